"""Runs that distil: whose rows a teacher scores, what it is refused for, and that a stage teaches the next."""

import dataclasses
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import make_batch

from rljax.algorithms import GKD, MOPD, OnPolicyDistillation
from rljax.batching import loss_mask
from rljax.experiment import EngineTeacher, ModelTeacher, OwnTeacher, RunModel, SamplingConfig
from rljax.experiment.build import build, stack_rows
from rljax.experiment.dry_run import worst_batch
from rljax.experiment.memory import bytes_of, held_state, phases
from rljax.experiment.model import run_checkpoints
from rljax.experiment.train import train
from rljax.models import abstract_params, hidden_states, logits
from rljax.rollouts import EngineFailed, ScoringEngines
from rljax.rollouts.collect import collect
from rljax.tasks.echo import EchoData
from rljax.testing import run_metrics, tiny_config
from rljax.training import restore_params
from rljax.types import TEACHER_LOGPROBS

OTHER = dataclasses.replace(tiny_config().model, num_layers=1, embed_dim=16)


def config(*teachers, **changes):
    settings = {"algorithm": OnPolicyDistillation(group_size=4), "teachers": teachers or (ModelTeacher(OTHER),)}
    return tiny_config(**settings | changes)


def test_each_row_is_scored_by_its_own_teacher_and_a_teacher_with_the_students_weights_has_its_log_probs():
    """The student's own weights for one task, other ones for the rest."""
    own = tiny_config().model
    run = build(config(ModelTeacher(own, tasks=("own",)), ModelTeacher(OTHER)))
    params = run.initial_params()
    run.teachers.open()
    with run.actor:
        run.actor.set_params(params, 0)
        rollout = collect(run.actor, run.algorithm.plan, lambda n: run.dataset.train[:n], 4, 0)
    batch = stack_rows(run.config, rollout.trajectories, 16)
    tasks = ["own", "else", "own", "else"]
    examples = [
        dataclasses.replace(rollout.examples[t.group_id], columns={"task": tasks[t.group_id]})
        for t in rollout.trajectories
    ]
    taught, metrics = run.teachers.taught(batch, examples, run.student())

    mask = loss_mask(batch)
    is_own = np.array([example.columns["task"] == "own" for example in examples])[:, None] & mask
    scored = run.learner.score_rows(params, batch)
    got = taught.columns[TEACHER_LOGPROBS]
    # Two programs, which on some processors add up in other orders: a unit in the last place is 2.4e-7 here.
    np.testing.assert_allclose(got[is_own], scored[is_own], atol=1e-6, rtol=0)
    np.testing.assert_allclose(got[is_own], batch.behavior_logprobs[is_own], atol=1e-5)
    assert np.abs(got - batch.behavior_logprobs)[mask & ~is_own].mean() > 0.01
    assert not got[~mask].any()

    gap = (batch.behavior_logprobs - got).astype(np.float64)
    assert metrics["teacher/kl_0"] == pytest.approx(0, abs=1e-5)
    assert metrics["teacher/kl_1"] == pytest.approx(gap[mask & ~is_own].mean())
    assert metrics["teacher/kl"] == pytest.approx(gap[mask].mean())
    assert metrics["teacher/share_0"] == is_own.sum() / mask.sum()


@pytest.mark.slow
def test_a_run_teaches_the_next_by_its_checkpoint(tmp_path):
    """The next begins with the weights that the first began with, of which one step has made the teacher's."""
    train(tiny_config(steps=1), str(tmp_path / "stage"))
    teacher = ModelTeacher(RunModel(str(tmp_path / "stage"), step=1))
    train(config(teacher, steps=1), str(tmp_path / "next"))
    (line,) = run_metrics(tmp_path / "next")
    assert line["loss/teacher_kl"] == pytest.approx(line["teacher/kl"], abs=1e-5)

    run = build(tiny_config())
    trained, _ = restore_params(run_checkpoints(str(tmp_path / "stage")), abstract_params(run.decoder), 1)
    (loaded,) = build(config(teacher)).teachers.teachers
    loaded.open()
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trained)


