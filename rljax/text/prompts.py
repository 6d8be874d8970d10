"""From a data row's prompt to the token ids that the model reads."""

from collections.abc import Sequence
from typing import Any

from rljax.text.base import Message, Tokenizer, encode_text

ROLES = (
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
    "ipython",
    "environment",
    "observation",
    "documents",
)
"""Roles of chat messages that models are trained with."""


def render_prompt(tokenizer: Tokenizer, prompt: str | Sequence[Message], chat: bool | None = None) -> list[int]:
    """Token ids of a prompt.

    A list of messages goes through the chat template, up to where the assistant begins to speak. Text is encoded as
    it is, behind a beginning-of-sequence token if the tokenizer's model expects one; with `chat=True` it is taken as
    one user message. Names of control tokens in either are text: only the template opens turns.

    Raises ValueError if the prompt is empty or malformed, if it needs a chat template and there is none, or for
    messages with `chat=False`.
    """
    if isinstance(prompt, str):
        if chat:
            return render_prompt(tokenizer, [{"role": "user", "content": prompt}])
        # a template writes the token by itself; plain text has nobody to do it
        ids = encode_text(tokenizer, prompt)
        bos = tokenizer.bos_id if getattr(tokenizer, "adds_bos", False) else None
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
    else:
        check_messages(prompt)
        if chat is False:
            raise ValueError(
                "chat=False takes prompts as plain text, but this prompt is a list of messages; "
                "leave chat unset, or give text"
            )
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)

    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens; a model needs at least one to go on from")
    return ids


def check_messages(messages: Any) -> None:
    """Raise ValueError unless `messages` is a non-empty list of objects with a `role` of `ROLES` and a `content`."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"prompt is {messages!r}; it must be text, or a non-empty list of chat messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {i} is {message!r}; it must be an object with a role such as 'user' and a text content"
            )
        # A template writes a role as it stands: `<|{{ role }}|>` makes a control token of the role `end`.
        if message["role"] not in ROLES:
            raise ValueError(f"message {i} has the role {message['role']!r:.80}; it must be one of {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and len(message) > 2):
            raise ValueError(f"message {i} has the content {content!r}; it must be text")
