"""The decoder samples what the full forward pass says, whatever the layout of its rows, and compiles nothing new."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import DecoderConfig, RopeScaling, hidden_states, init_params, logits
from rljax.models.cache import resize_ring, resized_column, ring_size
from rljax.sampling import (
    Request,
    Sampler,
    SamplerSpec,
    Stops,
    compile_count,
    process_logits,
    sampling_params,
    spec,
)
from rljax.sampling.slots import Slots
from rljax.sampling.spec import NO_STOPS
from rljax.sampling.stopping import StopStrings, find_stop

VOCAB, NEW = 300, 12
CONFIG = DecoderConfig(
    vocab_size=VOCAB, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
)
PROMPTS = (3, 16, 1, 9, 8, 2)


def make_params(config):
    """Wide enough logits that tokens differ in probability. A token then flips between two layouts only if its
    uniform number lies within rounding (1e-7) of a boundary of the CDF; with these fixed seeds none does."""
    return jax.tree.map(lambda x: 3 * x, init_params(config, jax.random.key(0)))


def make_sampler(config=CONFIG, *, stops=NO_STOPS, **sizes):
    sizes = {"prompt_slots": 3, "sample_slots": 4, "prompt_buckets": (8, 16), "max_new_tokens": NEW} | sizes
    sampler = Sampler(config, SamplerSpec(**sizes), stops)
    sampler.set_params(make_params(config))
    return sampler


def emitted(count):
    """What a row has emitted in so many steps."""
    types = {"tokens": np.int32, "logprobs": np.float32, "entropies": np.float32}
    return {name: np.ones(count, dtype) for name, dtype in types.items()}


def make_requests(samples=5):
    rng = np.random.default_rng(0)
    return [Request(rng.integers(0, VOCAB, n).tolist(), 100 + i, range(samples)) for i, n in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def sampler():
    return make_sampler()


@pytest.fixture(scope="module")
def samples(sampler):
    return sampler.generate(make_requests(), sampling_params(), seed=1, step=2)


def forward(config, rows):
    """Logits [B, T, V] of whole rows from hidden states in float64, as float32.

    In float32 the pass is no oracle for every model: where queries and keys are normed, one log-prob moves by 3e-5 with
    the width of the row and the rows beside it.
    """
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), make_params(config))
    with jax.enable_x64(True):
        return np.asarray(_forward(dataclasses.replace(config, dtype="float64"), params, rows), np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params, rows):
    ends = jnp.full(rows.shape, rows.shape[1])
    hidden = hidden_states(config, params, rows, jnp.broadcast_to(jnp.arange(32), rows.shape), ends)
    return logits(config, params, hidden)


@jax.jit
def processed_logprobs(z, params):
    return jax.nn.log_softmax(process_logits(z, params), axis=-1)


def full_logits(config, requests, groups, then=lambda z: z):
    """For each sample, the logits that its tokens were drawn from: one forward pass over prompt and completion.

    `then` is applied to the logits of all rows at once, which have one shape.
    """
    pairs = [(r.prompt, x.tokens) for r, group in zip(requests, groups, strict=True) for x in group]
    rows = np.zeros((32, 32), np.int32)
    for row, (prompt, tokens) in zip(rows, pairs, strict=False):
        row[: len(prompt) + len(tokens)] = [*prompt, *tokens]
    out = np.asarray(then(forward(config, rows)))
    return [z[len(p) - 1 : len(p) - 1 + len(t)] for z, (p, t) in zip(out, pairs, strict=False)]


def assert_matches_forward(config, requests, groups, params):
    samples = [x for group in groups for x in group]
    wanted = full_logits(config, requests, groups, lambda z: processed_logprobs(z, params))
    for sample, want in zip(samples, wanted, strict=True):
        np.testing.assert_allclose(sample.logprobs, want[np.arange(len(want)), sample.tokens], atol=2e-5)
        np.testing.assert_allclose(sample.entropies, -(np.exp(want) * want).sum(-1), atol=2e-5)


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert [x.tokens.tolist() for x in a] == [x.tokens.tolist() for x in b]
        assert [x.finish_reason for x in a] == [x.finish_reason for x in b]
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-5)


def test_logprobs_and_entropies_equal_a_full_forward_pass(samples):
    assert_matches_forward(CONFIG, make_requests(), samples, sampling_params())
    assert {len(x.tokens) for group in samples for x in group} == {NEW}
    assert samples[0][0].tokens.dtype == np.int32 and samples[0][0].logprobs.dtype == np.float32


@pytest.mark.parametrize("values", [{"temperature": 0.7, "top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1, "top_p": 0.9}])
def test_truncated_logprobs_equal_those_of_a_full_forward_pass(sampler, values):
    params = sampling_params(**values)
    requests = make_requests(2)[:3]
    groups = sampler.generate(requests, params, seed=0, step=0)
    assert_matches_forward(CONFIG, requests, groups, params)


# Each layer has a window and a rotation of its own, and what families add besides.
OTHERWISE = {
    "num_layers": 3,
    "sliding_window": 5,
    "sliding_layers": (True, False, False),
    "local_rope_theta": 100.0,
    "rotated_layers": (True, True, False),
    "rotary_dim": 6,
    "qk_norm": True,
    "qk_norm_whole": True,
    "post_norms": True,
    "norm_offset": True,
    "activation": "gelu_tanh",
    "embed_scale": 4.0,
    "residual_scale": 0.7,
    "score_scale": 0.5,
    "logits_divisor": 2.0,
}
VARIANTS = {
    "tied, biases, qk-norm": {"tied_embeddings": True, "attention_bias": True, "qk_norm": True},
    "sliding window of 5 in one layer": {"sliding_window": 5, "sliding_layers": (True, False)},
    "one key head": {"num_kv_heads": 1},
    "as many key heads as heads": {"num_kv_heads": 4},
    "layers that rotate otherwise": OTHERWISE,
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_greedy_takes_the_argmax_of_a_full_forward_pass_at_every_position(changes):
    config = dataclasses.replace(CONFIG, **changes)
    requests = make_requests(1)
    groups = make_sampler(config).generate(requests, sampling_params(0.0), seed=0, step=0)
    for [sample], want in zip(groups, full_logits(config, requests, groups), strict=True):
        assert sample.tokens.tolist() == want.argmax(-1).tolist()
    assert_matches_forward(config, requests, groups, sampling_params(0.0))


def test_bfloat16_decodes_near_float32():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    requests = make_requests(1)[:2]
    groups = make_sampler(config).generate(requests, sampling_params(), seed=0, step=0)
    for [sample], z in zip(groups, full_logits(CONFIG, requests, groups), strict=True):
        want = np.asarray(jax.nn.log_softmax(z, axis=-1))
        gap = np.abs(sample.logprobs - want[np.arange(NEW), sample.tokens])
        assert 0 < gap.max() < 0.2


@pytest.mark.parametrize("shape", [(1, 1), (6, 5), (2, 1), (8, 2), (1, 7)])
def test_slots_of_any_shape_give_the_same_samples(samples, shape):
    """(6, 5) holds everything at once; the others refill rows, take prompts in turn, or copy prompts between slots."""
    sampler = make_sampler(prompt_slots=shape[0], sample_slots=shape[1], refill_rows=1)
    assert_same(sampler.generate(make_requests(), sampling_params(), seed=1, step=2), samples)


def test_shuffled_and_split_requests_give_the_same_samples(sampler, samples):
    requests = make_requests()
    order = [4, 0, 5, 2, 1, 3]
    shuffled = sampler.generate([requests[i] for i in order], sampling_params(), seed=1, step=2)
    assert_same(shuffled, [samples[i] for i in order])
    assert_same(sampler.generate(requests[2:4], sampling_params(), seed=1, step=2), samples[2:4])
    part = [request._replace(sample_ids=(4, 1)) for request in requests]
    assert_same(sampler.generate(part, sampling_params(), seed=1, step=2), [[g[4], g[1]] for g in samples])


def test_another_bucket_gives_the_same_samples(samples):
    assert_same(
        make_sampler(prompt_buckets=(20,)).generate(make_requests(), sampling_params(), seed=1, step=2), samples
    )


@pytest.mark.parametrize("change", ["seed", "step", "prompt_id", "sample_id"])
def test_every_part_of_the_key_matters(sampler, samples, change):
    requests, where = make_requests()[:1], {"seed": 1, "step": 2}
    if change in where:
        where[change] += 1
    elif change == "prompt_id":
        requests = [requests[0]._replace(prompt_id=7)]
    else:
        requests = [requests[0]._replace(sample_ids=range(5, 10))]
    [other] = sampler.generate(requests, sampling_params(), **where)
    assert all(a.tokens.tolist() != b.tokens.tolist() for a in other for b in samples[0])


def test_a_stop_token_ends_a_sample_and_is_its_last_token(samples):
    stop = int(samples[1][2].tokens[4])
    stopping = make_sampler(stops=Stops(tokens=(stop,)))
    groups = stopping.generate(make_requests(), sampling_params(), seed=1, step=2)
    for group, without in zip(groups, samples, strict=True):
        for sample, full in zip(group, without, strict=True):
            hits = np.flatnonzero(full.tokens == stop)
            length = hits[0] + 1 if len(hits) else NEW
            assert sample.tokens.tolist() == full.tokens[:length].tolist()
            assert sample.finish_reason == ("stop" if len(hits) else "length")
    assert groups[1][2].finish_reason == "stop"


def test_each_request_may_have_its_own_limit(sampler, samples):
    requests = [request._replace(max_new_tokens=i + 1) for i, request in enumerate(make_requests())]
    groups = sampler.generate(requests, sampling_params(), seed=1, step=2)
    for i, (group, full) in enumerate(zip(groups, samples, strict=True)):
        assert [x.tokens.tolist() for x in group] == [x.tokens[: i + 1].tolist() for x in full]
        assert {x.finish_reason for x in group} == {"length"}


@pytest.mark.parametrize("check_every", [1, 5, 12])
def test_a_stop_string_ends_a_sample_at_the_token_that_completes_it(samples, check_every):
    def decode(ids):
        return "".join(f"<{i}>" for i in ids)

    first, last = samples[3][1].tokens[5:7]
    stop = f"{first}><{last}"  # spans two tokens
    groups = make_sampler(stops=Stops(strings=("never", stop), decode_text=decode), check_every=check_every).generate(
        make_requests(), sampling_params(), seed=1, step=2
    )
    assert groups[3][1].finish_reason == "stop_string"
    for group, without in zip(groups, samples, strict=True):
        for sample, full in zip(group, without, strict=True):
            ends = [n for n in range(NEW + 1) if stop in decode(full.tokens[:n])]
            assert sample.tokens.tolist() == full.tokens[: ends[0] if ends else NEW].tolist()
            assert len(sample.logprobs) == len(sample.entropies) == len(sample.tokens)


@pytest.mark.parametrize(
    "prompt", ["größer".encode()[:-3], *(pytest.param(text, marks=pytest.mark.slow) for text in (b"", b"a stop"))]
)
def test_a_tail_of_the_text_tells_what_the_whole_text_does(prompt):
    """Run by run of some steps. Random bytes, many of them pieces of characters, and tokens without text."""

    def decode(ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    strings = ("stop", "öß", "a\n\n")
    finder = StopStrings(Stops(strings=strings, decode_text=decode))
    pieces = [*(s.encode() for s in strings), b"st", b"op", b"a\n", b"\xc3", b"\xb6\xc3", b"xyz"]
    rng = np.random.default_rng(len(prompt))
    found = 0
    for _ in range(60):
        ids = []
        while len(ids) < 120:
            ids += [*pieces[rng.integers(len(pieces))]] if rng.random() < 0.15 else rng.integers(97, 300, 4).tolist()
        whole = [*prompt, *ids]
        for new in (1, 5, 16):
            for end in range(new, len(ids) + 1, new):
                texts = [decode(whole[: len(prompt) + n]) for n in range(end + 1)]
                is_in = [find_stop(text, strings, texts[0]) is not None for text in texts]
                want = next((n for n in range(end - new + 1, end + 1) if is_in[n]), None)
                tail = whole[: len(prompt) + end]
                assert finder.end(lambda n, tail=tail: tail[-n:], end, new, begun=len(prompt)) == want
                if want is not None:
                    found += 1
                    break
    assert found > 50


def test_the_search_for_stop_strings_reads_a_tail_alone():
    lengths = []

    def decode(ids):
        lengths.append(len(ids))
        return "x" * len(ids)

    slots = Slots(
        make_requests(1)[:1], SamplerSpec(prompt_buckets=(8,), max_new_tokens=999, prompt_slots=1, sample_slots=1)
    )
    slots.assign()
    finder = StopStrings(Stops(strings=("a stop string",), decode_text=decode))
    for _ in range(50):
        slots.advance((0, 0), emitted(16))
        assert finder.end(lambda n: slots.last_tokens((0, 0), n), int(slots.steps[0, 0]), 16) is None
    assert max(lengths) <= 16 + 32 and slots.last_tokens((0, 0), 900)[:3] == list(make_requests()[0].prompt)


def test_a_step_reads_no_more_columns_than_the_oldest_row_needs(sampler, samples, monkeypatch):
    """What a limit allows costs nothing: short completions run the programs of a short limit."""
    monkeypatch.setattr(spec, "_SMALLEST_RING", 8)
    columns = []
    decode = Sampler._decode

    def spy(self, cache, *rest):
        columns.append(ring_size(cache))
        return decode(self, cache, *rest)

    monkeypatch.setattr(Sampler, "_decode", spy)
    short = [request._replace(max_new_tokens=8) for request in make_requests()]
    want = [[x.tokens[:8].tolist() for x in group] for group in samples]
    roomy = make_sampler(max_new_tokens=100, prompt_buckets=(16,))
    groups = roomy.generate(short, sampling_params(), seed=1, step=2)
    assert [[x.tokens.tolist() for x in group] for group in groups] == want and set(columns) == {8}


@pytest.mark.parametrize("old, size", [(8, 12), (12, 8), (4, 8), (8, 4), (5, 7)])
def test_a_resized_ring_holds_the_same_columns_at_the_same_ages(old, size):
    for written in (1, 3, old - 1, old, old + 2, 3 * old + 1):
        ring = np.zeros(old, np.float32)
        for step in range(written):
            ring[step % old] = 1 + step
        k = jnp.broadcast_to(ring, (1, 1, 1, 1, old))
        column = written % old
        new_k, new_v = resize_ring(size, k, k.swapaxes(3, 4), np.array(column))
        following = resized_column(column, old, size)
        for age in range(1, min(written, old, size) + 1):
            assert new_k[0, 0, 0, 0, following - age] == new_v[0, 0, 0, following - age, 0] == 1 + written - age


def test_decoding_ends_with_the_last_row():
    sampler = make_sampler()
    requests = [request._replace(max_new_tokens=3) for request in make_requests(4)[:3]]
    sampler.generate(requests, sampling_params(), seed=0, step=0)
    assert sampler.last_stats["decode_steps"] == 3
    assert sampler.last_stats["slot_occupancy"] == 1.0
    assert sampler.last_stats["new_tokens"] == 36
    assert sampler.last_stats["prefill_tokens"] == sum(len(request.prompt) - 1 for request in requests)


def test_a_finished_row_is_refilled_at_once():
    """8 samples of 12 tokens and 8 of 1: two rows that always have work need 12 * 8 / 2 + few steps."""
    sampler = make_sampler(prompt_slots=2, sample_slots=1, refill_rows=1)
    requests = [
        Request([1 + i], i, (0,), max_new_tokens=1 if i % 2 else NEW)
        for i in (0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)
    ]
    sampler.generate(requests, sampling_params(), seed=0, step=0)
    assert sampler.last_stats["new_tokens"] == 8 * NEW + 8
    assert sampler.last_stats["slot_occupancy"] == 1.0


def test_a_short_row_does_not_cut_the_run_of_a_long_one():
    """Two runs: until the first row is refilled, and until all are done."""
    sampler = make_sampler(prompt_slots=2, sample_slots=1, refill_rows=1)
    requests = [Request([1 + i], i, (0,), max_new_tokens=n) for i, n in enumerate((4, 1, NEW))]
    sampler.generate(requests, sampling_params(), seed=0, step=0)
    assert (sampler.last_stats["decode_steps"], sampler.last_stats["runs"]) == (1 + NEW, 2)


def test_idle_slots_take_waiting_samples_of_another_prompt():
    sampler = make_sampler(prompt_slots=4, sample_slots=2)
    sampler.generate([Request([5, 6, 7], 0, range(8))], sampling_params(), seed=0, step=0)
    assert sampler.last_stats["decode_steps"] == NEW
    assert sampler.last_stats["prefill_tokens"] == 2  # computed once, copied thrice


def test_prompts_fewer_than_slots_are_of_all_devices():
    sizes = SamplerSpec(prompt_buckets=(1,), max_new_tokens=9, prompt_slots=8, sample_slots=1)
    for parts, want in ((1, [0, 1, 2]), (2, [0, 4, 1]), (4, [0, 2, 4])):
        loads, _ = Slots([Request([i], i, (0,)) for i in range(3)], sizes, parts).assign()
        assert [(load.request, load.slot) for load in loads] == list(enumerate(want))


def test_the_bookkeeping_serves_every_sample_once():
    """Random limits and grids, without a device: each sample runs in one row, once, beside its own prompt."""
    rng = np.random.default_rng(0)
    for trial in range(20):
        requests = [Request([i], i, range(rng.integers(0, 9))) for i in range(rng.integers(1, 9))]
        sizes = {"prompt_slots": int(rng.integers(1, 5)), "sample_slots": int(rng.integers(1, 5))}
        slots = Slots(requests, SamplerSpec(prompt_buckets=(1,), max_new_tokens=9, **sizes))
        loaded, done = {}, []
        for _ in range(1000):
            for load in slots.assign()[0]:
                assert load.source is None or loaded[load.source] == load.request
                loaded[load.slot] = load.request
            if not slots.active.any():
                break
            for row, (request, _) in slots.owners():
                assert loaded[row[0]] == request == slots.rows().prompt_id[row[0]]
                if rng.random() < 0.4:
                    slots.advance(row, emitted(1))
                    done.append(slots.owners()[[r for r, _ in slots.owners()].index(row)][1])
                    slots.finish(row, "stop")
        want = [(i, j) for i, request in enumerate(requests) for j in range(len(request.sample_ids))]
        assert sorted(done) == want, trial
        assert all(sample is not None for group in slots.results for sample in group)


def test_nothing_compiles_after_warmup():
    sampler = make_sampler(stops=Stops(tokens=(7,)))
    sampler.warmup()
    weights = make_params(CONFIG)
    before = compile_count()
    rng = np.random.default_rng(4)
    for step in range(8):
        requests = [
            Request(rng.integers(0, VOCAB, rng.integers(1, 17)).tolist(), i, range(rng.integers(1, 9)))
            for i in range(rng.integers(1, 9))
        ]
        params = sampling_params(rng.choice([0.0, 0.5, 1.0]), int(rng.integers(0, 9)), rng.uniform(0.5, 1.0))
        sampler.set_params(weights)
        sampler.generate(requests, params, seed=step, step=step)
    assert compile_count() == before


def test_the_counter_sees_a_compile():
    before = compile_count()
    jax.jit(lambda x: x * 3.25 + before)(np.float32(1))
    assert compile_count() == before + 1


def test_the_weights_are_a_copy_and_can_be_replaced(samples):
    params = make_params(CONFIG)
    sampler = make_sampler()
    sampler.set_params(params)
    jax.tree.map(lambda x: x.delete(), params)
    assert_same(sampler.generate(make_requests()[:2], sampling_params(), seed=1, step=2), samples[:2])
    sampler.set_params(jax.tree.map(lambda x: 1.1 * x, make_params(CONFIG)))
    [group, _] = sampler.generate(make_requests()[:2], sampling_params(), seed=1, step=2)
    assert not np.allclose(group[0].logprobs, samples[0][0].logprobs)


def test_a_sampler_without_weights_says_so():
    spec = SamplerSpec(prompt_buckets=(8,), max_new_tokens=NEW, prompt_slots=1, sample_slots=1)
    with pytest.raises(ValueError, match="set_params"):
        Sampler(CONFIG, spec).generate(make_requests()[:1], sampling_params(), seed=1, step=2)


BAD_REQUESTS = {
    "longer than the largest bucket": {"prompt": [1] * 17},
    "prompt is empty": {"prompt": []},
    "token 300 is outside": {"prompt": [1, 300]},
    "token -1 is outside": {"prompt": [-1]},
    "max_new_tokens=0": {"max_new_tokens": 0},
    "max_new_tokens=13": {"max_new_tokens": 13},
    "begun=3 must": {"begun": 3},
    "id -2 must": {"sample_ids": (0, -2)},
    "id 2147483648 must": {"prompt_id": 2**31},
}


@pytest.mark.parametrize("message", BAD_REQUESTS)
def test_a_bad_request_is_refused_before_device_work(sampler, message):
    good = Request([1, 2], 5, (0,))
    with pytest.raises(ValueError, match=message) as error:
        sampler.generate([good, good._replace(**BAD_REQUESTS[message])], sampling_params(), seed=0, step=0)
    assert "request 1" in str(error.value)


def test_positions_that_the_model_does_not_have_are_refused():
    request = Request([1] * 10, 0, (0,))
    with pytest.raises(ValueError, match="10 prompt \\+ 12 new tokens exceed 20"):
        make_sampler(dataclasses.replace(CONFIG, max_position=20)).generate(
            [request], sampling_params(), seed=0, step=0
        )
    scaling = RopeScaling(type="dynamic", factor=2.0, original_max_position=21)
    with pytest.raises(ValueError, match="dynamic RoPE"):
        make_sampler(dataclasses.replace(CONFIG, rope_scaling=scaling)).generate(
            [request], sampling_params(), seed=0, step=0
        )


BAD_SETTINGS = {
    "prompt_slots=0": {"prompt_slots": 0},
    "smallest prompt bucket=0": {"prompt_buckets": ()},
    "stop token 300": {"stops": Stops(tokens=(300,))},
    "decode_text": {"stops": Stops(strings=("x",))},
    "empty": {"stops": Stops(strings=("",), decode_text=str)},
    "refill_rows=0": {"refill_rows": 0},
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_impossible_settings_are_refused(message):
    with pytest.raises(ValueError, match=message):
        make_sampler(**BAD_SETTINGS[message])
