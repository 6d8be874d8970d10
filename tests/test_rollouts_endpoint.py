"""Agents that know nothing but a base URL: what the policy said to them is recorded as it was sampled."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest
from forward import row_logprobs

from rljax.batching import PackConfig, layout, loss_mask, pack, stack
from rljax.batching.pack import masked
from rljax.envs import EnvironmentPool, Step
from rljax.envs.formats import Parsed, ParseProblem, ToolCall
from rljax.models import DecoderConfig, init_params
from rljax.plans import ForkPlan, RolloutPlan
from rljax.rollouts import (
    Actor,
    BlackBox,
    BlackBoxActor,
    ChatEndpoint,
    EndpointConfig,
    MultiTurn,
    MultiTurnActor,
    RolloutSettings,
    collect,
    number_groups,
)
from rljax.rollouts.black_box.address import TOKEN
from rljax.rollouts.black_box.recording import Renderer, Reply, sample_of
from rljax.rollouts.trajectories import allowed_in
from rljax.sampling import Stops, TurnDecoder, TurnDecoderSpec, sampling_params
from rljax.sampling.logits import Penalties
from rljax.sampling.score import score_tokens
from rljax.tasks import Example, RewardRunner, RewardSpec
from rljax.text import CharTokenizer, Dialogue, Grammars

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools[0].function.name }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}{{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ECHO = {"type": "function", "function": {"name": "echo", "parameters": {"type": "object", "properties": {}}}}
VOCAB, LENGTH, NEW = 264, 160, 8


@functools.lru_cache
def make_tokenizer(template=TEMPLATE):
    """Bytes, and the tokens of a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from rljax.text import HuggingFaceTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    hf = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    hf.chat_template = template
    return HuggingFaceTokenizer(hf)


CONFIG = DecoderConfig(
    vocab_size=VOCAB, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
)
END = make_tokenizer().eos_id


@functools.lru_cache
def params():
    return jax.tree.map(lambda x: 3 * x, init_params(CONFIG, jax.random.key(0)))


def read_echo(text):
    """All that is said is a call of `echo`, but what holds a z."""
    if "z" in text:
        return Parsed(problem=ParseProblem("bad_call", "no z"))
    return Parsed((ToolCall("echo", {"text": text}),))


def make_decoder(*, rows=4, conversations=8, length=LENGTH):
    spec = TurnDecoderSpec(
        conversations=conversations,
        rows=rows,
        context_length=length,
        max_new_tokens=NEW,
        prefill_chunks=(16, 64),
        check_every=3,
        top_logprobs=2,
    )
    # a fifth of the bytes end a turn, so that some end by themselves
    return TurnDecoder(CONFIG, spec, Stops(tokens=[END, *range(0, 256, 5)], decode_text=make_tokenizer().decode))


def open_endpoint(template=TEMPLATE, tool_format="hermes", **sizes):
    endpoint = ChatEndpoint(make_decoder(**sizes), make_tokenizer(template), tool_format=tool_format)
    endpoint.__enter__()
    endpoint.set_params(params(), version=7)
    endpoint.begin(sampling_params(), seed=3, step=5)
    return endpoint


@contextlib.contextmanager
def make_endpoint(**settings):
    endpoint = open_endpoint(**settings)
    try:
        yield endpoint
    finally:
        endpoint.close()


@pytest.fixture(scope="module")
def endpoint():
    with make_endpoint(tool_format=read_echo) as endpoint:
        yield endpoint


def post(url, body, *, key="x", raw=None, path="/chat/completions", method="POST"):
    data = raw if raw is not None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(url + path, data, headers, method=method), timeout=60) as answer:
        return answer.read()


def ask(url, messages, **settings):
    return json.loads(post(url, {"model": "m", "messages": messages, **settings}))


def refused(url, body=None, **settings):
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(url, body, **settings)
    error = json.loads(caught.value.read())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return caught.value.code, error


def user(text):
    return {"role": "user", "content": text}


def talk(url, row, turns=3):
    """A plain conversation."""
    messages = [user(row["prompt"])]
    for turn in range(turns):
        said = ask(url, messages)["choices"][0]["message"]
        messages += [said, user(f"more {turn}")]
    return float(len(said["content"]))


def use_tool(url, row):
    """Two turns: what the policy says calls a tool, whose result comes back."""
    messages = [{"role": "system", "content": "Use echo."}, user(row["prompt"])]
    for _ in range(2):
        choice = ask(url, messages, tools=[ECHO], temperature=1.0)["choices"][0]
        said = choice["message"]
        calls = said.get("tool_calls", [])
        assert choice["finish_reason"] == "tool_calls" if calls else choice["finish_reason"] in ("stop", "length")
        messages.append(said)
        for call in calls:
            assert call["function"]["name"] == "echo"
            result = json.loads(call["function"]["arguments"])["text"].upper()
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        if not calls:
            messages.append(user("call it"))
    return 1.0


