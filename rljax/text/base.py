"""What every tokenizer offers the rest of the package."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
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
    "<|return|>",
    "<|call|>",
)
"""Names of special tokens after which nothing more of an answer comes, whichever model uses them."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    `stop_ids` lists the tokens that end a completion (`eos_id` first, then end-of-turn tokens); `vocab_size` is one
    past the largest id. `pad_id` may equal `eos_id`. A tokenizer whose model expects a beginning-of-sequence token in
    front of plain text also has a true attribute `adds_bos`; `render_prompt` reads it. One whose `encode` finds control
    tokens in text, or begins a text with a space of its own, also has `encode_text`, which the function of that name
    calls. One with control tokens, which `decode` leaves out, has their ids by name in a mapping `special_tokens`. One
    whose chat template ends the assistant's turns with another token than `eos_id` names it as `turn_end_id`.
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
        """Token ids of `text`, the beginning of one; no token is added at either end. For text of one's own: names of
        control tokens in it may become these."""
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


def encode_text(
    tokenizer: Tokenizer, text: str, *, wrap: tuple[str, str] = ("", ""), continues: bool = False
) -> list[int]:
    """Token ids of `wrap[0] + text + wrap[1]`, where `text` comes from outside: whatever names of control tokens it
    holds, they are text. Those in `wrap` are control tokens. `continues`: it stands behind other tokens, so that no
    dummy space is put in front. Raises ValueError for text that the tokenizer cannot encode."""
    own = getattr(tokenizer, "encode_text", None)
    if own is None:
        return tokenizer.encode(f"{wrap[0]}{text}{wrap[1]}")
    return own(text, wrap=wrap, continues=continues)


def token_of(tokenizer: Tokenizer, text: str) -> int:
    """The id of a text of one token, or of a control token by its name. ValueError for a text of none or several."""
    special: Mapping[str, int] = getattr(tokenizer, "special_tokens", {})
    if text in special:
        return special[text]
    ids = encode_text(tokenizer, text, continues=True)
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens of this tokenizer ({ids}); give ids, or a text of one token")
    return ids[0]


def decode_behind(tokenizer: Tokenizer, ids: Sequence[int], before: Sequence[int]) -> str:
    """Text of `ids`, special tokens left out, as it stands behind the tokens `before`, of which the last one suffices:
    a space that begins it stays, which a tokenizer takes away at the beginning of a text."""
    return text_behind(tokenizer.decode, ids, before)


def text_behind(decode: Callable[[list[int]], str], ids: Sequence[int], before: Sequence[int]) -> str:
    """The same by a tokenizer's `decode` alone."""
    last = list(before[-1:])
    if not last:
        return decode(list(ids))
    text = decode([*last, *ids])
    return text[shared_length(text, decode(last)) :]


def shared_length(text: str, head: str) -> int:
    """How many characters of `head` the longer `text` begins with: all but a last one whose last bytes came later, and
    which is another one in `text`."""
    while not text.startswith(head):
        head = head[:-1]
    return len(head)


def control_tokens_of(tokenizer: Tokenizer, texts: Sequence[str], problem: str) -> list[int]:
    """Ids of those of `texts` that are control tokens, which the text of a completion does not show. ValueError for one
    that holds the name of a control token beside other text, and so stands in no completion's text; it begins with
    `problem`, where `{}` is the text."""
    special: Mapping[str, int] = getattr(tokenizer, "special_tokens", {})
    for text in texts:
        name = next((name for name in special if name in text), None)
        if name is not None and text not in special:
            raise ValueError(
                f"{problem.format(repr(text))}, since the text of a completion leaves out the control token {name!r}; "
                f"give {name!r} alone, or a text without it"
            )
    return [special[text] for text in texts if text in special]


@dataclasses.dataclass(frozen=True)
class WithinText:
    """A tokenizer for words that stand within a text, not at the beginning of one."""

    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def encode(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text, continues=True)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)


def end_of_turn_tokens(names: Collection[str]) -> tuple[str, ...]:
    """Those of `END_OF_TURN_TOKENS` that end an answer in a vocabulary with the special tokens `names`. Where one of
    them returns or calls, as in the Harmony format, `<|end|>` ends a thought, and the answer comes behind it."""
    has_channels = "<|return|>" in names and "<|call|>" in names
    return tuple(name for name in END_OF_TURN_TOKENS if name in names and not (has_channels and name == "<|end|>"))


def unique(ids: Sequence[int | None]) -> tuple[int, ...]:
    """`ids` without None and without repeats, in order."""
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))
