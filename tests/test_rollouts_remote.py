"""Engines in other processes: our decoder behind vLLM's protocol, and the actor that samples with them."""

import contextlib
import dataclasses
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import jax
import numpy as np
import pytest
from test_models_export_metadata import tokenizer_of_own

from rljax.algorithms import GRPO, DecoupledPPO, TreeRL
from rljax.experiment import Remote, RolloutConfig, SamplingConfig
from rljax.experiment.build import build
from rljax.experiment.check import check
from rljax.experiment.serve import ServeConfig, engine_of
from rljax.experiment.train import train
from rljax.models import DecoderConfig, init_params, save_hf
from rljax.rollouts import EngineFailed, RemoteActor, ScoringEngines, number_groups
from rljax.rollouts.engines.api import read_request
from rljax.rollouts.engines.client import Engine, assign
from rljax.rollouts.engines.fleet import _started
from rljax.rollouts.engines.remote_sampler import written_sampling
from rljax.rollouts.engines.sharing import Share, own_share, share_of
from rljax.rollouts.http_server import ApiError, HttpServer
from rljax.sampling import sampling_params
from rljax.sampling.logits import logit_biases
from rljax.sampling.row_scorer import score_rows
from rljax.testing import tiny_config

# Two programs add up in other orders, so log-probs differ by float32 rounding. Of these models' log-probs, which are
# below 4, a unit in the last place is 2.4e-7; the largest difference seen is one of them.
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(config, its run, a folder with its first weights)."""
    config = tiny_config(steps=2)
    run = build(config)
    folder = tmp_path_factory.mktemp("model")
    save_hf(folder, run.decoder, run.initial_params(), tokenizer=run.tokenizer)
    with run.actor:
        yield config, run, folder


@contextlib.contextmanager
def served(folder, **changes):
    config = ServeConfig(model=str(folder), port=0, rows=8, context_length=16, max_new_tokens=8)
    with engine_of(dataclasses.replace(config, **changes)) as service:
        yield service


@pytest.fixture(scope="module")
def service(model):
    with served(model[2], top_logprobs=2) as service:
        yield service


def remote(config, *urls, **changes):
    return Remote(engines=urls, rewards=config.actor.rewards, longest_prompt=4, wait_s=20.0, **changes)


def ask(service, path, body=None, method="POST", key="none"):
    """(status, JSON) of one request."""
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=120)
    with contextlib.closing(connection):
        connection.request(method, path, None if body is None else json.dumps(body), {"Authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def samples_of(actor, run, params, version=0, step=0):
    """All samples of a step's groups."""
    actor.set_params(params, version)
    examples = run.dataset.train[:4]
    actor.submit(number_groups(examples, 4), run.algorithm.plan, step)
    return [sample for group in actor.ready(4) for sample in group.samples]


def assert_same_samples(found, wanted, rounding=ROUNDING):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert (one.finish_reason, one.parent, one.fork_index, one.forced) == (
            other.finish_reason,
            other.parent,
            other.fork_index,
            other.forced,
        )
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=rounding, rtol=0)
        np.testing.assert_allclose(one.entropies, other.entropies, atol=rounding, rtol=0)


