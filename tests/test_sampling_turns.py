"""Turns continue contexts as if each had been sampled behind the whole of it, and compute only what is new."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from forward import row_logprobs
from jax.sharding import Mesh

from rljax.models import DecoderConfig, init_params
from rljax.parallel import MESH_AXES
from rljax.sampling import (
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
from rljax.sampling.sampler import by_part

VOCAB, NEW, LENGTH = 300, 10, 96
CONFIG = DecoderConfig(
    vocab_size=VOCAB, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
)
STOPS = (7, 11, 200, 31, 32, 33, 34, 35, 36, 37)


def params(config=CONFIG):
    return jax.tree.map(lambda x: 3 * x, init_params(config, jax.random.key(0)))


def make_decoder(config=CONFIG, *, stops=None, **sizes):
    sizes = {"rows": 3, "conversations": 6, "prefill_chunks": (4, 8), "check_every": 3} | sizes
    decoder = TurnDecoder(
        config, TurnDecoderSpec(context_length=LENGTH, max_new_tokens=NEW, **sizes), stops or Stops(tokens=STOPS)
    )
    decoder.set_params(params(config))
    decoder.begin(sampling_params(), seed=1, step=2)
    return decoder


def finish(decoder):
    spoken = []
    while decoder.num_open:
        spoken += decoder.run()
    return {said.turn.conversation: said for said in spoken}


def sampled_alone(tokens, prompt_id, sample_id, turn, config=CONFIG):
    """The same turn by `Sampler`, with the whole context as a prompt."""
    sampler = alone(config)
    request = Request(tokens, prompt_id, (sample_id * 2048 + turn,))
    return sampler.generate([request], sampling_params(), seed=1, step=2)[0][0]


@functools.lru_cache
def alone(config):
    spec = SamplerSpec(prompt_buckets=(LENGTH,), max_new_tokens=NEW, prompt_slots=1, sample_slots=1)
    sampler = Sampler(config, spec, Stops(tokens=STOPS))
    sampler.set_params(params(config))
    return sampler


def play(decoder, turns=4, conversations=6, seed=0):
    """Conversations of several turns with observations between; yields (context, tokens before, spoken)."""

    def text(most, *place):
        rng = np.random.default_rng([seed, *place])
        return rng.integers(40, VOCAB, rng.integers(1, most)).tolist()

    contexts, log = [text(20, i) for i in range(conversations)], []
    for turn in range(turns):
        for i, tokens in enumerate(contexts):
            decoder.submit(Turn(i, list(tokens), 50 + i, i, turn))
        spoken = finish(decoder)
        assert sorted(spoken) == list(range(conversations))
        for i, said in spoken.items():
            log.append((i, turn, list(contexts[i]), said))
            contexts[i] += said.tokens.tolist() + text(12, i, turn)
    return log


# The second layer has no window, and neither rotates as the other.
OTHERWISE = {"sliding_window": 5, "sliding_layers": (True, False), "local_rope_theta": 100.0, "post_norms": True}


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5}, OTHERWISE], ids=["plain", "window", "otherwise"])
def test_a_turn_is_what_the_sampler_says_behind_the_whole_context(changes):
    config = dataclasses.replace(CONFIG, **changes)
    log = play(make_decoder(config))
    for i, turn, tokens, said in log:
        want = sampled_alone(tokens, 50 + i, i, turn, config)
        np.testing.assert_array_equal(said.tokens, want.tokens)
        np.testing.assert_allclose(said.logprobs, want.logprobs, atol=2e-5)
        np.testing.assert_allclose(said.entropies, want.entropies, atol=2e-5)
        assert said.end == want.finish_reason
    assert {said.end for *_, said in log} == {"stop", "length"}


def test_logprobs_are_those_of_the_full_forward_pass():
    for _, _, tokens, said in play(make_decoder(), turns=3, conversations=3):
        want = row_logprobs(CONFIG, params(), tokens + said.tokens.tolist())[len(tokens) :]
        np.testing.assert_allclose(said.logprobs, want, atol=2e-5)


def test_only_what_is_new_is_computed():
    decoder = make_decoder()
    log = play(decoder)
    first = sum(len(tokens) - 1 for _, turn, tokens, _ in log if turn == 0)
    later = {(i, turn): (tokens, said) for i, turn, tokens, said in log}
    # the last token said is computed with the observation behind it, whose own last token is fed by the decoder
    new = sum(
        len(later[i, turn + 1][0]) - len(tokens) - len(said.tokens)
        for i, turn, tokens, said in log
        if (i, turn + 1) in later
    )
    assert decoder.stats["prefill_tokens"] == first + new
    assert decoder.stats["conversation_tokens"] == sum(len(tokens) - 1 for _, _, tokens, _ in log)


def test_a_context_begins_with_what_another_has_computed():
    decoder = make_decoder()
    tokens = np.random.default_rng(3).integers(40, VOCAB, 21).tolist()
    for i in range(5):
        decoder.submit(Turn(i, tokens, 9, i, prefix_of=0))
    spoken = finish(decoder)
    assert decoder.stats["prefill_tokens"] == 20 and decoder.stats["copied_tokens"] == 4 * 20
    for i in range(5):
        np.testing.assert_array_equal(spoken[i].tokens, sampled_alone(tokens, 9, i, 0).tokens)
    # a fork in the middle of what context 2 said
    forked = tokens + spoken[2].tokens.tolist()[:2]
    decoder.submit(Turn(5, forked, 9, 17, prefix_of=2))
    said = finish(decoder)[5]
    np.testing.assert_array_equal(said.tokens, sampled_alone(forked, 9, 17, 0).tokens)
    assert decoder.stats["prefill_tokens"] == 20


def test_a_context_that_was_rewritten_is_computed_again():
    decoder = make_decoder()
    tokens = list(range(50, 70))
    decoder.submit(Turn(0, tokens, 9, 0))
    finish(decoder)
    other = [*tokens[:5], 99, *tokens[6:]]
    decoder.submit(Turn(0, other, 9, 1))
    np.testing.assert_array_equal(finish(decoder)[0].tokens, sampled_alone(other, 9, 1, 0).tokens)
    assert decoder.stats["prefill_tokens"] == 19 + 14


@pytest.mark.slow
def test_turns_do_not_depend_on_company_or_rows():
    log = {(i, turn): said for i, turn, _, said in play(make_decoder())}
    for settings in ({"rows": 1}, {"rows": 6, "check_every": 1}, {"rows": 2, "check_every": 10}):
        for i, turn, _, said in play(make_decoder(**settings)):
            np.testing.assert_array_equal(said.tokens, log[i, turn].tokens)


def test_stop_strings_end_a_turn_and_the_context_goes_on_behind_them():
    def decode(ids):
        return " ".join(map(str, ids))

    plain = {(i, turn): said for i, turn, _, said in play(make_decoder())}
    target = next(said for said in plain.values() if len(said.tokens) >= 4 and said.turn.turn == 0)
    stop = decode(target.tokens[1:3].tolist())
    decoder = make_decoder(stops=Stops(STOPS, (stop,), decode))
    log = play(decoder)
    cut = [said for *_, said in log if said.end == "stop_string"]
    assert cut and all(decode(said.tokens.tolist()).endswith(stop) for said in cut)
    for i, turn, tokens, said in log:
        want = sampled_alone(tokens, 50 + i, i, turn).tokens
        np.testing.assert_array_equal(said.tokens, want[: len(said.tokens)])


def test_an_interrupted_turn_can_go_on():
    decoder = make_decoder(rows=2)
    for i in range(3):
        decoder.submit(Turn(i, list(range(50, 60 + i)), 9, i))
    decoder.run()
    with pytest.raises(RuntimeError, match="under way"):
        decoder.set_params(params())
    parts = decoder.interrupt()
    assert [len(said.tokens) for said in parts if said.end == "interrupted"][-1] == 0 and not decoder.num_open
    decoder.set_params(params())
    for said in parts:
        decoder.submit(said.turn._replace(tokens=[*said.turn.tokens, *said.tokens.tolist()], turn=1))
    assert sorted(finish(decoder)) == sorted(said.turn.conversation for said in parts)
    assert decoder.stats["prefill_tokens"] > 25  # the new weights have computed everything again


def test_a_turn_ends_where_its_context_is_full():
    decoder = make_decoder()
    decoder.submit(Turn(0, [50 + i % 40 for i in range(LENGTH - 1)], 9, 0))
    said = finish(decoder)[0]
    assert len(said.tokens) == 1 and said.end in ("length", "stop")


def test_nothing_compiles_after_warmup():
    decoder = make_decoder()
    decoder.warmup()
    before = compile_count()
    play(decoder, seed=5)
    decoder.submit(Turn(0, list(range(50, 90)), 9, 0, prefix_of=3))
    finish(decoder)
    assert compile_count() == before


def test_rows_have_the_room_that_the_longest_of_them_needs(monkeypatch):
    """A step reads all of it, so it grows and shrinks; nothing compiles for that, and turns stay what they were."""
    monkeypatch.setattr("rljax.sampling.spec._SMALLEST_CONTEXT", 16)
    decoder = make_decoder()
    assert decoder.spec.context_sizes == (16, 32, 64, LENGTH) and decoder.room == 0
    decoder.warmup()
    assert decoder.room == 16
    before = compile_count()
    rooms = []

    def run(decode=decoder.run):
        ended = decode()
        assert all(len(said.turn.tokens) - 1 <= decoder.room for said in ended)
        rooms.append(decoder.room)
        return ended

    monkeypatch.setattr(decoder, "run", run)
    log = play(decoder, turns=5)
    # A short one by itself, behind long ones.
    decoder.submit(Turn(0, list(range(50, 60)), 9, 0))
    finish(decoder)
    assert set(rooms[:-1]) == {16, 32, 64, decoder.spec.context_length + NEW + 3} and rooms[-1] == 16
    assert compile_count() == before

    for i, turn, tokens, said in log:
        want = sampled_alone(tokens, 50 + i, i, turn)
        np.testing.assert_array_equal(said.tokens, want.tokens)
        np.testing.assert_allclose(said.logprobs, want.logprobs, atol=2e-5)


def test_a_long_turn_is_handed_to_its_conversation_part_by_part(monkeypatch):
    """A row keeps the last few tokens to itself; nothing compiles for that, and turns stay what they were."""
    whole = make_decoder().cache_bytes()
    monkeypatch.setattr("rljax.sampling.turns._LONGEST_RING", 4)
    decoder = make_decoder()
    assert decoder.cache_bytes() < whole
    decoder.warmup()
    before = compile_count()
    log = play(decoder, turns=3)
    assert compile_count() == before and max(len(said.tokens) for *_, said in log) == NEW
    for i, turn, tokens, said in log:
        want = sampled_alone(tokens, 50 + i, i, turn)
        np.testing.assert_array_equal(said.tokens, want.tokens)
        np.testing.assert_allclose(said.logprobs, want.logprobs, atol=2e-5)
        assert said.end == want.finish_reason


@pytest.mark.parametrize("keep", [False, True])
def test_a_long_turn_that_is_interrupted_keeps_all_of_itself_or_nothing(keep, monkeypatch):
    """Whatever of it was handed over: what a run that goes on finds must not depend on how the turn was cut."""
    monkeypatch.setattr("rljax.sampling.turns._LONGEST_RING", 4)
    decoder = make_decoder(stops=Stops())
    context = list(range(40, 50))
    decoder.submit(Turn(1, context, 50, 0, 1))
    at_once = finish(decoder)[1].tokens.tolist()

    decoder.submit(Turn(0, context, 50, 0, 1))
    for _ in range(2):
        assert not decoder.run()
    (said,) = decoder.interrupt(keep=keep)
    decoder.begin(sampling_params(), seed=1, step=2)
    begun = len(said.tokens)
    rest = {"begun": begun, "drawn": begun, "max_new_tokens": NEW - begun}
    decoder.submit(Turn(0, [*context, *said.tokens.tolist()], 50, 0, 1, **rest))
    assert [*said.tokens.tolist(), *finish(decoder)[0].tokens.tolist()] == at_once
    assert begun == 6 and decoder.stats["prefill_tokens"] == (0 if keep else begun)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversation": 6}, "conversation 6 must lie between 0 and 5"),
        ({"tokens": []}, "0 tokens leave no room"),
        ({"tokens": [1] * LENGTH}, "96 tokens leave no room for a new one within context_length=96"),
        ({"prefix_of": -1}, "conversation 0: prefix_of=-1 must lie between 0 and 5"),
        ({"prefix_of": 6}, "conversation 0: prefix_of=6 must lie between 0 and 5"),
        ({"max_new_tokens": 11}, "max_new_tokens=11 must lie between 1 and 10"),
        ({"turn": 2048}, "turn 2048"),
    ],
)
def test_a_turn_that_cannot_be_served_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_decoder().submit(Turn(0, [1, 2], 0, 0)._replace(**change))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_length": 10}, "context_length=10 must be above max_new_tokens=10"),
        ({"rows": 0}, "rows=0 must be at least 1"),
        ({"prefill_chunks": (0, 8)}, "smallest of prefill_chunks=0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    good = {"conversations": 2, "rows": 1, "context_length": 32, "max_new_tokens": 10}
    with pytest.raises(ValueError, match=message):
        TurnDecoder(CONFIG, TurnDecoderSpec(**{**good, **settings}))


def test_stop_strings_without_a_way_to_text_are_refused():
    with pytest.raises(ValueError, match="stop_strings need decode_text"):
        make_decoder(stops=Stops(strings=("x",)))


def test_long_observations_are_scored_in_blocks(monkeypatch):
    monkeypatch.setattr("rljax.sampling.conversations.QUERY_BLOCK", 3)
    config = dataclasses.replace(CONFIG, rope_theta=5000.0)  # no program of another test fits it
    for i, turn, tokens, said in play(make_decoder(config, prefill_chunks=(4, 8)), turns=3):
        want = sampled_alone(tokens, 50 + i, i, turn, config)
        np.testing.assert_array_equal(said.tokens, want.tokens)
        np.testing.assert_allclose(said.logprobs, want.logprobs, atol=2e-5)


def test_a_stop_string_that_begins_before_a_turn_was_cut_off_ends_it():
    """A turn that goes on is told how many tokens were said of it: a string may begin in these, and not before them."""
    context = list(range(40, 50))
    first = sampled_alone(context, 50, 0, 0).tokens[0]
    stops = Stops(strings=(f"49><{first}>",), decode_text=lambda ids: "".join(f"<{i}>" for i in ids))
    decoder = make_decoder(stops=stops)
    for begun in (0, 1, 4):
        decoder.submit(Turn(begun, context, 50, 0, begun=begun))
    results = finish(decoder)

    assert len(results[0].tokens) == NEW and results[0].end == "length"
    for begun in (1, 4):
        assert (results[begun].tokens.tolist(), results[begun].end) == ([first], "stop_string")
    with pytest.raises(ValueError, match="begun=11 must lie between 0 and its 10 tokens"):
        decoder.submit(Turn(0, context, 50, 0, begun=11))


def test_a_turn_that_was_cut_off_goes_on_with_the_numbers_that_are_its_own():
    """Cut off again and again within a step, it says what it would have said at once."""
    decoder = make_decoder(stops=Stops())
    context = list(range(40, 50))
    decoder.submit(Turn(1, context, 50, 0, 1))
    at_once = finish(decoder)[1].tokens.tolist()

    tokens = list(context)
    while (left := NEW + len(context) - len(tokens)) > 0:
        drawn = len(tokens) - len(context)
        decoder.submit(Turn(0, tokens, 50, 0, 1, max_new_tokens=left, begun=drawn, drawn=drawn))
        (said,) = decoder.run() or decoder.interrupt()
        tokens = [*tokens, *said.tokens.tolist()]

    assert tokens == [*context, *at_once] and len(at_once) == NEW
    with pytest.raises(ValueError, match="drawn=2 must lie between 0 and begun=1"):
        decoder.submit(Turn(0, context, 50, 0, begun=1, drawn=2))


FOUR_PARTS = Mesh(np.array(jax.devices()[:1] * 4).reshape(2, 2, 1, 1, 1), MESH_AXES)
"""For what the host decides: nothing is computed on it."""


def test_on_a_mesh_turns_run_on_the_devices_that_keep_their_conversations():
    """Four parts of the devices: three conversations and two rows each, rounded up from eleven and five."""
    sizes = TurnDecoderSpec(conversations=11, rows=5, context_length=LENGTH, max_new_tokens=NEW)
    decoder = TurnDecoder(CONFIG, sizes, mesh=FOUR_PARTS)
    assert (decoder.parts, decoder.spec.conversations, decoder.spec.rows) == (4, 12, 8)

    # Conversations 0, 1 and 2 share two rows; the last one of all has rows of its own.
    for conversation in (1, 0, 2, 11):
        decoder.submit(Turn(conversation, [1, 2], 0, conversation))
    assert [(row, turn.conversation) for row, turn in decoder._choose()] == [(0, 1), (1, 0), (6, 11)]
    assert [turn.conversation for turn in decoder._waiting] == [2]


def test_on_a_mesh_conversations_are_taken_where_most_are_free():
    sizes = TurnDecoderSpec(conversations=12, rows=4, context_length=LENGTH, max_new_tokens=NEW)
    assert make_decoder().pick([5, 0, 3], near=0) == 5
    decoder = TurnDecoder(CONFIG, sizes, mesh=FOUR_PARTS)
    assert decoder.pick([11, 4, 5, 3]) == 4
    # Beside another one, where that does not leave its devices twice as busy.
    assert decoder.pick([11, 10, 4, 5, 3], near=9) == 11
    assert decoder.pick([11, 4, 5, 3], near=9) == 4


def test_entries_go_to_their_part_of_the_devices():
    places = [0, 1, 1, 1, 1, 1]
    batches = list(by_part("abcdef", places, 2, (4, 1)))
    assert batches == [["a", None, None, None, *"bcde"], [None, "f"]]
    assert list(by_part("abcde", [0] * 5, 1, (4, 1))) == [[*"abcd"], ["e"]]
