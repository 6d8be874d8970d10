"""What changes logits before they are drawn from changes them alike where they are scored."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.batching import build_forest, pad_rows
from rljax.models import DecoderConfig, hidden_states, init_params, logits
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
from rljax.sampling.logits import Penalties
from rljax.sampling.row_scorer import RowScorer
from rljax.sampling.score import score_tokens
from rljax.types import Packed

VOCAB = 40
LENGTH = 24
CONFIG = DecoderConfig(
    vocab_size=VOCAB, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)
PROMPTS = ([3, 4, 5, 4], [7, 3])


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 4 * x, init_params(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def sampler(params):
    sampler = Sampler(CONFIG, SamplerSpec(prompt_buckets=(8,), max_new_tokens=12, prompt_slots=2, sample_slots=2))
    sampler.set_params(params)
    return sampler


@pytest.fixture(scope="module")
def scorer(params):
    scorer = RowScorer(CONFIG, None, rows=4, length=LENGTH)
    scorer.set_params(params)
    return scorer


@functools.partial(jax.jit)
def _forward(params, row):
    ends = jnp.full(row.shape, row.shape[1])
    hidden = hidden_states(CONFIG, params, row, jnp.arange(row.shape[1])[None], ends)
    return logits(CONFIG, params, hidden)


def model_logits(params, prompt, completion):
    """float64 [T, V] of the completion's tokens, as the model has them."""
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(prompt) + len(completion)] = [*prompt, *completion]
    found = np.asarray(_forward(params, row), np.float64)[0]
    return found[len(prompt) - 1 : len(prompt) - 1 + len(completion)]


def log_softmax(z):
    shifted = z - z.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def generate(sampler, sampling):
    requests = [Request(prompt, i, range(4)) for i, prompt in enumerate(PROMPTS)]
    return sampler.generate(requests, sampling, seed=1, step=0)


def check_scored_alike(sampler, scorer, params, sampling, change, temperature):
    """Log-probs of the sampler and of the trainer are those of the model's logits, changed by `change(z, before)`."""
    for prompt, group in zip(PROMPTS, generate(sampler, sampling), strict=True):
        for sample, scored in zip(group, scorer(prompt, [s.tokens for s in group], sampling), strict=True):
            z = model_logits(params, prompt, sample.tokens.tolist())
            changed = [change(row, sample.tokens[:t].tolist(), prompt) / temperature for t, row in enumerate(z)]
            want = log_softmax(np.array(changed))[np.arange(len(z)), sample.tokens]
            np.testing.assert_allclose(sample.logprobs, want, atol=2e-5)
            np.testing.assert_allclose(scored, want, atol=2e-5)


def test_a_bias_and_a_ban_are_in_the_logprobs_of_sampler_and_trainer(sampler, scorer, params):
    plain = np.concatenate([s.tokens for group in generate(sampler, sampling_params(0.7)) for s in group])
    banned = np.bincount(plain).argsort()[-2:].tolist()
    sampling = sampling_params(0.7, logit_bias={11: 3.0, 12: -2.0}, banned=banned)

    def change(z, said, prompt):
        z = z.copy()
        z[11] += 3.0
        z[12] -= 2.0
        z[banned] = -1e30
        return z

    check_scored_alike(sampler, scorer, params, sampling, change, 0.7)
    tokens = np.concatenate([s.tokens for group in generate(sampler, sampling) for s in group])
    assert not np.isin(tokens, banned).any()
    assert (tokens == 11).sum() > (plain == 11).sum()

    # Greedy too; and other values, of no larger number, compile nothing.
    before = compile_count()
    generate(sampler, sampling_params(0.7, logit_bias={1: 0.5}, banned=[2]))
    assert compile_count() == before
    (best,) = {int(s.tokens[0]) for s in generate(sampler, sampling_params(0.0))[0]}
    (second,) = {int(s.tokens[0]) for s in generate(sampler, sampling_params(0.0, banned=[best]))[0]}
    first = model_logits(params, PROMPTS[0], [best])[0]
    assert [best, second] == first.argsort()[:-3:-1].tolist()


class Following(NamedTuple):
    """A grammar over characters by Python's `re`: what may follow is what some completion that is known begins with."""

    name: str
    width: int
    known: tuple[tuple[int, ...], ...]

    def begin(self):
        return _Begun(self, [])


