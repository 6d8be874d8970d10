"""One optimizer step as one compiled program. It sees a minibatch, and knows of no rollout."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from rljax.batching import dense_rows, gather, ragged_rows, spread
from rljax.models import DecoderConfig, Forward
from rljax.sampling import SamplingParams
from rljax.sampling.divergence import DivergenceHead, divergence_hidden, what_was_said
from rljax.sampling.score import score_hidden, scored_states
from rljax.training.balance import load_metrics, take_loads, with_balance
from rljax.training.objective import Metrics, Objective, ScoreFn
from rljax.training.trainable import EVERYTHING, Subtree
from rljax.types import TEACHER_DIVERGENCE, ArrayLike, Packed, Params, RaggedRows, TrainBatch

LOGPROBS = 0
ENTROPIES = 1
"""Which of a `ScoreFn`'s two numbers is wanted."""


class Scored(NamedTuple):
    """What a pass over a minibatch gives: a scalar, metrics, and the gradient by the trainable weights."""

    loss: Array
    metrics: Metrics
    grads: Any
    loads: Array | None = None
    """Of each layer's experts how many tokens they computed for, [L, E]; None where they are not counted."""


@dataclasses.dataclass(frozen=True)
class UpdateProgram:
    """Pure functions that a learner compiles: what changes comes in and goes out.

    Weights come as `trainable` and `base`, gradients are by `trainable` alone. `sampling` None is the model's own
    distribution.
    """

    config: DecoderConfig
    loss: Objective
    optimizer: optax.GradientTransformationExtraArgs
    score_fn: ScoreFn
    chunk: int
    """Tokens whose logits a device has at once."""
    forward: Forward
    """How log-probs are computed, never what they are."""

    updates_once: bool
    """Whether a rollout is one update; then its old log-probs are the update's own, as constants, unless those of the
    sampler are asked for."""

    use_sampler_logprobs: bool
    """Whether the sampler's log-probs, with which a batch comes, are the old ones."""

    divergence: DivergenceHead | None = None
    """Of the policy from a teacher, for a loss that reads it."""

    subtree: Subtree = EVERYTHING
    balance_rate: float | None = None
    """How far the bias that experts are chosen by moves in an update (`rljax.training.balance`); None where the model
    has none that is trained."""

    schedule: optax.Schedule | None = None
    """Learning rate by optimizer step, for the metrics."""

    @property
    def _old_is_current(self) -> bool:
        """Whether the old log-probs are the update's own."""
        return self.updates_once and not self.use_sampler_logprobs

    def step(
        self, trainable: Any, opt_state: Any, step: Array, skipped: Array, base: Any, batch: TrainBatch, sampling: Any
    ) -> tuple[Any, Any, Array, Array, Metrics, dict[str, Array]]:
        """(trainable, opt_state, step, skipped, metrics, finite) after one update. An update whose loss or gradient is
        not finite, or whose minibatch has no token to learn from, leaves weights and optimizer as they are; `finite`
        says what was."""
        params = self.subtree.merge(trainable, base)
        batch, whole_metrics, scale = self._whole_minibatch(params, batch, sampling)
        loss, metrics, grads, loads = self.gradients(trainable, batch, sampling, base=base)
        grad_norm = optax.tree_utils.tree_norm(grads)
        norms = [grad_norm]

        def gradient_at(other: Any) -> Any:
            # For optimizers that look elsewhere. Nothing but the weights may differ there, so the old log-probs stay
            # those at `params`.
            anchored = self._anchored(params, batch, sampling)
            there = self.gradients(other, anchored, sampling, base=base, anchored=True).grads
            norms.append(optax.tree_utils.tree_norm(there))
            return there

        masked_advantages = jnp.where(batch.rows.loss_mask, batch.rows.advantages, 0.0)
        finite = {
            "advantages": jnp.all(jnp.isfinite(masked_advantages)),
            "logprobs": metrics.pop("nonfinite_logprobs") == 0,
            "loss": jnp.isfinite(loss),
        }

        # The optimizer runs before the norms are judged: it may call `gradient_at`, which adds one.
        updates, new_opt_state = self.optimizer.update(grads, opt_state, trainable, grad_fn=gradient_at)
        finite["gradient norm"] = jnp.all(jnp.isfinite(jnp.stack(norms)))
        is_finite = finite["loss"] & finite["gradient norm"]

        # No data is no update: momentum would move the weights, and the schedule would go on.
        ok = is_finite & jnp.any(jnp.asarray(batch.rows.loss_mask))

        if scale is not None:
            updates = jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates)
        if loads is not None and self.balance_rate is not None:
            updates = with_balance(updates, loads, self.balance_rate)
            metrics |= load_metrics(loads)
        new_trainable = optax.apply_updates(trainable, updates)

        # A choice by element and not a branch: a branch would keep both states alive, and undo the donation.
        new_trainable, new_opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old), (new_trainable, new_opt_state), (trainable, opt_state)
        )
        skipped = jnp.where(is_finite, jnp.where(ok, 0, skipped), skipped + 1).astype(jnp.int32)

        metrics |= {"loss/total": loss, "loss/grad_norm": grad_norm, "loss/skipped": skipped.astype(jnp.float32)}
        metrics |= whole_metrics | _packing_metrics(batch)
        if self.schedule is not None:
            # By the count before the update: the rate that this update was made with.
            metrics["loss/learning_rate"] = jnp.asarray(self.schedule(_update_count(opt_state)), jnp.float32)
        return new_trainable, new_opt_state, step + 1, skipped, metrics, finite

    def gradients(
        self,
        trainable: Any,
        batch: TrainBatch,
        sampling: SamplingParams | None,
        *,
        base: Any = None,
        anchored: bool = False,
    ) -> Scored:
        """Added up over the microbatches that hold anything. `anchored` keeps the old log-probs of the batch, whatever
        the weights."""
        total = self._total(trainable, batch, sampling, base=base, anchored=anchored)
        if self.balance_rate is None:
            return total
        grads, loads = take_loads(total.grads)
        return total._replace(grads=grads, loads=loads)

    def _total(
        self, trainable: Any, batch: TrainBatch, sampling: SamplingParams | None, *, base: Any, anchored: bool
    ) -> Scored:
        """`gradients`, with loads where they came home."""
        loss_fn = functools.partial(self._microbatch_loss, anchored=anchored)
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

        def of(m: Any) -> Scored:
            packed, rows = jax.tree.map(lambda x: x[m], (batch.packed, batch.rows))
            (loss, metrics), grads = value_and_grad(trainable, base, packed, rows, sampling, batch.teacher_head)
            return Scored(loss, metrics, grads)

        # A single microbatch needs no accumulators beside its gradients.
        if batch.rows.place.shape[0] == 1:
            return of(0)

        def add(m: Any, total: Scored) -> Scored:
            one = of(m)
            grads = jax.tree.map(lambda a, g: a + g.astype(a.dtype), total.grads, one.grads)
            metrics = {name: _combine(name)(total.metrics[name], value) for name, value in one.metrics.items()}
            return Scored(total.loss + one.loss, metrics, grads)

        # Sums are kept in float32 whatever the weights' dtype, since bfloat16 would drop small microbatches.
        shapes = jax.eval_shape(of, 0)
        start = Scored(
            loss=jnp.zeros(shapes.loss.shape, jnp.float32),
            metrics={name: jnp.full(x.shape, _neutral(name), x.dtype) for name, x in shapes.metrics.items()},
            grads=jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.float32), shapes.grads),
        )
        # At least one, so that an empty minibatch has a loss and a gradient of 0 rather than none.
        count = jnp.maximum(_live_microbatches(batch.rows.loss_mask), 1)
        return jax.lax.fori_loop(0, count, add, start)

    def token_logprobs(
        self, params: Params, packed: Packed, rows: RaggedRows, sampling: SamplingParams | None
    ) -> tuple[Array, Array]:
        """Log-probs and entropies `[Q, C]` of the loss tokens of one microbatch; 0 in padding."""
        scored = self.score_fn(self.config, params, packed, sampling, chunk=self.chunk, forward=self.forward)
        index = jnp.asarray(rows.row_index)

        def of_tokens(values: Array) -> Array:
            # Parts hold whole packed rows, so that no device reads the scored tokens of another.
            of_parts = values.reshape(index.shape[0], -1)
            return jnp.where(rows.loss_mask, jnp.take_along_axis(of_parts, index, axis=1), 0.0)

        return of_tokens(scored[LOGPROBS]), of_tokens(scored[ENTROPIES])

    def score_microbatches(
        self,
        params: Params,
        packed: Packed,
        rows: RaggedRows,
        sampling: SamplingParams | None,
        what: int = LOGPROBS,
    ) -> Array:
        """Log-probs or entropies `[M, Q, C]` of the loss tokens of all microbatches."""

        def score(m, out):
            one, of_one = jax.tree.map(lambda x: x[m], (packed, rows))
            return out.at[m].set(self.token_logprobs(params, one, of_one, sampling)[what])

        return jax.lax.fori_loop(0, _live_microbatches(rows.loss_mask), score, jnp.zeros(rows.place.shape, jnp.float32))

    def token_divergences(
        self, params: Params, packed: Packed, rows: RaggedRows, sampling: SamplingParams | None, teacher_head: Any
    ) -> tuple[Array, Array, Array]:
        """`token_logprobs`, and the divergence `[Q, C]` from the teacher, of one forward pass."""
        assert self.divergence is not None
        hidden, targets, wanted = scored_states(self.config, params, packed, forward=self.forward)
        scored = score_hidden(self.config, params, hidden, targets, wanted, sampling, chunk=self.chunk)
        index = jnp.asarray(rows.row_index)

        def of_tokens(values: Array) -> Array:
            of_parts = values.reshape(index.shape[0], -1)
            return jnp.where(rows.loss_mask, jnp.take_along_axis(of_parts, index, axis=1), 0.0)

        # A state for each loss token and not each scored one: rows that share tokens may have teachers that were told
        # different things.
        states = hidden.reshape(index.shape[0], -1, hidden.shape[-1])
        states = jnp.take_along_axis(states, index[..., None], axis=1)
        said = what_was_said(rows.teacher, teacher_head)
        values = divergence_hidden(self.config, params, states, said, rows.loss_mask, sampling, how=self.divergence)
        return of_tokens(scored[LOGPROBS]), of_tokens(scored[ENTROPIES]), values

    def _microbatch_loss(
        self,
        trainable: Any,
        base: Any,
        packed: Packed,
        ragged: RaggedRows,
        sampling: Any,
        teacher_head: Any,
        *,
        anchored: bool,
    ) -> tuple[Array, Metrics]:
        params = self.subtree.merge(trainable, base)
        rows = dense_rows(ragged)
        if self.divergence is None:
            of_tokens = self.token_logprobs(params, packed, ragged, sampling)
        else:
            scored = self.token_divergences(params, packed, ragged, sampling, teacher_head)
            of_tokens, divergences = scored[:2], scored[2]
            columns = {**rows.columns, TEACHER_DIVERGENCE: spread(ragged, divergences)}
            rows = rows.replace(columns=columns)  # type: ignore[attr-defined]
        logprobs, entropies = (spread(ragged, x) for x in of_tokens)

        # The only update of a rollout starts from the old policy: the ratio is 1, and only its gradient counts.
        if self._old_is_current and not anchored:
            rows = rows.replace(old_logprobs=jax.lax.stop_gradient(logprobs))  # type: ignore[attr-defined]
        loss, metrics = self.loss.loss(logprobs, entropies, rows)

        # With the sampler's log-probs as the old ones, those would differ from themselves by nothing.
        sampled_by = logprobs if self.use_sampler_logprobs else rows.old_logprobs
        gap = jnp.abs(jax.lax.stop_gradient(sampled_by - rows.behavior_logprobs))
        gap = jnp.where(rows.loss_mask, gap, 0.0)
        metrics = dict(metrics) | {
            "rollout/logprob_gap_max": jnp.max(gap),
            "rollout/logprob_gap_mean": jnp.sum(gap) / rows.token_count,
            "nonfinite_logprobs": jnp.sum(~jnp.isfinite(logprobs)).astype(jnp.float32),
        }
        return loss, jax.lax.stop_gradient(metrics)

    def _whole_minibatch(
        self, params: Params, batch: TrainBatch, sampling: Any
    ) -> tuple[TrainBatch, Metrics, Array | None]:
        """What the loss selects and corrects by all rows at once: the minibatch to train on, metrics, a step factor."""
        metrics: Metrics = {}
        scale = None

        # Corrections come first: selection is of the advantages that they leave.
        if self.loss.correct_fn is not None:
            anchored = self._anchored(params, batch, sampling)
            corrected, metrics, scale = self.loss.correct_fn(dense_rows(anchored.rows))
            batch = dataclasses.replace(batch, rows=ragged_rows(corrected, anchored.rows))

        if self.loss.select_fn is not None:
            ragged = batch.rows
            # `sampling` None: the entropies are of the full softmax, whatever was sampled from.
            unmasked = batch.packed.replace(allowed=None, allowed_index=None)  # type: ignore[attr-defined]
            entropies = self.score_microbatches(params, unmasked, ragged, None, ENTROPIES)
            mask = spread(ragged, ragged.loss_mask)
            selected = self.loss.select_fn(spread(ragged, entropies), mask)
            batch = with_rows(batch, advantages=jnp.where(gather(ragged, selected), ragged.advantages, 0))
            fraction = jnp.sum(selected & mask) / jnp.maximum(jnp.sum(mask), 1)
            metrics = metrics | {"loss/selected_fraction": fraction}
        return batch, metrics, scale

    def _anchored(self, params: Params, batch: TrainBatch, sampling: Any) -> TrainBatch:
        """The minibatch with old log-probs, which a single update would else leave to the loss itself."""
        if not self._old_is_current:
            return batch
        scored = self.score_microbatches(params, batch.packed, batch.rows, sampling)
        return with_rows(batch, old_logprobs=scored)


