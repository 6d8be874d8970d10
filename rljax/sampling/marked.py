"""Where conversations can be gone on from: the host's account of their memories (`rljax.sampling.conversations`)."""

from collections.abc import Collection

import numpy as np

from rljax.models.config import DecoderConfig
from rljax.sampling.conversations import Marks
from rljax.sampling.spec import TurnDecoderSpec

_NOT_KEPT = -1
"""Of a memory that is that of no token."""


class MarkedTokens:
    """Behind which tokens of conversations the memories of delta rules are kept; of a model without, behind all."""

    def __init__(self, config: DecoderConfig, spec: TurnDecoderSpec):
        self._has_memories = config.delta is not None
        self._tokens = np.full((spec.conversations, spec.memories), _NOT_KEPT)

    def last(self, conversation: int, tokens: int) -> int:
        """The last place in the first `tokens` of a conversation that it can go on from."""
        if not self._has_memories:
            return tokens
        kept = self._tokens[conversation]
        return int(kept[kept <= tokens].max(initial=0))

    def place(self, conversation: int, tokens: int) -> int:
        """Which memory is that behind so many tokens; -1 for none, as behind nothing."""
        (found,) = np.nonzero(self._tokens[conversation] == tokens)
        return int(found[0]) if len(found) else -1

    def set(self, conversation: int, common: int, tokens: int) -> int:
        """Which memory becomes that behind so many tokens: the one of the fewest, once those behind more than `common`
        tokens, which have been said otherwise, are gone."""
        kept = self._tokens[conversation]
        kept[kept > common] = _NOT_KEPT
        chosen = int(kept.argmin())
        kept[chosen] = tokens
        return chosen

    def copy(self, conversation: int, other: int) -> None:
        self._tokens[conversation] = self._tokens[other]

    def forget(self, keep: Collection[int]) -> None:
        """All, but of the conversations `keep`."""
        self._tokens[[i not in keep for i in range(len(self._tokens))]] = _NOT_KEPT

    def told(self, source: np.ndarray, target: np.ndarray, length: np.ndarray) -> Marks | None:
        """As the device wants them; None where it has no use for them."""
        return Marks(source=source, target=target, length=length) if self._has_memories else None
