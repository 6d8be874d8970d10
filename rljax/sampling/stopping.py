"""Stop strings: looked for in the text of what was sampled, since they may lie across tokens."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from rljax.sampling.spec import Stops
from rljax.text.base import shared_length, text_behind

# Tokens, and then characters, by which a tail reaches further back than its longest stop string: its first token may be
# a piece of a character, or be written otherwise than within a text.
_MARGIN = 8


class StopStrings:
    """Finds where a text comes to hold one of `stops.strings`. Raises ValueError for an empty one, or without
    `stops.decode_text`."""

    def __init__(self, stops: Stops):
        if stops.strings and stops.decode_text is None:
            raise ValueError("stop_strings need decode_text, a function from token ids to text; pass tokenizer.decode")
        if "" in stops.strings:
            raise ValueError(
                "config.sampling.stop_strings, or the stops of a request, hold an empty text, which would end any "
                "sample at once; leave it out"
            )
        self.strings = tuple(stops.strings)
        self._decode = stops.decode_text
        self._beside: dict[tuple[str, ...], StopStrings] = {}
        self._reach = max(map(len, self.strings), default=0) + _MARGIN

    def end(
        self, last: Callable[[int], list[int]], length: int, new: int, *, begun: int = 0, given: int = 0
    ) -> int | None:
        """With how many of its `length` tokens a completion comes to contain a stop string that ends within the last
        `new` of them, behind the first `given`; None where there is none.

        `last(n)` gives the last `n` tokens of prompt and completion, or all there are. The prompt's last `begun` and
        the completion's first `given` belong to the text, but were not said by this sample: a string that lies in them
        as a whole does not count, but one that begins there does. Of the tokens before these the last counts: a
        tokenizer may write the first word of a text otherwise than one within it.
        """
        if not self.strings or not new or not self._is_in_tail(last, new):
            return None
        ids = last(length + begun + 1)
        before = ids[: -(length + begun)]
        ids = ids[len(before) :]

        there = begun + given
        known = self._text(ids[:there], before) if there else ""
        if not self._is_in(ids, before, known):
            return None
        first = begun + max(length - new, given) + 1
        return next(n for n in range(first, len(ids) + 1) if self._is_in(ids[:n], before, known)) - begun

    def _is_in_tail(self, last: Callable[[int], list[int]], new: int) -> bool:
        """Whether a stop string may end within the last `new` tokens, by the text of a tail alone. Where none does, a
        search costs what is new, however long the text has become."""
        assert self._decode is not None
        back = _MARGIN
        while True:
            ids = last(new + back)
            if len(ids) < new + back or len(self._decode(ids[:-new])) >= self._reach:
                break
            # Tokens of little text, or none.
            back *= 2
        text = self._decode(ids)
        return any(string in text for string in self.strings)

    @property
    def reads_text(self) -> bool:
        """Whether it could find others."""
        return self._decode is not None

    def beside(self, strings: Sequence[str]) -> "StopStrings":
        """Finds `strings` too, as those of one request. Raises ValueError as when it is made."""
        more = tuple(string for string in strings if string not in self.strings)
        if not more:
            return self
        if more not in self._beside:
            self._beside[more] = StopStrings(Stops(strings=(*self.strings, *more), decode_text=self._decode))
        return self._beside[more]

    def _is_in(self, ids: list[int], before: list[int], known: str) -> bool:
        return find_stop(self._text(ids, before), self.strings, known) is not None

    def _text(self, ids: list[int], before: list[int]) -> str:
        assert self._decode is not None
        return text_behind(self._decode, ids, before)


def last_of(prompt: Sequence[int], parts: Iterable[np.ndarray], count: int) -> list[int]:
    """The last `count` of a prompt and the tokens behind it, which are given in parts, the last part first."""
    tail: list[int] = []
    for part in parts:
        tail = part[max(0, len(part) - count + len(tail)) :].tolist() + tail
        if len(tail) >= count:
            return tail
    missing = count - len(tail)
    return [int(token) for token in prompt[max(0, len(prompt) - missing) :]] + tail


def find_stop(text: str, strings: Sequence[str], known: str = "") -> int | None:
    """Where the first of `strings` in `text` begins, of those that end behind the text `known`, with which `text`
    begins; None for none."""
    length = shared_length(text, known)
    starts = [text.find(string, max(0, length - len(string) + 1)) for string in strings]
    return min((start for start in starts if start >= 0), default=None)
