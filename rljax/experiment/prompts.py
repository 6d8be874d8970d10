"""How prompts become tokens: what a run says of it at its start, and settings of chats that no prompt would see."""

from collections.abc import Iterable

from rljax.experiment.config import Config, actor_of
from rljax.rollouts import Remote, SingleTurn
from rljax.tasks import Dataset
from rljax.text import Tokenizer

_CHAT_FIELDS = ("chat_template", "template_kwargs", "system_prompt")


def check_chat_settings(config: Config, dataset: Dataset) -> None:
    """Raises ValueError for a chat setting of the model where no prompt goes through the chat template."""
    given = [name for name in _CHAT_FIELDS if getattr(config.model, name, None)]
    if given and _opens_by_row(config) and not config.data.chat and not any(_messages(dataset)):
        raise ValueError(
            f"config.model.{given[0]} is set, but no prompt goes through the chat template: prompts are text and "
            f"config.data.chat={config.data.chat}; set config.data.chat=True"
        )


def describe_prompts(config: Config, dataset: Dataset, tokenizer: Tokenizer) -> str:
    """In a few words, what stands around the prompts of the data."""
    given = {name: getattr(config.model, name, None) for name in _CHAT_FIELDS}
    settings = "".join(f", {name}={value!r:.60}" for name, value in given.items() if value)

    if not _opens_by_row(config):
        return f"opened by the environment or agent; chat messages go through the chat template{settings}"
    share = sum(_messages(dataset)) / max(1, len(dataset.train) + len(dataset.test))
    if share == 1:
        return f"chat messages through the chat template{settings}"
    if config.data.chat:
        return f"text as a user message of the chat template (config.data.chat=True){settings}"
    if share:
        return f"text as it is, chat messages ({share:.0%}) through the chat template{settings}"
    if not tokenizer.has_chat_template:
        return "text as it is; the tokenizer has no chat template"
    return (
        "text as it is, though the tokenizer has a chat template; config.data.chat=True makes each prompt a user "
        f"message of it (it is {config.data.chat})"
    )


def _opens_by_row(config: Config) -> bool:
    """Whether the prompt of a row is what the policy sees first; environments and agents may begin otherwise."""
    actor = actor_of(config)
    return isinstance(actor, (SingleTurn, Remote))


def _messages(dataset: Dataset) -> Iterable[bool]:
    """Of each prompt, whether it is a list of messages."""
    return (not isinstance(example.prompt, str) for example in (*dataset.train, *dataset.test))
