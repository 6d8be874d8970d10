"""A Hugging Face tokenizer, from a folder or built in memory, behind the `Tokenizer` protocol."""

import copy
import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rljax.text.base import Message, end_of_turn_tokens, unique
from rljax.text.plain import MARK, PlainText, any_of, check_characters, special_tokens

_ANSWER = "qz7"  # stands for what the assistant says

GENERATION_FILE = "generation_config.json"


class HuggingFaceTokenizer:
    """Wraps a `transformers` tokenizer.

    What ends a completion is said in several places, and each counts: the tokenizer's end of sequence, `stop_ids`, the
    end-of-turn tokens by name that the vocabulary marks special, and what the chat template writes behind a turn of the
    assistant (`turn_end_id`, the end of sequence where it writes nothing special). `template_kwargs` go to the chat
    template at every call, such as `{"enable_thinking": False}`. Raises ValueError if the tokenizer has no
    end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int] = (),
        adds_bos: bool | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        self.hf = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id

        # ids may have gaps, so not the number of tokens
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        # names alone do not tell: a vocabulary may hold one as a piece of text
        self.special_tokens: Mapping[str, int] = special_tokens(tokenizer)
        self._template_kwargs = dict(template_kwargs or {})

        named = [self.special_tokens.get(name) for name in end_of_turn_tokens(self.special_tokens)]
        known = [i for i in stop_ids if 0 <= i < self.vocab_size]  # files may speak of a larger vocabulary
        self._own_stops = unique([tokenizer.eos_token_id, *known, *named])
        template_end = self._template_end()
        self.stop_ids: tuple[int, ...] = unique([*self._own_stops, template_end])
        if not self.stop_ids:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so a completion could never end; "
                "set eos_token in its tokenizer_config.json"
            )

        self.eos_id: int = self.stop_ids[0]
        self.turn_end_id: int = self.eos_id if template_end is None else template_end
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.adds_bos: bool = self._finds_bos() if adds_bos is None else adds_bos
        self.system_prompt: str = ""
        self._plain = PlainText(tokenizer)

    def _template_end(self) -> int | None:
        """The first special token that the chat template writes behind a turn of the assistant."""
        if not self.has_chat_template:
            return None
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = self.hf.apply_chat_template(messages, tokenize=False, **self._template_kwargs)
        except Exception:  # a template may stumble over anything; it says so when it is given a conversation
            return None

        before, found, behind = text.rpartition(_ANSWER)
        if not found:  # it shows questions alone
            return None
        find = any_of(self.special_tokens).findall
        # A template that always opens the next turn ends none with the token that opens it.
        opening = find(before)[-1:]
        ends = [name for name in find(behind)[:1] if [name] != opening]
        return self.special_tokens[ends[0]] if ends else None

    def _finds_bos(self) -> bool:
        return self.bos_id is not None and self.hf.encode("a", add_special_tokens=True)[:1] == [self.bos_id]

    @property
    def has_chat_template(self) -> bool:
        return bool(self.hf.chat_template)

    def encode(self, text: str) -> list[int]:
        """Names of special tokens in the text become those tokens. Raises ValueError for half of a character."""
        check_characters(text)
        return list(self.hf.encode(text, add_special_tokens=False))

    def encode_text(self, text: str, *, wrap: tuple[str, str] = ("", ""), continues: bool = False) -> list[int]:
        """See `rljax.text.encode_text`."""
        marked = self._plain.mark(text)
        if marked == text and not (continues and self._plain.has_dummy_prefix):
            return self.encode(f"{wrap[0]}{text}{wrap[1]}")
        return self._plain.encode(f"{wrap[0]}{marked}{wrap[1]}", continues=continues)

    def decode(self, ids: Sequence[int]) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]  # a model's vocabulary may be padded beyond ours
        return self.hf.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """A message may have a key `tools`, JSON schemas of functions, which the template is shown. `system_prompt`
        stands before messages that do not begin with a system message.

        Names of control tokens in messages and tools are text; only the template writes such tokens. Raises ValueError
        without a chat template, or if the template refuses the messages or stumbles over them.
        """
        if not self.has_chat_template:
            raise ValueError(
                "this tokenizer has no chat template, so it cannot take a list of messages; "
                "give prompts as plain text (config.data.chat=False), or a template with config.model.chat_template"
            )
        try:
            import jinja2
        except ImportError:
            raise ValueError("chat templates need the package jinja2: pip install 'jinja2>=3.1'") from None

        try:
            text = self._rendered(messages, add_generation_prompt)
        except Exception as error:  # the expressions of a template raise what they will
            kind = "" if isinstance(error, (jinja2.TemplateError, ValueError)) else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{error}".split()).encode("utf-8", "backslashreplace").decode("utf-8")
            raise ValueError(
                f"the chat template refused the messages ({reason:.300}), which are {reprlib.repr(messages)}"
            ) from error
        return self._plain.encode(text) if MARK in text else self.encode(text)

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """What the template makes of messages in which names of control tokens are marked."""
        messages = self._behind_system_prompt(messages)
        # last, so that tools given for all conversations win
        kwargs = {"tools": _tools(messages), **self._template_kwargs, "add_generation_prompt": add_generation_prompt}

        def template(given: Sequence[Any]) -> str:
            return self.hf.apply_chat_template(given[0], tokenize=False, **{**kwargs, "tools": given[1]})

        return self._plain.render(template, [list(messages), kwargs["tools"]])

    def _behind_system_prompt(self, messages: Sequence[Message]) -> Sequence[Message]:
        own = bool(messages) and messages[0].get("role") == "system"
        return messages if own or not self.system_prompt else [_system(self.system_prompt), *messages]

    def with_chat(
        self, chat_template: str, system_prompt: str, template_kwargs: Mapping[str, Any]
    ) -> "HuggingFaceTokenizer":
        """The same tokenizer with another template and system prompt (empty: its own), and `template_kwargs` as well.
        `rljax.text.with_chat_settings` checks them."""
        hf = copy.copy(self.hf)
        hf.chat_template = chat_template or hf.chat_template
        # Made anew, since what ends a completion may follow from the template.
        other = HuggingFaceTokenizer(
            hf,
            stop_ids=self._own_stops,
            adds_bos=self.adds_bos,
            template_kwargs={**self._template_kwargs, **template_kwargs},
        )
        other.system_prompt = system_prompt or self.system_prompt
        return other

    def with_template_kwargs(self, **template_kwargs: Any) -> "HuggingFaceTokenizer":
        """The same tokenizer whose chat template gets these as well, such as `tools`."""
        other = copy.copy(self)
        other._template_kwargs = {**self._template_kwargs, **template_kwargs}
        return other

    def save(self, folder: str | os.PathLike) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json`, the chat template and, in `generation_config.json`, what
        ends a completion."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.hf.save_pretrained(str(folder))
        file = Path(folder) / GENERATION_FILE
        file.write_text(json.dumps({"eos_token_id": list(self.stop_ids)}) + "\n", encoding="utf-8")


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _tools(messages: Sequence[Message]) -> list[Any] | None:
    return [tool for message in messages for tool in message.get("tools", ())] or None


def load_huggingface_tokenizer(
    folder: str | os.PathLike, *, template_kwargs: Mapping[str, Any] | None = None
) -> HuggingFaceTokenizer:
    """The tokenizer of a local model folder; nothing is ever downloaded.

    The ids are those of the folder's own files: transformers rebuilds the tokenizers of some families by their name,
    whatever splitting tokenizer.json describes. End tokens of its `generation_config.json` count beside those of
    `HuggingFaceTokenizer`. Raises ValueError if the folder cannot be read.
    """
    folder = Path(folder)
    try:
        tokenizer = _load(folder)
    except Exception as error:  # transformers raises many kinds, from deep inside
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"cannot load a tokenizer from the folder {folder}: {reason:.300}") from error
    return HuggingFaceTokenizer(tokenizer, stop_ids=_generation_stop_ids(folder), template_kwargs=template_kwargs)


def _load(folder: Path) -> Any:
    """The `transformers` tokenizer of what `folder` holds."""
    transformers = import_transformers()
    file = folder / "tokenizer.json"
    if file.is_file():
        # The class that takes the file as it is; the one that AutoTokenizer picks may keep its vocabulary alone.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        _check_rules(tokenizer.backend_tokenizer, file)
        return tokenizer
    if (folder / "tokenizer.model").is_file():
        from rljax.text.rebuild import sentencepiece_folder_tokenizer

        return sentencepiece_folder_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _check_rules(loaded: Any, file: Path) -> None:
    """ValueError unless a tokenizer normalises, splits and joins text as its file says."""
    from tokenizers import Tokenizer

    described = Tokenizer.from_file(str(file))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        wanted = getattr(described, part)
        found = getattr(loaded, part)
        if (wanted and wanted.__getstate__()) != (found and found.__getstate__()):
            raise ValueError(f"transformers replaced the {part} of {file}; install the version that wrote the file")


def _generation_stop_ids(folder: Path) -> list[int]:
    file = folder / GENERATION_FILE
    if not file.is_file():
        return []
    try:
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{file} is not a JSON object ({error}); repair or remove it") from None
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{file}: eos_token_id is {ids!r}; it must be an integer or a list of integers")
    return ids


def import_transformers() -> Any:
    """`transformers`, without its advice about frameworks that this package does not need."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