def test_a_teacher_that_knows_more_scores_the_same_completions_behind_another_prompt():
    """The student itself, which is told the answer; against rows that are written out with that prompt."""
    teacher = OwnTeacher("policy", context_column="answer", context_format="{text}=")
    changes = {"algorithm": GKD(group_size=4, support=3), "data": EchoData()}
    base = tiny_config()
    model = dataclasses.replace(base.model, alphabet="abcdefgh=\n")
    run = build(config(teacher, model=model, update=dataclasses.replace(base.update, pack_length=64), **changes))
    run.state = run.init_state(run.initial_params())
    with run.actor:
        run.actor.set_params(run.policy(), 0)
        rollout = collect(run.actor, run.algorithm.plan, lambda n: run.dataset.train[:n], 4, 0)
    batch = stack_rows(run.config, rollout.trajectories, 16)
    examples = [rollout.examples[t.group_id] for t in rollout.trajectories]
    taught, _ = run.teachers.taught(batch, examples, run.student())

    for row in (0, 5, 15):
        example = examples[row]
        prompt = run.tokenizer.encode(f"{example.prompt}\n\n{example.columns['answer']}=")
        completion = batch.tokens[row][len(run.tokenizer.encode(example.prompt)) : batch.lengths[row]]
        tokens = np.array([[*prompt, *completion]], np.int32)
        whole = jax.nn.log_softmax(logits_of(run, tokens))[0, len(prompt) - 1 : -1]
        place = np.flatnonzero(batch.action_mask[row])
        got = taught.columns[TEACHER_LOGPROBS][row, place]
        np.testing.assert_allclose(got, whole[np.arange(len(completion)), completion], atol=1e-5)
        best, ids = jax.lax.top_k(whole, 3)
        np.testing.assert_array_equal(taught.teacher["ids"][row, place], ids)
        np.testing.assert_allclose(taught.teacher["logprobs"][row, place], best, atol=1e-5)
        rest = np.log1p(-np.exp(best).sum(-1))
        np.testing.assert_allclose(taught.teacher["tail"][row, place, 0], rest, atol=1e-5)


def logits_of(run, tokens):
    positions = np.arange(tokens.shape[1])[None]
    ends = np.full(tokens.shape, tokens.shape[1])
    params = run.policy()
    hidden = hidden_states(run.decoder, params, *map(jnp.asarray, (tokens, positions, ends)))
    return logits(run.decoder, params, hidden)


class FakeEngine(BaseHTTPRequestHandler):
    """Scores prompts as vLLM has them on the wire, by a table of log-probs [token before, token]; busy at first."""

    table = np.log(np.random.default_rng(0).dirichlet(np.ones(12), 12))
    times_busy = 1

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if FakeEngine.times_busy:
            FakeEngine.times_busy -= 1
            return self._send(503, {})
        tokens, top = body["token_ids"], body["sampling_params"]["prompt_logprobs"]
        said = [None]
        for before, token in itertools.pairwise(tokens):
            order = np.argsort(-self.table[before])
            ranks = {int(t): i + 1 for i, t in enumerate(order)}
            listed = {int(t) for t in order[:top]} | {token}
            said.append({str(t): {"logprob": self.table[before, t], "rank": ranks[t]} for t in listed})
        if body["token_ids"][0] == 11:
            said = said[1:]
        self._send(200, {"request_id": "x", "choices": [], "prompt_logprobs": said})

    def _send(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def engine():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeEngine)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_engine_that_is_busy_at_first_scores_every_sampled_token_and_names_its_most_likely_ones(engine):
    teacher = EngineTeacher((engine,))
    run = build(config(teacher, algorithm=GKD(group_size=4, support=3)))
    (own,) = run.teachers.teachers
    batch = make_batch(group_id=[0, 0, 0, 0], rewards=[0] * 4, lengths=[3, 5, 1, 4], width=8)
    mask = np.array(batch.action_mask)
    mask[2] = False
    logprobs, said = own.score(batch, mask, [], run.student())

    before, token = batch.tokens[:, :-1], batch.tokens[:, 1:]
    want = np.pad(FakeEngine.table[before, token], ((0, 0), (1, 0)))
    np.testing.assert_allclose(logprobs, np.where(mask, want, 0), atol=1e-6)
    best = -np.sort(-FakeEngine.table, axis=-1)[:, :3]
    at = np.argwhere(mask)
    for row, place in at:
        np.testing.assert_allclose(said["logprobs"][row, place], best[batch.tokens[row, place - 1]], atol=1e-6)
        named = FakeEngine.table[batch.tokens[row, place - 1], said["ids"][row, place]]
        np.testing.assert_allclose(named, said["logprobs"][row, place], atol=1e-6)
        rest = 1 - np.exp(best[batch.tokens[row, place - 1]]).sum()
        assert np.exp(said["tail"][row, place, 0]) == pytest.approx(rest, abs=1e-6)

    with pytest.raises(EngineFailed, match=f"{engine} gives no prompt_logprobs of 3 tokens"):
        ScoringEngines((engine,), top=0, connections=1, timeout_s=5.0, wait_s=1.0).score([[11, 0, 1]])


