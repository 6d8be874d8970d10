"""Stacking and packing: nothing is lost, everything fits, shapes come from tables."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rljax.batching import PackConfig, bucket, layout, likely_sizes, loss_mask, pack, stack
from rljax.trees import match_owners
from rljax.types import Trajectory


def trajectory(tokens, prompt_length, group, **fields):
    tokens = np.asarray(tokens, np.int32)
    mask = np.arange(len(tokens)) >= prompt_length
    return Trajectory(
        tokens=tokens,
        action_mask=mask,
        behavior_logprobs=np.where(mask, -1.0 - np.arange(len(tokens)), 0).astype(np.float32),
        entropies=np.zeros(len(tokens), np.float32),
        turn_ids=np.zeros(len(tokens), np.int32),
        policy_version=np.zeros(len(tokens), np.int32),
        prompt_id=group,
        group_id=group,
        episode_id=0,
        **fields,
    )


@st.composite
def rollouts(draw):
    rows = []
    for group in range(draw(st.integers(1, 4))):
        prompt = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
        for _ in range(draw(st.integers(1, 5))):
            completion = draw(st.lists(st.integers(0, 2), max_size=6))
            valid = draw(st.booleans()) or draw(st.booleans())
            rows.append(trajectory(prompt + completion, len(prompt), group + 7, is_valid=valid))
    return draw(st.permutations(rows))


@settings(max_examples=150, deadline=None)
@given(rollouts(), st.integers(12, 40), st.integers(1, 3), st.booleans(), st.booleans())
def test_every_loss_token_is_scored_once_on_its_own_path(rows, length, microbatch_size, share, split):
    """Follows predecessors from every scored token: the path must spell the row up to it."""
    batch = stack(rows)
    mask = loss_mask(batch)
    spec = PackConfig(length, microbatch_size=microbatch_size, share_prefixes=share)
    packing = layout(batch, mask, spec, parts=microbatch_size if split else 1)
    seen = np.zeros(batch.tokens.shape, int)
    length_of_scores = packing.packed.score_index.shape[-1]
    for m, q, c in np.argwhere(packing.place >= 0):
        line, t = divmod(int(packing.place[m, q, c]), packing.width)
        source = packing.source_row[m, q, line]
        assert packing.token[m, q, c] == source * batch.tokens.shape[1] + t
        r, k = divmod(int(packing.row_index[m, q, c]), length_of_scores)
        r += q * (microbatch_size // packing.place.shape[1])
        at, path = packing.packed.score_index[m, r, k], []
        assert packing.packed.positions[m, r, at] == t
        while at >= 0:
            path.append(int(packing.packed.tokens[m, r, at]))
            at = packing.packed.predecessor[m, r, at]
        assert path[::-1] == batch.tokens[source, : t + 1].tolist()
        seen[source, t] += 1
    np.testing.assert_array_equal(seen, mask)
    used = packing.packed.subtree_end > 0
    assert used.sum() == packing.unique_tokens <= packing.flat_tokens
    values = np.arange(mask.size, dtype=np.float32).reshape(mask.shape)
    np.testing.assert_array_equal(packing.batch_of(packing.of_tokens(values), values), np.where(mask, values, 0))


@settings(max_examples=50, deadline=None)
@given(rollouts())
def test_weights_and_counts_are_those_of_the_whole_minibatch(rows):
    batch = stack(rows)
    mask = loss_mask(batch)
    advantages = np.where(mask, np.arange(mask.size).reshape(mask.shape), np.nan).astype(np.float32)
    packed = pack(batch, advantages, PackConfig(12))
    assert (packed.rows.token_count == max(mask.sum(), 1)).all()
    np.testing.assert_allclose(packed.rows.loss_weights.sum(), float(mask.any()), rtol=1e-5)
    assert np.nansum(packed.rows.advantages) == np.nansum(advantages)
    assert (packed.rows.advantages[~packed.rows.loss_mask] == 0).all()


def test_groups_share_their_prompt_and_prompts_their_common_prefix():
    system = [1, 2, 3, 4]
    rows = [trajectory([*system, 10 + g, 20 + s], 5, g) for g in range(3) for s in range(4)]
    batch = stack(rows)
    packing = layout(batch, loss_mask(batch), PackConfig(32))
    assert packing.flat_tokens == 72 and packing.unique_tokens == 4 + 3 * (1 + 4)
    split = layout(batch, loss_mask(batch), PackConfig(9))  # a group alone: 5 + 4 tokens
    assert split.packed.tokens.shape[0] == 4 and split.unique_tokens == 3 * 9
    halved = layout(batch, loss_mask(batch), PackConfig(7))  # two of its four samples
    assert halved.unique_tokens == 6 * 7


def room(packing):
    used = (packing.packed.subtree_end > 0).any(axis=(1, 2)).sum()
    return int(used) * packing.packed.tokens.shape[1] * packing.packed.tokens.shape[2]


def test_what_is_packed_as_a_forest_follows_from_how_much_is_shared():
    """Left to choose, a tenth of shared tokens is packed as a forest, less only where it takes no more room."""
    rng, taken = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(60):
        shared = [int(rng.integers(0, 7)) for _ in range(5)]
        rows = [
            trajectory([*[g] * shared[g], *rng.integers(10, 10**6, rng.integers(15, 31))], 1, g)
            for g in range(5)
            for _ in "abc"
        ]
        batch = stack(rows)
        mask = loss_mask(batch)
        made = {share: layout(batch, mask, PackConfig(64, share_prefixes=share)) for share in (True, False, None)}
        shares = layout(batch, mask, PackConfig(512, share_prefixes=True))  # all in one packed row
        trie = 1 - shares.unique_tokens / shares.flat_tokens
        is_forest = made[None].unique_tokens < made[None].flat_tokens
        if trie >= 0.1:
            assert is_forest and room(made[None]) == room(made[True])
        else:
            assert room(made[None]) == min(room(made[True]), room(made[False]))
            taken[is_forest] += 1
    assert taken[True] > 0 and taken[False] > 0


def test_one_shape_whatever_the_rollout():
    spec = PackConfig(32, length_buckets=(32,), score_buckets=(32,), row_buckets=(16,), microbatch_buckets=(16,))
    shapes = set()
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = [
            trajectory(rng.integers(0, 5, rng.integers(5, 20)), int(rng.integers(1, 5)), g)
            for g in range(4)
            for _ in "ab"
        ]
        batch = stack(rows, row_buckets=(8,), length_buckets=(32,))
        packed = pack(batch, batch.action_mask.astype(np.float32), spec)
        shapes.add(tuple(np.shape(x) for x in jax.tree.leaves(packed)))
    assert len(shapes) == 1
    assert packed.packed.tokens.shape == packed.packed.score_index.shape == (16, 1, 32)
    assert packed.rows.source.shape == (16, 1, 16)


def test_the_packed_length_is_the_shortest_that_costs_no_microbatch():
    rows = [trajectory(np.arange(10), 5, g) for g in range(2)]
    batch = stack([r.replace(tokens=r.tokens + 20 * i) for i, r in enumerate(rows)])
    assert layout(batch, loss_mask(batch), PackConfig(80)).packed.tokens.shape == (1, 1, 20)
    assert layout(batch, loss_mask(batch), PackConfig(80, microbatch_size=2)).packed.tokens.shape == (1, 2, 20)


@pytest.mark.parametrize(("longest", "microbatches"), [(20, {1, 2}), (80, {1})])
def test_likely_sizes_are_those_of_minibatches_that_there_can_be(longest, microbatches):
    """Of automatic lengths, several microbatches have the longest alone."""
    batch = stack([trajectory(np.arange(20), 5, 0)])
    config = PackConfig(longest)
    packing = layout(batch, loss_mask(batch), config)
    assert packing.sizes.length == 20
    likely = likely_sizes(packing.needs, packing.sizes, config, per_part=1, width=batch.tokens.shape[1], count=8)
    assert {sizes.microbatches for sizes in likely} == microbatches


def test_padding_rows_are_an_invalid_group_of_their_own():
    batch = stack([trajectory([1, 2, 3], 1, 40), trajectory([1, 2], 1, 30)], row_buckets=(4,), length_buckets=(8,))
    np.testing.assert_array_equal(batch.group_id, [0, 1, 2, 2])
    np.testing.assert_array_equal(batch.is_valid, [True, True, False, False])
    np.testing.assert_array_equal(batch.lengths, [3, 2, 0, 0])
    assert batch.tokens.shape == (4, 8)


def test_a_rollout_without_loss_tokens_packs_to_nothing():
    batch = stack([trajectory([1, 2, 3], 1, 0, is_valid=False)])
    packed = pack(batch, np.zeros(batch.tokens.shape, np.float32), PackConfig(16))
    assert not packed.rows.loss_mask.any() and not (packed.packed.subtree_end > 0).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: layout(b := stack([trajectory(np.arange(9), 2, 0)]), loss_mask(b), PackConfig(8)),
            "raise pack_length to",
        ),
        (lambda: layout(b := stack([trajectory([1, 2], 0, 0)]), loss_mask(b), PackConfig(8)), "begin the prompt"),
        (lambda: stack([]), "no trajectories"),
        (lambda: stack([trajectory([1], 0, 0)], length_buckets=(0,)), "add a bucket of at least 1"),
        (lambda: bucket(5, (2, 4), "rows"), "rows is 5"),
        (lambda: PackConfig(0).check(), "config.update.pack_length=0"),
        (lambda: PackConfig(8, microbatch_size=0).check(), "config.update.microbatch_size=0"),
        (lambda: PackConfig(8, length_buckets=(4,)).check(), "must end with config.update.pack_length=8"),
        (lambda: PackConfig(8, row_buckets=(16, 8)).check(), r"config.update.row_buckets=\(16, 8\) must be increasing"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_large_rollout_packs_in_a_moment():
    import time

    rng = np.random.default_rng(0)
    rows = []
    for group in range(64):
        prompt = rng.integers(0, 1000, 500)
        rows += [trajectory(np.concatenate([prompt, rng.integers(0, 1000, 500)]), 500, group) for _ in range(8)]
    batch = stack(rows)
    start = time.process_time()
    packing = layout(batch, loss_mask(batch), PackConfig(8192))
    assert time.process_time() - start < 3.0
    assert packing.unique_tokens == 64 * (500 + 8 * 500)


IMAGE = 9
"""The id of every placeholder."""


def with_image(content, group, *, keyed=True, size=10, row=0):
    """A prompt of ten placeholders of one image, and a completion of three tokens of its own."""
    tokens = np.array([1, *[IMAGE] * size, 2, 3 + row, 4], np.int32)
    made = trajectory(tokens, size + 2, group)
    hashed = np.where(tokens == IMAGE, (content << 33) + np.arange(len(tokens)), tokens).astype(np.int64)
    return dataclasses.replace(made, token_keys=hashed) if keyed else made


def test_placeholders_of_different_contents_never_merge_and_those_of_equal_contents_do():
    size = 10

    def unique(*rows):
        batch = stack(rows)
        packing = layout(batch, loss_mask(batch), PackConfig(64, share_prefixes=True))
        return packing.unique_tokens, packing

    length = size + 4
    assert unique(with_image(1, 0, keyed=False), with_image(2, 1, keyed=False, row=1))[0] == length + 2
    assert unique(with_image(5, 0), with_image(5, 1, row=1))[0] == length + 2  # one image, seen twice
    apart, packing = unique(with_image(5, 0), with_image(6, 1, row=1))
    assert apart == 2 * length - 1  # only what stands before the image is shared
    assert sorted(packing.packed.tokens[packing.packed.subtree_end > 0].tolist()).count(IMAGE) == 2 * size

    # A hash that differs in its high half alone, or is negative, tells them apart as well.
    for other in (with_image(5 + (1 << 20), 1, row=1), with_image(-5, 1, row=1)):
        assert unique(with_image(5, 0), other)[0] == 2 * length - 1


def test_rows_without_keys_are_compared_by_their_ids_beside_rows_that_have_them():
    text = [trajectory(np.array([1, 2, 3 + i, 4], np.int32), 2, i) for i in range(2)]
    assert stack(text).token_keys is None
    keyed = dataclasses.replace(text[1], token_keys=text[1].tokens.astype(np.int64))
    batch = stack([text[0], keyed])
    assert batch.token_keys.shape == (*batch.tokens.shape, 2) and batch.token_keys.dtype == np.uint32
    np.testing.assert_array_equal(batch.token_keys[..., 1], batch.tokens)
    assert layout(batch, loss_mask(batch), PackConfig(64, share_prefixes=True)).unique_tokens == 6


def test_keys_that_are_the_ids_lay_out_what_no_keys_do():
    rng = np.random.default_rng(0)
    rows = [trajectory(rng.integers(1, 4, n).astype(np.int32), 2, int(n) % 3) for n in rng.integers(4, 12, 12)]
    keyed = [dataclasses.replace(t, token_keys=t.tokens.astype(np.int64)) for t in rows]
    made = [layout(b, loss_mask(b), PackConfig(32)) for b in (stack(rows), stack(keyed))]
    for a, b in zip(*map(jax.tree.leaves, made), strict=True):
        np.testing.assert_array_equal(a, b)


def test_owners_by_equal_text_go_by_keys():
    rows = [with_image(5, 0), with_image(6, 0, row=1), with_image(5, 0, row=2)]
    owners = np.asarray(match_owners(stack(rows)))
    np.testing.assert_array_equal(owners[1, :14], [0, *[1] * 13])
    np.testing.assert_array_equal(owners[2, :14], [0] * 12 + [2, 2])


def test_a_tree_that_one_sequence_cannot_hold_is_cut_between_its_limbs():
    """Filled up row by row, the first sequence would hold a leaf of the second limb, whose tokens the next repeats."""
    trunk, limbs = [1, 2], [[*range(10, 20)], [*range(20, 30)]]
    rows = [trajectory([*trunk, *limb, *range(100 * n, 100 * n + 4)], 2, 0) for limb in limbs for n in (1, 2, 3)]
    batch = stack(rows)
    whole = layout(batch, loss_mask(batch), PackConfig(64, share_prefixes=True))
    assert (whole.unique_tokens, whole.repeated_tokens) == (2 + 2 * (10 + 12), 0)
    cut = layout(batch, loss_mask(batch), PackConfig(40, share_prefixes=True))
    assert cut.packed.tokens.shape[0] == 2
    assert (cut.unique_tokens, cut.repeated_tokens) == (whole.unique_tokens + 2, 2)
