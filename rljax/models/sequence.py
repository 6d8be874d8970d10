"""Packed sequences that several devices share, along the `sequence` axis of the mesh (2407.21783, section 3.3.2).

A sequence shared by `n` devices is cut into `2 n` chunks; device `i` has chunks `i` and `2 n - 1 - i`. Later queries
see more keys, and so all devices see as many. Queries stay where they are: keys and values of a layer are gathered, and
their gradients added up where they came from. A delta rule passes over the whole of a sequence, and so each device has
some of its heads there. What is not activations (tokens, positions, ends of subtrees) is whole on every device.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from rljax.models.attention import Attention
from rljax.models.config import Delta
from rljax.models.decoder import Recall
from rljax.models.delta import forest_recall, parents
from rljax.parallel import RULES, constrain, partition_spec, split_axes, split_over

AXIS = RULES["positions"]
"""The mesh axis whose devices share sequences."""

CHUNKS = 2
"""Chunks of a sequence that a device has."""


class Shares(NamedTuple):
    """How the devices of the mesh in use share packed sequences.

    Activations stand in the order of shares: chunks 0, 2n - 1, 1, 2n - 2, ..., so that each device has its two side by
    side. `in_shares` takes other arrays there.
    """

    parts: int
    """Devices to a sequence."""
    length: int
    """Positions of a sequence."""

    @property
    def chunk(self) -> int:
        """Positions of a chunk."""
        return self.length // (CHUNKS * self.parts)

    def in_shares(self, x: Int[Array, "R S *d"]) -> Int[Array, "R S *d"]:
        """`x`, which is in packed order and whole on every device of a sequence, in the order of shares."""
        x = self._turned(x)
        # Left alone, the compiler would have each device send the others what they all hold.
        return constrain(x, ("batch", *(None,) * (x.ndim - 1)))

    def _turned(self, x: Shaped[Array, "R S *d"]) -> Shaped[Array, "R S *d"]:
        """`in_shares` of what a device has whole already."""
        chunks = x.reshape(x.shape[0], CHUNKS * self.parts, self.chunk, *x.shape[2:])
        early = chunks[:, : self.parts]
        late = chunks[:, self.parts :][:, ::-1]
        return jnp.stack([early, late], axis=2).reshape(x.shape)

    def in_order(self, x: Shaped[Array, "R S *d"]) -> Shaped[Array, "R S *d"]:
        """The reverse of `in_shares`."""
        pairs = x.reshape(x.shape[0], self.parts, CHUNKS, self.chunk, *x.shape[2:])
        return jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], axis=1).reshape(x.shape)

    def place(self, index: Int[Array, "*d"]) -> Int[Array, "*d"]:
        """Where the packed positions `index` stand in the order of shares."""
        chunk = index // self.chunk
        last = CHUNKS * self.parts - 1
        moved = jnp.where(chunk < self.parts, CHUNKS * chunk, CHUNKS * (last - chunk) + 1)
        return moved * self.chunk + index % self.chunk

    def attention(
        self, attention: Attention, positions: Int[Array, "R S"], subtree_end: Int[Array, "R S"]
    ) -> Attention:
        """`attention` of each device's queries to the gathered keys and values. It is called with arrays in the order
        of shares; `positions` and `subtree_end` here are in packed order."""

        def part(q, k, v, positions, subtree_end, window, sinks=None):
            k, v = (self.in_order(jax.lax.all_gather(x, AXIS, axis=1, tiled=True)) for x in (k, v))
            own = jax.lax.axis_index(AXIS)
            outs = []
            for i, chunk in enumerate((own, CHUNKS * self.parts - 1 - own)):
                queries = jax.lax.slice_in_dim(q, i * self.chunk, (i + 1) * self.chunk, axis=1)
                start = chunk * self.chunk
                outs.append(attention(queries, k, v, positions, subtree_end, window, query_start=start, sinks=sinks))
            return jnp.concatenate(outs, axis=1)

        def attend(q, k, v, _positions, _subtree_end, window, *, sinks=None):
            heads = ("batch", "positions", "kv_heads", None)
            row = ("batch", None)
            axes = (heads, heads, heads, row, row, ())
            arrays = (q, k, v, positions, subtree_end, jnp.asarray(window, jnp.int32))
            if sinks is None:
                return split_over(part, axes, heads)(*arrays)
            return split_over(part, (*axes, ("kv_heads",)), heads)(*arrays, sinks)

        return attend

    def recall(self, delta: Delta, subtree_end: Int[Array, "R S"]) -> Recall:
        """What tokens of packed forests recall (`rljax.models.delta.forest_recall`). It is called with arrays in the
        order of shares; `subtree_end` is in packed order. Each device gathers the layer's `mixed` [R, S, C], `g` and
        `beta` [R, S, H], recalls for its own heads, and sends others what is of their positions. Heads of keys that do
        not divide are recalled by every device."""
        divides = delta.key_heads % self.parts == 0

        def part(mixed, kernel, g, beta, subtree_end, parent):
            own = jax.lax.axis_index(AXIS)
            mixed, g, beta = (self.in_order(jax.lax.all_gather(x, AXIS, axis=1, tiled=True)) for x in (mixed, g, beta))
            if not divides:
                out = self._turned(forest_recall(delta, mixed, kernel, g, beta, subtree_end, parent))
                return jax.lax.dynamic_slice_in_dim(out, own * CHUNKS * self.chunk, CHUNKS * self.chunk, axis=1)

            def of_heads(x, axis):
                width = x.shape[axis] // self.parts
                return jax.lax.dynamic_slice_in_dim(x, own * width, width, axis=axis)

            # Channels are those of queries, of keys and of values, each of all heads.
            def of_channels(x, axis):
                parts = jnp.split(x, (delta.widths[0], 2 * delta.widths[0]), axis=axis)
                return jnp.concatenate([of_heads(one, axis) for one in parts], axis=axis)

            mixed, kernel = of_channels(mixed, 2), of_channels(kernel, 0)
            own_heads = delta.part(self.parts)
            out = forest_recall(own_heads, mixed, kernel, of_heads(g, 2), of_heads(beta, 2), subtree_end, parent)
            return jax.lax.all_to_all(self._turned(out), AXIS, split_axis=1, concat_axis=2, tiled=True)

        tokens, row = ("batch", "positions", None), ("batch", None)
        axes = (tokens, (None, None, None), tokens, tokens, row, row)
        run = split_over(part, axes, (*tokens, None))
        parent = parents(subtree_end)

        def recall(mixed, kernel, g, beta):
            return run(mixed, kernel, g, beta, subtree_end, parent), None

        return recall

    def states_at(self, hidden: Float[Array, "R S D"], places: Int[Array, "Rn W"]) -> Float[Array, "Rn W D"]:
        """The states in these places of the order of shares, for `places` that are `split`. All states are sent to all
        devices of a sequence, once; their gradients are added up where they came from."""

        def part(hidden, places):
            whole = jax.lax.all_gather(hidden, AXIS, axis=1, tiled=True)
            return jnp.take_along_axis(whole, places[..., None], axis=1)

        return _on_parts(part, (_ROWS, _SHARES), _SHARES)(hidden, places)

    def split(self, x: Shaped[Array, "R W"]) -> Shaped[Array, "Rn Wn"]:
        """Entries of sequences, `[R, W]`, as `[R * n, W / n]`: a line for each device's equal part. Zeros fill up."""
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.parts)))
        return _on_parts(lambda x: x, (_ROWS,), _SHARES)(x)

    def join(self, x: Shaped[Array, "Rn Wn"], width: int) -> Shaped[Array, "R W"]:
        """The reverse of `split`, for entries `[R, width]`."""
        return _on_parts(lambda x: x, (_SHARES,), _ROWS)(x)[:, :width]


_ROWS = partition_spec(("batch", "positions"))
_SHARES = partition_spec(("shares",))


def _on_parts(fn, in_specs: tuple[PartitionSpec, ...], out_specs: PartitionSpec):
    """`fn` on each device's part; what other mesh axes split is left to the compiler."""
    names = {*_SHARES[0]}
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)


def sequence_shares(rows: int, length: int) -> Shares | None:
    """How `rows` packed sequences of `length` positions are shared on the mesh in use (`use_mesh`); None where each is
    one device's own: without a `sequence` axis, and for rows or lengths that do not divide."""
    names = split_axes("positions", length)
    sizes = jax.sharding.get_abstract_mesh().shape
    parts = math.prod(sizes[name] for name in names)
    if parts == 1 or length % (CHUNKS * parts) or not split_axes("shares", rows * parts):
        return None
    return Shares(parts, length)