def check_sample(prompt, sample):
    ids = prompt + sample.tokens.tolist()
    want = row_logprobs(CONFIG, params(), ids)[len(prompt) :]
    np.testing.assert_allclose(sample.logprobs, np.where(sample.sampled, want, 0), atol=5e-5)


EXAMPLES = [Example("one"), Example("two")]


SETTINGS = RolloutSettings(seed=3, sampling=sampling_params())


def make_actor(endpoint, agent, rewards=None, **settings):
    return BlackBoxActor(endpoint, agent, rewards, SETTINGS, BlackBox(**settings))


def play(actor, examples=EXAMPLES, samples=4, *, step=5, forks=None):
    plan = RolloutPlan(group_size=samples, forks=forks)
    actor.submit(number_groups(examples, samples), plan, step)
    return actor.ready(len(examples))


def text_of(ids):
    return make_tokenizer().hf.decode(ids, skip_special_tokens=False)


def test_a_tool_agent_in_eight_threads_is_recorded_as_it_was_sampled(endpoint):
    actor = make_actor(endpoint, use_tool, workers=8)
    assert isinstance(actor, Actor)
    groups = play(actor)
    tools = set()
    for group in groups:
        want = "<|im_start|>system\necho<|im_end|>\n<|im_start|>system\nUse echo.<|im_end|>\n<|im_start|>user\n"
        assert text_of(group.prompt) == f"{want}{group.example.prompt}<|im_end|>\n<|im_start|>assistant\n"
        for sample, result in zip(group.samples, group.results, strict=True):
            assert result.is_valid, result.error
            assert result.value == 1.0 and result.components["turns"] == 2 and set(sample.versions.tolist()) == {7}
            check_sample(group.prompt, sample)
            ((start, stop),) = sample.forced
            said = make_tokenizer().decode(sample.tokens[:start].tolist())
            given = text_of(sample.tokens[start:stop].tolist())
            closing = "" if sample.tokens[start - 1] == END else "<|im_end|>"
            if "z" in said:
                tools.add(False)
                assert given == f"{closing}\n<|im_start|>user\ncall it<|im_end|>\n<|im_start|>assistant\n"
            else:
                tools.add(True)
                assert given == f"{closing}\n<|im_start|>tool\n{said.upper()}<|im_end|>\n<|im_start|>assistant\n"
            assert sample.turns.tolist() == [0] * stop + [1] * (len(sample.tokens) - stop)
    assert True in tools
    assert len({tuple(s.tokens.tolist()) for g in groups for s in g.samples}) == 8
    assert actor.stats["turns"] == 16 and actor.stats["reused_share"] > 0.4


def test_threads_rows_and_contexts_do_not_change_what_is_said(endpoint):
    want = [s.tokens.tolist() for g in play(make_actor(endpoint, talk)) for s in g.samples]
    with make_endpoint(rows=1, conversations=2) as other:
        got = play(make_actor(other, talk, workers=3))
    assert [s.tokens.tolist() for g in got for s in g.samples] == want
    assert len({tuple(tokens) for tokens in want}) == len(want)


def test_later_turns_begin_with_the_ids_recorded_before(endpoint):
    session = endpoint.open_session(1, 2)
    url = endpoint.url(session)
    messages, before = [user("hi")], []
    for turn in range(4):
        answer = ask(url, messages)
        reply = session.replies[-1]
        assert reply.ids[: len(before)] == before and len(session.replies) == turn + 1
        assert answer["usage"]["prompt_tokens"] == len(reply.ids) - len(reply.tokens)
        assert answer["usage"]["completion_tokens"] == len(reply.tokens)
        want = row_logprobs(CONFIG, params(), reply.ids)[-len(reply.tokens) :]
        np.testing.assert_allclose(reply.logprobs, want, atol=5e-5)
        before = reply.ids
        said = answer["choices"][0]["message"]
        # several messages at once, and white space that the agent's framework has cut
        messages += [{**said, "content": said["content"].strip()}, user("a"), {"role": "system", "content": "b"}]
    assert [len(path) for path in session.conversations()] == [4]
    assert text_of(reply.given).endswith(
        "\n<|im_start|>user\na<|im_end|>\n<|im_start|>system\nb<|im_end|>\n<|im_start|>assistant\n"
    )
    endpoint.close_session(session)


