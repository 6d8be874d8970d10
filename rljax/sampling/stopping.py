"""Stop strings: looked for in the text of what was sampled, since they may lie across tokens."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from rljax.sampling.spec import Stops

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
                "config.sampling.stop_strings holds an empty text, which would end any sample at once; leave it out"
            )
        self.strings = tuple(stops.strings)
        self._decode = stops.decode_text
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

    def _is_in(self, ids: list[int], before: list[int], known: str) -> bool:
        return find_stop(self._text(ids, before), self.strings, known) is not None

    def _text(self, ids: list[int], before: list[int]) -> str:
        assert self._decode is not None
        text = self._decode([*before, *ids])
        return text[_shared(text, self._decode(before)) :] if before else text


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
    # A character whose last bytes came later is another one in `known`: it was not there yet.
    length = _shared(text, known)
    starts = [text.find(string, max(0, length - len(string) + 1)) for string in strings]
    return min((start for start in starts if start >= 0), default=None)


def _shared(text: str, head: str) -> int:
    """How many characters of `head`, all but the last few, `text` begins with."""
    while not text.startswith(head):
        head = head[:-1]
    return len(head)
