"""The learner: rollouts to minibatches, minibatches to updates. It knows a loss, and no algorithm."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from rljax.batching import Packing, layout, loss_mask, pack, take_rows
from rljax.models import DecoderConfig, forest_attention, kernel_attention
from rljax.ops import row_uniforms
from rljax.parallel import batch_parts, put_batch, put_host, replicated, to_host, use_mesh
from rljax.sampling import SamplingParams
from rljax.sampling.score import score_tokens
from rljax.training.config import UpdateConfig
from rljax.training.guard import Guard
from rljax.training.optimizers import OptimizerConfig, make_optimizer, make_schedule
from rljax.training.state import abstract_state, create_state, state_shardings
from rljax.types import ArrayLike, Packed, Params, RolloutBatch, Rows, TrainBatch, TrainState

Metrics = dict[str, Array]

ScoreFn = Callable[..., tuple[Array, Array]]
"""`score_tokens`, or a function of the same arguments: two numbers per scored token, the loss's first arguments."""

UNIFORMS = 0x756E69
"""Folded into the run's key for the losses' random numbers, to keep them apart from the sampler's."""


@runtime_checkable
class Objective(Protocol):
    """What the learner minimises: `rljax.losses.policy_loss` makes one, `sft_loss` another. All four are there; None
    stands for a step that an objective does without."""

    @property
    def token_weights(self) -> Callable[[Bool[np.ndarray, "B T"]], ArrayLike]:
        """From the loss mask of a whole minibatch to weights of its tokens, float."""
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
    """Log-probs of the reference (`Rows.ref_logprobs`): the learner keeps a copy of the initial weights."""

    uniforms: bool = False
    """A random number per token and update (`Rows.uniforms`), drawn by seed, step, epoch, row of the rollout and
    position."""

    score_fn: ScoreFn = score_tokens
    """What is trained: `score_tokens`, or `score_values`, with which all that is said of log-probs holds for values."""


