"""What the rollout log holds of each token, beside ids and the sampler's log-probs (`config.log.per_token`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rljax.text import Tokenizer, decode_behind
from rljax.types import INTERVENTION_INJECT, INTERVENTION_NONE, RolloutBatch, Trajectory

_DIGITS = 5
_UNFINISHED = "\ufffd"
"""What a decoder shows for a character of which bytes are missing."""


def log_tokens(
    records: Sequence[dict[str, Any]],
    trajectories: Sequence[Trajectory],
    batch: RolloutBatch,
    advantages: Float[np.ndarray, "B T"],
    trainer_logprobs: Float[np.ndarray, "B T"],
    tokenizer: Tokenizer,
) -> None:
    """Adds `per_token` to each record, and `intervention` to those of forks that have one.

    `per_token` has a list for each of these, an entry a token of the completion: `text`, `turn`, `sampled` (1 where the
    policy emitted it), `trained` (1 where it may receive gradient), `entropy` (nats), `advantage`, `log_ratio` (the
    trainer's log-prob before the first update minus the sampler's, nats; 0 where `trained` is 0), and `value` where
    there is a critic. The rows of `batch`, `advantages` and `trainer_logprobs` are the trajectories, in order.
    """
    values = None if batch.values is None else np.asarray(batch.values)
    for row, (record, trajectory) in enumerate(zip(records, trajectories, strict=True)):
        ids = record["tokens"]
        end = len(trajectory.tokens)
        own = slice(end - len(ids), end)
        sampled = np.ones(len(ids), int)
        for start, stop in record.get("forced", ()):
            sampled[start:stop] = 0
        trained = trajectory.action_mask[own] & trajectory.is_valid
        log_ratio = np.where(trained, trainer_logprobs[row, own] - trajectory.behavior_logprobs[own], 0.0)

        columns = {
            "text": token_texts(tokenizer, ids, trajectory.tokens[: own.start].tolist()),
            "turn": trajectory.turn_ids[own].tolist(),
            "sampled": sampled.tolist(),
            "trained": trained.astype(int).tolist(),
            "entropy": _rounded(trajectory.entropies[own]),
            "advantage": _rounded(advantages[row, own]),
            # Of rollouts that are fresh it is as small as rounding, so digits count from its first one on.
            "log_ratio": [float(f"{value:.3g}") for value in log_ratio.tolist()],
        }
        if values is not None:
            columns["value"] = _rounded(values[row, own])
        record["per_token"] = columns
        if trajectory.intervention != INTERVENTION_NONE:
            is_injected = trajectory.intervention == INTERVENTION_INJECT
            record["intervention"] = "injected" if is_injected else "suppressed"


def _rounded(values: np.ndarray) -> list[float]:
    return np.round(np.asarray(values, np.float64), _DIGITS).tolist()


def token_texts(tokenizer: Tokenizer, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """The text that each of `ids` adds behind `before`. A character of several tokens stands at its last one, and so
    does what never becomes one; a special token has no text."""
    told = [""] * len(ids)
    path = [*before, *ids]
    begin = first = len(before)
    for end in range(first + 1, len(path) + 1):
        text = decode_behind(tokenizer, path[begin:end], path[max(0, begin - 1) : begin])
        if text.endswith(_UNFINISHED) and end < len(path):
            continue
        told[end - 1 - first] = text
        begin = end
    return told
