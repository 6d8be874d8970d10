"""Ragged trajectories as rows of one shape. Host, numpy.

Every dimension comes from a bucket table, and is a function of the data alone (not of earlier batches), so that a
resumed run meets the same shapes.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int, UInt32

from rljax.types import RolloutBatch, Trajectory

ROW_BUCKETS = tuple(sorted({m << p for p in range(17) for m in (1, 3)} - {1, 3}))
"""2, 4, 6, 8, 12, 16, 24, ... Used where no table is given."""
LENGTH_BUCKETS = tuple(b for b in ROW_BUCKETS if b >= 16)


def bucket(size: int, table: Sequence[int], what: str) -> int:
    """The smallest entry of the increasing `table` that holds `size`. ValueError when none does."""
    for entry in table:
        if entry >= size:
            return entry
    raise ValueError(f"{what} is {size}, but the largest bucket is {table[-1]}; add a bucket of at least {size}")


def stack(
    trajectories: Sequence[Trajectory],
    *,
    row_buckets: Sequence[int] = ROW_BUCKETS,
    length_buckets: Sequence[int] = LENGTH_BUCKETS,
) -> RolloutBatch:
    """Pads trajectories on the right and below into numpy arrays; row `i` is `trajectories[i]`.

    Groups, episodes and tasks are renumbered from 0 in order of appearance; padding rows form one invalid group,
    episode and task of their own. Optional fields are None unless all trajectories have them, columns are those that
    all have; states are renumbered too, those of two groups apart. ValueError for an empty list, fields of unequal
    length, and a column that is a number in one trajectory and an array in another.
    """
    if not trajectories:
        raise ValueError("there are no trajectories to stack; a rollout needs at least one")

    rows = bucket(len(trajectories), row_buckets, "the number of trajectories")
    lengths = [len(t.tokens) for t in trajectories]
    width = bucket(max(lengths), length_buckets, "the longest trajectory")

    def per_token(name: str, dtype, fill=0) -> np.ndarray:
        out = np.full((rows, width), fill, dtype)
        for i, trajectory in enumerate(trajectories):
            values = getattr(trajectory, name)
            if len(values) != lengths[i]:
                raise ValueError(f"trajectory {i}: {name} has {len(values)} entries for {lengths[i]} tokens")
            out[i, : lengths[i]] = values
        return out

    def per_row(name: str, dtype, fill=0) -> np.ndarray:
        values = [getattr(t, name) for t in trajectories]
        return np.array(values + [fill] * (rows - len(values)), dtype)

    def renumbered(name: str) -> np.ndarray:
        seen: dict[int, int] = {}
        # Padding rows get the number after the last.
        values = [seen.setdefault(getattr(t, name), len(seen)) for t in trajectories]
        return np.array(values + [len(seen)] * (rows - len(values)), np.int32)

    # Half a column would make the statistics of a group those of a part of it.
    def on_all(name: str) -> bool:
        return all(getattr(t, name) is not None for t in trajectories)

    return RolloutBatch(
        tokens=per_token("tokens", np.int32),
        action_mask=per_token("action_mask", bool),
        behavior_logprobs=per_token("behavior_logprobs", np.float32),
        entropies=per_token("entropies", np.float32),
        turn_ids=per_token("turn_ids", np.int32),
        policy_version=per_token("policy_version", np.int32),
        lengths=np.array(lengths + [0] * (rows - len(lengths)), np.int32),
        reward=per_row("reward", np.float32),
        is_valid=per_row("is_valid", bool, False),
        is_truncated=per_row("is_truncated", bool),
        group_id=renumbered("group_id"),
        episode_id=renumbered("episode_id"),
        source=per_row("source", np.int32),
        parent_row=per_row("parent_row", np.int32, -1),
        fork_index=per_row("fork_index", np.int32),
        fork_score=per_row("fork_score", np.float32),
        intervention=per_row("intervention", np.int32),
        task_id=renumbered("task_id"),
        turn_rewards=per_token("turn_rewards", np.float32) if on_all("turn_rewards") else None,
        state_ids=_state_ids(per_token("state_ids", np.int64, -1), trajectories) if on_all("state_ids") else None,
        token_keys=_token_keys(trajectories, (rows, width)),
        experts=_experts(trajectories, (rows, width)) if on_all("experts") else None,
        drawn=per_token("drawn", bool) if on_all("drawn") else None,
        columns={name: _column(name, trajectories, (rows, width)) for name in _shared_names(trajectories)},
    )


def _shared_names(trajectories: Sequence[Trajectory]) -> list[str]:
    """The columns that every trajectory has, in the order of the first one's."""
    return [name for name in trajectories[0].columns if all(name in t.columns for t in trajectories)]