class _Begun(NamedTuple):
    grammar: Following
    said: list

    def allowed(self):
        bits = np.zeros((self.grammar.width, 32), bool)
        for tokens in self.grammar.known:
            if len(tokens) > len(self.said) and list(tokens[: len(self.said)]) == self.said:
                bits.reshape(-1)[tokens[len(self.said)]] = True
        return np.packbits(bits, axis=1, bitorder="little").view(np.uint32)[:, 0]

    def advance(self, tokens):
        self.said.extend(tokens)


def test_penalties_are_those_of_the_tokens_before_on_either_side(sampler, scorer, params):
    """Against counting in NumPy; presence and frequency are of the completion alone, as vLLM has them."""
    own = sampling_params(0.8, logit_bias={4: 1.0}, penalties=Penalties(1.7, 0.6, 0.9))

    def change(z, said, prompt):
        z = z.copy()
        z[4] += 1.0
        for token in {*prompt, *said}:
            z[token] = z[token] / 1.7 if z[token] > 0 else z[token] * 1.7
        for token in set(said):
            z[token] -= 0.6 + 0.9 * said.count(token)
        return z

    check_scored_alike(sampler, scorer, params, own, change, 0.8)
    plain = [s.tokens.tolist() for group in generate(sampler, sampling_params(0.8)) for s in group]
    penalised = [s.tokens.tolist() for group in generate(sampler, own) for s in group]
    assert sum(len(set(tokens)) for tokens in penalised) > sum(len(set(tokens)) for tokens in plain)


def test_penalties_on_a_forest_are_those_of_its_rows_and_so_are_gradients(params):
    """A prompt, two completions with a common beginning, and one chunk or several; gradients by differences."""
    rows = [[3, 4, 3, 5, 5, 6], [3, 4, 3, 5, 7, 5, 8], [9, 4, 4, 4]]
    first = [2, 2, 1]
    forest = build_forest(*pad_rows(rows))
    own = sampling_params(0.8, penalties=Penalties(1.7, 0.6, 0.9))
    sampled = np.zeros(len(forest.tokens), bool)
    for row, start, tokens in zip(forest.row_index, first, rows, strict=True):
        sampled[row[start : len(tokens)]] = True
    packed = Packed(
        tokens=forest.tokens[None],
        positions=forest.positions[None],
        predecessor=forest.predecessor[None],
        subtree_end=forest.subtree_end[None],
        score_index=np.where(sampled, np.arange(len(sampled)), -1)[None].astype(np.int32),
    )

    def want(params):
        found = np.zeros(len(sampled))
        for row, start, tokens in zip(forest.row_index, first, rows, strict=True):
            z = model_logits(params, tokens[:start], tokens[start:])
            for t, token in enumerate(tokens[start:]):
                said = tokens[start : start + t]
                for before in {*tokens[:start], *said}:
                    z[t, before] *= 1 / 1.7 if z[t, before] > 0 else 1.7
                for before in set(said):
                    z[t, before] -= 0.6 + 0.9 * said.count(before)
                found[row[start + t]] = log_softmax(z[t] / 0.8)[token]
        return found

    for chunk in (4, 64):
        score = jax.jit(lambda p, chunk=chunk: score_tokens(CONFIG, p, packed, own, chunk=chunk)[0])
        np.testing.assert_allclose(score(params)[0], want(params), atol=2e-5)
        gradient = jax.grad(lambda p, score=score: score(p).sum())(params)
        # Along one direction of the embeddings, which are the head too.
        direction = jax.tree.map(jnp.zeros_like, params)
        direction["embedding"] = jax.random.normal(jax.random.key(1), params["embedding"].shape)
        moved = [jax.tree.map(lambda p, d, e=e: p + e * d, params, direction) for e in (3e-4, -3e-4)]
        slope = (want(moved[0]).sum() - want(moved[1]).sum()) / 6e-4
        np.testing.assert_allclose(jnp.vdot(gradient["embedding"], direction["embedding"]), slope, rtol=2e-3)


