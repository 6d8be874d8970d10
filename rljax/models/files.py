"""Safetensors files, read lazily and written one tensor at a time.

The format is eight bytes with the header's length, a JSON header, and the raw little-endian tensors. Reading maps the
file, so that a slice of a tensor touches its own bytes only; writing holds one tensor on the host at a time, and orders
tensors and header as the reference library does, so that equal weights give equal bytes.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
_BYTES = {"U8": np.dtype(np.uint8)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_LONGEST_HEADER = 100_000_000  # of the reference library

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class TensorInfo(NamedTuple):
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class SafetensorsFolder:
    """The tensors of a folder with one file, `single`, or with shards and their index. Those whose names end in one of
    `packed` may hold bytes."""

    def __init__(self, folder: Path, *, single: str = SINGLE_FILE, packed: tuple[str, ...] = ()):
        index = folder / INDEX_FILE
        weight_map = _read_index(index) if index.exists() else None
        if weight_map is None and not (folder / single).exists():
            raise ValueError(
                f"{folder} has neither {single} nor {INDEX_FILE}; save the model as safetensors "
                "(transformers: save_pretrained)"
            )

        self.tensors: dict[str, TensorInfo] = {}
        for name in [single] if weight_map is None else sorted(set(weight_map.values())):
            for tensor, info in _read_header(folder / name, packed).items():
                if tensor in self.tensors:
                    other = self.tensors[tensor].file.name
                    raise ValueError(f"{folder}: tensor {shown(tensor)} stands in both {other} and {name}")
                # A tensor that the index puts elsewhere is left over, and not this model's.
                if weight_map is None or weight_map.get(tensor) == name:
                    self.tensors[tensor] = info

        if absent := sorted(set(weight_map or ()) - set(self.tensors)):
            file = (weight_map or {})[absent[0]]
            raise ValueError(f"{index} puts {shown(absent[0])} into {file}, which does not hold it")

    def rename(self, start: str, own: str) -> None:
        """Has names that begin with `start` begin with `own` instead."""
        self.tensors = {
            f"{own}{name.removeprefix(start)}" if name.startswith(start) else name: info
            for name, info in self.tensors.items()
        }

    def part(self, name: str, parts: Sequence[tuple[str, int]]) -> None:
        """Has the tensor `name`, [.., rows, columns], be those that lie in it one behind the other: the name of each,
        and its rows."""
        info = self.tensors.pop(name)
        columns = info.shape[-1]
        start = info.start
        for own, rows in parts:
            self.tensors[own] = info._replace(shape=(rows, columns), start=start)
            start += rows * columns * info.dtype.itemsize

    def open(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file."""
        info = self.tensors[name]
        if 0 in info.shape:
            return np.zeros(info.shape, info.dtype)
        return np.memmap(info.file, dtype=info.dtype, mode="r", offset=info.start, shape=info.shape)


def shown(name: str) -> str:
    """A name from a file in one line of bounded length."""
    text = repr(name)[1:-1]
    return text if len(text) <= 80 else f"{text[:80]}..."


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor."""
    content = _parse(path, path.read_bytes(), "a valid index of safetensors files")
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path} has no object weight_map; write it again, or download it")
    for file in weight_map.values():
        # A shard lies beside the index, and nowhere else.
        if not _is_file_name(file):
            raise ValueError(f"{path} puts a tensor into {file!r:.80}, which is no name of a file in its folder")
    return weight_map


def _is_file_name(name: Any) -> bool:
    """Whether a value can name a file in a folder: text in one line, of a length that file systems take."""
    if not isinstance(name, str) or not name.isprintable():
        return False
    return Path(name).name == name and len(name.encode()) <= 255


def _parse(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """The JSON object `text` of the file `path`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands there twice")
        return found

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not {what}, or it is truncated: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not {what}: it holds no JSON object")
    return content


def _read_header(path: Path, packed: tuple[str, ...] = ()) -> dict[str, TensorInfo]:
    """The table of a file; bytes are allowed where a name ends in one of `packed`. As in the reference library, tensors
    lie one behind the other and fill the file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, though {INDEX_FILE} names it")
    size = path.stat().st_size
    with path.open("rb") as file:
        # Checked before it is read: the first bytes of a file of another kind are a length of exabytes.
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(
                f"{path} is not a safetensors file, or it is truncated: its header of {length} bytes "
                f"does not fit into {size} bytes, or is above {_LONGEST_HEADER}"
            )
        header = _parse(path, file.read(length), "a safetensors file")
    header.pop("__metadata__", None)

    tensors: dict[str, TensorInfo] = {}
    spans = []
    for name, item in header.items():
        known = _DTYPES | _BYTES if name.endswith(packed) else _DTYPES
        dtype, shape, start, end = _row(item, f"{path}: tensor {shown(name)}", known)
        # Offsets count from the end of the header, which lies behind the 8 bytes of its length.
        if end - start != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
            raise ValueError(f"{path} is truncated or corrupt at tensor {shown(name)}; copy or download it again")
        tensors[name] = TensorInfo(path, dtype, shape, 8 + length + start)
        spans.append((start, end, name))

    expected = 0
    for start, end, name in sorted(spans):
        if start != expected:
            raise ValueError(
                f"{path} is corrupt: tensor {shown(name)} begins at byte {start} of the data, where {expected} is due; "
                "download it again"
            )
        expected = end
    if 8 + length + expected != size:
        raise ValueError(
            f"{path} is corrupt: {size - 8 - length - expected} bytes at its end belong to no tensor; download it again"
        )
    return tensors


def _row(item: Any, where: str, known: Mapping[str, np.dtype]) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, byte behind the last) of an entry of a header."""
    try:
        name = item["dtype"]
        shape = item["shape"]
        offsets = item["data_offsets"]
        counts = [*shape, *offsets]
    except (TypeError, KeyError):
        raise ValueError(f"{where} lacks dtype, shape or data_offsets; download the file again") from None
    if len(offsets) != 2 or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(
            f"{where} has shape {shape!r:.80} and data_offsets {offsets!r:.80}, which must be whole numbers, two of "
            "them offsets; download the file again"
        )
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{where} has dtype {name!r:.80}; supported are {', '.join(known)}. Dequantise the model first"
        )
    return known[name], tuple(shape), *offsets


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], fetch: Callable[[str], np.ndarray]
) -> None:
    """Writes `tensors` (dtype and shape by name), each asked of `fetch` when its turn comes. Atomic: the file appears
    under its name when it is complete."""
    # The order of the safetensors library: wide types first, so that every tensor is aligned to its own size.
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape = tensors[name]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size

    # Spaces up to a multiple of 8, so that the data after the header begins aligned.
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            value = fetch(name)
            if (value.dtype, value.shape) != tensors[name]:
                raise ValueError(f"tensor {name} is {value.dtype}{list(value.shape)}, declared as {tensors[name]}")
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    os.replace(partial, path)


def split_into_files(sizes: Iterable[tuple[str, int]], max_bytes: int) -> list[list[str]]:
    """Tensor names file by file: filled in order, a tensor above `max_bytes` alone (as huggingface_hub does it)."""
    files: list[list[str]] = []
    current: list[str] = []
    used = 0
    for name, size in sizes:
        if size > max_bytes:
            files.append([name])
            continue
        if used + size > max_bytes and current:
            files.append(current)
            current = []
            used = 0
        current.append(name)
        used += size
    return files + ([current] if current else [])
