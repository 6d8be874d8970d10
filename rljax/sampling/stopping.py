"""Stop strings: looked for in the text of what was sampled, since they may lie across tokens."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

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

    def may_end(self, last: Callable[[int], Sequence[int]], new: int) -> bool:
        """Whether a stop string may end within the last `new` tokens, by the text of a tail alone: if not, `end` finds
        none there. `last(n)` gives the last `n` tokens of prompt and completion, or all there are.

        So a search costs what is new, however long the text has become.
        """
        if not self.strings or not new:
            return False
        assert self._decode is not None

        back = _MARGIN
        while True:
            ids = list(last(new + back))
            if len(ids) < new + back or len(self._decode(ids[:-new])) >= self._reach:
                break
            # Tokens of little text, or none.
            back *= 2
        text = self._decode(ids)
        return any(string in text for string in self.strings)

    def end(
        self,
        tokens: Int[np.ndarray, " T"],
        checked: int = 0,
        *,
        prompt: Sequence[int] = (),
        begun: int = 0,
        given: int = 0,
    ) -> int | None:
        """The fewest of `tokens`, more than `checked` and `given`, with which the text contains a stop string.

        `prompt` stands before them. Its last `begun` tokens and the first `given` of `tokens` belong to the text, but
        were not said by this sample: a string that lies in them as a whole does not count, but one that begins there
        does. Of the tokens before these the last counts: a tokenizer may write the first word of a text otherwise than
        one within it.
        """
        if not self.strings:
            return None
        start = len(prompt) - begun
        before = np.asarray(prompt[max(start - 1, 0) : start], np.int32).tolist()
        ids = np.concatenate([np.asarray(prompt[start:], np.int32), tokens]).tolist()

        there = begun + given
        known = self._text(ids[:there], before) if there else ""
        if not self._is_in(ids, before, known):
            return None
        first = begun + max(checked, given) + 1
        return next(n for n in range(first, len(ids) + 1) if self._is_in(ids[:n], before, known)) - begun

    def _is_in(self, ids: list[int], before: list[int], known: str) -> bool:
        return find_stop(self._text(ids, before), self.strings, known) is not None

    def _text(self, ids: list[int], before: list[int]) -> str:
        assert self._decode is not None
        text = self._decode([*before, *ids])
        return text[_shared(text, self._decode(before)) :] if before else text


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
