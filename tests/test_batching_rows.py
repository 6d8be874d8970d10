"""Rows are stored by their loss tokens, and losses see them as [B, T]."""

import jax
import numpy as np
import pytest

from rljax.batching import PackConfig, dense_rows, gather, layout, loss_mask, pack, ragged_rows, spread, stack
from rljax.types import Trajectory


def trajectory(rng, prompt, length, group, gap=0):
    """A completion of `length` tokens, of which the first `gap` after the third were not sampled."""
    tokens = np.concatenate([prompt, rng.integers(3, 1000, length)]).astype(np.int32)
    mask = np.arange(len(tokens)) >= len(prompt)
    mask[len(prompt) + 3 : len(prompt) + 3 + gap] = False
    zeros = np.zeros(len(tokens), np.int32)
    return Trajectory(
        tokens=tokens,
        action_mask=mask,
        behavior_logprobs=np.where(mask, -rng.random(len(tokens)), 0).astype(np.float32),
        entropies=np.zeros(len(tokens), np.float32),
        turn_ids=zeros,
        policy_version=zeros,
        prompt_id=group,
        group_id=group,
        episode_id=0,
        source=group % 2,
        columns={"token": mask * rng.random(len(tokens)), "row": float(rng.random())},
    )


def rollout(groups, size, lengths, gap=0):
    rng = np.random.default_rng(0)
    prompts = [np.concatenate([[1], rng.integers(3, 1000, 15)]) for _ in range(groups)]
    return stack([trajectory(rng, prompts[g], int(lengths(rng)), g, gap) for g in range(groups) for _ in range(size)])


@pytest.mark.parametrize("parts", [1, 2])
def test_dense_rows_hold_every_loss_token_at_its_position(parts):
    batch = rollout(6, 4, lambda rng: rng.integers(1, 30), gap=4)
    mask = loss_mask(batch)
    advantages = np.random.default_rng(1).normal(size=mask.shape).astype(np.float32)
    config = PackConfig(64, microbatch_size=2)
    packing = layout(batch, mask, config, parts=parts)
    rows = dense_rows(pack(batch, advantages, config, packing=packing).rows)
    source_row = packing.source_row.reshape(len(packing.source_row), -1)
    kept = source_row >= 0
    seen = np.zeros(len(mask), int)
    np.add.at(seen, source_row[kept], 1)
    np.testing.assert_array_equal(seen, mask.any(axis=1))

    wanted = {
        "loss_mask": mask,
        "advantages": advantages,
        "behavior_logprobs": batch.behavior_logprobs,
        "old_logprobs": batch.behavior_logprobs,
        "loss_weights": mask / np.float32(mask.sum()),
    }
    for name, values in wanted.items():
        found = np.asarray(getattr(rows, name))
        assert found.shape[-1] == 64
        found = found[..., : mask.shape[1]]
        np.testing.assert_array_equal(found[kept], np.where(mask, values, 0)[source_row[kept]], err_msg=name)
        assert not found[~kept].any()
    np.testing.assert_array_equal(rows.source[kept], batch.source[source_row[kept]])
    np.testing.assert_array_equal(rows.columns["row"][kept], batch.columns["row"][source_row[kept]])
    np.testing.assert_array_equal(
        rows.columns["token"][kept][:, : mask.shape[1]], batch.columns["token"][source_row[kept]]
    )


def test_storing_and_laying_out_are_inverse_and_so_are_their_gradients():
    batch = rollout(4, 3, lambda rng: rng.integers(1, 20), gap=2)
    stored = pack(batch, batch.action_mask.astype(np.float32), PackConfig(64)).rows
    back = ragged_rows(dense_rows(stored), stored.replace(old_logprobs=stored.behavior_logprobs))
    for got, want in zip(
        jax.tree.leaves(back), jax.tree.leaves(stored.replace(old_logprobs=stored.behavior_logprobs)), strict=True
    ):
        np.testing.assert_array_equal(got, want)

    values = np.random.default_rng(0).normal(size=stored.place.shape).astype(np.float32)
    dense, pull = jax.vjp(lambda x: spread(stored, x), values)
    slopes = np.random.default_rng(1).normal(size=dense.shape).astype(np.float32)
    np.testing.assert_array_equal(pull(slopes)[0], gather(stored, slopes))


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_rows_take_little_whatever_the_longest_is(sigma):
    """Twenty bytes of fields a loss token, and padding: where the microbatches fill their bucket, less than 30."""
    batch = rollout(32, 8, lambda rng: np.clip(rng.lognormal(np.log(200), sigma), 1, 2000))
    rows = pack(batch, batch.action_mask.astype(np.float32), PackConfig(2048, microbatch_size=4)).rows
    filled = rows.loss_mask.any(axis=(1, 2)).mean()
    of_tokens = sum(x.nbytes for x in jax.tree.leaves(rows)) - sum(x.nbytes for x in rows.row_columns.values())
    of_tokens -= rows.columns["token"].nbytes
    assert of_tokens * filled / batch.lengths.sum() < 30
