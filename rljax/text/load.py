"""One call for every kind of tokenizer file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rljax.text.base import Tokenizer
from rljax.text.char import CHAR_FILE, load_char_tokenizer
from rljax.text.gguf import load_gguf_tokenizer
from rljax.text.huggingface import load_huggingface_tokenizer
from rljax.text.spm import MODEL_FILE, SentencePieceTokenizer


def load_tokenizer(path: str | os.PathLike, *, template_kwargs: Mapping[str, Any] | None = None) -> Tokenizer:
    """Load the tokenizer at `path`: a Hugging Face folder, a SentencePiece `.model` file or a `.gguf` file.

    A folder that this package wrote for another kind of tokenizer loads as that kind. `template_kwargs` go to the chat
    template at every call. Raises ValueError if there is nothing at `path`, or nothing that can be read.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, template_kwargs)
    if not path.exists():
        raise ValueError(
            f"no tokenizer at {str(path)!r}: no such file or folder; "
            "give a local Hugging Face folder, a SentencePiece .model file or a .gguf file (nothing is downloaded)"
        )

    if path.suffix == ".gguf":
        return load_gguf_tokenizer(path, template_kwargs=template_kwargs)
    if ".model" in path.suffixes:  # also tokenizer.model.v3
        return SentencePieceTokenizer(path)
    if path.name in ("tokenizer.json", "tokenizer_config.json", CHAR_FILE):
        return _load_folder(path.parent, template_kwargs)
    raise ValueError(
        f"do not know how to read a tokenizer from {str(path)!r}; "
        "give a local Hugging Face folder, a SentencePiece .model file or a .gguf file"
    )


def _load_folder(folder: Path, template_kwargs: Mapping[str, Any] | None) -> Tokenizer:
    if (folder / CHAR_FILE).is_file():
        return load_char_tokenizer(folder / CHAR_FILE)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return load_huggingface_tokenizer(folder, template_kwargs=template_kwargs)
    if (folder / MODEL_FILE).is_file():
        return SentencePieceTokenizer(folder / MODEL_FILE)
    files = sorted(entry.name for entry in folder.iterdir())[:10]
    raise ValueError(
        f"the folder {str(folder)!r} has no tokenizer: none of tokenizer.json, tokenizer_config.json, {MODEL_FILE}, "
        f"{CHAR_FILE} is among {files}; point to the folder that the model was saved in, or to a .gguf file"
    )
