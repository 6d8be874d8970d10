"""Completions cut into steps by what their tokens say."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from rljax.text.base import Tokenizer


class StepSplitter:
    """Numbers the steps of a completion from 0: a step ends with a token whose text contains one of `delimiters`.

    The number of a token depends on the tokens up to it alone, so completions that share a prefix share its steps.
    Without delimiters everything is step 0. Raises ValueError for an empty delimiter.
    """

    def __init__(self, tokenizer: Tokenizer, delimiters: Sequence[str]):
        if "" in delimiters:
            raise ValueError("a step delimiter is empty and would end a step at every token; leave it out")
        self._tokenizer = tokenizer
        self._delimiters = tuple(delimiters)
        self._ends: dict[int, bool] = {}  # by token, which is decoded once

    def __call__(self, tokens: Sequence[int] | np.ndarray) -> Int[np.ndarray, " T"]:
        ends = np.array([self._is_end(int(token)) for token in tokens], np.int32)
        return (np.cumsum(ends) - ends).astype(np.int32)

    def _is_end(self, token: int) -> bool:
        if token not in self._ends:
            text = self._tokenizer.decode([token]) if self._delimiters else ""
            self._ends[token] = any(delimiter in text for delimiter in self._delimiters)
        return self._ends[token]
