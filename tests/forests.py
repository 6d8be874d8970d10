"""Shared by the tests of trees: batches from fork columns, random forests, and the sets of leaves by plain loops."""

import dataclasses

import numpy as np
from hypothesis import strategies as st
from objectives import make_batch, map_fields

WIDTH = 12


def forest_batch(
    *,
    parent_row,
    fork_index,
    lengths,
    rewards=None,
    group_id=None,
    is_valid=None,
    prompt=1,
    seed=0,
    dtype=np.float32,
    **fields,
):
    """A batch with these fork columns; `lengths` are of whole rows, and a fork's tokens begin with its parent's."""
    rows = len(parent_row)
    lengths = np.asarray(lengths, np.int32)
    batch = make_batch(
        group_id=np.zeros(rows, np.int32) if group_id is None else group_id,
        rewards=np.zeros(rows) if rewards is None else rewards,
        lengths=np.maximum(lengths - prompt, 0),
        prompt=prompt,
        width=fields.pop("width", int(lengths.max())),
        is_valid=is_valid,
        seed=seed,
        dtype=dtype,
    )
    batch = dataclasses.replace(
        batch,
        lengths=lengths,
        parent_row=np.asarray(parent_row, np.int32),
        fork_index=np.asarray(fork_index, np.int32),
        **{name: np.asarray(value) for name, value in fields.items()},
    )
    for name in ("tokens", "behavior_logprobs", "entropies", "turn_ids"):
        values = getattr(batch, name)
        original = values.copy()
        for b in range(rows):
            for t in range(lengths[b]):
                values[b, t] = original[owner(batch, b, t), t]
    return batch


def owner(batch, row, t):
    """The row that generated token `t` of `row`."""
    while batch.parent_row[row] >= 0 and t < batch.fork_index[row]:
        row = int(batch.parent_row[row])
    return row


def leaves_below(batch, row, t, prompt):
    """The valid rows that hold token `t` of `row`."""
    return frozenset(
        j
        for j in range(len(batch.group_id))
        if batch.is_valid[j]
        and batch.group_id[j] == batch.group_id[row]
        and t < batch.lengths[j]
        and (t < prompt or owner(batch, j, t) == owner(batch, row, t))
    )


@st.composite
def random_forests(draw, *, max_rows=9, invalid=True):
    """A batch of one to three groups; forks anywhere, of forks too, some of them empty; rows in any order."""
    rows = draw(st.integers(1, max_rows))
    prompt = draw(st.integers(0, 3))
    groups, parents, forks, lengths = [], [], [], []
    for row in range(rows):
        parent = draw(st.integers(-1, row - 1))
        if parent < 0:
            groups.append(draw(st.integers(0, min(2, rows - 1))))
            forks.append(0)
            lengths.append(draw(st.integers(prompt + 1, WIDTH)))
        else:
            groups.append(groups[parent])
            forks.append(draw(st.integers(prompt, lengths[parent])))
            lengths.append(draw(st.integers(max(forks[-1], prompt + 1), WIDTH)))
        parents.append(parent)
    valid = draw(st.lists(st.booleans(), min_size=rows, max_size=rows)) if invalid else [True] * rows
    order = draw(st.permutations(range(rows)))  # new place of each row
    place = np.argsort(order)
    moved = [order[p] if p >= 0 else -1 for p in parents]
    rewards = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=rows, max_size=rows))

    def sort(values):
        return np.asarray(values)[place]

    return prompt, forest_batch(
        prompt=prompt,
        width=WIDTH,
        parent_row=sort(moved),
        fork_index=sort(forks),
        lengths=sort(lengths),
        group_id=sort(groups),
        is_valid=sort(valid),
        rewards=sort(rewards),
        seed=draw(st.integers(0, 5)),
    )


def permute(batch, order):
    """The batch with row `i` at place `order[i]`."""
    order = np.asarray(order)
    place = np.argsort(order)
    moved = map_fields(batch, lambda x: np.asarray(x)[place])
    parent = np.where(moved.parent_row >= 0, order[np.maximum(moved.parent_row, 0)], -1)
    return dataclasses.replace(moved, parent_row=parent.astype(np.int32))


def pad(batch, rows=2, columns=3):
    """The batch with padding rows below, of a group of their own, and padding columns, NaN where numbers may be."""

    def bigger(x):
        x = np.asarray(x)
        fill = np.nan if x.dtype.kind == "f" else 0
        return np.pad(x, [(0, rows), (0, columns)][: x.ndim], constant_values=fill)

    padded = map_fields(batch, bigger)
    count = len(batch.group_id)
    padded.parent_row[count:] = -1
    padded.group_id[count:] = batch.group_id.max() + 1
    return padded
