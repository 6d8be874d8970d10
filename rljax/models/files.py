"""Safetensors files, read lazily and written one tensor at a time.

The format is eight bytes with the header's length, a JSON header, and the raw little-endian tensors. Reading maps the
file, so that a slice of a tensor touches its own bytes only; writing holds one tensor on the host at a time, and orders
tensors and header as the reference library does, so that equal weights give equal bytes.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class TensorInfo(NamedTuple):
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class SafetensorsFolder:
    """The tensors of a folder with `model.safetensors`, or with shards and their index."""

    def __init__(self, folder: Path):
        index = folder / INDEX_FILE
        if index.exists():
            weight_map = json.loads(index.read_text())["weight_map"]
            names = sorted(set(weight_map.values()))
        elif (folder / SINGLE_FILE).exists():
            weight_map = None
            names = [SINGLE_FILE]
        else:
            raise ValueError(
                f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; save the model as safetensors "
                "(transformers: save_pretrained)"
            )

        self.tensors: dict[str, TensorInfo] = {}
        for name in names:
            for tensor, info in _read_header(folder / name).items():
                if tensor in self.tensors:
                    raise ValueError(f"tensor {tensor} stands in both {self.tensors[tensor].file.name} and {name}")
                # A tensor that the index puts elsewhere is left over, and not this model's.
                if weight_map is None or weight_map.get(tensor) == name:
                    self.tensors[tensor] = info

        if absent := sorted(set(weight_map or ()) - set(self.tensors)):
            raise ValueError(f"{INDEX_FILE} puts {absent[0]} into {weight_map[absent[0]]}, which does not hold it")

    def open(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file."""
        info = self.tensors[name]
        if 0 in info.shape:
            return np.zeros(info.shape, info.dtype)
        return np.memmap(info.file, dtype=info.dtype, mode="r", offset=info.start, shape=info.shape)


def _read_header(path: Path) -> dict[str, TensorInfo]:
    if not path.exists():
        raise ValueError(f"{path} is missing, though {INDEX_FILE} names it")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            # Checked before it is read: the first bytes of a file of another kind are a length of exabytes.
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError("header longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
    except ValueError as error:
        raise ValueError(f"{path} is not a safetensors file, or it is truncated: {error}") from error
    header.pop("__metadata__", None)

    tensors = {}
    for name, item in header.items():
        start, end = item["data_offsets"]
        if item["dtype"] not in _DTYPES:
            raise ValueError(
                f"{path.name}: tensor {name} has dtype {item['dtype']}; supported are {', '.join(_DTYPES)}. "
                "Dequantise the model first"
            )
        dtype = _DTYPES[item["dtype"]]
        shape = tuple(item["shape"])
        expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        # Offsets count from the end of the header, which lies behind the 8 bytes of its length.
        if end - start != expected or 8 + length + end > size:
            raise ValueError(f"{path} is truncated or corrupt at tensor {name}; copy or download it again")
        tensors[name] = TensorInfo(path, dtype, shape, 8 + length + start)
    return tensors


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
