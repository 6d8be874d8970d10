"""Text of others as token ids: what it says is text, whatever names of control tokens stand in it.

A page that holds `<|im_end|>` would otherwise end a turn and speak as the policy. A name of a control token is broken
by a mark that no text needs; the mark goes away behind the search for control tokens, so that the name is read as the
letters that it has. What a chat template writes by itself is not marked, and stays what it is.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

MARK = "\ufdd0"
"""A code point that Unicode sets aside for use within a program."""

_KEPT = "\ufdd1"
"""Stands behind a mark that a text has of its own, which stays in it."""

_REMOVED = re.compile(f"{MARK}(?!{_KEPT})")

_TAG = r"</?\w+>"
"""What chat templates look for in messages, as `</think>`; it is no beginning of a name that has been cut."""

_BEFORE = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
_PROBES = [
    [*_BEFORE, {"role": "user", "content": "x"}],
    # What stands around an observation is the template's as well: a page must not close it.
    [*_BEFORE, {"role": "tool", "content": "z", "name": "f", "tool_call_id": "call00001"}],
]


class PlainText:
    """The control tokens of a `transformers` tokenizer, and an encoder that tells them from text.

    Control tokens are those that the vocabulary marks special, and whatever else was added to it that the chat template
    writes between two turns or around an observation. Everything is found when it is first needed, since a copy of a
    large vocabulary takes a second.
    """

    def __init__(self, hf: Any):
        self._hf = hf
        self._control: dict[str, int] | None = None
        self._names = re.compile("")
        self._beginnings = re.compile("")
        self._copies: dict[bool, Any] = {}

    @property
    def control(self) -> Mapping[str, int]:
        """Ids of control tokens by name."""
        if self._control is None:
            control = special_tokens(self._hf)
            others = {str(token): i for i, token in self._hf.added_tokens_decoder.items() if str(token) not in control}
            between = self._between_turns() if others else ""
            control |= {name: i for name, i in others.items() if name in between}
            # A name of one letter cannot be broken, and is the unknown token of a toy.
            control = {name: i for name, i in control.items() if len(name) > 1}

            self._names = any_of(control)
            # Whole names and tags come first: at one place the first alternative that fits is found. Looking at one
            # letter before them keeps a thousand names from being tried at each place of a text.
            first = "".join(sorted({re.escape(name[0]) for name in control}))
            signs = "".join(sorted({re.escape(name[0]) for name in control if not name[0].isalnum()}))
            if signs:
                self._beginnings = re.compile(f"(?=[{first}<])(?:{self._names.pattern}|{_TAG}|[{signs}])")
            else:
                self._beginnings = self._names
            self._control = control
        return self._control

    def _between_turns(self) -> str:
        """What the chat template writes around turns; of a probe that it refuses, nothing."""
        return "\n".join(map(self._written, _PROBES)) if self._hf.chat_template else ""

    def _written(self, probe: list[dict[str, str]]) -> str:
        try:
            return self._hf.apply_chat_template(probe, tokenize=False)
        except Exception:  # a template may stumble over anything
            return ""

    def mark(self, value: Any) -> Any:
        """`value`, nested lists and mappings of text, with all names of control tokens in it broken."""
        return _each(self._mark_names, value) if self.control else value

    def render(self, template: Callable[[Any], str], value: Any) -> str:
        """What `template` writes of `value`, in which names of control tokens are broken; also those that the template
        joins: `<|im_/no_thinkend|>` where it takes `/no_think` out, or the ends of two fields side by side. Raises
        ValueError for a joined name that cannot be broken."""
        marked = self.mark(value)
        text = template(marked)
        broken = _each(self._mark_beginnings, value) if self.control else marked
        if broken == marked:
            return text

        # Whole names that are there although all their beginnings are broken are the template's own.
        safe = template(broken)
        if self._names.findall(safe) == self._names.findall(text):
            return text
        # Marks may have changed what the template does: it looks for something in messages, or escapes them.
        if _REMOVED.sub("", safe) == _REMOVED.sub("", text):
            return safe
        raise ValueError("it joins parts of their text to names of control tokens; take the parts of such names out")

    def _mark_names(self, text: str) -> str:
        return self._names.sub(_broken, text.replace(MARK, MARK + _KEPT))

    def _mark_beginnings(self, text: str) -> str:
        """Also every sign with which a name of a control token begins; tags that are no such names stay whole."""

        def mark(found: re.Match[str]) -> str:
            is_tag = len(found[0]) > 1 and found[0] not in self.control
            return found[0] if is_tag else _broken(found)

        return self._beginnings.sub(mark, text.replace(MARK, MARK + _KEPT))

    def encode(self, marked: str, *, continues: bool = False) -> list[int]:
        """Ids of a text in which broken names are text and whole ones are control tokens, without the dummy space in
        front of a text where it `continues` another. Raises ValueError for half of a character, and for a name that the
        vocabulary cannot spell."""
        check_characters(marked)
        control = self.control
        wanted = [control[name] for name in self._names.findall(marked)] if control else []
        ids = list(self._encode(marked, continues))

        # What the vocabulary lacks becomes the unknown token, which opens no turn.
        counted = set(control.values()) - {self._hf.unk_token_id}
        if [i for i in ids if i in counted] != [i for i in wanted if i in counted]:
            raise ValueError(
                f"the tokenizer cannot write {self._unspelt(marked)} as plain text; take it out of the text"
            )
        return ids

    def _encode(self, marked: str, continues: bool) -> list[int]:
        if getattr(self._hf, "backend_tokenizer", None) is not None:
            return self._copy(continues).encode(marked, add_special_tokens=False).ids

        # A tokenizer written in Python has nothing behind the search: what stands around marks is encoded alone.
        parts = [part.replace(MARK + _KEPT, MARK) for part in _REMOVED.split(marked)]
        return [i for part in parts for i in self._hf.encode(part, add_special_tokens=False)]

    def _unspelt(self, marked: str) -> str:
        return ", ".join(sorted({repr(name) for name in self._names.findall(marked.replace(MARK, ""))}))

    @functools.cached_property
    def has_dummy_prefix(self) -> bool:
        """Whether the tokenizer begins a text with a space that is not in it."""
        backend = getattr(self._hf, "backend_tokenizer", None)
        if backend is None:
            return False
        parts = (backend.normalizer, backend.pre_tokenizer)
        return any(_puts_space(node) for part in parts if part is not None for node in _nodes(_state(part)))

    def _copy(self, continues: bool) -> Any:
        """The tokenizer with marks taken out behind the search for control tokens."""
        continues = continues and self.has_dummy_prefix
        if continues not in self._copies:
            from tokenizers import Tokenizer

            state = json.loads(self._hf.backend_tokenizer.to_str())
            state["truncation"] = None
            state["padding"] = None
            # Special tokens are looked for before the text is normalized, and there alone.
            for token in state["added_tokens"]:
                token["normalized"] = token["normalized"] and token["content"] not in self.control

            if continues:
                state["normalizer"] = _without_space(state["normalizer"])
                state["pre_tokenizer"] = _without_space(state["pre_tokenizer"])
            remove = {"type": "Replace", "pattern": {"Regex": _REMOVED.pattern}, "content": ""}
            restore = {"type": "Replace", "pattern": {"String": MARK + _KEPT}, "content": MARK}
            normalizers = [remove, restore, *([state["normalizer"]] if state["normalizer"] else [])]
            state["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
            self._copies[continues] = Tokenizer.from_str(json.dumps(state))
        return self._copies[continues]


def _broken(name: re.Match[str]) -> str:
    return name[0][0] + MARK + name[0][1:]


def _each(change: Callable[[str], str], value: Any) -> Any:
    """`value`, nested lists and mappings of text, with all text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_each(change, key): _each(change, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_each(change, part) for part in value)
    return value


