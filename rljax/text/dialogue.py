"""Conversations as token ids: what was sampled stays as it is, and what comes back is tokenised once, behind it."""

from collections.abc import Sequence
from typing import Any

from rljax.text.base import Message, Tokenizer, decode_behind, encode_text
from rljax.text.prompts import render_prompt

_BEFORE: list[dict[str, Any]] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


class Dialogue:
    """Ids of openings and observations; nothing that was sampled is ever decoded and encoded again.

    Behind a prompt of chat messages an observation is what the chat template puts behind a turn of the assistant: a
    message of `role`, and the start of the next turn. Behind a prompt of plain text it is `wrap[0] + text + wrap[1]`.
    Names of control tokens in the text of an environment are text.
    `chat` is that of `render_prompt`.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, role: str = "tool", wrap: tuple[str, str] = ("", ""), chat: bool | None = None
    ):
        self.tokenizer = tokenizer
        self.role = role
        self.wrap = wrap
        self.chat = chat
        self._base: list[int] | None = None  # ids of `_BEFORE`, rendered when first needed

    def opening(self, prompt: str | Sequence[Message]) -> list[int]:
        """Ids of a prompt up to where the policy speaks. Raises ValueError as `render_prompt` does."""
        return render_prompt(self.tokenizer, prompt, self.chat)

    def action(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
        """The text of a turn of the policy behind the tokens `before`, without special tokens: what the environment
        gets."""
        return decode_behind(self.tokenizer, ids, before)

    def observation(self, text: str, *, is_chat: bool, is_closed: bool) -> list[int]:
        """Ids that follow a turn, up to where the policy speaks again. `is_closed`: the turn ends with a stop token of
        its own; else the template's is put in first. Raises ValueError if the template does not append."""
        if not is_chat:
            return encode_text(self.tokenizer, text, wrap=self.wrap, continues=True)

        # What a template appends is the difference between two renderings of a conversation that stands for any.
        if self._base is None:
            self._base = self.tokenizer.apply_chat_template(_BEFORE, add_generation_prompt=False)
        base = self._base
        message = {"role": self.role, "content": text}
        ids = self.tokenizer.apply_chat_template([*_BEFORE, message], add_generation_prompt=True)

        # It is cut behind the stop token of the turn before, since that is where what was sampled ends.
        stops = [i for i, token in enumerate(base) if token in self.tokenizer.stop_ids]
        end = stops[-1] if stops else len(base)
        if ids[: end + 1] != base[: end + 1]:
            raise ValueError(
                f"the chat template does not append a message of role {self.role!r} to the turn before it; "
                "rljax.envs.check_chat_template says where they part"
            )
        # The stop token itself belongs to the observation where the turn has none of its own.
        return ids[end + (is_closed and bool(stops)) :]

    def turn_end(self, *, is_chat: bool) -> int:
        """The token with which a turn of the policy ends: the chat template's, or else the end of sequence."""
        return getattr(self.tokenizer, "turn_end_id", self.tokenizer.eos_id) if is_chat else self.tokenizer.eos_id

    def is_chat(self, prompt: str | Sequence[Message]) -> bool:
        """Whether a prompt goes through the chat template."""
        return bool(self.chat) if isinstance(prompt, str) else True