def test_a_rewritten_history_makes_a_branch(endpoint):
    session = endpoint.open_session(1, 2)
    url = endpoint.url(session)
    first = ask(url, [user("hi")])["choices"][0]["message"]
    history = [user("hi"), first, user("go on")]
    ask(url, history)
    ask(url, history)  # asked again: something else is said
    ask(url, [user("hi"), {"role": "assistant", "content": "never said"}, user("go on")])
    ask(url, [{"role": "system", "content": "You help."}, user("hi")])  # a helper of the agent
    one, again, forged, other = session.replies[1:]
    assert again.parent is one.parent is session.replies[0] and forged.parent is other.parent is None
    assert again.ids[: -len(again.tokens)] == one.ids[: -len(one.tokens)]
    assert again.tokens.tolist() != one.tokens.tolist()
    assert "never said" in text_of(forged.given)
    paths = session.conversations()
    assert len(paths) == 4 and sum(path[0] is session.replies[0] for path in paths) == 2
    endpoint.close_session(session)


def test_conversations_of_a_run_share_its_reward_and_train_what_they_share_once(endpoint):
    def agent(url, row):
        said = ask(url, [user(row["prompt"])])["choices"][0]["message"]
        history = [user(row["prompt"]), said, user("go on")]
        for _ in range(2):
            ask(url, history)
        ask(url, [user("check it"), said, user(row["prompt"])])
        return 0.25 if row["prompt"] == "one" else 0.75

    actor = make_actor(endpoint, agent, trained_conversations=3)
    rollout = collect(actor, RolloutPlan(group_size=6), lambda n: EXAMPLES[:n], 2, 5)
    assert len(rollout.trajectories) == 12 and rollout.rewards.tolist() == [[0.25] * 6, [0.75] * 6]
    assert [t.episode_id for t in rollout.trajectories] == [0] * 3 + [3] * 3 + [6] * 3 + [9] * 3
    for i in range(0, 12, 3):
        rows = rollout.trajectories[i : i + 3]
        shared = [t for t in rows if "check" not in text_of(t.tokens.tolist())]
        assert len(shared) == 2
        same = np.cumprod(shared[0].tokens[:40] == shared[1].tokens[:40]).sum()
        assert [t.action_mask[:same].any() for t in shared] == [True, False]
        assert all(t.action_mask.any() for t in rows)
        for t in rows:
            want = np.where(t.action_mask, row_logprobs(CONFIG, params(), t.tokens.tolist()), 0)
            np.testing.assert_allclose(t.behavior_logprobs, want, atol=5e-5)
    assert actor.stats["conversations"] == 3 and actor.stats["unused_conversations"] == 0
    batch = stack(rollout.trajectories)
    assert len(set(batch.episode_id.tolist())) == 4 and batch.action_mask.sum() == sum(
        t.action_mask.sum() for t in rollout.trajectories
    )
    with pytest.raises(ValueError, match=r"multiple of config.actor.trained_conversations=3"):
        play(actor, samples=4)
    assert [len(group.samples) for group in play(actor.for_evaluation(sampling_params()), samples=1)] == [
        1,
        1,
    ]  # an evaluation counts runs
    few = play(make_actor(endpoint, agent), samples=2)
    assert [len(group.samples) for group in few] == [2, 2]


def test_an_agents_turns_follow_a_grammar_and_penalties_count_what_the_policy_said(endpoint):
    """The trainer scores the same, also behind an answer that two conversations share and one of them trains."""

    def agent(url, row):
        said = ask(url, [user(row["prompt"])])["choices"][0]["message"]
        for _ in range(2):
            ask(url, [user(row["prompt"]), said, user("go on")])
        return 1.0

    tokenizer = make_tokenizer()
    grammars = Grammars(tokenizer, VOCAB)
    sampling = sampling_params(penalties=Penalties(1.4, 0.5, 0.8))
    grammar = grammars("regex [abc ]{3,6}")
    settings = dataclasses.replace(SETTINGS, sampling=sampling, grammar_of=lambda example: grammar)
    actor = BlackBoxActor(endpoint, agent, None, settings, BlackBox(trained_conversations=2))
    try:
        rollout = collect(actor, RolloutPlan(group_size=4), lambda n: EXAMPLES[:n], 2, 5)
    finally:
        endpoint.begin(sampling_params(), seed=3, step=5)
    rows = rollout.trajectories
    assert len(rows) == 8 and sum((t.drawn != t.action_mask).any() for t in rows) == 4
    for t in rows:
        assert len(t.grammar_turns) == 2
        for start, stop in t.grammar_turns.tolist():
            assert t.drawn[start:stop].all()
            assert re.fullmatch("[abc ]{1,6}", tokenizer.decode(t.tokens[start:stop].tolist()))

    batch = stack(rows)
    mask = loss_mask(batch)
    packing = layout(batch, mask, PackConfig(pack_length=512, microbatch_size=1))
    packed = masked(packing, allowed_in(rows, grammars, np.asarray(batch.tokens)))
    score = jax.jit(jax.vmap(lambda packed: score_tokens(CONFIG, params(), packed, sampling)[0]))
    scored = packing.batch_of(entries_of(np.asarray(score(packed)), packing), batch.tokens)
    np.testing.assert_allclose(scored, np.where(mask, batch.behavior_logprobs, 0), atol=5e-5)
    assert mask.sum() > 20


