"""Completions cut into steps by what their text says."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from rljax.text.base import Tokenizer, control_tokens_of


class StepSplitter:
    """Numbers the steps of a completion from 0: a step ends with the token that completes one of `delimiters`, which
    may lie across tokens, or be the name of a control token.

    The number of a token depends on the tokens up to it alone, so completions that share a prefix share its steps.
    Without delimiters everything is step 0. Raises ValueError for an empty delimiter, and for one that no text can hold
    since a control token stands in it.
    """

    def __init__(self, tokenizer: Tokenizer, delimiters: Sequence[str]):
        if "" in delimiters:
            raise ValueError("a step delimiter is empty and would end a step at every token; leave it out")

        self._tokenizer = tokenizer
        self._delimiters = tuple(delimiters)
        self._ids = set(control_tokens_of(tokenizer, delimiters, "the step delimiter {} ends no step"))
        self._texts: dict[int, str] = {}  # by token, which is decoded once

    def __call__(self, tokens: Sequence[int] | np.ndarray) -> Int[np.ndarray, " T"]:
        ids = [int(token) for token in tokens]
        ends = np.array([token in self._ids for token in ids], np.int32)

        if self._delimiters:
            pieces = [self._text(token) for token in ids]
            stops = np.array(list(itertools.accumulate(map(len, pieces))), np.int64)
            ends[np.searchsorted(stops, self._places("".join(pieces)))] = 1
        return (np.cumsum(ends) - ends).astype(np.int32)

    def _places(self, text: str) -> list[int]:
        """Lengths of `text` at which it ends with a delimiter; of each delimiter, those that do not overlap."""
        places = []
        for delimiter in self._delimiters:
            start = text.find(delimiter)
            while start >= 0:
                places.append(start + len(delimiter))
                start = text.find(delimiter, places[-1])
        return places

    def _text(self, token: int) -> str:
        if token not in self._texts:
            # Behind itself, since at the beginning of a text a tokenizer may take its space away.
            once = self._tokenizer.decode([token])
            self._texts[token] = self._tokenizer.decode([token, token])[len(once) :]
        return self._texts[token]
