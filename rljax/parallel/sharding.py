"""Where arrays live: one table from logical axis names to mesh axes.

Weights and activations name their axes logically ("embed", "heads", "batch"); a table of rules says which mesh axes
split each. Changing the layout of a run is changing the table.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from rljax.parallel.mesh import own_mesh, spread_mesh

AnyMesh = Mesh | AbstractMesh
"""An abstract mesh (sizes without devices) is enough to plan a layout."""

Rules = Mapping[str, str | tuple[str, ...] | None]
"""Logical axis -> the mesh axis or axes that split it, or None."""

RULES: Rules = {
    "batch": ("data", "fsdp", "expert"),
    "positions": "sequence",
    "shares": ("data", "fsdp", "expert", "sequence"),
    "layers": None,
    "embed": ("fsdp", "sequence", "expert"),
    "experts": "expert",
    "expert_embed": ("fsdp", "sequence"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
"""For training: weights and optimizer state are split over every device but the `data` replicas. `positions` are those
of packed sequences, `shares` the parts of them that devices have, `expert_embed` the width of the residual stream in
weights of experts, which `experts` splits already."""

DECODE_RULES: Rules = {**RULES, "embed": None, "expert_embed": None}
"""For decoding: weights whole along `fsdp`, since a step of one token is too short to gather them in."""


def partition_spec(axes: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
    """The `PartitionSpec` of an array with these logical axes. ValueError for an axis without a rule, and when two
    axes claim the same mesh axis."""
    claimed: dict[str, str] = {}
    parts: list[str | tuple[str, ...] | None] = []
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ValueError(f"logical axis {axis!r} has no rule; the rules know {', '.join(rules)}")
        part = None if axis is None else rules[axis]
        for name in _names(part):
            if name in claimed:
                raise ValueError(
                    f"axes {tuple(axes)}: {claimed[name]!r} and {axis!r} both claim mesh axis {name!r}; "
                    f"map one of them to another mesh axis or to None"
                )
            claimed[name] = str(axis)
        parts.append(part)
    return PartitionSpec(*parts)


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else part


def named_sharding(
    mesh: AnyMesh, axes: Sequence[str | None], shape: Sequence[int], rules: Rules = RULES, *, name: str = "array"
) -> NamedSharding:
    """The sharding of one array. ValueError, with `name`, when a dimension does not divide over its mesh axes."""
    if len(axes) != len(shape):
        raise ValueError(f"{name} has shape {tuple(shape)} but axes {tuple(axes)}; give one axis name per dimension")
    spec = partition_spec(axes, rules)
    for axis, size, part in zip(axes, shape, spec, strict=True):
        if unknown := [n for n in _names(part) if n not in mesh.shape]:
            raise ValueError(f"axis {axis!r} is mapped to mesh axis {unknown[0]!r}; the mesh has {mesh.axis_names}")
        parts = math.prod(mesh.shape[n] for n in _names(part))
        if size % parts:
            sizes = " x ".join(f"{n}={mesh.shape[n]}" for n in _names(part))
            raise ValueError(
                f"{name}: axis {axis!r} of size {size} does not divide over {sizes}; choose a mesh whose "
                f"{' x '.join(_names(part))} divides {size}, or map {axis!r} to None in the rules"
            )
    return NamedSharding(mesh, spec)


def shardings(mesh: AnyMesh, axes_tree: Any, shapes_tree: Any, rules: Rules = RULES) -> Any:
    """A tree of `NamedSharding`, one for each array of `shapes_tree` (arrays or `ShapeDtypeStruct`s).

    `axes_tree` is the same tree with a tuple of logical axis names (or None) on each leaf. Errors as in
    `named_sharding`, naming the array by its path.
    """

    def leaf(path, axes, array):
        return named_sharding(
            mesh, axes, array.shape, rules, name=jax.tree_util.keystr(path, simple=True, separator="/")
        )

    return jax.tree_util.tree_map_with_path(leaf, axes_tree, shapes_tree, is_leaf=_is_axes)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(item is None or isinstance(item, str) for item in node)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: AnyMesh, *, axis: int = 0, rules: Rules = RULES) -> NamedSharding:
    """Dimension `axis` is split as a batch, the others are whole; fits arrays of any rank above `axis`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, rules["batch"]))