def test_a_run_over_engines_trains_on_the_tokens_of_one_that_samples_itself(model, service, tmp_path):
    config, _, _ = model
    train(config, str(tmp_path / "own"))
    train(dataclasses.replace(config, actor=remote(config, service.url)), str(tmp_path / "engines"))

    def records(name):
        files = sorted((tmp_path / name / "rollouts").glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    own = records("own")
    found = records("engines")
    assert len(own) == 2 * 4 * 4
    for one, other in zip(found, own, strict=True):
        assert {**one, "logprobs": 0} == {**other, "logprobs": 0}


def test_samples_are_those_of_a_decoder_whatever_the_number_of_engines(model, service):
    config, run, folder = model
    wanted = samples_of(run.actor, run, run.initial_params())
    with served(folder, rows=2) as other:
        actor = build(dataclasses.replace(config, actor=remote(config, service.url, other.url))).actor
        with actor:
            assert_same_samples(samples_of(actor, run, run.initial_params()), wanted)
            assert actor.stats["probe_gap"] < ROUNDING
            # Each of the two had its share of the prompts, behind the probe, which is sampled in the same manner.
            assert service.stats["turns"] == other.stats["turns"] == 8 + 4


def test_forks_go_on_with_the_tokens_and_numbers_of_a_decoder(model, service):
    config, run, _ = model
    forks = dataclasses.replace(config, algorithm=TreeRL(chains=2, points=1, branches=1, kl_coef=0.0))
    own = build(forks)
    with own.actor:
        wanted = samples_of(own.actor, own, run.initial_params())
    assert any(sample.fork_index for sample in wanted)
    other = build(dataclasses.replace(forks, actor=remote(config, service.url)))
    with other.actor:
        assert_same_samples(samples_of(other.actor, other, run.initial_params()), wanted)


@pytest.mark.parametrize("engine", ["rljax", "vllm"])
def test_stop_strings_end_a_completion_where_a_decoder_would(model, service, engine):
    # An engine of vLLM's is told no stop strings: what it said is cut.
    config, run, _ = model
    stops = dataclasses.replace(
        config, sampling=SamplingConfig(max_new_tokens=8, stop_strings=("b", "ha"), truncated_is_wrong=False)
    )
    own = build(stops)
    with own.actor:
        wanted = samples_of(own.actor, own, run.initial_params())
    assert {"stop_string", "length"} <= {sample.finish_reason for sample in wanted}
    other = build(dataclasses.replace(stops, actor=remote(config, service.url, engine=engine)))
    with other.actor:
        assert_same_samples(samples_of(other.actor, other, run.initial_params()), wanted)


def test_an_engine_that_loads_a_part_of_the_weights_is_found_out(model, service):
    config, run, folder = model
    params = run.initial_params()
    moved = jax.tree.map(lambda x: x + 0.2, params)
    with served(folder) as engine:
        whole = engine._load

        def half(path):
            """The first layer as it is in the folder, the others as they were before."""
            new = whole(path)
            old = whole(str(folder))
            layers = {name: value.at[1:].set(old["layers"][name][1:]) for name, value in new["layers"].items()}
            return {**new, "layers": layers}

        actor = build(dataclasses.replace(config, actor=remote(config, service.url, engine.url))).actor
        with actor:
            actor.set_params(params, 0)
            engine._load = half
            url = engine.url
            with pytest.raises(EngineFailed) as caught:
                actor.set_params(moved, 1)
    message = str(caught.value)
    assert message.startswith(f"engine {url} says log-probs that are 0.")
    assert "config.actor.probe_bound=0.001" in message and "config.actor.hand_over='restart'" in message
    assert "\n" not in message


def test_other_weights_under_the_same_version_are_handed_over_and_the_same_ones_are_not(model, service):
    # An evaluation between two pushes has weights of its own under the number of the last push.
    config, run, _ = model
    first = run.initial_params()
    second = jax.tree.map(lambda x: x * 2, first)
    actor = build(dataclasses.replace(config, actor=remote(config, service.url))).actor
    with actor:
        labels = []
        for params in (first, second, second, first):
            actor.set_params(params, 7)
            labels.append(service.weights.label)
        assert actor.sampler.fleet.stats()["probe_gap"] < ROUNDING
    assert labels[1] == labels[2] and len(set(labels)) == 3


def shares(engines, hosts):
    return [share_of([f"http://{name}" for name in engines], hosts, process) for process in range(len(hosts))]


def test_engines_are_divided_among_processes_and_shared_where_they_are_fewer():
    far = ["a:1", "b:1", "c:1"]
    assert shares(far, ["x"]) == [Share((0, 1, 2), True)]
    assert shares(far, ["x", "x"]) == [Share((0, 2), True), Share((1,), True)]
    assert shares(far[:1], ["x", "y"]) == [Share((0,), False)] * 2
    assert shares(far[:2], ["x", "y", "y"]) == [Share((0,), False), Share((1,), True), Share((0,), False)]


def test_addresses_of_the_machine_itself_are_engines_of_each_machine():
    near = ["127.0.0.1:1", "localhost:2"]
    assert shares(near, ["x", "y"]) == [Share((0, 1), True)] * 2
    assert shares(near, ["x", "x", "y"]) == [Share((0,), True), Share((1,), True), Share((0, 1), True)]
    assert shares(near[:1], ["x", "x", "y"]) == [Share((0,), False), Share((0,), False), Share((0,), True)]
    # One that all see is one for all, and so those beside it are divided among all.
    assert shares(["a:1", "localhost:2"], ["x", "y"]) == [Share((0,), True), Share((1,), True)]


def test_engines_that_a_run_starts_are_not_shared(monkeypatch):
    monkeypatch.setattr("rljax.rollouts.engines.sharing.gather", lambda value: [value, value])
    with pytest.raises(ValueError, match="are fewer than the processes that share them; name as many engines"):
        own_share(Remote(engines=("http://127.0.0.1:1",), command="rljax serve --model={weights}"))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_an_engine_that_dies_is_waited_for_given_the_weights_again_and_asked_again(model, monkeypatch):
    config, run, folder = model
    params = jax.tree.map(lambda x: x + 0.1, run.initial_params())
    wanted = samples_of(run.actor, run, params, version=3)
    port = free_port()
    actor = build(dataclasses.replace(config, actor=remote(config, f"http://127.0.0.1:{port}", connections=3))).actor

    judged = []
    score = actor.rewards.score
    monkeypatch.setattr(actor.rewards, "score", lambda inputs: judged.extend(inputs) or score(inputs))

    with contextlib.ExitStack() as engines, actor:
        first = engines.enter_context(served(folder, port=port))
        asked = itertools.count()
        due = threading.Event()
        answer = first.generate

        def dying(body):
            # Behind the probe and some of the answers; requests under way are called off with it.
            if next(asked) == 4 + 6:
                due.set()
            return answer(body)

        first._post["/inference/v1/generate"] = lambda _, body: dying(body)

        def die_and_come_back():
            due.wait(60)
            first.__exit__()
            time.sleep(0.3)
            # It comes back on the weights that it was first started on.
            engines.enter_context(served(folder, port=port))

        thread = threading.Thread(target=die_and_come_back)
        thread.start()
        assert_same_samples(samples_of(actor, run, params, version=3), wanted)
        thread.join()
        assert actor.stats["engines_lost"] >= 1 and actor.stats["resent_requests"] >= 1
    assert len(judged) == len(wanted)


def test_a_hand_over_that_breaks_off_before_its_end_is_made_again(model):
    """Else the engine would bear the label, and stay paused."""
    config, run, folder = model
    with served(folder) as engine:
        resume = engine._post["/resume"]
        broken = [ApiError("try again", status=503)]

        def resume_the_second_time(asked, body):
            if broken:
                raise broken.pop()
            return resume(asked, body)

        engine._post["/resume"] = resume_the_second_time
        actor = build(dataclasses.replace(config, actor=remote(config, engine.url, request_s=5.0))).actor
        with actor:
            actor.set_params(run.initial_params(), 0)
            assert actor.sampler.fleet.stats()["probe_gap"] < ROUNDING
    assert not broken


def test_an_engine_that_does_not_come_back_ends_the_run_with_the_reason(model):
    config, run, _ = model
    address = f"http://127.0.0.1:{free_port()}"
    actor = build(dataclasses.replace(config, actor=remote(config, address))).actor
    actor.sampler.fleet.config.wait_s = 0.3
    with actor, pytest.raises(EngineFailed, match=f"engine {address} was waited for 0.3 s .* start it again"):
        actor.set_params(run.initial_params(), 0)


def fleet_of(config, command, **changes):
    address = f"http://127.0.0.1:{free_port()}"
    return build(dataclasses.replace(config, actor=remote(config, address, command=command, **changes))).actor


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("keeps", [True, False])
def test_a_command_that_ends_by_itself_ends_the_run_with_what_it_said_and_leaves_nothing_behind(model, tmp_path, keeps):
    config, run, _ = model
    said = tmp_path / "pids"
    program = (
        "import subprocess, sys; pid = subprocess.Popen(['sleep', '60']).pid; "
        f"print(pid, file=open('{said}', 'a')); sys.exit('no room for weights')"
    )
    folder = tmp_path / "weights"
    actor = fleet_of(config, f'{sys.executable} -c "{program}" {{weights}}', weights=str(folder) if keeps else "")
    with actor, pytest.raises(EngineFailed, match="ended by itself 3 times") as caught:
        actor.set_params(run.initial_params(), 0)

    message = str(caught.value)
    assert "the last time with status 1; it said last: no room for weights; " in message and "\n" not in message
    if keeps:
        assert message.endswith(f"is in {folder}/engine-0.log")
        assert (folder / "engine-0.log").read_text() == 3 * "no room for weights\n"
    else:
        assert message.endswith("name a folder config.actor.weights to keep all of its output")
    pids = said.read_text().split()
    assert len(pids) == 3 and not any(map(is_running, pids))


def test_an_engine_does_not_outlive_a_run_that_is_killed(tmp_path):
    """Of a killed run the kernel closes what it had open."""
    log = tmp_path / "log"
    started = _started(["sh", "-c", "sleep 60 & echo $$ $!; wait"], log, "weights")
    until = time.monotonic() + 10
    while not log.read_text().endswith("\n"):
        assert time.monotonic() < until
        time.sleep(0.01)
    pids = log.read_text().split()
    assert len(pids) == 2 and all(map(is_running, pids))

    started.line.close()
    assert started.popen.wait(timeout=10) == -signal.SIGKILL
    while any(map(is_running, pids)):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(("command", "status"), [("exit 3", 3), ("kill -TERM $$", -15), ("kill -KILL $$", -9)])
def test_a_keeper_ends_as_its_command_does(command, status, tmp_path):
    started = _started(["sh", "-c", command], tmp_path / "log", "weights")
    with started.line:
        assert started.popen.wait(timeout=10) == status


def test_an_engine_that_starts_while_the_run_ends_is_ended_too(model, monkeypatch):
    actor = fleet_of(model[0], f"{sys.executable} -c 'import time; time.sleep(60)' {{weights}}")
    fleet = actor.sampler.fleet
    start = subprocess.Popen
    started = []

    def start_and_end(*arguments, **settings):
        started.append(start(*arguments, **settings))
        fleet.__exit__()
        return started[0]

    fleet.__enter__()
    monkeypatch.setattr(subprocess, "Popen", start_and_end)
    fleet._start_if_due(0, 0)
    monkeypatch.undo()
    try:
        assert started[0].poll() == -signal.SIGTERM
    finally:
        started[0].kill()


def test_requests_are_given_up_while_one_of_them_ends_by_itself():
    class Ending:
        """A connection that is closed between two looks at it."""

        def __init__(self, *sockets):
            self._sockets = list(sockets)

        @property
        def sock(self):
            return self._sockets.pop(0)

    engine = Engine("http://127.0.0.1:1", timeout_s=1.0)
    with socket.socket() as open_socket:
        engine._open.add(Ending(open_socket, None))
        engine.abandon()


def test_engines_are_told_a_folder_that_does_not_depend_on_where_they_were_started(
    model, service, tmp_path, monkeypatch
):
    config, run, _ = model
    monkeypatch.chdir(tmp_path)
    actor = build(dataclasses.replace(config, actor=remote(config, service.url, weights="handed"))).actor
    with actor:
        actor.set_params(run.initial_params(), 0)
        assert Path(service.weights.folder).parent == tmp_path / "handed"


def test_an_address_of_ipv6_can_be_asked(service):
    try:
        server = HttpServer(("::1", 0), service)
    except OSError:
        pytest.skip("no IPv6 here")
    with server:
        assert urlsplit(server.url).hostname == "::1" and urlsplit(server.url).port == server.server_address[1]


@pytest.mark.slow
def test_an_engine_that_a_run_starts_and_that_is_killed_is_started_again(model):
    config, run, _ = model
    params = run.initial_params()
    wanted = samples_of(run.actor, run, params)
    command = (
        f"{sys.executable} -m rljax serve --model={{weights}} --port={{port}} --rows=8 --context_length=16 "
        "--max_new_tokens=8"
    )
    address = f"http://127.0.0.1:{free_port()}"
    for hand_over in ("reload", "restart"):
        settings = {"command": command, "hand_over": hand_over, "connections": 2}
        actor = build(dataclasses.replace(config, actor=remote(config, address, **settings))).actor
        fleet = actor.sampler.fleet
        fleet.config.wait_s = 120.0
        with actor:
            actor.set_params(params, 0)
            # The engine is in the group of its keeper, whose own end says nothing of the engine's.
            process = fleet._processes[0].popen
            threading.Timer(0.05, lambda process=process: os.killpg(process.pid, signal.SIGKILL)).start()
            assert_same_samples(samples_of(actor, run, params, version=1), wanted)
            assert fleet._processes[0].popen.pid != process.pid
        assert fleet._processes == {}


def test_prompts_are_spread_in_equal_numbers_and_stay_where_they_were():
    engines = [f"http://host-{i}:8000" for i in range(4)]
    names = list(range(100, 180))
    places = assign(names, engines)
    assert [places.count(i) for i in range(4)] == [20] * 4
    assert assign(names, engines) == places
    # One prompt a call is bounded by nothing: with an engine fewer only what it had goes elsewhere.
    alone = {name: engines[assign([name], engines)[0]] for name in names}
    fewer = {name: engines[:3][assign([name], engines[:3])[0]] for name in names}
    assert {name for name in names if alone[name] != fewer[name]} == {n for n in names if alone[n] == engines[3]}


def body_of(tokens=(3, 4), **sampling):
    return {"token_ids": list(tokens), "sampling_params": {"max_tokens": 4, "seed": 7, **sampling}}


def test_an_engine_refuses_what_it_cannot_honour(service):
    path = "/inference/v1/generate"
    refused = {
        "presence_penalty": 0.5,
        "min_tokens": 2,
        "logit_bias": {"three": 1.0},
        "logprobs": 5,
        "prompt_logprobs": 3,
        "beam_width": 2,
        "top_p": 0.0,
        "temperature": -1,
        "n": 0,
        "stop": [""],
        "max_tokens": 9,
        "extra_args": {"rljax": {"turn": 1}},
    }
    for name, value in refused.items():
        status, answer = ask(service, path, body_of(**{name: value}))
        assert status == 400 and name in "{param} {message}".format(**answer["error"]), (name, answer)
    for body in ({**body_of(), "stream": True}, {**body_of(), "token_ids": []}, {"token_ids": [1]}, [1], body_of([99])):
        assert ask(service, path, body)[0] == 400
    status, answer = ask(service, path, body_of(extra_args=["rljax"]))
    assert status == 400 and answer["error"]["message"] == "extra_args is ['rljax']; it must be an object"
    status, answer = ask(service, path, body_of(seed="one"))
    assert status == 400 and answer["error"]["message"] == "seed is 'one'; it must be a whole number"
    assert ask(service, path, body_of([3] * 16))[1]["error"]["code"] == "context_length_exceeded"
    status, answer = ask(service, "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "b"})
    assert status == 501 and "adapters are not served" in answer["error"]["message"]
    status, answer = ask(service, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": "/no"}})
    assert status == 400 and "no model at '/no'" in answer["error"]["message"]


def test_an_engine_biases_logits_and_bans_tokens_as_it_is_told(service):
    """What a trainer's distribution becomes on the wire is what the engine reads; 100 is as good as always."""
    sampling = sampling_params(0.5, logit_bias={5: 2.5}, banned=[6])
    written = json.loads(json.dumps(written_sampling(sampling)))
    assert dict(read_request(body_of(**written), new_seed=0).logit_bias) == logit_biases(sampling)

    def said(**own):
        return ask(service, "/inference/v1/generate", body_of(**own))[1]["choices"][0]

    always = said(logit_bias={"5": 100})
    assert always["token_ids"] == [5] * 4
    np.testing.assert_allclose([x["logprob"] for x in always["logprobs"]["content"]], 0, atol=1e-6)
    (first,) = said(temperature=0.0, max_tokens=1)["token_ids"]
    assert said(temperature=0.0, max_tokens=1, logit_bias={str(first): -1e30})["token_ids"] != [first]


def test_an_engine_tells_the_most_probable_tokens(service):
    """The best of greedy decoding is what it says, and there are as many as are asked for."""
    for count in (0, 1, 2):
        (choice,) = ask(service, "/inference/v1/generate", body_of(temperature=0.0, logprobs=count))[1]["choices"]
        content = choice["logprobs"]["content"]
        assert [len(entry["top_logprobs"]) for entry in content] == [count] * len(content)
        for entry in content[: len(content) * bool(count)]:
            best = entry["top_logprobs"][0]
            assert (best["token_id"], best["rank"]) == (entry["token_id"], 1)
            assert abs(best["logprob"] - entry["logprob"]) < ROUNDING


def scored(run, tokens):
    """Log-probs [T - 1] of the scorer that trains, and all of each place [T - 1, V]."""
    tokens = np.array([tokens], np.int32)
    lengths = np.array([tokens.shape[1]])
    params = run.initial_params()
    score = jax.jit(score_rows, static_argnums=0)
    own = score(run.decoder, params, tokens, lengths, sampling_params())[0, 1:]
    whole = [
        score(run.decoder, params, changed(tokens, place, token), lengths, sampling_params())[0, place]
        for place in range(1, tokens.shape[1])
        for token in range(run.decoder.num_ids)
    ]
    return np.asarray(own), np.reshape(np.array(whole), (tokens.shape[1] - 1, -1))


def changed(tokens, place, token):
    other = tokens.copy()
    other[0, place] = token
    return other


def test_an_engine_scores_prompts_as_the_trainer_does(model, service):
    """The log-prob and the rank of each token and the best ones of its place, in vLLM's words; and what a teacher reads
    of them, for rows of several lengths at once."""
    _, run, _ = model
    prompt = [3, 7, 4, 4, 1, 6]
    own, whole = scored(run, prompt)
    body = body_of(prompt, prompt_logprobs=2, temperature=0.3)
    answer = ask(service, "/inference/v1/generate", body)[1]
    first, *said = answer["prompt_logprobs"]
    assert first is None and len(said) == len(prompt) - 1
    for place, (entry, token) in enumerate(zip(said, prompt[1:], strict=True)):
        order = np.argsort(-whole[place])
        assert {int(name) for name in entry} == {*order[:2], token}
        for name, value in entry.items():
            assert abs(value["logprob"] - whole[place, int(name)]) < ROUNDING
            assert value["rank"] == 1 + np.sum(whole[place] > whole[place, int(name)])
        assert abs(entry[str(token)]["logprob"] - own[place]) < ROUNDING
    assert ask(service, "/inference/v1/generate", body_of(prompt))[1].keys() == {"request_id", "choices", "usage"}

    engines = ScoringEngines((service.url,), top=2, connections=2, timeout_s=120.0, wait_s=1.0)
    for row, scores in zip((prompt, [5, 2]), engines.score([prompt, [5, 2]]), strict=True):
        own, whole = scored(run, row)
        np.testing.assert_allclose(scores.logprobs, own, atol=ROUNDING, rtol=0)
        np.testing.assert_allclose(scores.top, -np.sort(-whole)[:, :2], atol=ROUNDING, rtol=0)


def test_text_is_completed_and_echoed_with_the_log_probs_of_all_its_tokens(model, service):
    _, run, _ = model
    prompts = ["abca", "hg"]
    settings = {"max_tokens": 2, "temperature": 0.0, "logprobs": 1}
    answer = ask(service, "/v1/completions", {"prompt": prompts, "echo": True, **settings})[1]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        ids = run.tokenizer.encode(prompt)
        assert choice["text"].startswith(prompt)
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        own, whole = scored(run, ids)
        np.testing.assert_allclose(told["token_logprobs"][1 : len(ids)], own, atol=ROUNDING, rtol=0)
        # A harness asks whether the text is what greedy decoding says, by equal numbers.
        best = [max(top.values()) for top in told["top_logprobs"][1:]]
        greedy = [a == b for a, b in zip(told["token_logprobs"][1:], best, strict=True)]
        assert greedy[: len(ids) - 1] == (whole.argmax(axis=-1) == ids[1:]).tolist()
        assert all(greedy[len(ids) - 1 :])

        # The same tokens without an echo, by ids.
        alone = ask(service, "/v1/completions", {"prompt": ids, **settings})[1]["choices"][0]
        assert prompt + alone["text"] == choice["text"]
        assert alone["logprobs"]["token_logprobs"] == told["token_logprobs"][len(ids) :]

    silent = ask(service, "/v1/completions", {"prompt": "abca", "max_tokens": 0, "echo": True, "logprobs": 0})[1]
    (choice,) = silent["choices"]
    assert choice["text"] == "abca" and silent["usage"]["completion_tokens"] == 0
    np.testing.assert_allclose(
        choice["logprobs"]["token_logprobs"][1:],
        answer["choices"][0]["logprobs"]["token_logprobs"][1:4],
        atol=ROUNDING,
        rtol=0,
    )
    for wrong in (
        {"prompt": "xyz"},
        {"prompt": []},
        {"stream": True},
        {"max_tokens": 0},
        {"logprobs": 3, "echo": True},
    ):
        assert ask(service, "/v1/completions", {"prompt": "ab", **wrong})[0] == 400, wrong


HARNESS_TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.mark.slow
def test_a_harness_reads_the_trainers_log_probs(tmp_path):
    """lm-eval runs a task of its own over an engine; the likelihood of each of its choices is the scorer's."""
    python = os.environ.get("RLJAX_LM_EVAL")
    if not python:
        pytest.skip("RLJAX_LM_EVAL names no Python that has lm-eval; pip install 'lm-eval[api]' into a venv of its own")
    config = DecoderConfig(
        vocab_size=62, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, max_position=64
    )
    params = init_params(config, jax.random.key(3))
    folder = tmp_path / "model"
    save_hf(folder, config, params)
    tokenizer_of_own().save_pretrained(folder)
    docs = [{"question": "ab@c", "choices": ["dcba", "a", "@@"]}, {"question": "X", "choices": ["YZ", "Y"]}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "letters.yaml").write_text(HARNESS_TASK.format(data=tmp_path / "data.jsonl"))

    with served(folder, context_length=32, top_logprobs=1) as service:
        options = f"base_url={service.url}/v1/completions,model={folder},tokenizer={folder},max_length=31"
        asked = [f"--model_args={options}"]
        places = [f"--include_path={tmp_path}", f"--output_path={tmp_path / 'out'}", "--log_samples"]
        subprocess.run(
            [python, "-m", "lm_eval", "run", "--model=local-completions", "--tasks=letters", *places, *asked],
            check=True,
            env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        )

    (file,) = (tmp_path / "out").rglob("samples_letters_*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    tokenizer = tokenizer_of_own()
    for sample, doc in zip(samples, docs, strict=True):
        asked = tokenizer(doc["question"], add_special_tokens=False).input_ids
        for choice, ((likelihood, _),) in zip(doc["choices"], sample["resps"], strict=True):
            ids = [*asked, *tokenizer(choice, add_special_tokens=False).input_ids]
            own = score_rows(config, params, np.array([ids]), np.array([len(ids)]), sampling_params())[0]
            assert abs(float(likelihood) - float(own[len(asked) :].sum())) < 1e-4


def test_a_key_is_asked_for(model):
    with served(model[2], key="secret") as service:
        assert ask(service, "/inference/v1/generate", body_of())[0] == 401
        assert ask(service, "/health", method="GET") == (200, {})
        # They name the folder of the weights.
        for path in ("/weight_info", "/v1/models", "/stats"):
            assert ask(service, path, method="GET")[0] == 401
        assert ask(service, "/weight_info", method="GET", key="secret") == (200, {"weight_version": "default"})


def test_seeds_name_completions_and_manners_do_not_mix(service):
    """Requests of several seeds, temperatures and stop tokens at once get what each gets alone."""
    bodies = [
        body_of(seed=seed, temperature=temperature, stop_token_ids=stops, n=2)
        for seed, temperature, stops in itertools.product((1, 2), (0.0, 1.0), ([], [4]))
    ]
    alone = [ask(service, "/inference/v1/generate", body)[1]["choices"] for body in bodies]
    found = [None] * len(bodies)

    def one(i):
        found[i] = ask(service, "/inference/v1/generate", bodies[i])[1]["choices"]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(itertools.chain(*found), itertools.chain(*alone), strict=True):
        said = [[entry["logprob"] for entry in choice["logprobs"]["content"]] for choice in (one, other)]
        np.testing.assert_allclose(said[0], said[1], atol=ROUNDING, rtol=0)
        assert (one["token_ids"], one["stop_reason"]) == (other["token_ids"], other["stop_reason"])
    assert alone[2] != alone[6]  # of other seeds
    assert all(choice["token_ids"][-1] == 4 or 4 not in choice["token_ids"] for choice in alone[3])


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_a_paused_engine_takes_other_weights_and_goes_on(model, tmp_path, mode):
    _, run, folder = model
    path = "/inference/v1/generate"
    other = jax.tree.map(lambda x: x * 1.5, run.initial_params())
    save_hf(tmp_path, run.decoder, other, tokenizer=run.tokenizer)
    with served(folder) as service:
        before = ask(service, path, body_of())[1]["choices"][0]
        assert ask(service, f"/pause?mode={mode}", None) == (200, {"status": "paused"})
        assert ask(service, "/is_paused", method="GET")[1] == {"is_paused": True}

        found = []
        waiting = threading.Thread(target=lambda: found.append(ask(service, path, body_of())[1]["choices"][0]))
        waiting.start()
        assert (
            ask(service, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path)}})[0]
            == 200
        )
        assert ask(service, "/update_weight_version", {"new_version": "next"})[0] == 200
        assert ask(service, "/weight_info", method="GET")[1] == {"weight_version": "next"}
        assert not found
        assert ask(service, "/resume", None) == (200, {"status": "resumed"})
        waiting.join(30)
        assert before["weight_versions"] == [{"version": "default", "start": 0, "end": len(before["token_ids"])}]
        assert found[0]["weight_versions"][0]["version"] == "next"
        assert found[0]["logprobs"] != before["logprobs"]
        assert ask(service, "/pause?mode=soon", None)[0] == 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engines": ()}, "config.actor.engines=.* must be addresses"),
        ({"engines": ("localhost:8000",)}, "'localhost:8000', which is no address such as http://host:8000"),
        ({"engines": ("http://localhost:x",)}, "'http://localhost:x', which is no address such as http://host:8000"),
        ({"engines": ("http://localhost:65536",)}, "'http://localhost:65536', which is no address such as"),
        ({"engines": ("http://far:1",)}, "config.actor.weights='' is a folder of this one; name a folder that both"),
        ({"weights": "gs://bucket/w"}, "config.actor.weights='gs://bucket/w' is no folder of a file system; mount"),
        ({"hand_over": "restart"}, "config.actor.hand_over='restart' needs config.actor.command"),
        ({"command": "serve {model}"}, r"config.actor.command='serve {model}' cannot be filled in .*{weights}"),
        ({"command": "serve '{weights}"}, "cannot be filled in .*No closing quotation.* its quotes must close"),
        ({"command": "serve {weights.path}"}, "cannot be filled in .*has no attribute 'path'"),
        ({"command": "serve it"}, "must say where the weights are"),
        ({"key_variable": "NO_SUCH_KEY"}, "config.actor.key_variable='NO_SUCH_KEY' is not in the environment"),
        ({"wait_s": 0.0}, "config.actor.wait_s=0.0 must be"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(model, changes, message):
    config = model[0]
    actor = dataclasses.replace(remote(config, "http://127.0.0.1:1"), **changes)
    with pytest.raises(ValueError, match=message) as caught:
        check(dataclasses.replace(config, actor=actor))
    assert "\n" not in str(caught.value)


def test_forks_that_engines_cannot_make_are_refused(model):
    config = model[0]
    for algorithm in (TreeRL(chains=2, points=1, branches=1),):
        actor = remote(config, "http://127.0.0.1:1", engine="vllm")
        with pytest.raises(ValueError, match="engine='vllm' says no entropies and knows nothing of forks"):
            check(dataclasses.replace(config, actor=actor, algorithm=algorithm))
    assert check(dataclasses.replace(config, actor=actor, algorithm=GRPO(group_size=4)))


@pytest.mark.slow
def test_engines_sample_beside_updates_what_the_same_schedule_samples_in_turn(model, service, tmp_path, monkeypatch):
    config = dataclasses.replace(
        model[0], steps=3, algorithm=DecoupledPPO(group_size=4), rollout=RolloutConfig(staleness=1)
    )
    threads = []
    ready = RemoteActor.ready
    monkeypatch.setattr(
        RemoteActor, "ready", lambda self, n: threads.append(threading.current_thread().name) or ready(self, n)
    )

    def records(actor, name):
        train(dataclasses.replace(config, actor=actor), str(tmp_path / name))
        files = sorted((tmp_path / name / "rollouts").glob("*.jsonl"))
        return [{**json.loads(line), "logprobs": 0} for file in files for line in file.read_text().splitlines()]

    assert records(remote(config, service.url), "engines") == records(config.actor, "own")
    assert set(threads) == {"rollouts"}
