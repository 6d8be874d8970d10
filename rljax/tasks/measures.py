"""How hard a task is for a policy, by what it says and how sure it is of that: the dimensions of 2510.19099.

Most come from the most probable tokens beside each sampled one (`config.sampling.top_logprobs`; the paper has five),
whose probabilities are made to sum to 1. They are of a policy as it stands: of the weights that will be trained.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

IMPOSSIBLE = -1e29
"""Log-probs below it are of tokens that cannot be sampled: the sampler's are -1e30 or so, since a log of 0 is no number
to compute with."""

Dimension = Literal["problem", "surprisal", "margin", "uncertainty", "variability"]


class Measure(NamedTuple):
    """What a number says of a task."""

    dimension: Dimension
    """The paper's name for its kind."""
    is_easy_high: bool = False
    """Whether easy tasks have high values."""


MEASURES = {
    "accuracy": Measure("problem", is_easy_high=True),
    "sequence_perplexity": Measure("surprisal"),
    "token_perplexity": Measure("surprisal"),
    "margin": Measure("margin", is_easy_high=True),
    "sequence_entropy": Measure("uncertainty"),
    "token_entropy": Measure("uncertainty"),
    "pooled_entropy": Measure("uncertainty"),
    "nll_variance": Measure("variability"),
    "token_nll_variance": Measure("variability"),
    "sequence_entropy_variance": Measure("variability"),
    "token_entropy_variance": Measure("variability"),
    "pooled_entropy_variance": Measure("variability"),
    "margin_variance": Measure("variability"),
    "accuracy_variance": Measure("variability"),
}
"""What `difficulties` tells, by name. Sums over a sample, `sequence_entropy` and `nll_variance`, grow with its length;
the means of a token beside them do not."""


class MeasuredSample(NamedTuple):
    """One sample in a few numbers; all are 0 where it has no token."""

    nll: float
    """Negative log-prob of all its tokens, nats."""
    entropies: np.ndarray
    """float64 [T]: entropy of the most probable tokens at each place, bits."""
    margin: float
    """Mean log-prob of the most probable token over that of the second, nats, over the places that have two."""

    @property
    def token_nll(self) -> float:
        """`nll` of a token."""
        return self.nll / max(len(self.entropies), 1)

    @property
    def token_entropy(self) -> float:
        """Mean of `entropies`."""
        return float(self.entropies.mean()) if len(self.entropies) else 0.0


def measured_sample(logprobs: np.ndarray, top_logprobs: np.ndarray) -> MeasuredSample:
    """`logprobs` [T] of the tokens of a sample, and those of the C most probable ones at each place, `top_logprobs`
    [T, C], the best first (nats; of tokens that cannot be sampled below `IMPOSSIBLE`). ValueError for C below 2."""
    top = np.asarray(top_logprobs, np.float64)
    if top.ndim != 2 or top.shape[1] < 2:
        raise ValueError(f"top_logprobs has the shape {top.shape}; it must be [tokens, candidates], 2 of them at least")
    if not len(top):
        return MeasuredSample(0.0, np.zeros(0), 0.0)

    # Of the candidates alone: what is beyond them is not known.
    probs = np.where(top > IMPOSSIBLE, np.exp(top), 0.0)
    probs /= probs.sum(axis=1, keepdims=True)
    entropies = -(probs * np.log2(np.where(probs > 0, probs, 1.0))).sum(axis=1)

    has_two = top[:, 1] > IMPOSSIBLE
    margins = (top[:, 0] - top[:, 1])[has_two]
    margin = float(margins.mean()) if len(margins) else 0.0
    return MeasuredSample(-float(np.sum(logprobs, dtype=np.float64)), entropies, margin)


def difficulties(samples: Sequence[MeasuredSample], solved: Sequence[float]) -> dict[str, float]:
    """`MEASURES` of a task, of samples of it and whether each solved it (1, 0, or NaN where nothing could tell).

    Means over the samples, or population variances over them; those of pooled entropies are over all tokens of all
    samples. Accuracy and its variance are NaN where nothing could tell of any. ValueError without samples.
    """
    if not samples:
        raise ValueError("the difficulty of a task comes from samples of it; there is none")

    pooled = np.concatenate([sample.entropies for sample in samples])
    # What the samples differ in, a number for each of them, and for pooled entropies one for each token.
    spread = {
        "nll": np.array([sample.nll for sample in samples]),
        "token_nll": np.array([sample.token_nll for sample in samples]),
        "sequence_entropy": np.array([sample.entropies.sum() for sample in samples]),
        "token_entropy": np.array([sample.token_entropy for sample in samples]),
        "pooled_entropy": pooled if len(pooled) else np.zeros(1),
        "margin": np.array([sample.margin for sample in samples]),
    }
    mean = {name: float(values.mean()) for name, values in spread.items()}

    told = [value for value in solved if not math.isnan(value)]
    accuracy = float(np.mean(told)) if told else math.nan
    return {
        "accuracy": accuracy,
        "sequence_perplexity": float(np.exp(spread["token_nll"]).mean()),
        # Entropies are in bits.
        "token_perplexity": float(np.exp2(spread["token_entropy"]).mean()),
        "margin": mean["margin"],
        **{name: mean[name] for name in ("sequence_entropy", "token_entropy", "pooled_entropy")},
        **{f"{name}_variance": float(values.var()) for name, values in spread.items()},
        "accuracy_variance": accuracy * (1 - accuracy),
    }
