"""Settings of chats: another template than the tokenizer's own, what the template is told, a system prompt."""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from rljax.text.base import Message, Tokenizer
from rljax.text.huggingface import HuggingFaceTokenizer

_PROBE: list[Message] = [{"role": "user", "content": "x"}]


def with_chat_settings(
    tokenizer: Tokenizer,
    *,
    chat_template: str = "",
    template_kwargs: Mapping[str, Any] | None = None,
    system_prompt: str = "",
) -> Tokenizer:
    """The tokenizer with these settings; empty ones leave it as it is.

    `chat_template` is the Jinja text of a template. `template_kwargs` go to the template at every call. A conversation
    that does not begin with a system message begins with `system_prompt`. Raises ValueError, beginning with the name of
    the setting, for one that could have no effect: a tokenizer without chat messages or template, a key that the
    template does not read, a system prompt that it does not show, a template that cannot be rendered.
    """
    settings = {"chat_template": chat_template, "template_kwargs": template_kwargs, "system_prompt": system_prompt}
    given = [name for name, value in settings.items() if value]
    if not given:
        return tokenizer
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(f"{given[0]} is set, but {type(tokenizer).__name__} takes no chat messages; leave it out")

    tokenizer = tokenizer.with_chat(chat_template, system_prompt, dict(template_kwargs or {}))
    if not tokenizer.has_chat_template:
        raise ValueError(f"{given[0]} is set, but the tokenizer has no chat template; give one with chat_template")

    # Jinja takes any name, whether the template reads it or not.
    text = _text(tokenizer.hf.chat_template)
    for name in template_kwargs or {}:
        if not re.search(rf"\b{re.escape(name)}\b", text):
            raise ValueError(f"template_kwargs has {name!r}, which the chat template does not read; take it out")

    try:
        ids = tokenizer.apply_chat_template(_PROBE)
    except ValueError as error:
        raise ValueError(f"{given[-1]} does not go with the chat template: {error}") from error
    if _plain(system_prompt.strip()) not in _plain(tokenizer.hf.decode(ids)):
        raise ValueError(f"system_prompt={system_prompt!r:.80} is not in what the chat template writes; leave it out")
    return tokenizer


def _text(template: str | Mapping[str, str]) -> str:
    """All that a template, or several by name, consist of."""
    return template if isinstance(template, str) else "\n".join(template.values())


def _plain(text: str) -> str:
    """Some tokenizers normalise what they encode."""
    return unicodedata.normalize("NFKC", text)
