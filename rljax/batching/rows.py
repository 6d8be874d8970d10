"""Between rows as they are stored, ragged, and as losses see them, `[B, T]`. Device, jax.

A whole minibatch is stored by its loss tokens. Positions of rows exist for one microbatch at a time, within the program
that uses them.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from rljax.types import ArrayLike, RaggedRows, Rows


def spread(rows: RaggedRows, values: ArrayLike) -> Array:
    """`values [*M, Q, C]`, one per loss token, at their places of the rows `[*M, B, T]`, 0 elsewhere.

    Line `l` of part `q` is row `q * L + l`. Differentiable in `values`.
    """
    place = jnp.asarray(rows.place)
    values = jnp.asarray(values)
    lines = rows.source.shape[-1]
    room = lines * rows.width

    # Padding goes to places of its own beyond the room, which drops it: indices stay sorted and unique.
    beyond = room + jnp.arange(place.shape[-1])
    where = jnp.where(place >= 0, place, beyond)

    def lay(where: Array, values: Array) -> Array:
        empty = jnp.zeros(room, values.dtype)
        return empty.at[where].set(values, mode="drop", indices_are_sorted=True, unique_indices=True)

    # Mapped over parts, which tells the compiler that none of them reaches into another.
    laid = jnp.vectorize(lay, signature="(c),(c)->(t)")(where, values)
    return laid.reshape(*_rows_shape(rows), rows.width)


def gather(rows: RaggedRows, values: ArrayLike) -> Array:
    """The inverse: of `values [*M, B, T]` those of the loss tokens, `[*M, Q, C]`, 0 in padding."""
    place = jnp.asarray(rows.place)
    flat = jnp.asarray(values).reshape(*place.shape[:-1], rows.source.shape[-1] * rows.width)
    taken = jnp.take_along_axis(flat, jnp.maximum(place, 0), axis=-1)
    return jnp.where(place >= 0, taken, jnp.zeros((), taken.dtype))


def dense_rows(rows: RaggedRows) -> Rows:
    """What losses see of a microbatch, or with an axis `M` of all of them: `[*M, B, T]`, `B = Q * L`."""

    def of_rows(values: ArrayLike) -> Array:
        return jnp.asarray(values).reshape(_rows_shape(rows))

    of_tokens = {name: spread(rows, value) for name, value in rows.columns.items()}
    behavior = spread(rows, rows.behavior_logprobs)
    return Rows(
        loss_mask=spread(rows, rows.loss_mask),
        loss_weights=spread(rows, rows.loss_weights),
        token_count=jnp.asarray(rows.token_count),
        advantages=spread(rows, rows.advantages),
        behavior_logprobs=behavior,
        old_logprobs=behavior if rows.old_logprobs is None else spread(rows, rows.old_logprobs),
        source=of_rows(rows.source),
        ref_logprobs=_maybe(lambda x: spread(rows, x), rows.ref_logprobs),
        uniforms=_maybe(lambda x: spread(rows, x), rows.uniforms),
        columns=of_tokens | {name: of_rows(value) for name, value in rows.row_columns.items()},
    )


def ragged_rows(rows: Rows, like: RaggedRows) -> RaggedRows:
    """`like` with the values of `rows` on its loss tokens; the loss mask stays that of `like`."""

    def of_rows(values: ArrayLike) -> Array:
        return jnp.asarray(values).reshape(like.source.shape)

    return dataclasses.replace(
        like,
        loss_weights=gather(like, rows.loss_weights),
        token_count=rows.token_count,
        advantages=gather(like, rows.advantages),
        behavior_logprobs=gather(like, rows.behavior_logprobs),
        old_logprobs=gather(like, rows.old_logprobs),
        source=of_rows(rows.source),
        ref_logprobs=_maybe(lambda x: gather(like, x), rows.ref_logprobs),
        uniforms=_maybe(lambda x: gather(like, x), rows.uniforms),
        columns={name: gather(like, rows.columns[name]) for name in like.columns},
        row_columns={name: of_rows(rows.columns[name]) for name in like.row_columns},
    )


def bare_rows(rows: RaggedRows) -> RaggedRows:
    """Without what not every minibatch has: what scoring takes, so that all are scored by one program."""
    return dataclasses.replace(
        rows, old_logprobs=None, ref_logprobs=None, uniforms=None, columns={}, row_columns={}, teacher={}
    )


def _maybe(of: Callable[[ArrayLike], Array], values: ArrayLike | None) -> Array | None:
    return None if values is None else of(values)


def _rows_shape(rows: RaggedRows) -> tuple[int, ...]:
    """`[*M, B]`."""
    *leading, parts, lines = rows.source.shape
    return (*leading, parts * lines)
