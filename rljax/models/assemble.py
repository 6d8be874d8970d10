"""From the tensors of a file to our stacked and sharded params, one weight at a time."""

import concurrent.futures
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rljax.models.config import DecoderConfig
from rljax.models.decoder import abstract_params
from rljax.models.families import Entry

Fetch = Callable[[Entry, slice], np.ndarray]
"""`fetch(entry, which)` -> the tensor as the file lays it out, lazily (a view of the mapped file) or computed: of one
that holds a matrix for each expert those of `which`, so that no others are computed; of any other all."""

_BLOCK = 512  # a transposed copy goes in square blocks that fit the cache: four times faster than one strided copy


def assemble(config: DecoderConfig, entries: Sequence[Entry], fetch: Fetch, shardings: Any = None) -> dict[str, Any]:
    """Params in `config.param_dtype`, their layers stacked.

    The host holds one weight (all its layers), or the shards of it that this process needs, at a time. `shardings` is
    a tree like the params of `jax.sharding.Sharding`; None puts everything on the default device.
    """
    by_path: dict[str, list[Entry]] = {}
    for entry in entries:
        by_path.setdefault(entry.weight.path, []).append(entry)
    abstract = abstract_params(config)
    params: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, group in by_path.items():
            leaf = weight_at(abstract, path)
            sharding = None if shardings is None else weight_at(shardings, path)
            *stack, name = path.split("/")
            target = params.setdefault(stack[0], {}) if stack else params
            target[name] = _leaf(group, leaf, fetch, sharding, pool)
    return params


def weight_at(tree: Mapping[str, Any], path: str) -> Any:
    """The leaf of a tree like the params at a path such as `head` or `layers/q`."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _leaf(group: list[Entry], leaf: jax.ShapeDtypeStruct, fetch: Fetch, sharding, pool) -> jax.Array:
    seen: dict[tuple, np.ndarray] = {}  # replicas ask for the same index again

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        whole = (slice(None),) * len(leaf.shape)
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index or whole, leaf.shape, strict=True))
        if bounds not in seen:
            seen[bounds] = _read_block(group, leaf, bounds, fetch, pool)
        return seen[bounds]

    if sharding is None:
        return jax.device_put(read(None))
    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _read_block(group, leaf, bounds, fetch: Fetch, pool) -> np.ndarray:
    out = _aligned_empty(tuple(stop - start for start, stop in bounds), np.dtype(leaf.dtype))
    if group[0].layer is None:
        _fill(out, fetch, group[0], bounds)
        return out
    start, stop = bounds[0]
    if group[0].expert is None:
        targets = [(out[entry.layer - start], bounds[1:], entry) for entry in group[start:stop]]
    else:
        first, last = bounds[1]
        wanted = [e for e in group if start <= e.layer < stop and first <= e.expert < last]
        targets = [(out[entry.layer - start, entry.expert - first], bounds[2:], entry) for entry in wanted]
    copies = [pool.submit(_fill, to, fetch, entry, where) for to, where, entry in targets]
    for copy in copies:
        copy.result()
    return out


def _fill(out: np.ndarray, fetch: Fetch, entry: Entry, bounds: tuple[tuple[int, int], ...]) -> None:
    """The part `bounds` of a weight into `out`."""
    window = tuple(slice(start, stop) for start, stop in bounds)
    which = slice(None)
    if len(window) == 3:
        which, *rest = window
        window = (slice(None), *rest)

    source = fetch(entry, which)
    source = source if entry.part is None else source[entry.part]
    transpose = entry.weight.transpose
    source = (source.swapaxes(-1, -2) if transpose else source)[window]
    if source.ndim < 3:
        _copy_matrix(out, source, transpose)
        return
    for matrix, own in zip(source, out, strict=True):
        _copy_matrix(own, matrix, transpose)


def _copy_matrix(out: np.ndarray, source: np.ndarray, transpose: bool) -> None:
    if not transpose:
        np.copyto(out, source, casting="same_kind" if source.dtype.itemsize >= out.dtype.itemsize else "unsafe")
        return
    for i, j in itertools.product(range(0, out.shape[0], _BLOCK), range(0, out.shape[1], _BLOCK)):
        block = (slice(i, i + _BLOCK), slice(j, j + _BLOCK))
        out[block] = source[block]


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory at a multiple of 64 bytes, which the CPU backend can take over without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)
