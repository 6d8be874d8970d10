"""Tokenizers with nothing learnt: one id for a character, or for a byte. For small models trained from nothing."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from rljax.text.base import Message

CHAR_FILE = "char_tokenizer.json"
BYTES = "bytes"

_PAD = 0
_EOS = 1
_FIRST = 2  # id of the first character, or byte


class _Plain:
    """What both share: padding is id 0, end of sequence id 1, and there are no chat messages."""

    bos_id: int | None = None
    eos_id: int = _EOS
    pad_id: int = _PAD
    stop_ids: tuple[int, ...] = (_EOS,)
    has_chat_template: bool = False
    adds_bos: bool = False

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Raises ValueError: these tokenizers have no chat template."""
        raise ValueError(
            f"{type(self).__name__} has no chat template, so it cannot take a list of messages; "
            "give the prompt as plain text"
        )


class CharTokenizer(_Plain):
    """One id for each character of `alphabet`, in its order, from id 2 on.

    Raises ValueError if the alphabet is empty or repeats a character.
    """

    def __init__(self, alphabet: str):
        repeated = sorted({c for c in alphabet if alphabet.count(c) > 1})
        if not alphabet or repeated:
            raise ValueError(
                f"alphabet={alphabet!r} must hold each character once"
                + (f"; repeated: {repeated}" if repeated else ", and at least one")
            )
        self.alphabet = alphabet
        self._ids = {c: i + _FIRST for i, c in enumerate(alphabet)}
        self.vocab_size = len(alphabet) + _FIRST

    def encode(self, text: str) -> list[int]:
        """Raises ValueError at a character that the alphabet lacks."""
        try:
            return [self._ids[c] for c in text]
        except KeyError as error:
            raise ValueError(
                f"character {error.args[0]!r} of {text!r} is not in the alphabet {self.alphabet!r}; "
                "add it to the alphabet or take it out of the data"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Ids outside of the alphabet give nothing."""
        return "".join(self.alphabet[i - _FIRST] for i in ids if _FIRST <= i < self.vocab_size)

    def save(self, folder: str | os.PathLike) -> None:
        _write(folder, self.alphabet)


class ByteTokenizer(_Plain):
    """One id for each byte of the UTF-8 text, from id 2 on; 258 ids. Any text can be encoded."""

    vocab_size: int = 256 + _FIRST

    def encode(self, text: str) -> list[int]:
        return [b + _FIRST for b in text.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are not UTF-8 become U+FFFD."""
        return bytes(i - _FIRST for i in ids if _FIRST <= i < self.vocab_size).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, which alone need not be a character."""
        return bytes(i - _FIRST for i in (token,) if _FIRST <= i < self.vocab_size)

    def save(self, folder: str | os.PathLike) -> None:
        _write(folder, None)


def _write(folder: str | os.PathLike, alphabet: str | None) -> None:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    content = {"kind": BYTES} if alphabet is None else {"kind": "characters", "alphabet": alphabet}
    (path / CHAR_FILE).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def load_char_tokenizer(file: Path) -> CharTokenizer | ByteTokenizer:
    """Read what `save` wrote. Raises ValueError on anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return ByteTokenizer() if content["kind"] == BYTES else CharTokenizer(content["alphabet"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file} is not a character tokenizer ({error!r}); write it again with CharTokenizer.save"
        ) from None
