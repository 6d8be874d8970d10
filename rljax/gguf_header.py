"""The header of a GGUF file: metadata and the table of tensors, read without touching the tensors.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Reading 49k-token vocabularies through general
readers takes seconds, since they wrap each string in arrays; this takes a fraction of one and needs no package.
A header is not trusted: every length is compared with the file before anything of that length is made.
"""

import mmap
import os
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

# numbers of the types of values
_STRING = 8
_ARRAY = 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_VERSIONS = (2, 3)
_MAX_RANK = 4  # GGML_MAX_DIMS
_LENGTH = struct.Struct("<Q")


class GGUFTensor(NamedTuple):
    """A row of the table of tensors."""

    shape: tuple[int, ...]
    """Slowest dimension first; the file has it the other way round."""
    type: int
    """Number of the block format."""
    start: int
    """Where it begins in the file, in bytes."""


class GGUFHeader(NamedTuple):
    """What stands before the data."""

    metadata: dict[str, Any]
    """Plain numbers, booleans, strings and lists of these by key."""
    tensors: dict[str, GGUFTensor]
    """The tensors by name, in the order of the file. Whether they fit into the file is not checked here."""


def read_gguf_header(path: str | os.PathLike, wanted: Callable[[str], bool] = lambda key: True) -> GGUFHeader:
    """The header of the GGUF file at `path`, with the metadata whose keys are `wanted`.

    ValueError of one line that names the file unless it is a little-endian GGUF of version 2 or 3 whose header is whole
    and well-formed.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data).header(wanted)
            except (_Malformed, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is no sound GGUF file: {error}; convert it or download it again") from None


def read_gguf_metadata(path: str | os.PathLike, wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Any]:
    """The metadata of a GGUF file; only keys that are `wanted`. ValueError as in `read_gguf_header`."""
    return read_gguf_header(path, wanted).metadata


class _Malformed(Exception):
    """What is wrong with the header."""


class _Reader:
    """Reads values one behind the other; `at` is the place in the file of the next one."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 4

    def header(self, wanted: Callable[[str], bool]) -> GGUFHeader:
        (version,) = self.numbers("I")
        if version not in _VERSIONS:
            raise _Malformed(f"GGUF version {version} is not supported; {_VERSIONS}, little-endian, are")
        tensor_count, key_count = self.numbers("QQ")

        metadata: dict[str, Any] = {}
        seen: set[str] = set()
        alignment = 32
        for _ in range(key_count):
            key = self.text("a metadata key")
            if key in seen:
                raise _Malformed(f"metadata key {key!r:.80} stands there twice")
            seen.add(key)

            # What is not wanted must be walked over all the same, since lengths stand in front of their values.
            (kind,) = self.numbers("I")
            keep = wanted(key) or key == "general.alignment"
            value = self.value(kind, keep, key)
            if key == "general.alignment":
                alignment = value
            if wanted(key):
                metadata[key] = value

        table = self.table(tensor_count)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise _Malformed(f"general.alignment is {alignment!r:.80}, which is no power of two")

        # Offsets count from the first aligned place behind the header.
        begin = -(-self.at // alignment) * alignment
        return GGUFHeader(metadata, {name: row._replace(start=begin + row.start) for name, row in table.items()})

    def table(self, count: int) -> dict[str, GGUFTensor]:
        """The table of `count` tensors, whose offsets count from behind the header."""
        table: dict[str, GGUFTensor] = {}
        for _ in range(count):
            name = self.text("a tensor's name")
            if name in table:
                raise _Malformed(f"tensor {name!r:.80} stands there twice")
            (rank,) = self.numbers("I")
            if rank > _MAX_RANK:
                raise _Malformed(f"tensor {name!r:.80} has {rank} dimensions, where at most {_MAX_RANK} can be")
            shape = self.numbers("Q" * rank)[::-1]
            kind, offset = self.numbers("IQ")
            table[name] = GGUFTensor(shape, kind, offset)
        return table

    def value(self, kind: int, keep: bool, key: str) -> Any:
        """The value of the type `kind`; None if it is not to be kept and long."""
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            return self.array(keep, key)
        if kind not in _SCALARS:
            raise _Malformed(f"{key!r:.80} has the unknown type {kind}")
        return self.numbers(_SCALARS[kind])[0]

    def array(self, keep: bool, key: str) -> list[Any] | None:
        kind, length = self.numbers("IQ")
        if kind in _SCALARS:
            # Compared before a format is built of the length.
            start = self.take(length * struct.calcsize(f"<{_SCALARS[kind]}"), key)
            return list(struct.unpack_from(f"<{length}{_SCALARS[kind]}", self.data, start)) if keep else None
        if kind != _STRING:
            raise _Malformed(f"{key!r:.80} is an array of the type {kind}, which no array has")
        if keep:
            return [self.text(key) for _ in range(length)]
        for _ in range(length):
            self.take(self.length(key), key)
        return None

    def text(self, what: str) -> str:
        length = self.length(what)
        start = self.take(length, what)
        return self.data[start : start + length].decode("utf-8")

    def length(self, what: str) -> int:
        return _LENGTH.unpack_from(self.data, self.take(_LENGTH.size, what))[0]

    def numbers(self, codes: str) -> tuple[Any, ...]:
        form = f"<{codes}"
        start = self.take(struct.calcsize(form), "a number")
        return struct.unpack_from(form, self.data, start)

    def take(self, size: int, what: str) -> int:
        """Moves behind the next `size` bytes; returns where they begin."""
        start = self.at
        if size > len(self.data) - start:
            raise _Malformed(f"the header is truncated or corrupt: {what!r:.80} ends behind the file")
        self.at += size
        return start
