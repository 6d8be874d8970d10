"""Samples of a model with a delta rule in some layers, beside the trainer's forward pass over whole sequences."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parallel_mesh import run_python

from rljax.models import Experts, fresh_config, hidden_states, init_params, logits
from rljax.sampling import (
    Fork,
    Request,
    Sampler,
    SamplerSpec,
    Stops,
    Turn,
    TurnDecoder,
    TurnDecoderSpec,
    compile_count,
    sampling_params,
)
from rljax.sampling.prompt_scores import score_prompts
from rljax.sampling.weights import decode_weights

SIZES = {
    "vocab_size": 29,
    "num_layers": 4,
    "embed_dim": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 24,
    "max_position": 64,
}
CONFIG = fresh_config("qwen3_5_text", **SIZES)
PARAMS = jax.tree.map(lambda x: 5 * x if x.ndim == 3 else x, init_params(CONFIG, jax.random.key(0)))
# The same with experts in all layers, one of which computes for every token.
MIXTURE = fresh_config("qwen3_5_moe_text", experts=Experts(count=6, per_token=2, mlp_dim=12), **SIZES)
MIXED = jax.tree.map(lambda x: 5 * x if x.ndim > 2 else x, init_params(MIXTURE, jax.random.key(1)))
SPEC = SamplerSpec(prompt_slots=2, sample_slots=2, prompt_buckets=(4, 8), max_new_tokens=12)
LENGTH = 64
TURNS = TurnDecoderSpec(
    conversations=6, rows=3, context_length=LENGTH, max_new_tokens=10, prefill_chunks=(4, 8), check_every=3
)


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(config, params, row, end, experts=None):
    positions = jnp.arange(LENGTH)[None]
    hidden = hidden_states(config, params, row, positions, jnp.where(positions < end, end, 0), experts=experts)
    return jax.nn.log_softmax(logits(config, params, hidden)[0])


def logprobs(prompt, completion, config=CONFIG, params=PARAMS, experts=None):
    """Of the completion, by the trainer's forward pass."""
    ids = [*prompt, *completion]
    row = jnp.asarray([ids + [0] * (LENGTH - len(ids))])
    if experts is not None:
        # The last token has none, and padding none that counts.
        recorded = np.full((1, LENGTH, *experts.shape[1:]), -1)
        recorded[0, : len(experts)] = experts
        experts = jnp.asarray(recorded)
    table = _logprobs(config, params, row, len(ids), experts)
    return np.asarray([table[len(prompt) + i - 1, token] for i, token in enumerate(completion)])


def sampler(**change):
    made = Sampler(CONFIG, dataclasses.replace(SPEC, **change))
    made.set_params(PARAMS)
    return made


def test_samples_have_the_log_probs_of_the_trainer():
    """More of them than rows, so that rows and slots are used again, and prompts of all lengths, one token among
    them."""
    prompts = [[3], [1, 2, 3, 4, 5, 6, 7, 8], [9, 9, 9], [4, 20, 11, 2, 8]]
    requests = [
        Request(prompt=np.asarray(prompt), prompt_id=i, sample_ids=tuple(range(3)), max_new_tokens=5 + 2 * i)
        for i, prompt in enumerate(prompts)
    ]
    groups = sampler().generate(requests, sampling_params(), seed=1, step=2)
    for prompt, request, group in zip(prompts, requests, groups, strict=True):
        assert len(group) == 3 and len({tuple(sample.tokens) for sample in group}) > 1
        for sample in group:
            assert len(sample.tokens) == request.max_new_tokens
            np.testing.assert_allclose(sample.logprobs, logprobs(prompt, sample.tokens), atol=2e-5)


def test_a_sample_does_not_depend_on_what_else_is_sampled():
    alone = Request(prompt=np.asarray([5, 6, 7]), prompt_id=7, sample_ids=(1,), max_new_tokens=9)
    other = Request(prompt=np.asarray([1, 2]), prompt_id=3, sample_ids=(0, 1, 2, 3, 4), max_new_tokens=4)
    made = sampler()
    ((single,),) = made.generate([alone], sampling_params(), seed=0, step=0)
    _, (among,) = made.generate([other, alone], sampling_params(), seed=0, step=0)
    assert single.tokens.tolist() == among.tokens.tolist()