def entries_of(scored, packing):
    """Scores of the slots of `packing` as its entries have them."""
    flat = scored.reshape(len(scored), -1)
    return np.take_along_axis(flat, packing.row_index.reshape(len(flat), -1), axis=1).reshape(packing.token.shape)


def test_a_run_that_raises_hangs_or_never_asks_costs_its_sample_alone(endpoint):
    hung = threading.Event()

    def agent(url, row):
        kind = row["kind"]
        if kind == "silent":
            return 1.0
        talk(url, row, turns=1)
        if kind == "raises":
            raise KeyError("lost")
        if kind == "hangs":
            hung.wait(60)
            talk(url, row, turns=1)  # its session is over by then
        return {"nan": float("nan"), "list": [1], "text": "some text"}.get(kind, 0.5)

    wanted = {
        "fine": None,
        "silent": "never asked the policy anything",
        "raises": "the agent raised KeyError: 'lost'",
        "hangs": "longer than 3 s",
        "nan": "it must return a finite number",
        "list": "it must return a finite number",
        "text": "needs a reward to score it",
    }
    examples = [Example(kind, {"kind": kind}) for kind in wanted]
    actor = make_actor(endpoint, agent, timeout_s=3.0)
    groups = play(actor, examples, 2)
    hung.set()
    for group, error in zip(groups, wanted.values(), strict=True):
        for sample, result in zip(group.samples, group.results, strict=True):
            assert result.is_valid == (error is None) and (error is None or error in result.error)
            assert (len(sample.tokens) > 0) == (group.example.prompt != "silent")
    assert actor.stats["failed"] == 12
    rollout = collect(actor, RolloutPlan(group_size=2), lambda n: examples[1:3], 2, 5)
    assert np.isnan(rollout.rewards).all() and not any(t.is_valid for t in rollout.trajectories)
    assert not stack(rollout.trajectories).is_valid.any()


def test_a_text_is_scored_by_the_reward(endpoint):
    def longer(completion, least):
        return float(len(completion) >= least)

    reward = RewardRunner([RewardSpec(longer, in_process=True)])
    examples = [Example("ab", {"least": 3}), Example("abcd", {"least": 3})]

    def agent(url, row):
        talk(url, row, turns=1)
        return row["prompt"]

    groups = play(make_actor(endpoint, agent, reward), examples, 2)
    assert [[r.value for r in g.results] for g in groups] == [[0.0, 0.0], [1.0, 1.0]]
    assert groups[0].results[0].components["longer"] == 0.0


def test_limits_cut_a_conversation_and_say_so(endpoint):
    session = endpoint.open_session(9, 9)
    url = endpoint.url(session)
    choices = [ask(url, [user("x")], max_tokens=1)["choices"][0] for _ in range(8)]
    assert all(r.is_cut == (c["finish_reason"] == "length") for r, c in zip(session.replies, choices, strict=True))
    assert {c["finish_reason"] for c in choices} >= {"length"} and {len(r.tokens) for r in session.replies} == {1}
    code, error = refused(url, {"messages": [user("x" * LENGTH)]})
    assert (code, error["code"]) == (400, "context_length_exceeded") and str(LENGTH) in error["message"]
    reply = session.replies[0]
    code, error = refused(url, {"messages": [user("x"), choices[0]["message"], user("y" * LENGTH)]})
    assert error["code"] == "context_length_exceeded" and reply.is_cut
    endpoint.close_session(session)


