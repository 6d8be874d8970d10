"""Stop strings: looked for in the text of what was sampled, since they may lie across tokens."""

from collections.abc import Sequence

import numpy as np

from rljax.sampling.spec import Stops


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

    def end(self, tokens: np.ndarray, checked: int = 0, *, given: int = 0, before: Sequence[int] = ()) -> int | None:
        """The fewest tokens, more than `checked` and `given`, whose text contains a stop string.

        The first `given` tokens were not said by this sample: a string that lies in them as a whole does not count, but
        one that begins there does. `before` are the tokens that stand before all of these, of which the last counts: a
        tokenizer may write the first word of a text otherwise than one within it.
        """
        ids = tokens.tolist()
        before = list(before[-1:])
        known = self._text(ids[:given], before) if self.strings and given else ""
        if not self.strings or not self._is_in(ids, before, known):
            return None
        first = max(checked, given) + 1
        return next(n for n in range(first, len(ids) + 1) if self._is_in(ids[:n], before, known))

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