class Learner:
    """Makes minibatches of a rollout and updates the state with them.

    `update` says how a rollout becomes updates; under a mesh, its `microbatch_size` must divide over the batch axes.
    Log-probs are those of the distribution that `sampling` describes; None is the model's own. `seed` is the run's:
    shuffling and the losses' random numbers are drawn from it.

    An update whose loss or gradient is not finite leaves weights and optimizer as they are; after `max_skipped` of
    them in a row `update` (or `check`) raises `FloatingPointError` with what was not finite. ValueError for values that
    cannot work.
    """

    def __init__(
        self,
        config: DecoderConfig,
        loss: Objective,
        optimizer: OptimizerConfig | optax.GradientTransformation,
        update: UpdateConfig,
        *,
        needs: LossNeeds = LossNeeds(),
        sampling: SamplingParams | None = None,
        mesh: Mesh | None = None,
        seed: int = 0,
    ):
        update.check()
        if mesh is not None and update.microbatch_size % batch_parts(mesh):
            raise ValueError(
                f"config.update.microbatch_size={update.microbatch_size} does not divide over the {batch_parts(mesh)} "
                f"devices that split the batch; set it to a multiple of {batch_parts(mesh)}"
            )
        self.config = config
        self.loss = loss
        self.update_config = dataclasses.replace(update)
        self.needs = needs
        self.mesh = mesh
        self.seed = seed
        self._schedule = None
        if isinstance(optimizer, OptimizerConfig):
            self._schedule, optimizer = make_schedule(optimizer), make_optimizer(optimizer)
        self.optimizer = optax.with_extra_args_support(optimizer)
        self._sampling = None if sampling is None or _is_plain(sampling) else sampling
        attention = kernel_attention if update.attention_kernel else forest_attention
        self._head: dict[str, Any] = dict(chunk=update.head_chunk, remat=update.remat, attention=attention)
        self._guard = Guard(update.max_skipped)
        outputs: dict[str, Any] = {}
        if mesh is not None:  # the state comes back as it lay, so that nothing is moved or compiled again
            where = state_shardings(config, self.optimizer, mesh=mesh)
            outputs["out_shardings"] = (where.params, where.opt_state, where.step, where.skipped, None, None)
        self._update = jax.jit(self._update_step, donate_argnums=(0, 1, 2, 3), **outputs)
        self._score = jax.jit(self._score_microbatches)

    def init_state(self, params: Params) -> TrainState:
        """A state at step 0 that owns `params`, sharded over the mesh; with a copy as reference if one is needed."""
        where = None
        if self.mesh is not None:
            where = state_shardings(self.config, self.optimizer, reference=self.needs.reference, mesh=self.mesh)
        return create_state(params, self.optimizer, reference=self.needs.reference, shardings=where)

    def abstract_state(self) -> TrainState:
        """What a checkpoint of the state is restored into."""
        return abstract_state(self.config, self.optimizer, reference=self.needs.reference, mesh=self.mesh)

    def prepare(
        self,
        state: TrainState,
        batch: RolloutBatch,
        advantages: Float[ArrayLike, "B T"],
        extra_mask: Bool[ArrayLike, "B T"] | None = None,
    ) -> list[TrainBatch]:
        """The minibatches of one rollout, in order: each is one `update`, and they are on the device already.

        With one update per rollout, `old_logprobs` are the update's own log-probs as constants, which costs nothing;
        with several, the policy before the first is scored here. Reference log-probs are taken from the batch, or
        scored if the learner needs them.
        """
        advantages = np.asarray(advantages, np.float32)
        mask = loss_mask(batch, extra_mask)
        parts = self._split(batch, int(state.step) if self.update_config.shuffle else None)
        made, packings = [], []
        for rows in parts:
            part = batch if len(parts) == 1 else take_rows(batch, rows)
            packing = layout(part, mask[rows], self.update_config)
            train_batch = pack(
                part,
                advantages[rows],
                self.update_config,
                token_weights=self.loss.token_weights,
                extra_mask=mask[rows],
                packing=packing,
            )
            train_batch = self._put(train_batch)
            if (len(parts) > 1 or self.update_config.epochs > 1) and not self.update_config.use_sampler_logprobs:
                train_batch = _with(train_batch, old_logprobs=self._score_packing(state.params, train_batch))
            if self.needs.reference and batch.ref_logprobs is None:
                train_batch = _with(train_batch, ref_logprobs=self._score_packing(state.ref_params, train_batch))
            made.append(train_batch)
            packings.append(packing)
        if not self.needs.uniforms:
            return made * self.update_config.epochs
        return [
            _with(train_batch, uniforms=self._put(packing.rows_of(uniforms[rows])))
            for epoch in range(self.update_config.epochs)
            for uniforms in [self._uniforms(batch, int(state.step), epoch)]
            for rows, packing, train_batch in zip(parts, packings, made, strict=True)
        ]

    def score_rows(
        self, params: Params, batch: RolloutBatch, mask: Bool[ArrayLike, "B T"] | None = None
    ) -> Float[np.ndarray, "B T"]:
        """Log-probs under `params` of the tokens in `mask` (default: the action mask of valid rows), 0 elsewhere.

        A rollout is scored in as many parts as it has minibatches, so that both fit the same buckets.
        """
        mask = loss_mask(batch) if mask is None else np.asarray(mask, bool)
        out = np.zeros(np.shape(batch.tokens), np.float32)
        for rows in self._split(batch):
            part = take_rows(batch, rows)
            packing: Packing = layout(part, mask[rows], self.update_config)
            packed, row_index, row_mask = self._put((packing.packed, packing.row_index, packing.mask))
            with self._on_mesh():
                values = self._score(params, packed, row_index, row_mask, self._sampling)
            out[rows] = packing.batch_of(to_host(values), part.tokens)
        return out

    def update(self, state: TrainState, train_batch: TrainBatch) -> tuple[TrainState, Metrics]:
        """One optimizer step, one jitted call; `state` is donated. The metrics are device scalars."""
        with self._on_mesh():
            params, opt_state, step, skipped, metrics, finite = self._update(
                state.params, state.opt_state, state.step, state.skipped, train_batch, self._sampling
            )
        self._guard.observe(skipped, finite)
        fields = dict(params=params, opt_state=opt_state, step=step, skipped=skipped)
        return state.replace(**fields), metrics  # type: ignore[attr-defined]

    def lower_update(self, train_batch: TrainBatch) -> jax.stages.Lowered:
        """The update lowered for a batch of `jax.ShapeDtypeStruct`s, to compile and inspect; nothing runs."""
        state = self.abstract_state()
        arguments = (state.params, state.opt_state, state.step, state.skipped, train_batch, self._sampling)
        with self._on_mesh():
            return self._update.lower(*arguments)

    def check(self) -> None:
        """Raises for the last update too; `update` itself looks one update back, so as not to wait."""
        self._guard.check()

    def refresh_reference(self, state: TrainState, weight: float = 1.0) -> TrainState:
        """Moves the reference to the policy: `weight` of the way (1 copies it; less is an exponential average)."""
        if state.ref_params is None:
            raise ValueError("the state has no reference params; build the learner with LossNeeds(reference=True)")
        return state.replace(ref_params=_mix(state.params, state.ref_params, weight))  # type: ignore[attr-defined]

    def _split(self, batch: RolloutBatch, step: int | None = None) -> list[np.ndarray]:
        """Rows of each minibatch; in an order drawn for update `step` if the learner shuffles and it is given."""
        if self.update_config.minibatches == 1:
            return [np.arange(len(batch.lengths))]
        group_id = np.asarray(batch.group_id)
        groups = np.unique(group_id[np.asarray(batch.lengths) > 0])
        if len(groups) % self.update_config.minibatches:
            raise ValueError(
                f"{len(groups)} groups do not divide into {self.update_config.minibatches} minibatches of whole "
                "groups; choose a divisor"
            )
        if self.update_config.shuffle and step is not None:
            groups = np.random.default_rng([self.seed, step]).permutation(groups)
        return [np.flatnonzero(np.isin(group_id, part)) for part in np.split(groups, self.update_config.minibatches)]

    def _uniforms(self, batch: RolloutBatch, step: int, epoch: int) -> Float[np.ndarray, "B T"]:
        """A number in [0, 1) per token of the rollout. Rows count by their place in it, so that neither padding,
        minibatches, packing nor devices matter."""
        count, width = np.shape(batch.tokens)
        key = functools.reduce(jax.random.fold_in, (UNIFORMS, step, epoch), jax.random.key(self.seed))
        return np.asarray(_draw(key, np.arange(count), width=width))

    def _put(self, tree: Any) -> Any:
        """Packed rows split over the batch axes of the mesh, everything else replicated."""
        mesh = self.mesh
        if mesh is None:
            return jax.device_put(tree)
        is_packed = lambda x: isinstance(x, Packed)  # noqa: E731
        return jax.tree.map(
            lambda x: put_batch(mesh, x, axis=1) if is_packed(x) else put_host(x, replicated(mesh)),
            tree,
            is_leaf=is_packed,
        )

    @property
    def _updates_once(self) -> bool:
        return self.update_config.minibatches * self.update_config.epochs == 1

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else use_mesh(self.mesh)

    def _score_packing(self, params: Params, batch: TrainBatch) -> Array:
        with self._on_mesh():
            return self._score(params, batch.packed, batch.rows.row_index, batch.rows.loss_mask, self._sampling)

    def _rows_logprobs(self, params, packed: Packed, row_index, mask, sampling) -> tuple[Array, Array]:
        """Log-probs and entropies of one microbatch, gathered into its rows; 0 off the mask."""
        scored = self.needs.score_fn(self.config, params, packed, sampling, **self._head)
        gathered = [jnp.where(mask, jnp.take(x.reshape(-1), row_index, axis=0), 0.0) for x in scored]
        return gathered[0], gathered[1]

    def _score_microbatches(self, params, packed: Packed, row_index, mask, sampling, what: int = 0) -> Array:
        """Log-probs (`what` 0) or entropies (1) of all microbatches."""

        def score(m, out):
            one, index, kept = jax.tree.map(lambda x: x[m], (packed, row_index, mask))
            return out.at[m].set(self._rows_logprobs(params, one, index, kept, sampling)[what])

        return jax.lax.fori_loop(0, _live_microbatches(mask), score, jnp.zeros(mask.shape, jnp.float32))

    def _microbatch_loss(self, params, packed: Packed, rows: Rows, sampling, *, anchored) -> tuple[Array, Metrics]:
        logprobs, entropies = self._rows_logprobs(params, packed, rows.row_index, rows.loss_mask, sampling)
        if self._updates_once and not anchored:
            rows = rows.replace(old_logprobs=jax.lax.stop_gradient(logprobs))  # type: ignore[attr-defined]
        loss, metrics = self.loss.loss(logprobs, entropies, rows)
        sampled_by = logprobs if self.update_config.use_sampler_logprobs else rows.old_logprobs
        gap = jnp.abs(jax.lax.stop_gradient(sampled_by - rows.behavior_logprobs))
        gap = jnp.where(rows.loss_mask, gap, 0.0)
        metrics = dict(metrics) | {
            "rollout/logprob_gap_max": jnp.max(gap),
            "rollout/logprob_gap_mean": jnp.sum(gap) / rows.token_count,
            "nonfinite_logprobs": jnp.sum(~jnp.isfinite(logprobs)).astype(jnp.float32),
        }
        return loss, jax.lax.stop_gradient(metrics)

    def _whole_minibatch(self, params, batch: TrainBatch, sampling) -> tuple[TrainBatch, Metrics, Array | None]:
        """What the loss selects and corrects by all rows at once: the minibatch to train on, metrics, a step factor."""
        metrics: Metrics = {}
        scale = None
        if self.loss.correct_fn is not None:
            anchored = self._anchored(params, batch, sampling)
            rows, metrics, scale = self.loss.correct_fn(anchored.rows)
            batch = TrainBatch(packed=batch.packed, rows=rows)
        if self.loss.select_fn is not None:
            mask = jnp.asarray(batch.rows.loss_mask)
            entropies = self._score_microbatches(params, batch.packed, batch.rows.row_index, mask, None, 1)
            selected = self.loss.select_fn(entropies, mask)
            batch = _with(batch, advantages=jnp.where(selected, batch.rows.advantages, 0))
            metrics = metrics | {"loss/selected_fraction": jnp.sum(selected & mask) / jnp.maximum(jnp.sum(mask), 1)}
        return batch, metrics, scale

    def _anchored(self, params, batch: TrainBatch, sampling) -> TrainBatch:
        """The minibatch with old log-probs, which a single update would else leave to the loss itself."""
        if not self._updates_once:
            return batch
        rows = batch.rows
        return _with(
            batch, old_logprobs=self._score_microbatches(params, batch.packed, rows.row_index, rows.loss_mask, sampling)
        )

    def _gradients(self, params, batch: TrainBatch, sampling, anchored: bool = False) -> tuple[Array, Metrics, Any]:
        """(loss, metrics, gradients), added up over the microbatches that hold anything. `anchored` keeps the old
        log-probs of the batch, at whatever params."""
        value_and_grad = jax.value_and_grad(functools.partial(self._microbatch_loss, anchored=anchored), has_aux=True)

        def of(m):
            packed, rows = jax.tree.map(lambda x: x[m], (batch.packed, batch.rows))
            (loss, metrics), grads = value_and_grad(params, packed, rows, sampling)
            return loss, metrics, grads

        if batch.rows.row_index.shape[0] == 1:  # no accumulators beside the gradients
            return of(0)

        def add(m, total):
            loss, metrics, grads = of(m)
            grads = jax.tree.map(lambda a, g: a + g.astype(a.dtype), total[2], grads)
            metrics = {k: (jnp.maximum if k.endswith("_max") else jnp.add)(total[1][k], v) for k, v in metrics.items()}
            return total[0] + loss, metrics, grads

        shapes = jax.eval_shape(of, 0)
        start = (
            jnp.zeros(shapes[0].shape, jnp.float32),
            {k: jnp.full(v.shape, -jnp.inf if k.endswith("_max") else 0.0, v.dtype) for k, v in shapes[1].items()},
            jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.float32), shapes[2]),
        )
        return jax.lax.fori_loop(0, jnp.maximum(_live_microbatches(batch.rows.loss_mask), 1), add, start)

    def _update_step(self, params, opt_state, step, skipped, batch: TrainBatch, sampling):
        batch, whole_metrics, scale = self._whole_minibatch(params, batch, sampling)
        loss, metrics, grads = self._gradients(params, batch, sampling)
        grad_norm = optax.tree_utils.tree_norm(grads)
        norms = [grad_norm]

        def gradient_at(other):  # for optimizers that look elsewhere: nothing but the params differs
            there = self._gradients(other, self._anchored(params, batch, sampling), sampling, anchored=True)[2]
            norms.append(optax.tree_utils.tree_norm(there))
            return there

        finite = {
            "advantages": jnp.all(jnp.isfinite(jnp.where(batch.rows.loss_mask, batch.rows.advantages, 0.0))),
            "logprobs": metrics.pop("nonfinite_logprobs") == 0,
            "loss": jnp.isfinite(loss),
        }
        updates, new_opt_state = self.optimizer.update(grads, opt_state, params, grad_fn=gradient_at)
        finite["gradient norm"] = jnp.all(jnp.isfinite(jnp.stack(norms)))
        ok = finite["loss"] & finite["gradient norm"]
        if scale is not None:
            updates = jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates)
        new_params = optax.apply_updates(params, updates)
        keep = lambda new, old: jnp.where(ok, new, old)  # noqa: E731
        new_params, new_opt_state = jax.tree.map(keep, (new_params, new_opt_state), (params, opt_state))
        skipped = jnp.where(ok, 0, skipped + 1).astype(jnp.int32)
        metrics |= {"loss/total": loss, "loss/grad_norm": grad_norm, "loss/skipped": skipped.astype(jnp.float32)}
        metrics |= whole_metrics | _packing_metrics(batch)
        if self._schedule is not None:
            metrics["loss/learning_rate"] = jnp.asarray(self._schedule(_update_count(opt_state)), jnp.float32)
        return new_params, new_opt_state, step + 1, skipped, metrics, finite


