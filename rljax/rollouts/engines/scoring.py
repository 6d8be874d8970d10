"""Engines that score given tokens: a teacher that is served elsewhere. Host, no jax."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from rljax.rollouts.engines.client import Engine, EngineFailed, Unreachable

_PAUSE_S = 1.0


class TokenScores(NamedTuple):
    """Of the tokens of one row, from the second on: [T - 1], and [T - 1, K] of the most probable tokens."""

    logprobs: np.ndarray
    """float32, nats."""
    ids: np.ndarray
    """int32: the K most probable tokens, best first."""
    top: np.ndarray
    """float32: their log-probs."""


class ScoringEngines:
    """Asks engines that speak vLLM's protocol of token ids for the log-probs of rows (`prompt_logprobs`).

    Rows go to `addresses` in turn, `connections` at a time. An engine that does not answer is asked again for `wait_s`
    seconds. Log-probs are those of the model as it is, at temperature 1.
    """

    def __init__(
        self, addresses: Sequence[str], *, top: int, connections: int, timeout_s: float, wait_s: float, key: str = ""
    ):
        self._engines = [Engine(address, timeout_s=timeout_s, key=key) for address in addresses]
        self._top = top
        self._connections = connections
        self._wait_s = wait_s

    def score(self, rows: Sequence[Sequence[int]]) -> list[TokenScores]:
        """One for each of `rows`. EngineFailed for an engine that refuses, stays away, or answers something else."""
        with ThreadPoolExecutor(max_workers=min(self._connections, max(1, len(rows)))) as pool:
            return list(pool.map(self._score, range(len(rows)), rows))

    def _score(self, index: int, tokens: Sequence[int]) -> TokenScores:
        engine = self._engines[index % len(self._engines)]
        body = {
            "token_ids": [int(token) for token in tokens],
            # vLLM wants to say one token at least; what it says is not read.
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": self._top, "detokenize": False},
        }
        until = time.monotonic() + self._wait_s
        while True:
            try:
                answer = engine.post("/inference/v1/generate", body)
                break
            except Unreachable as error:
                if time.monotonic() > until:
                    raise EngineFailed(
                        f"engine {engine.address} has not answered for {self._wait_s:g} s: {error}"
                    ) from None
                time.sleep(_PAUSE_S)
        try:
            return read_scores(answer, tokens, self._top)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise EngineFailed(
                f"engine {engine.address} gives no prompt_logprobs of {len(tokens)} tokens ({error!r}); a teacher is "
                "served by `rljax serve`, or by vLLM with --enable-scale-out, which score prompts"
            ) from error


def read_scores(answer: Mapping[str, Any], tokens: Sequence[int], top: int) -> TokenScores:
    """ValueError, TypeError or KeyError for what is no answer with the log-probs of `tokens`, and of the `top` best."""
    said = answer["prompt_logprobs"]
    if len(said) != len(tokens):
        raise ValueError(f"{len(said)} entries for {len(tokens)} tokens")

    logprobs = np.zeros(len(tokens) - 1, np.float32)
    ids = np.zeros((len(tokens) - 1, top), np.int32)
    best = np.zeros((len(tokens) - 1, top), np.float32)
    # Nothing precedes the first.
    for place, (token, entry) in enumerate(zip(tokens[1:], said[1:], strict=True)):
        logprobs[place] = entry[str(int(token))]["logprob"]
        ranked = sorted((value["rank"], int(name), value["logprob"]) for name, value in entry.items())[:top]
        if len(ranked) < top:
            raise ValueError(f"{len(ranked)} tokens at place {place + 1}, and {top} were asked for")
        for column, (_, name, value) in enumerate(ranked):
            ids[place, column] = name
            best[place, column] = value
    return TokenScores(logprobs, ids, best)