def test_nothing_is_sampled_that_leads_out_of_a_grammar_and_forks_go_on_in_it(params):
    """Against sampling from the set of all that may be said, by enumeration."""
    known = ((5, 6, 1), (5, 7, 8, 1), (9, 35, 1))
    grammar = Following("known", 2, known)
    stops = Stops(tokens=(1,))
    spec = SamplerSpec(prompt_buckets=(8,), max_new_tokens=6, prompt_slots=2, sample_slots=2, path_slots=3)
    sampler = Sampler(CONFIG, spec, stops)
    sampler.set_params(params)

    def forks(samples):
        return [Fork(0, 1, 50), Fork(1, 0, 51)] if len(samples) == 3 else []

    requests = [
        Request(PROMPTS[0], 0, range(3), grammar=grammar, rounds=forks),
        Request(PROMPTS[1], 1, range(3)),
    ]
    bound, free = sampler.generate(requests, sampling_params(3.0), seed=0, step=0)
    assert len(bound) == 5 and all(tuple(s.tokens.tolist()) in known for s in bound)
    assert {s.grammar for s in bound} == {"known"} and {s.grammar for s in free} == {""}

    # The other request samples what it does alone.
    (alone,) = sampler.generate(requests[1:], sampling_params(3.0), seed=0, step=0)
    assert [s.tokens.tolist() for s in alone] == [s.tokens.tolist() for s in free]

    for sample in bound:
        said = sample.tokens.tolist()
        z = model_logits(params, PROMPTS[0], said) / 3.0
        for t, row in enumerate(z):
            may = sorted({k[t] for k in known if len(k) > t and list(k[:t]) == said[:t]})
            want = log_softmax(row[may])[may.index(said[t])]
            np.testing.assert_allclose(sample.logprobs[t], want, atol=2e-5)


KNOWN = ((5, 6, 1), (5, 7, 8, 1), (9, 35, 1), (5, 5, 9, 5, 1))


def penalised(z, tokens, is_own):
    """Logits of one place behind `tokens`, by counting."""
    z = z.copy()
    z[4] += 1.0
    own = [token for token, counts in zip(tokens, is_own, strict=True) if counts]
    for token in set(tokens):
        z[token] = z[token] / 1.7 if z[token] > 0 else z[token] * 1.7
    for token in set(own):
        z[token] -= 0.6 + 0.9 * own.count(token)
    return z


def turn_decoder(params, sampling, check_every=3):
    sizes = {"conversations": 4, "rows": 3, "context_length": LENGTH, "max_new_tokens": 5, "prefill_chunks": (4,)}
    spec = TurnDecoderSpec(**sizes, check_every=check_every, suppressed=(5, 9))
    decoder = TurnDecoder(CONFIG, spec, Stops(tokens=(1,)))
    decoder.set_params(params)
    decoder.begin(sampling, seed=1, step=2)
    return decoder


def spans_of(is_own):
    """[start, stop) of the runs of True."""
    edges = np.flatnonzero(np.diff([0, *is_own, 0]))
    return tuple((int(start), int(stop)) for start, stop in edges.reshape(-1, 2))


def play_turns(decoder, grammars, interrupts=False):
    """Three turns of each conversation, with the same observation between: {(conversation, turn): (all tokens before,
    which of them are own, tokens, log-probs)}. Of conversation 3 the second turn begins with a suppressed token."""
    tokens = {i: list(PROMPTS[i % 2]) for i in grammars}
    is_own = {i: [False] * len(tokens[i]) for i in grammars}
    log = {}

    def submit(i, turn, begun):
        suppress = not begun and (i, turn) == (3, 1)
        own = spans_of(is_own[i])
        room = 5 - begun
        decoder.submit(
            Turn(i, list(tokens[i]), i, i, turn, None, room, begun, begun, (), suppress, own=own, grammar=grammars[i])
        )

    for turn in range(3):
        begun = dict.fromkeys(grammars, 0)
        for i in grammars:
            log[i, turn] = (list(tokens[i]), list(is_own[i]), [], [])
            submit(i, turn, 0)
        while decoder.num_open:
            results = decoder.run()
            results += decoder.interrupt() if interrupts else []
            for result in results:
                i = result.turn.conversation
                said = result.tokens.tolist()
                own = [not (result.turn.suppress and place == 0) for place in range(len(said))]
                tokens[i] += said
                is_own[i] += own
                begun[i] += len(said)
                log[i, turn][2].extend(said)
                log[i, turn][3].extend(result.logprobs.tolist())
                if result.end == "interrupted":
                    submit(i, turn, begun[i])
        for i in grammars:
            tokens[i] += [4, 5]
            is_own[i] += [False, False]
    return log


