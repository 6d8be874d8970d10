"""Scored groups as plain bytes and back: a header in JSON and raw arrays, so that reading them runs nothing."""

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rljax.rollouts.actor import ScoredGroup
from rljax.sampling import Sample
from rljax.tasks import Example, RewardResult

_ARRAY = "\0array"
"""The only key of an object of the header that stands for an array: dtype, shape and where its bytes begin."""


_SPANS = ("forced", "shared", "spoken")
"""Fields of a sample that are spans of its tokens."""


def to_bytes(value: Any) -> bytes:
    """Numbers, texts, None, lists, dicts with names for keys, and numpy arrays among them. Tuples become lists.
    TypeError for anything else."""
    arrays: list[np.ndarray] = []
    size = 0

    def plain(node: Any) -> Any:
        nonlocal size
        if isinstance(node, np.ndarray):
            array = np.ascontiguousarray(node)
            if array.dtype.hasobject:
                raise TypeError(f"an array of {array.dtype} is no plain data")
            arrays.append(array)
            size += array.nbytes
            return {_ARRAY: [array.dtype.str, list(node.shape), size - array.nbytes]}
        if isinstance(node, np.generic):
            return node.item()
        if isinstance(node, Mapping):
            if any(not isinstance(key, str) or key == _ARRAY for key in node):
                raise TypeError(f"the keys {list(node)!r:.100} are not all names")
            return {key: plain(item) for key, item in node.items()}
        if isinstance(node, (list, tuple)):
            return [plain(item) for item in node]
        return node

    # Half characters are escaped, so that any text can be told.
    header = json.dumps(plain(value)).encode("ascii")
    return b"".join([struct.pack("<Q", len(header)), header, *(array.tobytes() for array in arrays)])


def from_bytes(data: bytes) -> Any:
    """The inverse. Arrays are the caller's own."""
    (length,) = struct.unpack_from("<Q", data)
    start = 8 + length

    def whole(node: dict[str, Any]) -> Any:
        if set(node) != {_ARRAY}:
            return node
        dtype, shape, offset = node[_ARRAY]
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(data, np.dtype(dtype), count, start + offset).reshape(shape).copy()

    return json.loads(data[8:start], object_hook=whole)


def plain_group(group: ScoredGroup) -> dict[str, Any]:
    """A group for `to_bytes`. Of its example the id alone: whoever asked for it has the row."""
    samples = [sample._asdict() for sample in group.samples]
    results = [vars(result) for result in group.results]
    return {**group._asdict(), "example": group.example.id, "samples": samples, "results": results}


def group_of(plain: Mapping[str, Any], example_of: Callable[[int], Example]) -> ScoredGroup:
    """The inverse, with the row that `example_of` has of the id."""
    samples = [
        Sample(**sample | {name: tuple((start, stop) for start, stop in sample[name]) for name in _SPANS})
        for sample in plain["samples"]
    ]
    results = [RewardResult(**{**result, "not_applied": tuple(result["not_applied"])}) for result in plain["results"]]
    return ScoredGroup(
        **{**plain, "example": example_of(plain["example"]), "samples": samples, "results": results},
    )