def test_malformed_requests_get_a_clear_answer(endpoint):
    session = endpoint.open_session()
    url, fine = endpoint.url(session), [user("x")]
    for body, part in [
        ([], "must be a JSON object"),
        ({}, "messages is None"),
        ({"messages": []}, "non-empty list"),
        ({"messages": ["x"]}, "must be one of system"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "'wizard'; it must be one of system"),
        ({"messages": [{"role": "user"}]}, "no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "list of text parts"),
        ({"messages": [{"role": "assistant", "tool_calls": [3]}]}, "must be an object with a function"),
        ({"messages": fine, "temperature": 0.3}, "this run samples with temperature=1"),
        ({"messages": fine, "temperature": float("nan")}, "this run samples with temperature=1"),
        ({"messages": fine, "top_p": "high"}, "top_p=1"),
        ({"messages": fine, "n": 2}, "n=2 is not served"),
        ({"messages": fine, "stop": ["<|im_start|>"]}, "its control token ends answers of all requests or of none"),
        ({"messages": fine, "stop": ["a<|im_end|>"]}, "never ends an answer"),
        ({"messages": fine, "stop": [""]}, "stop is ['']"),
        ({"messages": fine, "top_logprobs": 3}, "top_logprobs=3 is not served"),
        ({"messages": fine, "max_tokens": 0}, "at least 1"),
        ({"messages": fine, "tools": [{"name": "echo"}]}, "tools must be"),
        ({"messages": fine, "tools": [ECHO], "tool_choice": "required"}, "tool_choice='required'"),
        ({"messages": fine, "response_format": {"type": "json_object"}}, "response_format"),
    ]:
        code, error = refused(url, body)
        assert code == 400 and part in error["message"] and error["type"] == "invalid_request_error", error
    for raw in (b"{", b"\xff\xfe", b"[" * 100_000):
        assert refused(url, raw=raw)[0] == 400
    half = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'  # half of a surrogate pair
    assert refused(url, raw=half)[0] == 400
    assert refused(url, {"messages": fine}, method="PUT")[0] == 501
    with socket.create_connection(endpoint._open.server.server_address, timeout=10) as connection:
        connection.sendall(b"nonsense from beginning to end\r\n\r\n")
        assert b"Bad request" in connection.recv(1000)
    assert refused(url, {"messages": fine}, path="/embeddings")[0] == 404
    assert refused(url.replace(session.id, "nobody"), {"messages": fine})[1]["code"] == "session_not_found"
    base = url.replace(f"/session/{session.id}", "")
    assert refused(base, {"messages": fine})[1]["code"] == "session_not_found"
    assert not session.replies
    assert json.loads(post(base, {"messages": fine}, key=session.id))["object"] == "chat.completion"
    for harmless in ({"temperature": 1, "top_p": 1.0, "n": 1, "seed": 4, "user": "me"}, {"stop": None, "tools": []}):
        ask(
            url,
            [{"role": "developer", "content": "d"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}],
            **harmless,
        )
    assert len(session.replies) == 3
    with urllib.request.urlopen(f"{url}/models", timeout=10) as answer:
        assert json.loads(answer.read())["data"][0]["id"] == "policy"
    with urllib.request.urlopen(base.replace("/v1", "/health"), timeout=10) as answer:
        assert json.loads(answer.read()) == {"status": "ok", "version": 7}
    endpoint.close_session(session)
    assert refused(url, {"messages": fine})[0] == 404


def test_a_request_has_stops_of_its_own_and_is_told_the_most_probable_tokens(endpoint):
    session = endpoint.open_session(prompt_id=3, sample_id=1)
    url = endpoint.url(session)
    # The same messages again would have other random numbers, so the session is another one of the same name.
    whole = ask(url, [user("x")])["choices"][0]["message"]["content"]
    again = endpoint.open_session(prompt_id=3, sample_id=1)
    stop = whole[1:3]
    (choice,) = ask(endpoint.url(again), [user("x")], stop=[stop, "never"], logprobs=True, top_logprobs=2)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")

    (reply,) = again.replies
    sample = sample_of([reply], len(reply.given), set())
    for t, entry in enumerate(choice["logprobs"]["content"]):
        best = [x["logprob"] for x in entry["top_logprobs"]]
        assert best == sorted(best, reverse=True) and len(best) == 2 and entry["logprob"] <= best[0] + 1e-5
        want = row_logprobs(CONFIG, params(), [*reply.given, *reply.tokens[:t].tolist(), int(sample.top_tokens[t, 0])])
        np.testing.assert_allclose([best[0], sample.top_logprobs[t, 0]], want[-1], atol=5e-5)


def test_what_a_template_refuses_is_an_error_and_what_it_rewrites_begins_anew():
    picky = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    with make_endpoint(template=picky + TEMPLATE) as endpoint:
        url = endpoint.url(endpoint.open_session())
        code, error = refused(url, {"messages": [user("x"), {"role": "tool", "content": "y"}]})
        assert code == 400 and "no tools" in error["message"]
    last_only = TEMPLATE.replace("in messages %}", "in messages[-1:] %}", 1)
    with make_endpoint(template=last_only) as endpoint:
        session = endpoint.open_session()
        said = ask(endpoint.url(session), [user("x")])["choices"][0]["message"]
        ask(endpoint.url(session), [user("x"), said, user("y")])
        assert [reply.parent for reply in session.replies] == [None, None]
    with pytest.raises(ValueError, match="no chat template"):
        ChatEndpoint(endpoint._turn_decoder, CharTokenizer("ab"))


def make_reply(text, *, closed, calls=()):
    ids = [*make_tokenizer().encode(text), *([END] if closed else [])]
    message = {"role": "assistant", "content": text} | ({"tool_calls": list(calls)} if calls else {})
    nothing = np.zeros(len(ids), np.float32)
    return Reply(None, [], message, [1, 2], np.array(ids, np.int32), nothing, nothing, 0)


LIKE_QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[it] {% endif %}"
)