def test_weights_of_teachers_are_in_the_plan_of_memory():
    run = build(config(ModelTeacher(dataclasses.replace(OTHER, param_dtype="bfloat16"))))
    (shapes,) = run.teachers.abstract_params()
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert held_state(run)["teachers"] == 2 * count


@pytest.mark.parametrize("support", [0, 3])
def test_a_plan_counts_what_teachers_do(support):
    run = build(config(algorithm=GKD(group_size=4, support=support)))
    batch = worst_batch(run)
    assert set(batch.rows.teacher) == ({"hidden"} if support == 0 else {"ids", "logprobs", "tail"})
    assert (batch.teacher_head is None) == (support > 0)
    found = {phase.name: phase for phase in phases(run, batch, [decoder.plan() for decoder in run.actor.decoders])}
    assert list(found) == ["sample", "teach", "update"]
    # Weights of teachers stay on the devices throughout.
    assert all(phase.held["teachers"] == held_state(run)["teachers"] > 0 for phase in found.values())
    assert found["teach"].working["teacher's states"] == bytes_of(batch.rows.teacher) > 0


def test_the_policy_as_its_own_teacher_keeps_a_copy_of_its_head():
    """Its next update donates the one that it has."""

    def parts(weights):
        teacher = OwnTeacher(weights, context_column="answer", context_format="{text}")
        model = dataclasses.replace(tiny_config().model, alphabet="abcdefgh=\n")
        run = build(config(teacher, algorithm=GKD(group_size=4), model=model))
        batch = worst_batch(run)
        found = phases(run, batch, [decoder.plan() for decoder in run.actor.decoders])
        return {phase.name: phase.held for phase in found}["update"], bytes_of(batch.teacher_head)

    held, head = parts("policy")
    assert held["teacher's head"] == head > 0
    assert "teacher's head" not in parts("reference")[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": MOPD(), "teachers": ()}, r"config.teachers=\(\) but MOPD needs one"),
        (
            {"teachers": (OwnTeacher("policy"),)},
            r"config.teachers\[0\].context_column='' with weights='policy'",
        ),
        (
            {"teachers": (OwnTeacher(context_column="hint"),)},
            r"config.teachers\[0\].context_column='hint': .* has no such column, only answer",
        ),
        (
            {"teachers": (OwnTeacher(context_column="answer", context_format="x"),)},
            r"config.teachers\[0\].context_format='x' must hold",
        ),
        (
            {"teachers": (EngineTeacher(),), "algorithm": GKD()},
            r"config.teachers\[0\] is served elsewhere .* with config.algorithm.support=0",
        ),
        (
            {"teachers": (EngineTeacher(),), "sampling": SamplingConfig(max_new_tokens=4, temperature=0.7)},
            r"config.sampling.temperature=0.7: config.teachers\[0\] is served elsewhere",
        ),
        (
            {"teachers": (EngineTeacher(("http://host:x",)),)},
            r"config.teachers\[0\].engines=\('http://host:x',\) must be",
        ),
        ({"teachers": (EngineTeacher(("host",)),)}, r"config.teachers\[0\].engines=\('host',\) must be addresses"),
        ({"algorithm": GKD(support=64)}, "config.algorithm.support=64 must be below the"),
        ({"algorithm": tiny_config().algorithm}, "config.teachers has no effect: GRPO asks no teacher"),
        (
            {"sampling": SamplingConfig(max_new_tokens=4, regex="[ab]+")},
            r"^config.sampling.regex='\[ab\]\+': teachers do not score completions that follow a [^\n]*$",
        ),
        ({"sampling": SamplingConfig(max_new_tokens=4, top_p=0.9)}, "config.sampling.top_p=0.9 cuts tokens off"),
        (
            {"teachers": (ModelTeacher(dataclasses.replace(OTHER, alphabet="abcdefg=")),)},
            r"config.teachers\[0\].model has \d+ tokens and the student \d+",
        ),
        (
            {"teachers": (ModelTeacher(dataclasses.replace(OTHER, alphabet="abcdefhg=")),)},
            r"config.teachers\[0\].model has 'h' for token \d+ where the student has 'g'",
        ),
        ({"teachers": (ModelTeacher(OTHER), ModelTeacher(OTHER))}, "config.teachers: 2 teachers have no tasks"),
        ({"teachers": (ModelTeacher(OTHER, tasks=("sums",)),)}, "config.teachers: .* has the column task=None"),
        (
            {"teachers": (ModelTeacher(RunModel("nowhere")),)},
            r"config.teachers\[0\].model.path='nowhere' is no folder of a run",
        ),
    ],
)
def test_what_cannot_teach_is_refused_before_weights_load(changes, message):
    with pytest.raises(ValueError, match=message):
        build(config(**changes))
