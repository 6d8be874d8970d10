"""Stop strings: looked for in the text of what was sampled, since they may lie across tokens."""

import numpy as np

from rljax.sampling.spec import Stops


class StopStrings:
    """Finds where text first contains one of `stops.strings`. Raises ValueError for an empty one, or without
    `stops.decode_text`."""

    def __init__(self, stops: Stops):
        if stops.strings and stops.decode_text is None:
            raise ValueError("stop_strings need decode_text, a function from token ids to text; pass tokenizer.decode")
        if "" in stops.strings:
            raise ValueError("a stop string is empty and would end every sample at once; leave it out")
        self.strings = tuple(stops.strings)
        self._decode = stops.decode_text

    def end(self, tokens: np.ndarray, checked: int = 0) -> int | None:
        """The fewest tokens, more than `checked`, whose text contains a stop string."""
        ids = tokens.tolist()
        if not self.strings or not self._is_in(ids):
            return None
        return next(n for n in range(checked + 1, len(ids) + 1) if self._is_in(ids[:n]))

    def _is_in(self, ids: list[int]) -> bool:
        assert self._decode is not None
        text = self._decode(ids)
        return any(string in text for string in self.strings)
