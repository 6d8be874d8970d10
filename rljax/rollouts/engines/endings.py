"""Where a completion ends that an engine said: by the run's own rules, whatever the engine calls it."""

from collections.abc import Sequence

import numpy as np

from rljax.rollouts.engines.api import Said
from rljax.rollouts.engines.client import EngineFailed
from rljax.sampling import Stops
from rljax.sampling.slots import FinishReason
from rljax.sampling.stopping import StopStrings, last_of


class Endings:
    """The end that a decoder with `stops` would have come to, for a model of `vocabulary` ids."""

    def __init__(self, stops: Stops, vocabulary: int):
        self._tokens = frozenset(stops.tokens)
        self._strings = StopStrings(stops)
        self._vocabulary = vocabulary

    @property
    def finds_strings(self) -> bool:
        """Whether completions may have stop strings of their own."""
        return self._strings.reads_text

    def cut(
        self,
        prompt: Sequence[int],
        inherited: Sequence[int],
        said: Said,
        *,
        begun: int,
        limit: int,
        stop: tuple[str, ...] = (),
    ) -> tuple[Said, FinishReason]:
        """What was said up to its end, of at most `limit` tokens, and why that is one. A text, also one of its own
        (`stop`), may begin in the last `begun` tokens of `prompt`, and in `inherited`, which stand behind it. Raises
        EngineFailed for what does not end by these rules."""
        tokens = said.tokens.tolist()
        if outside := [token for token in tokens if not 0 <= token < self._vocabulary]:
            raise EngineFailed(
                f"an engine said the token {outside[0]}, and the model knows {self._vocabulary}; it serves another"
            )

        # As a decoder would have stopped, so that no token behind the end is trained on.
        ended = next((i + 1 for i, token in enumerate(tokens) if token in self._tokens), None)
        end = min(ended or len(tokens), limit)
        length = self._strings.beside(stop).end(
            lambda count: last_of(prompt, [np.array([*inherited, *tokens[:end]], np.int32)], count),
            len(inherited) + end,
            end,
            begun=begun,
            given=len(inherited),
        )
        if length is not None:
            return said.until(length - len(inherited)), "stop_string"
        if ended is not None and ended <= limit:
            return said.until(ended), "stop"
        if len(tokens) >= limit:
            return said.until(limit), "length"
        raise EngineFailed(
            f"an engine ended a completion ({said.finish_reason}) after {len(tokens)} of {limit} tokens, and neither "
            "a stop token nor a stop string ends it; start it with room for prompt and completion, and no defaults of "
            "its own (vLLM: --max-model-len, --generation-config=vllm)"
        )
