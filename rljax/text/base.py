"""What every tokenizer offers the rest of the package."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Protocol, runtime_checkable

Message = Mapping[str, Any]
"""One chat turn: `{"role": "user", "content": "text"}`, plus whatever else the chat template reads."""

END_OF_TURN_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<|end|>",
    "<|end_of_turn|>",
)
"""Names of special tokens after which nothing more of an answer comes, whichever model uses them."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    `stop_ids` lists the tokens that end a completion (`eos_id` first, then end-of-turn tokens); `vocab_size` is one
    past the largest id. `pad_id` may equal `eos_id`. A tokenizer whose model expects a beginning-of-sequence token in
    front of plain text also has a true attribute `adds_bos`; `render_prompt` reads it.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    @property
    def has_chat_template(self) -> bool: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no token is added at either end."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        ...

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation; with `add_generation_prompt` up to where the assistant begins to speak."""
        ...

    def save(self, folder: str | PathLike) -> None:
        """Write files into `folder` from which `load_tokenizer(folder)` gives the same tokenizer."""
        ...


def unique(ids: Sequence[int | None]) -> tuple[int, ...]:
    """`ids` without None and without repeats, in order."""
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))
