"""Grammars that completions must follow: which tokens may come next, by llguidance. Host, no jax.

A grammar is named by one text, its kind and then what it is: `json_schema {"type": "object"}`, `regex [0-9]+` or
`lark start: "yes" | "no"` (llguidance's dialect of Lark).
"""

import functools
import json
import threading
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from rljax.text.base import Tokenizer, decode_behind, encode_text

KINDS = ("json_schema", "regex", "lark")
_BITS = 32


class GrammarError(ValueError):
    """A grammar that cannot be read, or that is not installed for."""


class Grammars:
    """Grammars over the vocabulary of `tokenizer`, each compiled once. Safe for several threads.

    A completion that follows its grammar to an end may be ended by any of the tokenizer's stop tokens, and where
    nothing else can follow it must. `num_ids` is the vocabulary of the model, at least that of the tokenizer. What is
    `banned` leads nowhere; ValueError where that is every stop token, since then no completion could end.
    """

    def __init__(self, tokenizer: Tokenizer, num_ids: int, banned: Collection[int] = ()):
        if banned and set(tokenizer.stop_ids) <= set(banned):
            raise ValueError("every token that ends a completion is banned, and one that follows a grammar must end")
        self.tokenizer = tokenizer
        self.num_ids = num_ids
        self.width = -(-num_ids // _BITS)
        self.unbanned = np.full(self.width, 0xFFFFFFFF, np.uint32)
        """A bit a token, as `Followed.allowed` has them: whether it is not banned."""
        for token in banned:
            self.unbanned[token // _BITS] &= ~np.uint32(1 << token % _BITS)
        self._lock = threading.Lock()
        self._compiled: dict[str, Grammar] = {}

    def __call__(self, name: str) -> "Grammar":
        """The grammar of this name. Raises GrammarError."""
        with self._lock:
            if name not in self._compiled:
                self._compiled[name] = Grammar(self, name)
            return self._compiled[name]

    @functools.cached_property
    def vocabulary(self) -> Any:
        """llguidance's own view of the tokenizer. Raises GrammarError where that is not installed."""
        llguidance = import_llguidance()
        from llguidance.hf import from_tokenizer

        stops = list(dict.fromkeys(self.tokenizer.stop_ids))
        hf: Any = getattr(self.tokenizer, "hf", None)
        if not hasattr(hf, "backend_tokenizer"):
            return llguidance.LLTokenizer(
                llguidance.TokenizerWrapper(_Vocabulary(self.tokenizer, self.num_ids)),
                n_vocab=self.num_ids,
                eos_token=stops,
            )
        return from_tokenizer(hf, n_vocab=self.num_ids, eos_token=stops)


class Grammar:
    """A grammar of `grammars`, ready to be followed."""

    def __init__(self, grammars: Grammars, name: str):
        kind, _, text = name.partition(" ")
        if kind not in KINDS or not text:
            raise GrammarError(f"{name!r:.80} is no grammar; it begins with {', '.join(KINDS)}, and a space")
        self.name = name
        self.width = grammars.width
        self._grammars = grammars
        self._matcher_class = import_llguidance().LLMatcher
        if kind == "json_schema":
            text = checked_schema(text)
        made = getattr(self._matcher_class, f"grammar_from_{kind}")
        try:
            self._text = made(text)
            problem = self._matcher_class.validate_grammar(self._text, grammars.vocabulary)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise GrammarError(f"{kind} {text!r:.80}: {' '.join(problem.split())[:300]}")

    def begin(self) -> "Followed":
        """The beginning of a completion."""
        return Followed(self._matcher_class(self._grammars.vocabulary, self._text, log_level=0), self._grammars)


class Followed:
    """Where a completion stands in its grammar."""

    def __init__(self, matcher: Any, grammars: Grammars):
        self._matcher = matcher
        self._grammars = grammars
        self._is_free = False  # behind a stop token, or behind tokens that are not the grammar's

    def allowed(self) -> UInt32[np.ndarray, " W"]:
        """A bit a token, the first the lowest: whether it may come next. All of them behind a stop token, and behind
        tokens that are not the grammar's."""
        grammars = self._grammars
        if self._is_free:
            return np.full(grammars.width, 0xFFFFFFFF, np.uint32)
        bits = np.zeros(grammars.width, np.uint32)
        if not self._matcher.is_stopped():
            found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: grammars.width]
            bits[: len(found)] = found & grammars.unbanned[: len(found)]
        if self._matcher.is_error() or not bits.any():
            # Nothing follows, or no token of this vocabulary leads on, as where its alphabet lacks a letter or the only
            # one is banned.
            bits[:] = 0
            for stop in grammars.tokenizer.stop_ids:
                bits[stop // _BITS] |= np.uint32(1 << stop % _BITS)
            bits &= grammars.unbanned
        return bits

    def advance(self, tokens: Sequence[int]) -> None:
        """Goes on by these tokens."""
        for token in tokens:
            if self._is_free:
                return
            is_end = token in self._grammars.tokenizer.stop_ids or self._matcher.is_stopped()
            self._is_free = is_end or not self._matcher.consume_token(int(token))


def import_llguidance() -> Any:
    """Raises GrammarError where it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise GrammarError("grammars need llguidance; pip install 'rljax-lm[grammar]'") from error
    return llguidance


def checked_schema(text: str) -> str:
    """A JSON schema as JSON text. GrammarError for what is none."""
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise GrammarError(f"json_schema {text!r:.80} is no JSON: {error}") from error
    if not isinstance(schema, (dict, bool)):
        raise GrammarError(f"json_schema {text!r:.80} must be a JSON object")
    return json.dumps(schema)


class _Vocabulary:
    """A tokenizer as llguidance asks it: the bytes of every token."""

    def __init__(self, tokenizer: Tokenizer, num_ids: int):
        special = set(getattr(tokenizer, "special_tokens", {}).values())
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(special | {*tokenizer.stop_ids, tokenizer.pad_id})
        bytes_of = getattr(tokenizer, "token_bytes", None) or functools.partial(_bytes_within, tokenizer)
        known = range(min(num_ids, tokenizer.vocab_size))
        self.tokens = [b"" if i in self.special_token_ids else bytes_of(i) for i in known]
        self.tokens += [b""] * (num_ids - len(self.tokens))
        self._tokenizer = tokenizer
        self._ids = {text: token for token, text in reversed(list(enumerate(self.tokens))) if text}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens of what must come next: all of it, since what is left out would be free. Raises GrammarError for what
        there are no tokens of, at which llguidance ends the completion."""
        whole = text.encode() if isinstance(text, str) else text
        try:
            ids = encode_text(self._tokenizer, whole.decode(), continues=True)
        except ValueError:  # a part of a character, or a letter that there is no token of
            ids = []
        return ids if b"".join(self.tokens[i] for i in ids) == whole else self._greedy(whole)

    def _greedy(self, text: bytes) -> list[int]:
        """The longest token that fits, again and again. Raises GrammarError where none does."""
        ids: list[int] = []
        while text:
            lengths = range(min(self._longest, len(text)), 0, -1)
            length = next((n for n in lengths if text[:n] in self._ids), 0)
            if not length:
                raise GrammarError(f"the tokenizer has no token that begins {text!r:.40}")
            ids.append(self._ids[text[:length]])
            text = text[length:]
        return ids


def _bytes_within(tokenizer: Tokenizer, token: int) -> bytes:
    """Of a token as it stands within a text."""
    return decode_behind(tokenizer, [token], [token]).encode()