@functools.partial(jax.jit, static_argnames="width")
def _draw(key, row_id, *, width: int) -> Array:
    return row_uniforms(key, row_id, width=width)


def add_metrics(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of several updates as one line: means, and maxima where the name ends in `_max`."""
    host = [{k: float(v) for k, v in part.items()} for part in jax.device_get(list(parts))]
    names = dict.fromkeys(name for part in host for name in part)
    return {
        name: float((np.max if name.endswith("_max") else np.mean)([part[name] for part in host if name in part]))
        for name in names
    }


def _with(batch: TrainBatch, **fields: Any) -> TrainBatch:
    return TrainBatch(packed=batch.packed, rows=batch.rows.replace(**fields))  # type: ignore[attr-defined]


def _is_plain(sampling: SamplingParams) -> bool:
    """Whether these parameters leave the model's distribution as it is; greedy scores under it too."""
    s = {name: float(getattr(sampling, name)) for name in ("temperature", "top_k", "top_p", "min_p")}
    return s["temperature"] == 0 or (s["temperature"] == 1 and s["top_k"] == 0 and s["top_p"] == 1 and s["min_p"] == 0)


def _live_microbatches(mask: ArrayLike) -> Array:
    """Microbatches up to the last that has a token to score."""
    mask = jnp.asarray(mask)
    return jnp.max(jnp.where(jnp.any(mask, axis=(1, 2)), jnp.arange(mask.shape[0]) + 1, 0))


def _packing_metrics(batch: TrainBatch) -> Metrics:
    mask, real = jnp.asarray(batch.rows.loss_mask), jnp.asarray(batch.packed.subtree_end) > 0
    flat = jnp.sum(jnp.max(jnp.where(mask, jnp.arange(mask.shape[-1]) + 1, 0), axis=-1))
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
    counts = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    return counts[0][1]


@jax.jit
def _mix(params, reference, weight):
    return jax.tree.map(lambda p, r: (weight * p + (1 - weight) * r).astype(r.dtype), params, reference)