def add_metrics(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of several updates as one line: means, and maxima where the name ends in `_max`."""
    host = [{k: float(v) for k, v in part.items()} for part in jax.device_get(list(parts))]
    names = dict.fromkeys(name for part in host for name in part)
    total = {}
    for name in names:
        reduce = np.max if _is_maximum(name) else np.mean
        total[name] = float(reduce([part[name] for part in host if name in part]))
    return total


def with_rows(batch: TrainBatch, **fields: Any) -> TrainBatch:
    """The minibatch with other fields of its rows."""
    return dataclasses.replace(batch, rows=batch.rows.replace(**fields))  # type: ignore[attr-defined]


def _is_maximum(name: str) -> bool:
    return name.endswith("_max")


def _combine(name: str) -> Any:
    """How a metric of two microbatches becomes one."""
    return jnp.maximum if _is_maximum(name) else jnp.add


def _neutral(name: str) -> float:
    return -jnp.inf if _is_maximum(name) else 0.0


def _live_microbatches(mask: ArrayLike) -> Array:
    """Microbatches up to the last that has a token to score."""
    mask = jnp.asarray(mask)
    return jnp.max(jnp.where(jnp.any(mask, axis=(1, 2)), jnp.arange(mask.shape[0]) + 1, 0))


def _packing_metrics(batch: TrainBatch) -> Metrics:
    mask = batch.rows.loss_mask
    real = jnp.asarray(batch.packed.subtree_end) > 0

    # A row counts up to its last loss token, which is as far as it is packed. Tokens stand in the order of line and
    # position, so the last of a line is the one that another line, or nothing, follows.
    place = jnp.asarray(batch.rows.place)
    line = place // batch.rows.width
    after = jnp.pad(line[..., 1:], ((0, 0), (0, 0), (0, 1)), constant_values=-1)
    is_last = mask & (line != after)
    flat = jnp.sum(jnp.where(is_last, place % batch.rows.width + 1, 0))
    unique = jnp.maximum(jnp.sum(real), 1)
    capacity = jnp.maximum(_live_microbatches(mask), 1) * real.shape[1] * real.shape[2]

    values = {
        "flat_tokens": flat,
        "unique_tokens": unique,
        "token_ratio": flat / unique,
        "is_forest": flat > unique,
        "fill": unique / capacity,
    }
    return {f"pack/{name}": jnp.asarray(value, jnp.float32) for name, value in values.items()}


def _update_count(opt_state: Any) -> Array:
    """How many updates the optimizer has applied (skipped ones do not count)."""
    # The schedule comes last, and keeps its count where that of the moments begins anew.
    counts = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    return counts[-1][1]