@pytest.mark.parametrize("closed", [True, False])
def test_behind_a_reply_stands_what_the_template_puts_there_though_it_drops_thinking(closed):
    reply = make_reply("<think>hm</think>yes", closed=closed)
    results = [{"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}]
    ids = Renderer(make_tokenizer(LIKE_QWEN3)).continuation_ids(reply, results)
    assert text_of(ids) == ("" if closed else "<|im_end|>") + (
        "\n<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = Renderer(make_tokenizer(BARE)).continuation_ids(make_reply("yes", closed=False), results[:1])
    assert text_of(ids) == "[tool] a\n[it] "


def test_an_agent_and_an_environment_that_say_the_same_sample_the_same():
    class More:
        def reset(self, row):
            self.turn = -1
            return [user(row["prompt"])]

        def step(self, action):
            self.turn += 1
            return Step(f"more {self.turn}", 0.0, self.turn == 2)

    with make_endpoint() as endpoint:
        agents = play(make_actor(endpoint, talk))
        decoder = endpoint._turn_decoder
    with EnvironmentPool(More, workers=2) as pool:  # a closed endpoint gives its decoder back
        actor = MultiTurnActor([decoder], pool, Dialogue(make_tokenizer(), role="user"), SETTINGS, MultiTurn())
        actor.set_params(params(), version=7)
        groups = play(actor)
    compared = 0
    for ours, theirs in zip(agents, groups, strict=True):
        assert ours.prompt == theirs.prompt
        for a, b in zip(ours.samples, theirs.samples, strict=True):
            length = len(b.tokens)  # an episode ends where a turn is cut, an agent goes on
            assert a.tokens[:length].tolist() == b.tokens.tolist()
            assert a.sampled[:length].tolist() == b.sampled.tolist()
            assert a.turns[:length].tolist() == b.turns.tolist()
            np.testing.assert_allclose(a.logprobs[:length], b.logprobs, atol=1e-5)
            compared += int(b.turns.max()) > 0
    assert compared > 2


def test_agents_whose_openings_share_nothing_are_packed(endpoint):
    first = "{% if messages[0].role == 'user' %}<|im_end|>{% endif %}"

    def agent(url, row):
        role = "user" if next(count) % 2 else "system"
        ask(url, [{"role": role, "content": "a"}])
        return 1.0

    count = itertools.count()
    with make_endpoint(template=first + TEMPLATE) as endpoint:
        actor = make_actor(endpoint, agent)
        rollout = collect(actor, RolloutPlan(group_size=4), lambda n: EXAMPLES[:n], 1, 5)
    batch = stack(rollout.trajectories)
    packed = pack(batch, batch.action_mask.astype(np.float32), PackConfig(pack_length=128))
    assert float(packed.rows.loss_mask.sum()) == batch.action_mask.sum() > 0
    for t in rollout.trajectories:
        want = np.where(t.action_mask, row_logprobs(CONFIG, params(), t.tokens.tolist()), 0)
        np.testing.assert_allclose(t.behavior_logprobs, want, atol=5e-5)


def events(body):
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_says_the_same(endpoint):
    one, two = (endpoint.open_session(5, 5) for _ in range(2))
    for tools in ([], [ECHO]):
        body = {"messages": [user("x")], "tools": tools, "logprobs": True}
        plain = json.loads(post(endpoint.url(one), body))
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = events(post(endpoint.url(two), body | usage))
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        message = plain["choices"][0]["message"]
        assert deltas[0]["role"] == "assistant"
        assert "".join(delta.get("content") or "" for delta in deltas) == (message["content"] or "")
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert calls == [{"index": i, **call} for i, call in enumerate(message.get("tool_calls", []))]
        assert chunks[-2]["choices"][0]["finish_reason"] == plain["choices"][0]["finish_reason"]
        assert chunks[-1]["usage"] == plain["usage"]
        shown = plain["choices"][0]["logprobs"]["content"]
        np.testing.assert_allclose([t["logprob"] for t in shown], one.replies[-1].logprobs, rtol=1e-6)
    assert [r.ids for r in one.replies] == [r.ids for r in two.replies]


def test_nothing_is_left_running_after_close():
    before = set(threading.enumerate())
    endpoint = open_endpoint(rows=1, conversations=1)
    actor = make_actor(endpoint, talk, workers=4)
    play(actor, EXAMPLES[:1], 2)
    host, port = endpoint._open.server.server_address[:2]
    connection = socket.create_connection((host, port))  # says nothing
    url, outcomes = endpoint.url(endpoint.open_session()), []

    def hurry():
        try:
            for i in itertools.count():
                outcomes.append(ask(url, [user(str(i))]))
        except (urllib.error.URLError, ConnectionError) as error:
            outcomes.append(error)

    thread = threading.Thread(target=hurry)
    thread.start()
    while not outcomes:
        time.sleep(0.01)
    begin = time.monotonic()
    endpoint.close()
    thread.join(10)
    connection.close()
    assert time.monotonic() - begin < 5 and not thread.is_alive()
    assert isinstance(outcomes[-1], Exception)
    assert [t for t in set(threading.enumerate()) - before if t.is_alive()] == []
    with pytest.raises(OSError):
        socket.create_connection((host, port), timeout=1)
    endpoint.close()


def test_a_decoder_that_fails_ends_the_call():
    with make_endpoint() as endpoint:
        actor = make_actor(endpoint, talk)
        decoder = endpoint._turn_decoder

        def broken():
            raise MemoryError("no room on the device")

        decoder.run, run = broken, decoder.run
        with pytest.raises(RuntimeError, match="the decoder failed") as caught:
            play(actor, EXAMPLES[:1], 2)
        assert "no room on the device" in str(caught.value.__cause__)
        decoder.run = run
        assert all(r.is_valid for g in play(actor, EXAMPLES[:1], 2) for r in g.results)


def test_plans_with_forks_and_bad_settings_are_refused(endpoint):
    actor = make_actor(endpoint, talk)
    with pytest.raises(ValueError, match="cannot be forked"):
        play(actor, forks=ForkPlan(chains=2, points=1, rule=lambda group: []))
    for settings, message in [
        ({"workers": 0}, "workers=0"),
        ({"timeout_s": 0.0}, "timeout_s=0"),
        ({"trained_conversations": 0}, "trained_conversations=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_actor(endpoint, talk, **settings)


def test_the_openai_client_is_served(endpoint):
    openai = pytest.importorskip("openai", reason="the package openai is not installed")

    def agent(url, row):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        messages = [user(row["prompt"])]
        for _ in range(3):
            choice = client.chat.completions.create(model="policy", messages=messages, tools=[ECHO]).choices[0]
            messages.append(choice.message.model_dump(exclude_none=True))
            for call in choice.message.tool_calls or []:
                messages.append({"role": "tool", "tool_call_id": call.id, "content": "ok"})
            if not choice.message.tool_calls:
                messages.append(user("again"))
        stream = client.chat.completions.create(model="policy", messages=messages, tools=[ECHO], stream=True)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        with pytest.raises(openai.BadRequestError, match="context length"):
            client.chat.completions.create(model="policy", messages=[user("x" * 500)])
        return float(len(said))

    for group in play(make_actor(endpoint, agent, timeout_s=60.0)):
        for sample, result in zip(group.samples, group.results, strict=True):
            assert result.is_valid, result.error
            assert result.components["turns"] == 4 and result.components["conversations"] == 1
            check_sample(group.prompt, sample)


def test_nothing_opens_before_with():
    """The port of an endpoint, and the threads of an actor over it."""
    before = set(threading.enumerate())
    endpoint = ChatEndpoint(make_decoder(), make_tokenizer())
    actor = make_actor(endpoint, talk)
    assert set(threading.enumerate()) == before and actor.cache_bytes() > 0
    with pytest.raises(RuntimeError, match="use it within `with endpoint:`"):
        endpoint.url(endpoint.open_session())
    with actor:
        actor.set_params(params(), version=1)
        assert all(result.is_valid for group in play(actor, EXAMPLES[:1], 2) for result in group.results)
    assert [t for t in set(threading.enumerate()) - before if t.is_alive()] == []


def test_an_endpoint_does_not_stay_open_when_its_rewards_cannot_be_opened():
    class Broken(RewardRunner):
        def __enter__(self):
            raise OSError("no process can be started")

    before = set(threading.enumerate())
    endpoint = ChatEndpoint(make_decoder(), make_tokenizer())
    rewards = Broken([RewardSpec(lambda completion: 1.0, name="one", in_process=True)])
    with pytest.raises(OSError, match="no process can be started"), make_actor(endpoint, talk, rewards):
        pass
    assert [t for t in set(threading.enumerate()) - before if t.is_alive()] == []


PROGRAM = """
import json, os, sys, urllib.request
body = json.dumps({"model": "policy", "messages": [{"role": "user", "content": "hi"}]}).encode()
key = os.environ["RLJAX_ENDPOINT_TOKEN"] + sys.argv[1]
headers = {"Content-Type": "application/json", "Authorization": "Bearer " + key}
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
print(json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"])
"""


def program(url, row):
    """An agent in a process of its own, which knows what its environment holds; with a base URL, and by its key."""
    whole, _, session = url.removesuffix("/v1").partition("/session/")
    for base, key in ((url, ""), (f"{whole}/v1", f".{session}")):
        environment = os.environ | {"OPENAI_BASE_URL": base}
        subprocess.run([sys.executable, "-c", PROGRAM, key], env=environment, check=True, timeout=60)
    return 1.0


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_agents_on_other_machines_need_the_token_and_find_it_in_their_environment(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    address = EndpointConfig(host="0.0.0.0", port=free_port(), advertised="127.0.0.1")
    endpoint = ChatEndpoint(make_decoder(), make_tokenizer(), address=address)
    with make_actor(endpoint, program, timeout_s=60.0) as actor:
        actor.set_params(params(), version=1)
        (group,) = play(actor, EXAMPLES[:1], 2)
        assert [(r.is_valid, r.components["turns"]) for r in group.results] == [(True, 2.0)] * 2

        token = endpoint.token
        assert len(token) >= 32 and os.environ[TOKEN] == token
        session = endpoint.open_session()
        url = endpoint.url(session)
        assert url == f"http://127.0.0.1:{address.port}/session/{session.id}/v1"
        body = {"model": "m", "messages": [user("hi")]}
        for key in ("", "none", session.id, token[:-1], f"x{token}", f"{token[:-1]}.{session.id}", "é" * 40):
            for path, sent in (("/chat/completions", body), ("/models", None), ("/nowhere", None)):
                method = "POST" if sent else "GET"
                status, error = refused(url, sent, key=key, path=path, method=method)
                assert (status, error["code"]) == (401, "invalid_api_key")
                assert TOKEN in error["message"] and token not in error["message"]
        assert session.replies == []
        assert json.loads(post(url, body, key=f"{token}.{session.id}"))["choices"]

        other = make_actor(ChatEndpoint(make_decoder(), make_tokenizer(), address=address), program)
        taken = rf"config.actor.endpoint.host='0.0.0.0' and port={address.port} cannot be listened on \(Address already"
        with pytest.raises(ValueError, match=taken), other:
            pass
        assert os.environ[TOKEN] == token
    assert TOKEN not in os.environ


def test_a_token_that_is_given_is_the_one_and_a_weak_one_is_refused_without_being_shown(monkeypatch):
    endpoint = ChatEndpoint(make_decoder(), make_tokenizer(), address=EndpointConfig(host="0.0.0.0"))
    monkeypatch.setenv(TOKEN, "a-token-of-a-user-0")
    with endpoint:
        assert endpoint.token == "a-token-of-a-user-0"
    assert os.environ[TOKEN] == "a-token-of-a-user-0"
    for weak in ("hunter2", "sixteen letters!"):
        monkeypatch.setenv(TOKEN, weak)
        with pytest.raises(ValueError, match=f"{TOKEN} must have at least 16 characters") as error, endpoint:
            pass
        assert weak not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "needs_token", "origin"),
    [
        ({}, False, "http://127.0.0.1:8000"),
        ({"host": "localhost"}, False, "http://localhost:8000"),
        ({"host": "::1"}, False, "http://[::1]:8000"),
        ({"host": "0.0.0.0"}, True, f"http://{socket.gethostname()}:8000"),
        ({"host": "10.0.0.5"}, True, "http://10.0.0.5:8000"),
        ({"host": "trainer-0"}, True, "http://trainer-0:8000"),
        ({"advertised": "trainer-0"}, True, "http://trainer-0:8000"),
        ({"advertised": "trainer-0:443"}, True, "http://trainer-0:443"),
        ({"advertised": "fe80::1"}, True, "http://[fe80::1]:8000"),
        ({"advertised": "2001:db8::a:443"}, True, "http://[2001:db8::a:443]:8000"),
        ({"advertised": "[fe80::1]:443"}, True, "http://[fe80::1]:443"),
        ({"advertised": "https://policy.example/a/"}, True, "https://policy.example/a"),
    ],
)
def test_an_address_says_who_can_reach_it_and_how(settings, needs_token, origin):
    config = EndpointConfig(**settings)
    config.check()
    assert (config.is_open, config.origin(8000)) == (needs_token, origin)


@pytest.mark.parametrize(
    "settings", [{"host": ""}, {"host": "a b"}, {"port": -1}, {"port": 65536}, {"advertised": "ftp://x"}]
)
def test_an_address_that_cannot_be_is_refused(settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=f"EndpointConfig: {name}="):
        EndpointConfig(**settings).check()