def test_over_turns_a_grammar_begins_anew_and_penalties_count_what_the_row_has_sampled(params):
    """Against loops over all that stands before; rows beside them follow none; a turn that is cut off goes on alike;
    and the trainer scores the same of whole rows."""
    grammar = Following("known", 2, KNOWN)
    own = sampling_params(2.0, logit_bias={4: 1.0}, penalties=Penalties(1.7, 0.6, 0.9))
    grammars = {0: grammar, 1: None, 2: grammar, 3: None}
    log = play_turns(turn_decoder(params, own), grammars)

    for (i, turn), (before, is_own, said, logprobs) in log.items():
        z = model_logits(params, before, said)
        for t, token in enumerate(said):
            is_suppressed = (i, turn, t) == (3, 1, 0)
            mine = [(i, turn, place) != (3, 1, 0) for place in range(t)]
            row = penalised(z[t], before + said[:t], is_own + mine) / 2.0
            may = np.arange(VOCAB)
            if grammars[i] is not None:
                may = np.array(sorted({k[t] for k in KNOWN if len(k) > t and list(k[:t]) == said[:t]}))
            assert token in may and not (is_suppressed and token in (5, 9))
            want = 0.0 if is_suppressed else log_softmax(row[may])[may.tolist().index(token)]
            np.testing.assert_allclose(logprobs[t], want, atol=2e-5)
        assert grammars[i] is None or tuple(said) in KNOWN

    again = play_turns(turn_decoder(params, own, check_every=1), grammars, interrupts=True)
    assert {key: said for key, (_, _, said, _) in again.items()} == {key: said for key, (_, _, said, _) in log.items()}

    # What the trainer is told of a row: which tokens are the policy's, of which those of one turn alone are scored.
    for i in (1, 3):
        before, is_own, said, logprobs = log[i, 2]
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(before) + len(said)] = [*before, *said]
        place = np.arange(LENGTH)[None]
        is_last = (place >= len(before)) & (place < len(before) + len(said))
        packed = Packed(
            tokens=row,
            positions=place,
            predecessor=place - 1,
            subtree_end=np.full_like(place, len(before) + len(said)),
            score_index=np.where(is_last, place, -1),
            drawn=is_last | np.pad(is_own, (0, LENGTH - len(is_own)))[None],
        )
        scored = jax.jit(lambda packed: score_tokens(CONFIG, params, packed, own)[0])(packed)
        np.testing.assert_allclose(np.asarray(scored)[is_last], logprobs, atol=2e-5)


def decode_letters(ids):
    return "".join(chr(0x100 + i) for i in ids)


def test_each_request_ends_at_stops_of_its_own(sampler, params):
    """Against cutting what is sampled without any; requests beside it go on."""
    stops = Stops(decode_text=decode_letters)
    own = Sampler(CONFIG, dataclasses.replace(sampler.spec, check_every=3), stops)
    own.set_params(params)
    plain = generate(sampler, sampling_params())
    strings = (decode_letters(plain[0][0].tokens[4:6].tolist()), decode_letters(plain[0][1].tokens[2:3].tolist()))
    requests = [Request(prompt, i, range(4)) for i, prompt in enumerate(PROMPTS)]
    bound, free = own.generate([requests[0]._replace(stop=strings), requests[1]], sampling_params(), seed=1, step=0)
    assert [s.tokens.tolist() for s in free] == [s.tokens.tolist() for s in plain[1]]

    ends = []
    for sample, whole in zip(bound, plain[0], strict=True):
        texts = [decode_letters(whole.tokens[:n].tolist()) for n in range(len(whole.tokens) + 1)]
        end = next((n for n, text in enumerate(texts) if any(s in text for s in strings)), None)
        assert len(sample.tokens) == (len(whole.tokens) if end is None else end)
        assert (sample.finish_reason == "stop_string") == (end is not None)
        ends.append(end)
    assert ends[0] is not None and ends[1] is not None
    with pytest.raises(ValueError, match=r"^request 0 .*hold an empty text"):
        own.generate([requests[0]._replace(stop=("",))], sampling_params(), seed=1, step=0)


def test_the_most_probable_tokens_are_told_beside_what_was_sampled(sampler, params):
    telling = Sampler(CONFIG, dataclasses.replace(sampler.spec, top_logprobs=3, path_slots=1), Stops())
    telling.set_params(params)
    forks = [Fork(0, 2, 9)]
    request = Request(PROMPTS[0], 0, range(2), rounds=lambda samples: forks if len(samples) == 2 else [])
    sampling = sampling_params(0.8, top_k=2, logit_bias={3: 2.0})
    (group,) = telling.generate([request], sampling, seed=1, step=0)
    for sample in group:
        z = model_logits(params, PROMPTS[0], sample.tokens.tolist())
        z[:, 3] += 2.0
        best = np.argsort(-z, axis=1)[:, :2]
        np.testing.assert_array_equal(sample.top_tokens[:, :2], best)
        kept = np.take_along_axis(z, best, axis=1) / 0.8
        np.testing.assert_allclose(sample.top_logprobs[:, :2], log_softmax(kept), atol=2e-5)
        assert (sample.top_logprobs[:, 2] < -1e29).all()  # truncated: it could not have been sampled
