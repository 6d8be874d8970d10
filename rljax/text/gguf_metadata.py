"""The key-value part of a GGUF file, read without touching the tensors.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Reading 49k-token vocabularies through general
readers takes seconds, since they wrap each string in arrays; this takes a fraction of one and needs no package.
"""

import mmap
import os
import struct
from collections.abc import Callable
from typing import Any

# numbers of the types of values
_STRING = 8
_ARRAY = 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_VERSIONS = (2, 3)


def read_gguf_metadata(path: str | os.PathLike, wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Any]:
    """Metadata of the GGUF file as plain numbers, booleans, strings and lists; only keys that are `wanted`.

    Raises ValueError if the file is no little-endian GGUF of version 2 or 3, or ends early.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read(data, path, wanted)
            except (struct.error, IndexError):
                raise ValueError(
                    f"{path} ends in the middle of its metadata; the file is truncated, get it again"
                ) from None


def _read(data: mmap.mmap, path: str | os.PathLike, wanted: Callable[[str], bool]) -> dict[str, Any]:
    (version,) = struct.unpack_from("<I", data, 4)
    if version not in _VERSIONS:
        raise ValueError(
            f"{path} is GGUF version {version}; versions {_VERSIONS}, little-endian, can be read: convert it again"
        )

    _, count = struct.unpack_from("<QQ", data, 8)  # tensors, keys
    metadata: dict[str, Any] = {}
    offset = 24
    for _ in range(count):
        key, offset = _string(data, offset)
        (kind,) = struct.unpack_from("<I", data, offset)
        # what is not wanted must be walked over all the same, since lengths stand in front of their values
        keep = wanted(key)
        value, offset = _value(data, offset + 4, kind, keep, path)
        if keep:
            metadata[key] = value
    return metadata


def _string(data: mmap.mmap, offset: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, offset)
    end = offset + 8 + length
    if end > len(data):
        raise IndexError
    return data[offset + 8 : end].decode("utf-8"), end


def _value(data: mmap.mmap, offset: int, kind: int, keep: bool, path: str | os.PathLike) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(data, offset)

    if kind == _ARRAY:
        item, length = struct.unpack_from("<IQ", data, offset)
        offset += 12
        if item in _SCALARS:
            form = f"<{length}{_SCALARS[item]}"
            end = offset + struct.calcsize(form)
            return (list(struct.unpack_from(form, data, offset)) if keep else None), end

        # strings and arrays have lengths of their own
        values = []
        for _ in range(length):
            value, offset = _value(data, offset, item, keep, path)
            if keep:
                values.append(value)
        return values, offset

    if kind not in _SCALARS:
        raise ValueError(f"{path} holds a metadata value of the unknown type {kind}; the file is damaged or too new")
    form = "<" + _SCALARS[kind]
    return struct.unpack_from(form, data, offset)[0], offset + struct.calcsize(form)