def _token_keys(trajectories: Sequence[Trajectory], shape: tuple[int, int]) -> UInt32[np.ndarray, "B T 2"] | None:
    """The halves of the keys, as a device without 64-bit integers takes them; ids serve trajectories without keys."""
    if all(t.token_keys is None for t in trajectories):
        return None

    keys = np.zeros(shape, np.int64)
    for i, trajectory in enumerate(trajectories):
        of_row = trajectory.tokens if trajectory.token_keys is None else trajectory.token_keys
        if len(of_row) != len(trajectory.tokens):
            raise ValueError(
                f"trajectory {i}: token_keys has {len(of_row)} entries for {len(trajectory.tokens)} tokens"
            )
        keys[i, : len(of_row)] = of_row
    halves = keys.view(np.uint64)[..., None] >> np.array([32, 0], np.uint64)
    return (halves & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _experts(trajectories: Sequence[Trajectory], shape: tuple[int, int]) -> Int[np.ndarray, "B T L K"]:
    """The record of each token, -1 in the padding."""
    first = trajectories[0].experts
    assert first is not None
    out = np.full((*shape, *first.shape[1:]), -1, np.int16)
    for i, trajectory in enumerate(trajectories):
        of_row = trajectory.experts
        assert of_row is not None
        if len(of_row) != len(trajectory.tokens):
            raise ValueError(f"trajectory {i}: experts has {len(of_row)} entries for {len(trajectory.tokens)} tokens")
        out[i, : len(of_row)] = of_row
    return out


def _column(
    name: str, trajectories: Sequence[Trajectory], shape: tuple[int, int]
) -> Float[np.ndarray, " B"] | Float[np.ndarray, "B T"]:
    """Column `name` as float32 [B, T] where its values are arrays and [B] where they are numbers; 0 in the padding."""
    values = [np.asarray(t.columns[name], np.float32) for t in trajectories]
    dimensions = {value.ndim for value in values}
    if len(dimensions) > 1 or max(dimensions) > 1:
        raise ValueError(
            f"column {name!r} has values of {sorted(dimensions)} dimensions; give every trajectory a number, or every "
            "trajectory one number per token"
        )

    out = np.zeros(shape[: 1 + values[0].ndim], np.float32)
    for i, (value, trajectory) in enumerate(zip(values, trajectories, strict=True)):
        if value.ndim and len(value) != len(trajectory.tokens):
            raise ValueError(
                f"trajectory {i}: column {name!r} has {len(value)} entries for {len(trajectory.tokens)} tokens"
            )
        out[(i, slice(value.size)) if value.ndim else i] = value
    return out


def _state_ids(states: np.ndarray, trajectories: Sequence[Trajectory]) -> Int[np.ndarray, "B T"]:
    """Ids [B, T] of any size, negative for none, as numbers from 0 for each pair of group and state; -1 for none."""
    groups = np.array([t.group_id for t in trajectories] + [-1] * (len(states) - len(trajectories)), np.int64)
    pairs = np.stack([np.broadcast_to(groups[:, None], states.shape), states], axis=-1)[states >= 0]
    out = np.full(states.shape, -1, np.int32)
    out[states >= 0] = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    return out


def take_rows(batch: RolloutBatch, rows: Int[np.ndarray, " n"]) -> RolloutBatch:
    """The batch of these rows alone. `group_id` and `parent_row` keep pointing into the whole batch."""
    return jax.tree.map(lambda x: np.asarray(x)[rows], batch)
