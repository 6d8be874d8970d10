"""Tokenizers with nothing learnt: one id for a character, or for a byte. For small models trained from nothing."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rljax.text.base import Message

CHAR_FILE = "char_tokenizer.json"
BYTES = "bytes"
CHARACTERS = "characters"

_PAD = 0
_EOS = 1
_FIRST = 2  # id of the first character, or byte

_ROLES = ("system", "user", "assistant", "tool")
_ROLE_OF = {**{role: role for role in _ROLES}, "developer": "system"}


class _Plain:
    """What both share: padding is id 0, end of sequence id 1, and chat messages have no form."""

    bos_id: int | None = None
    eos_id: int = _EOS
    pad_id: int = _PAD
    stop_ids: tuple[int, ...] = (_EOS,)
    has_chat_template: bool = False
    adds_bos: bool = False
    _remedy: str = ""

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Raises ValueError: there is no chat template."""
        raise ValueError(
            f"{type(self).__name__} has no chat template, so it cannot take a list of messages; "
            f"give the prompt as plain text{self._remedy}"
        )


class CharTokenizer(_Plain):
    """One id for each character of `alphabet`, in its order, from id 2 on.

    With `chat` it takes conversations, too: a message is a control token of its role, its text, and the end of
    sequence. The control tokens, `special_tokens` by name, are the last ids.

    Raises ValueError if the alphabet is empty or repeats a character.
    """

    _remedy = ", or make the tokenizer with chat=True, which is config.model.chat of a FreshModel"

    def __init__(self, alphabet: str, *, chat: bool = False):
        repeated = sorted({c for c in alphabet if alphabet.count(c) > 1})
        if not alphabet or repeated:
            raise ValueError(
                f"alphabet={alphabet!r} must hold each character once"
                + (f"; repeated: {repeated}" if repeated else ", and at least one")
            )
        self.alphabet = alphabet
        self._ids = {c: i + _FIRST for i, c in enumerate(alphabet)}
        self.has_chat_template = chat
        names = [f"<|{role}|>" for role in _ROLES] if chat else []
        self.special_tokens = {name: len(alphabet) + _FIRST + i for i, name in enumerate(names)}
        self.vocab_size = len(alphabet) + _FIRST + len(names)

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
        return "".join(self.alphabet[i - _FIRST] for i in ids if _FIRST <= i < _FIRST + len(self.alphabet))

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Raises ValueError without `chat`, for a character that the alphabet lacks, and for calls of tools in a field
        of their own, which have no form here."""
        if not self.has_chat_template:
            return super().apply_chat_template(messages, add_generation_prompt)

        ids = []
        for message in messages:
            if message.get("tool_calls"):
                raise ValueError("characters have no form for tool_calls; write calls into the content of messages")
            role = _ROLE_OF.get(message["role"], "tool")
            ids += [self.special_tokens[f"<|{role}|>"], *self.encode(message.get("content") or ""), self.eos_id]
        return [*ids, self.special_tokens["<|assistant|>"]] if add_generation_prompt else ids

    def save(self, folder: str | os.PathLike) -> None:
        _write(folder, {"kind": CHARACTERS, "alphabet": self.alphabet, "chat": self.has_chat_template})


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
        _write(folder, {"kind": BYTES})


def _write(folder: str | os.PathLike, content: dict[str, Any]) -> None:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / CHAR_FILE).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def load_char_tokenizer(file: Path) -> CharTokenizer | ByteTokenizer:
    """Read what `save` wrote. Raises ValueError on anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["kind"] == BYTES:
            return ByteTokenizer()
        # Files of earlier versions do not say whether there are conversations, and have none.
        return CharTokenizer(content["alphabet"], chat=content.get("chat", False))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file} is not a character tokenizer ({error!r}); write it again with CharTokenizer.save"
        ) from None