def batch_parts(mesh: AnyMesh, rules: Rules = RULES) -> int:
    """Into how many parts a batch is split; batch sizes must be multiples of it."""
    return math.prod(mesh.shape[name] for name in _names(rules["batch"]))


def put_batch(mesh: AnyMesh, tree: Any, *, axis: int = 0, rules: Rules = RULES) -> Any:
    """Host arrays to devices, dimension `axis` split as a batch; arrays without that dimension are replicated.

    In a multi-process run every process passes the same global arrays and sends its own part only. ValueError when a
    batch does not divide.
    """
    sharding = batch_sharding(mesh, axis=axis, rules=rules)
    parts = batch_parts(mesh, rules)

    def put(path, value):
        value = np.asarray(value)
        if value.ndim <= axis:
            return put_host(value, replicated(mesh))
        if value.shape[axis] % parts:
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "batch"
            raise ValueError(
                f"{name}: batch of {value.shape[axis]} does not divide over {parts} devices "
                f"({' x '.join(f'{n}={mesh.shape[n]}' for n in _names(rules['batch']))}); "
                f"make it a multiple of {parts}, or the mesh smaller along these axes"
            )
        return put_host(value, sharding)

    return jax.tree_util.tree_map_with_path(put, tree)


def put_host(tree: Any, sharding: Any) -> Any:
    """Host arrays, the same in every process, to devices. `sharding` is one sharding or a tree of them."""

    def put(value, where):
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

    if isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(lambda value: put(value, sharding), tree)
    return jax.tree.map(put, tree, sharding)


def reshard(params: Any, target: Any) -> Any:
    """The same arrays under the shardings of `target`, on whichever devices these are; from the host too."""
    return jax.device_put(params, target)


def mesh_of(tree: Any) -> Mesh:
    """The mesh that the arrays of a tree lie on, by the first of them. TypeError where it lies on none."""
    mesh = _sharding_of(jax.tree.leaves(tree)[0]).mesh
    if not isinstance(mesh, Mesh):
        raise TypeError(f"{mesh} has no devices")
    return mesh


def _sharding_of(x: Array) -> NamedSharding:
    if not isinstance(x.sharding, NamedSharding):
        raise TypeError(f"an array {x.shape} lies on no mesh: {x.sharding}")
    return x.sharding


def own_part(tree: Any, mesh: Mesh) -> Any:
    """What arrays hold on the devices of `mesh`, as arrays on them alone: nothing is copied. Their shardings name axes
    as `mesh` does, and split them over its devices in the same parts as over all: those of `spread_mesh` and
    `own_mesh`."""

    def part(x: Array) -> Array:
        where = NamedSharding(mesh, _sharding_of(x).spec)
        shards = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, where, shards)

    return jax.tree.map(part, tree)


def hand_over(params: Any, target: Any) -> Any:
    """Copies of weights under the shardings of `target`, on devices of this process. They last when the weights are
    donated.

    Weights that are spread over several processes come to the learner's devices of each first, split there along
    `tensor` alone: one array after another, since these devices hold the training state as well. All processes must
    come here.
    """

    def one(x: Array, where: NamedSharding) -> Array:
        if x.is_fully_addressable:
            return jax.device_put(x, where, may_alias=False)

        # `spread_mesh` has the axes of the learner's mesh, of which all but `tensor` leave weights whole.
        everywhere = spread_mesh(mesh_of(x))
        copies = jax.jit(_same, out_shardings=NamedSharding(everywhere, _sharding_of(x).spec))(x)
        own = jax.device_put(own_part(copies, own_mesh(everywhere)), where)

        # Without a wait all arrays would be on their way at once.
        return jax.block_until_ready(own)

    return jax.tree.map(one, params, target)


def _same(x: Array) -> Array:
    return x