def test_a_mixture_records_the_experts_of_both_kinds_of_layers():
    """Layer by layer: the trainer computes the same with them as by itself, and something else with another layer's."""
    made = Sampler(MIXTURE, dataclasses.replace(SPEC, path_slots=1, record_experts=True))
    made.set_params(MIXED)

    def rounds(samples):
        return [Fork(0, 5, 7)] if len(samples) == 2 else []

    prompts = [[3], [1, 2, 3, 4, 5, 6, 7, 8]]
    requests = [Request(prompt, i, (0, 1), rounds=rounds) for i, prompt in enumerate(prompts)]
    for prompt, group in zip(prompts, made.generate(requests, sampling_params(), seed=1, step=2), strict=True):
        for sample in group:
            said = sample.tokens.tolist()
            assert sample.experts.shape == (len(prompt) + len(said) - 1, 4, 2)
            for experts in (None, sample.experts):
                wanted = logprobs(prompt, said, MIXTURE, MIXED, experts)
                np.testing.assert_allclose(sample.logprobs, wanted, atol=2e-5)
            turned = logprobs(prompt, said, MIXTURE, MIXED, np.roll(sample.experts, 1, axis=1))
            assert np.abs(turned - sample.logprobs).max() > 0.05


def test_prompts_are_scored_as_the_trainer_does():
    tokens = np.asarray([[1, 2, 3, 4, 5, 6], [9, 8, 7, 0, 0, 0]])
    scores = score_prompts(CONFIG, 2, decode_weights(CONFIG, PARAMS), tokens)
    for row, length in enumerate((6, 3)):
        wanted = logprobs(tokens[row, :1].tolist(), tokens[row, 1:length].tolist())
        np.testing.assert_allclose(scores.logprobs[row, : length - 1], wanted, atol=2e-5)