def check_characters(text: str) -> None:
    """ValueError for half of a character: a lone surrogate, which JSON may escape and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds half of a character ({text[error.start]!a} in {text!a:.80}), which "
            "no tokenizer takes; take it out"
        ) from None


def special_tokens(hf: Any) -> dict[str, int]:
    """Ids of the tokens by name that a `transformers` tokenizer leaves out when it decodes."""
    added = {str(token): i for i, token in hf.added_tokens_decoder.items() if token.special}
    return added | dict(zip(hf.all_special_tokens, hf.all_special_ids, strict=True))


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds the first of `names` in a text; nothing if there are none."""
    # The longest first, since one name may begin with another.
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _state(part: Any) -> Any:
    return json.loads(part.__getstate__())


def _nodes(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A component of a tokenizer and all that it is made of."""
    yield state
    for part in (*state.get("normalizers", ()), *state.get("pretokenizers", ())):
        yield from _nodes(part)


def _puts_space(state: Mapping[str, Any]) -> bool:
    if state["type"] == "Metaspace":
        return state.get("prepend_scheme", "always") != "never"
    return state["type"] == "Prepend" or (state["type"] == "ByteLevel" and bool(state.get("add_prefix_space")))


def _without_space(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer that puts no space in front of a text."""
    if state is None or state["type"] == "Prepend":
        return None
    if state["type"] == "Metaspace":
        return {**state, "prepend_scheme": "never"}
    if state["type"] == "ByteLevel":
        return {**state, "add_prefix_space": False}

    for name in ("normalizers", "pretokenizers"):
        if name in state:
            parts = [_without_space(part) for part in state[name]]
            state = {**state, name: [part for part in parts if part is not None]}
    return state
