"""What a learner is given to minimise: an objective, and what that wants beside a rollout."""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool

from rljax.sampling import SamplingParams
from rljax.sampling.divergence import DivergenceHead
from rljax.sampling.score import score_tokens
from rljax.types import ArrayLike, Rows

Metrics = dict[str, Array]

ScoreFn = Callable[..., tuple[Array, Array]]
"""`score_tokens`, or a function of the same arguments: two numbers per scored token, the loss's first arguments."""


@runtime_checkable
class Objective(Protocol):
    """What a learner minimises: `rljax.losses.policy_loss` makes one, `sft_loss` another. It has all four; None stands
    for a step that it does without."""

    @property
    def token_weights(self) -> Callable[[Bool[np.ndarray, "B T"]], ArrayLike]:
        """From the loss mask of a whole minibatch to the weights of its tokens, float."""
        ...

    @property
    def loss(self) -> Callable[[Array, Array, Rows], tuple[Array, Metrics]]:
        """`loss(logprobs [B, T], entropies [B, T], rows)`: a sum over the tokens of a microbatch, and metrics. Both add
        up over microbatches; metrics whose name ends in `_max` combine by maximum."""
        ...

    @property
    def select_fn(self) -> Callable[[Array, Array], Array] | None:
        """`select_fn(entropies, loss_mask) -> bool`, over all microbatches `[M, B, T]` of a minibatch at once: tokens
        that it does not select have their advantage set to 0. The entropies (nats) are those of the policy before the
        update, of its full softmax at temperature 1, and cost one more forward pass."""
        ...

    @property
    def correct_fn(self) -> Callable[[Rows], tuple[Rows, Metrics, Array | None]] | None:
        """`correct_fn(rows)`, over all microbatches too: given the old log-probs, it returns the rows to train on,
        metrics, and a factor for the optimizer's step or None. With one update per rollout that costs a forward
        pass."""
        ...


@dataclasses.dataclass(frozen=True)
class LossNeeds:
    """What an objective wants beside a rollout and its advantages."""

    reference: bool = False
    """Log-probs of the reference (`Rows.ref_logprobs`): the state keeps a copy of the initial trainable weights."""

    uniforms: bool = False
    """A random number per token and update (`Rows.uniforms`), drawn by seed, step, epoch, row of the rollout and
    position."""

    sampling: SamplingParams | None = None
    """The distribution that log-probs are of, the one that was sampled from; None is the model's own."""

    divergence: DivergenceHead | None = None
    """Of a teacher's distributions (`RolloutBatch.teacher`) from the policy's: the column `TEACHER_DIVERGENCE` of the
    rows that a loss sees. Its `chunk` is that of the updates. None is for a loss without one."""

    score_fn: ScoreFn = score_tokens
    """What is trained: `score_tokens`, or `score_values`, with which all that is said of log-probs holds for values."""


NO_NEEDS = LossNeeds()
"""A policy's log-probs, and nothing beside."""