def test_forks_of_samples_have_the_log_probs_of_the_trainer():
    """At each token of the first two samples and behind the last, from a fork too, and with tokens that are given. More
    of them than rows, in a ring that grows, beside prompts of one token and of as many as there may be."""
    given = {}

    def rounds(samples):
        done = len(samples)
        if done == 2:
            return [Fork(i % 2, (i + 1) // 2, 10 + i) for i in range(24)]
        if done == 26:
            return [Fork(6, 7, 50), Fork(5, 2, 51, inject=(3, 4, 5)), Fork(7, 20, 52, inject=(9,))]
        given[len(given)] = done
        return []

    prompts = [[3], [1, 2, 3, 4, 5, 6, 7, 8], [9, 9, 9]]
    requests = [
        Request(prompt=np.asarray(prompt), prompt_id=i, sample_ids=(0, 1), rounds=rounds)
        for i, prompt in enumerate(prompts)
    ]
    made = sampler(path_slots=8, max_injected=3, max_new_tokens=24)
    made.warmup(sampling_params())
    compiled = compile_count()
    groups = made.generate(requests, sampling_params(), seed=1, step=2)
    assert compile_count() == compiled and len(given) == 3
    for prompt, group in zip(prompts, groups, strict=True):
        assert len(group) == 29 and {sample.parent for sample in group} == {-1, 0, 1, 5, 6, 7}
        for sample in group:
            parent = group[sample.parent].tokens if sample.parent >= 0 else sample.tokens
            assert sample.tokens[: sample.fork_index].tolist() == parent[: sample.fork_index].tolist()
            wanted = logprobs(prompt, sample.tokens)
            for start, stop in sample.forced:
                wanted[start:stop] = 0
            np.testing.assert_allclose(sample.logprobs[sample.fork_index :], wanted[sample.fork_index :], atol=2e-5)
    assert made.last_stats["prefill_tokens"] > made.last_stats["reused_tokens"] > 500


def turn_decoder(stops=None, config=CONFIG, params=PARAMS, **change):
    made = TurnDecoder(config, dataclasses.replace(TURNS, **change), stops or Stops(tokens=(7, 11)))
    made.set_params(params)
    made.begin(sampling_params(), seed=1, step=2)
    return made


def finish(decoder, *turns):
    """What came of `turns`, whose log-probs are those of the trainer, by conversation."""
    for turn in turns:
        decoder.submit(turn)
    ended = []
    while decoder.num_open:
        ended += decoder.run()
    model = (decoder.config, PARAMS if decoder.config is CONFIG else MIXED)
    for said in ended:
        np.testing.assert_allclose(said.logprobs, logprobs(said.turn.tokens, said.tokens.tolist(), *model), atol=2e-5)
    return {said.turn.conversation: said for said in ended}


def observations(seed, count=6, most=12):
    rng = np.random.default_rng(seed)
    return [rng.integers(12, 29, rng.integers(1, most)).tolist() for _ in range(count)]


@pytest.mark.parametrize(
    "model", [(CONFIG, PARAMS), pytest.param((MIXTURE, MIXED), marks=pytest.mark.slow)], ids=["plain", "experts"]
)
def test_turns_have_the_log_probs_of_the_trainer_and_only_what_is_new_is_computed(model):
    """Conversations on half as many rows, of a single token too; what is new is longer than a chunk, and shorter."""
    decoder = turn_decoder(None, *model)
    decoder.warmup()
    logprobs([1], [2], *model)
    compiled = compile_count()
    said = [[12], *observations(0, 5)]
    new = sum(len(tokens) - 1 for tokens in said)
    for turn in range(4):
        ended = finish(decoder, *(Turn(i, list(tokens), 50 + i, i, turn) for i, tokens in enumerate(said)))
        assert sorted(ended) == list(range(6))
        if turn < 3:
            for i, seen in enumerate(observations(turn + 1, most=10)):
                said[i] += [*ended[i].tokens.tolist(), *seen]
                # The last token that was said, and the observation but for its own last one.
                new += len(seen)
    assert decoder.stats["prefill_tokens"] == new and decoder.stats["busy_rows"] > 100
    assert compile_count() == compiled


@pytest.mark.parametrize(
    ("memories", "begins_at", "ring"),
    [(2, "the third turn", 256), (6, "the second turn", 256), (2, "the third turn", 4)],
)
def test_a_fork_begins_at_a_memory_that_is_kept(memories, begins_at, ring, monkeypatch):
    """Also of turns that are handed over in parts."""
    monkeypatch.setattr("rljax.sampling.turns._LONGEST_RING", ring)
    decoder = turn_decoder(memories=memories)
    said, turns = [12, 13, 14, 15, 16, 17], []
    for turn, seen in enumerate(observations(3, 3)):
        turns.append(list(said))
        said += [*finish(decoder, Turn(0, list(said), 9, 0, turn))[0].tokens.tolist(), *seen]

    decoder.begin(sampling_params(), seed=1, step=2)
    finish(decoder, *(Turn(1 + turn, tokens, 9, 1 + turn, prefix_of=0) for turn, tokens in enumerate(turns)))
    places = [len(tokens) - 1 for tokens in turns]
    kept = places if begins_at == "the second turn" else places[2:]
    assert decoder.stats["copied_tokens"] == sum(kept)
    assert decoder.stats["prefill_tokens"] == sum(places) - sum(kept)

    # In the middle of what was said, behind what is kept and in front of it, and with nothing before its own first.
    for conversation, cut in ((4, len(said) - 1), (5, places[1] + 2), (4, 3), (4, 1)):
        finish(decoder, Turn(conversation, said[:cut], 9, 17, prefix_of=0))


def test_a_turn_goes_on_behind_a_stop_string_that_cut_it():
    """Its row had gone on by then, and remembers what was never said."""

    def decode(ids):
        return " ".join(map(str, ids))

    tokens = [12, 13, 14]
    whole = finish(turn_decoder(Stops()), Turn(0, tokens, 9, 0))[0].tokens.tolist()
    decoder = turn_decoder(Stops((), (decode(whole[1:4]),), decode), check_every=10)
    cut = finish(decoder, Turn(0, tokens, 9, 0))[0]
    assert cut.end == "stop_string" and cut.tokens.tolist() == whole[:4]
    before = decoder.stats["prefill_tokens"]
    said = [*tokens, *whole[:4], 20, 21]
    said += finish(decoder, Turn(0, said, 9, 0, 1))[0].tokens.tolist()
    # What was said too.
    assert decoder.stats["prefill_tokens"] - before == 4 + 2

    # Where the row that was cut had come to something else is said now.
    row_end = len(tokens) - 1 + 10
    assert len(said) > row_end + 2
    finish(decoder, Turn(1, said[: row_end + 2], 9, 5, prefix_of=0))


@pytest.mark.parametrize("keep", [False, True])
def test_a_turn_that_was_interrupted_goes_on_as_if_it_was_not(keep):
    tokens = observations(5, 3)
    whole = finish(turn_decoder(rows=2), *(Turn(i, tokens[i], 9, i) for i in range(3)))
    decoder = turn_decoder(rows=2)
    for i in range(3):
        decoder.submit(Turn(i, tokens[i], 9, i))
    parts = decoder.run()
    for said in decoder.interrupt(keep=keep):
        count = len(said.tokens)
        behind = said.turn._replace(
            tokens=[*said.turn.tokens, *said.tokens.tolist()], begun=count, drawn=count, max_new_tokens=10 - count
        )
        parts += [said._replace(tokens=np.concatenate([said.tokens, finish(decoder, behind)[said.turn[0]].tokens]))]
    assert {said.turn.conversation: said.tokens.tolist() for said in parts} == {
        i: said.tokens.tolist() for i, said in whole.items()
    }


def test_a_turn_that_is_interrupted_before_its_first_step_goes_on():
    """Its row remembers nothing yet: what another turn left there takes no memory's place."""
    decoder = turn_decoder(rows=1)
    finish(decoder, Turn(1, [20, 21, 22], 9, 1))
    for tokens, keep in (([12, 13, 14], False), ([12, 13, 14, 15, 16], True)):
        decoder.submit(Turn(0, tokens, 9, 0))
        decoder._admit(decoder._params)
        (said,) = decoder.interrupt(keep=keep)
        assert len(said.tokens) == 0
    finish(decoder, said.turn)


def test_conversations_count_their_memories():
    decoder = turn_decoder(memories=3)
    decoder._allocate()
    held = sum(x.nbytes for x in jax.tree.leaves((decoder._kept, decoder._cache)))
    assert decoder.cache_bytes() == held
    assert turn_decoder().cache_bytes() < held
    with pytest.raises(ValueError, match=r"memories=1 must be at least 2: behind a turn's beginning and its end"):
        turn_decoder(memories=1)


def test_the_cache_counts_memories():
    made = sampler()
    cache = made._new_cache(8)
    held = sum(x.nbytes for x in jax.tree.leaves((cache.prompt_memory, cache.row_memory)))
    # Memories in float32, and the last three tokens before the convolution.
    delta = CONFIG.delta
    assert held == 3 * 2 * (1 + 2) * 4 * (4 * 8 * 8 + 3 * sum(delta.widths))
    keys = 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 4 * 2 * (8 + 2 * 12)
    assert made.cache_bytes() == held + keys


@pytest.fixture(scope="module")
def on_meshes():
    return json.loads(run_python("hybrid_mesh_program.py", devices=8))


@pytest.mark.parametrize("mesh", ["1x8x1", "2x2x2"])
def test_devices_of_a_mesh_train_what_one_does(on_meshes, mesh):
    assert on_meshes["trained"][mesh]["gradient"] < 2e-5


@pytest.mark.parametrize("mesh", ["1x8x1", "2x2x2"])
def test_devices_gather_weights_alone(on_meshes, mesh):
    """And the tokens, whose embeddings they exchange; all else of a row has its 40 positions too."""
    gathered = on_meshes["trained"][mesh]["gathered"]
    assert {shape.split("[")[0] for shape in gathered if "40" in shape} == {"s32"}
    assert sum(shape.startswith("f32") for shape in gathered) > 10


@pytest.mark.parametrize("devices", ["2", "4"])
def test_devices_that_share_sequences_recall_what_one_does(on_meshes, devices):
    """Its two heads of keys divide over two of them, and not over four. Gradients too."""
    assert on_meshes["recalled"][devices] < 1e-5


def test_memories_stay_on_the_devices_that_keep_them(on_meshes):
    """But for one that is copied to another device, which is sent alone."""
    copied = on_meshes["sent"].pop("copy")
    assert not any(on_meshes["sent"].values()) and len(on_meshes["sent"]) == 4
    assert sorted(shape.split("[")[1][:2] for shape in copied) == ["1,"] * 4


def test_devices_of_a_mesh_sample_what_one_does(on_meshes):
    assert on_meshes["sampled"]


def test_devices_of_a_mesh_take_the_turns_that_one_does(on_meshes):
    assert on_meshes["spoken"]