def constrain(x: Array, axes: Sequence[str | None], rules: Rules = RULES) -> Array:
    """Asks the compiler to split activation `x` by its logical axes; without a mesh (`use_mesh`) `x` as it is.

    A dimension that does not divide over its mesh axes is left to the compiler: decoding a single prompt on eight
    devices is legal. Weights and batches are where this is an error.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    auto = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}

    # Only Auto axes may be constrained: inside shard_map the others are Manual.
    parts: list[Any] = []
    for size, part in zip(x.shape, partition_spec(axes, rules), strict=True):
        names = tuple(name for name in _names(part) if name in auto)
        divides = size % math.prod(mesh.shape[name] for name in names) == 0
        parts.append((names or None) if divides else PartitionSpec.UNCONSTRAINED)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts))


def split_axes(axis: str, size: int, rules: Rules = RULES) -> tuple[str, ...]:
    """The axes of the mesh in use that split a dimension of `size` entries with the logical axis `axis`; none without a
    mesh (`use_mesh`), and where the dimension does not divide over them."""
    mesh = jax.sharding.get_abstract_mesh()
    auto = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    names = tuple(name for name in _names(rules[axis]) if name in auto and mesh.shape[name] > 1)
    return () if size % math.prod(mesh.shape[name] for name in names) else names


class Shard(NamedTuple):
    """A device's part of arrays that are split along their first dimension."""

    number: Array | int
    """Which part it is."""
    axes: tuple[str, ...]
    """Mesh axes that split the dimension; none where every device holds the whole of it."""

    @property
    def parts(self) -> int:
        """How many there are."""
        return jax.lax.axis_size(self.axes) if self.axes else 1

    def sum(self, x: Array) -> Array:
        """The sum of `x` over all parts, on each of them."""
        return jax.lax.psum(x, self.axes) if self.axes else x

    def max(self, x: Array) -> Array:
        """The largest `x` of all parts, on each of them."""
        return jax.lax.pmax(x, self.axes) if self.axes else x

    def running(self, x: Array) -> tuple[Array, Array]:
        """The sums of the integers `x` over the parts before this one, and over all."""
        if not self.axes:
            return jnp.zeros_like(x), x
        every = jax.lax.all_gather(x, self.axes)
        is_before = jnp.arange(self.parts) < self.number
        return jnp.tensordot(is_before.astype(x.dtype), every, 1), jnp.sum(every, axis=0)


WHOLE = Shard(0, ())
"""The one part of what is not split."""


def on_shards(
    fn: Callable[..., Any],
    in_axes: Sequence[Sequence[str | None]],
    out_axes: Sequence[str | None],
    rules: Rules = RULES,
) -> Callable[..., Any]:
    """`fn(*arrays, shard)` on each device's own part of its arrays, so that indexing them needs no other device's
    part. `shard` tells which part of the first dimension of the first array that is.

    `in_axes` are the logical axes of each array, `out_axes` those of the result, or of each of several. Mesh axes over
    which some dimension does not divide are left out: their devices all do the same work. Without a mesh `fn` sees
    whole arrays.
    """

    def call(*arrays: Array) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        auto = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
        if not auto or mesh.size == 1:
            return fn(*arrays, WHOLE)

        # An axis that fails for one array is left out for all: a device must hold matching parts of each.
        left_out = {*mesh.axis_names} - auto
        for array, axes in zip(arrays, in_axes, strict=True):
            for size, part in zip(array.shape, partition_spec(axes, rules), strict=True):
                if size % math.prod(mesh.shape[name] for name in _names(part)):
                    left_out |= {*_names(part)}

        def spec(axes):
            parts = (tuple(n for n in _names(part) if n not in left_out) for part in partition_spec(axes, rules))
            return PartitionSpec(*(names or None for names in parts))

        in_specs = tuple(spec(axes) for axes in in_axes)
        first = _names(in_specs[0][0]) if in_specs[0] else ()

        def run(*arrays):
            return fn(*arrays, Shard(jax.lax.axis_index(first) if first else 0, first))

        return jax.shard_map(run, in_specs=in_specs, out_specs=spec(out_axes), check_vma=False)(*arrays)

    return call


def split_over(
    fn: Callable[..., Array],
    in_axes: Sequence[Sequence[str | None]],
    out_axes: Sequence[str | None],
    rules: Rules = RULES,
) -> Callable[..., Array]:
    """`on_shards` of a function for which it does not matter which part it sees: the parts need nothing of each
    other, and the compiler cannot split it itself."""
    return on_shards(lambda *arguments: fn(*arguments[:-1]), in_axes, out_axes, rules)
