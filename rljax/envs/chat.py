"""Does a chat template keep the turns that it has rendered? Token bookkeeping over turns relies on it."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

Message = Mapping[str, Any]
_SYSTEM = {"role": "system", "content": "Answer in one sentence."}


@runtime_checkable
class ChatTokenizer(Protocol):
    """What the check asks of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]: ...


def probe_conversation(role: str = "tool") -> list[dict[str, str]]:
    """Two turns with thinking and an observation between, then a question of the user and an answer."""
    think = "<think>\n{}\n</think>\n\n{}"
    return [
        {"role": "user", "content": "How old is the bridge?"},
        {"role": "assistant", "content": think.format("I should look it up.", "Let me search.")},
        {"role": role, "content": "The bridge was built in 1901."},
        {"role": "assistant", "content": think.format("Now subtract.", "It is 125 years old.")},
        {"role": "user", "content": "And the tower?"},
        {"role": "assistant", "content": think.format("Another search.", "It is older.")},
    ]


def check_chat_template(
    tokenizer: ChatTokenizer, messages: Sequence[Message] | None = None, *, role: str = "tool"
) -> None:
    """Raise ValueError unless rendering turn by turn only ever appends token ids.

    Before every turn of the assistant the conversation is rendered up to where it begins to speak, and after it with
    its turn; each rendering must begin with the ids of the one before. What others say must be there to be read: a
    template may leave out the messages of a role that it does not know. `messages` defaults to
    `probe_conversation(role)`, with `role` that of observations; where the template shows a system message, also behind
    one. The error names the first turn that differs and the remedy.
    """
    if messages is not None:
        return _check_turns(tokenizer, list(messages))

    conversation = probe_conversation(role)
    _check_turns(tokenizer, conversation)
    # A template may write the instructions into the last question, and so into another with every turn.
    if _shows_system(tokenizer):
        _check_turns(tokenizer, [_SYSTEM, *conversation])


def _shows_system(tokenizer: ChatTokenizer) -> bool:
    """Whether the template takes a system message; one that refuses or leaves it out says so when one is given."""
    try:
        ids = tokenizer.apply_chat_template([_SYSTEM, *probe_conversation()[:1]], add_generation_prompt=True)
    except ValueError:
        return False
    return _SYSTEM["content"] in tokenizer.decode(ids)


def _check_turns(tokenizer: ChatTokenizer, conversation: Sequence[Message]) -> None:
    before: list[int] = []
    for i, message in enumerate(conversation):
        if message.get("role") != "assistant":
            continue
        for count, prompting in ((i, True), (i + 1, False)):
            if count == 0:
                continue
            ids = _render(tokenizer, conversation[:count], prompting)
            if ids[: len(before)] != before:
                raise ValueError(_explain(tokenizer, conversation[:count], before, ids))
            _check_said(tokenizer, conversation[:count], ids[len(before) :])
            before = ids


def _check_said(tokenizer: ChatTokenizer, turns: Sequence[Message], new: Sequence[int]) -> None:
    """ValueError if the ids that the last messages added do not hold what others than the assistant say in them."""
    text = tokenizer.decode(list(new))
    later = itertools.takewhile(lambda turn: turn.get("role") != "assistant", reversed(turns))
    for turn in later:
        content = turn.get("content")
        if isinstance(content, str) and content.strip() not in text:
            raise ValueError(
                f"the chat template leaves out messages of role {turn.get('role')!r}: the policy would never read "
                f"{content!r}. Choose a role that it knows, such as 'tool', 'ipython' or 'user' (a tool format names "
                "the role of observations)"
            )


def _render(tokenizer: ChatTokenizer, messages: Sequence[Message], prompting: bool) -> list[int]:
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=prompting))
    except ValueError as error:
        raise ValueError(
            f"the chat template cannot render the first {len(messages)} turns, whose roles are "
            f"{[m.get('role') for m in messages]} ({error}); choose the role of observations that it knows, such as "
            "'tool', 'ipython' or 'user'"
        ) from error


def _explain(tokenizer: ChatTokenizer, turns: Sequence[Message], before: list[int], ids: list[int]) -> str:
    same = next((k for k, pair in enumerate(zip(before, ids)) if pair[0] != pair[1]), min(len(before), len(ids)))
    ends = (len(_render(tokenizer, turns[: k + 1], False)) for k in range(len(turns)))
    turn = next((k for k, end in enumerate(ends) if same < end), len(turns) - 1)
    was, now = (tokenizer.decode(list(x[same : same + 12])) for x in (before, ids))
    return (
        f"the chat template rewrites history: turn {turn} ({turns[turn].get('role')}) is not the same once "
        f"{len(turns)} turns are rendered; at token {same} {was!r} became {now!r}. What was sampled would not be what "
        "a later turn reads. Give the tokenizer a chat template that keeps earlier turns word for word (take out what "
        "drops or moves their thinking, and name the file in config.model.chat_template), or set the template's own "
        "switch through config.model.template_kwargs, or open episodes with plain text, behind which observations are "
        "plain text too"
    )
