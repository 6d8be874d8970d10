"""The learner: rollouts to minibatches, minibatches to updates. It knows a loss, and no algorithm."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from rljax.batching import Packing, bare_rows, emptied, layout, likely_sizes, loss_mask, masked, pack, take_rows
from rljax.models import KERNEL_DEVICES, DecoderConfig, Forward, forest_attention, kernel_attention
from rljax.models.sequence import CHUNKS
from rljax.ops import row_uniforms
from rljax.parallel import batch_parts, device_kind, put_batch, put_host, replicated, to_host, use_mesh
from rljax.sampling import SamplingParams
from rljax.training.balance import check_balance, counts_load
from rljax.training.config import UpdateConfig
from rljax.training.guard import Guard
from rljax.training.objective import NO_NEEDS, LossNeeds, Metrics, Objective
from rljax.training.optimizers import OptimizerConfig, ResetMoments, make_optimizer, make_schedule, reset_moments
from rljax.training.state import abstract_state, create_state, frozen_base, state_shardings
from rljax.training.trainable import EVERYTHING, Subtree, policy_params, pushed_params, reference_params
from rljax.training.update import UpdateProgram, with_rows
from rljax.types import Allowed, ArrayLike, Params, RolloutBatch, TrainBatch, TrainState

UNIFORMS = 0x756E69
"""Folded into the run's key for the losses' random numbers, to keep them apart from the sampler's."""


_MUCH_REPEATED = 0.05
"""Share of the packed tokens, from which on a user hears of it."""


class Learner:
    """Makes minibatches of a rollout and updates the state with them.

    `update` says how a rollout becomes updates; under a mesh, its `microbatch_size` must divide over the batch axes,
    and the lengths of its packed sequences over the devices that share them. `seed` is the run's: shuffling and
    the losses' random numbers are drawn from it. `subtree` says which weights are trained; gradients and moments exist
    for these alone, and the reference shares the frozen ones.

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
        needs: LossNeeds = NO_NEEDS,
        mesh: Mesh | None = None,
        seed: int = 0,
        subtree: Subtree = EVERYTHING,
    ):
        update.check()
        if mesh is not None and update.microbatch_size % batch_parts(mesh):
            raise ValueError(
                f"config.update.microbatch_size={update.microbatch_size} does not divide over the {batch_parts(mesh)} "
                f"devices that split the batch; set it to a multiple of {batch_parts(mesh)}"
            )

        if mesh is not None:
            _check_shared(update, mesh)

        schedule = None
        balance_rate = 0.0
        if isinstance(optimizer, OptimizerConfig):
            balance_rate = optimizer.balance_rate
            schedule = make_schedule(optimizer)
            optimizer = make_optimizer(optimizer)

        check_balance(balance_rate, config, subtree)
        counted = counts_load(config, subtree)

        self.config = config
        self.loss = loss
        self.optimizer = optax.with_extra_args_support(optimizer)
        # Compiled programs are made of these values, so a later change of the caller's struct must not reach them.
        self.update_config = dataclasses.replace(update)
        self.needs = needs
        self.mesh = mesh
        self.seed = seed
        self.subtree = subtree
        divergence = needs.divergence
        if divergence is not None:
            divergence = divergence._replace(chunk=update.head_chunk)
            if mesh is not None and mesh.shape["sequence"] > 1:
                raise ValueError(
                    f"config.mesh.sequence={mesh.shape['sequence']} has devices share packed sequences, which a "
                    "divergence from a teacher's distributions cannot; set it to 1, or choose a method that compares "
                    "sampled tokens, e.g. OnPolicyDistillation"
                )
        self._parts = 1 if mesh is None else batch_parts(mesh)
        self._sampling = None if needs.sampling is None or _is_plain(needs.sampling) else needs.sampling
        self._packing: Packing | None = None
        self._has_told_repeated = False
        self._guard = Guard(update.max_skipped)
        self.is_warm = update.compile_ahead == 1
        """Whether there is nothing to compile ahead of updates any more."""

        self.program = UpdateProgram(
            config=config,
            loss=loss,
            optimizer=self.optimizer,
            score_fn=needs.score_fn,
            chunk=update.head_chunk,
            forward=Forward(
                remat=update.remat,
                attention=kernel_attention if _takes_kernels(update, mesh) else forest_attention,
                counts_load=counted,
            ),
            updates_once=update.minibatches * update.epochs == 1,
            use_sampler_logprobs=update.use_sampler_logprobs,
            divergence=divergence,
            subtree=subtree,
            balance_rate=balance_rate if counted else None,
            schedule=schedule,
        )
        outputs: dict[str, Any] = {}
        where = None if mesh is None else self._shardings()
        if where is not None:
            # The state comes back as it lay, so that nothing is moved or compiled again.
            outputs["out_shardings"] = (where.trainable, where.opt_state, where.step, where.skipped, None, None)
        # What an update replaces is donated; the base is not, since every later state shares it.
        self._update = jax.jit(self.program.step, donate_argnums=(0, 1, 2, 3), **outputs)
        self._score = jax.jit(self.program.score_microbatches)
        self._copy = jax.jit(_copied, out_shardings=None if where is None else where.trainable)
        self._reset = jax.jit(
            functools.partial(reset_moments, self.optimizer),
            static_argnums=2,
            donate_argnums=0,
            out_shardings=None if where is None else where.opt_state,
        )

    def init_state(self, params: Params) -> TrainState:
        """A state at step 0 that owns `params`, sharded over the mesh; with a copy of what is trained as reference if
        one is needed."""
        where = None if self.mesh is None else self._shardings()
        return create_state(
            params, self.optimizer, reference=self.needs.reference, shardings=where, subtree=self.subtree
        )

    def param_shardings(self) -> Any:
        """Where the model's params lie, as a tree of shardings; None without a mesh."""
        return None if self.mesh is None else policy_params(self._shardings(), self.subtree)

    def abstract_state(self) -> TrainState:
        """What a checkpoint of the state is restored into. Checkpoints leave the base out: put one in with
        `with_base(abstract_state(), base_of(params))`."""
        return abstract_state(
            self.config, self.optimizer, reference=self.needs.reference, mesh=self.mesh, subtree=self.subtree
        )

    def base_of(self, params: Params) -> Any:
        """The frozen part of a model's params as a state holds it; None where all is trained."""
        where = None if self.mesh is None else self._shardings().base
        return frozen_base(params, self.subtree, shardings=where)

    def policy_params(self, state: TrainState) -> Params:
        """The weights of a state as the model takes them: to sample with, to score, to export. Nothing is copied, so
        they last until the next update donates them."""
        return policy_params(state, self.subtree)

    def reference_params(self, state: TrainState) -> Params:
        """The reference's weights as the model takes them. ValueError without a reference."""
        return reference_params(state, self.subtree)

    def prepare(
        self,
        state: TrainState,
        batch: RolloutBatch,
        advantages: Float[ArrayLike, "B T"],
        extra_mask: Bool[ArrayLike, "B T"] | None = None,
        *,
        allowed: Allowed | None = None,
        teacher_head: Params | None = None,
    ) -> list[TrainBatch]:
        """The minibatches of one rollout, in order: each is one `update`, and they are on the device already.

        With one update per rollout, `old_logprobs` are the update's own log-probs as constants, which costs nothing;
        with several, the policy before the first is scored here. With `use_sampler_logprobs` they are those that were
        recorded when the tokens were sampled, whatever the number of updates. Reference log-probs are taken from the
        batch, or scored if the learner needs them. `allowed` are the masks that tokens were drawn under. `teacher_head`
        is that of the batch's `teacher`, if it has hidden states; it lies where it is to be used.
        """
        update = self.update_config
        advantages = np.asarray(advantages, np.float32)
        mask = loss_mask(batch, extra_mask)
        parts = self._split(batch, int(state.step) if update.shuffle else None)
        scores_old = not self.program.updates_once and not update.use_sampler_logprobs
        scores_reference = self.needs.reference and batch.ref_logprobs is None

        minibatches = []
        packings = []
        for rows in parts:
            part = batch if len(parts) == 1 else take_rows(batch, rows)
            packing = layout(part, mask[rows], update, parts=self._parts)
            minibatch = pack(
                part,
                advantages[rows],
                update,
                token_weights=self.loss.token_weights,
                extra_mask=mask[rows],
                packing=packing,
                allowed=of_rows(allowed, rows),
            )
            minibatch = dataclasses.replace(self._put(minibatch), teacher_head=teacher_head)

            if scores_old:
                old = self._score_minibatch(self.policy_params(state), minibatch)
                minibatch = with_rows(minibatch, old_logprobs=old)
            if scores_reference:
                # A record says what the policy computed with; the reference chooses its own experts.
                unrecorded = dataclasses.replace(minibatch.packed, experts=None)
                own = dataclasses.replace(minibatch, packed=unrecorded)
                reference = self._score_minibatch(self.reference_params(state), own)
                minibatch = with_rows(minibatch, ref_logprobs=reference)
            minibatches.append(minibatch)
            packings.append(packing)
        self._packing = packings[0]
        self._tell_repeated(packings)

        # Epochs go through the same arrays; only random numbers are drawn anew for each.
        if not self.needs.uniforms:
            return minibatches * update.epochs

        drawn = []
        for epoch in range(update.epochs):
            uniforms = self._uniforms(batch, int(state.step), epoch)
            for rows, packing, minibatch in zip(parts, packings, minibatches, strict=True):
                drawn.append(with_rows(minibatch, uniforms=self._put(packing.of_tokens(uniforms[rows]))))
        return drawn

    def _tell_repeated(self, packings: list[Packing]) -> None:
        """Says, once, that much is computed again for trees that one packed sequence cannot hold."""
        repeated = sum(packing.repeated_tokens for packing in packings)
        unique = sum(packing.unique_tokens for packing in packings)
        if self._has_told_repeated or repeated <= _MUCH_REPEATED * unique:
            return
        self._has_told_repeated = True
        logging.warning(
            "%d of %d packed tokens (%.0f%%) are prefixes that stand in another packed sequence as well: what shares "
            "them exceeds config.update.pack_length=%d; a larger one computes them once, if memory allows",
            repeated,
            unique,
            100 * repeated / unique,
            self.update_config.pack_length,
        )

    def score_rows(
        self,
        params: Params,
        batch: RolloutBatch,
        mask: Bool[ArrayLike, "B T"] | None = None,
        allowed: Allowed | None = None,
    ) -> Float[np.ndarray, "B T"]:
        """Log-probs under `params` of the tokens in `mask` (default: the action mask of valid rows), 0 elsewhere. The
        experts of a mixture are those that these weights choose, whatever the batch has recorded.

        `allowed` are the masks that they were drawn under. A rollout is scored in as many parts as it has minibatches,
        so that both fit the same buckets.
        """
        return self.score_with(self._score, params, batch, mask, allowed)

    def score_with(
        self,
        program: Callable[..., Any],
        params: Params,
        batch: RolloutBatch,
        mask: Bool[ArrayLike, "B T"] | None = None,
        allowed: Allowed | None = None,
    ) -> Any:
        """`score_rows` by another jitted program of `(params, packed, rows, sampling)`, whose arrays `[M, Q, C, ...]`
        come back as `[B, T, ...]`."""
        mask = loss_mask(batch) if mask is None else np.asarray(mask, bool)
        whole: list[np.ndarray] = []
        for rows in self._split(batch):
            part = dataclasses.replace(take_rows(batch, rows), experts=None)
            packing: Packing = layout(part, mask[rows], self.update_config, parts=self._parts)
            packed, ragged = self._put((masked(packing, of_rows(allowed, rows)), packing.rows_to_score()))
            with self._on_mesh():
                values = program(params, packed, bare_rows(ragged), self._sampling)

            of_part = [packing.batch_of(to_host(x), part.tokens) for x in jax.tree.leaves(values)]
            whole = whole or [np.zeros((len(mask), *x.shape[1:]), x.dtype) for x in of_part]
            for out, x in zip(whole, of_part, strict=True):
                out[rows] = x
        return jax.tree.unflatten(jax.tree.structure(values), whole)

    def warm_up(
        self, state: TrainState, train_batch: TrainBatch, say: Callable[[int, int], None] = lambda done, total: None
    ) -> TrainState:
        """Compiles the updates of the sizes that minibatches after `train_batch`, the newest of `prepare`, are likely
        to have (`config.update.compile_ahead`). `state` is donated, and comes back with the values that it had.

        Each program runs once, on a minibatch of nothing, so that later calls find it compiled. `say` is told how many
        of how many are done.
        """
        assert self._packing is not None, "prepare comes before warm_up"
        update = self.update_config
        likely = likely_sizes(
            self._packing.needs,
            self._packing.sizes,
            update,
            per_part=update.microbatch_size // self._parts,
            width=self._packing.sizes.width,
            count=update.compile_ahead,
        )
        # The first goes round twice: what an update returns may lie otherwise than what the state began with.
        for done, sizes in enumerate([likely[0], *likely]):
            empty = self._put(emptied(train_batch, sizes))
            if empty.rows.old_logprobs is not None or empty.rows.ref_logprobs is not None:
                self._score_minibatch(self.policy_params(state), empty)
            with self._on_mesh():
                trainable, opt_state, step, skipped, _, finite = self._update(*self._arguments(state, empty))
            self._guard.observe(skipped, finite)
            # An update of nothing changes no weight, but it counts as a step.
            fields = dict(trainable=trainable, opt_state=opt_state, step=step - 1, skipped=skipped)
            state = state.replace(**fields)  # type: ignore[attr-defined]
            if done:
                say(done, len(likely))
        self.is_warm = True
        return state

    def update(self, state: TrainState, train_batch: TrainBatch) -> tuple[TrainState, Metrics]:
        """One optimizer step, one jitted call; `state` is donated, all but its base and reference. The metrics are
        device scalars."""
        with self._on_mesh():
            trainable, opt_state, step, skipped, metrics, finite = self._update(*self._arguments(state, train_batch))
        self._guard.observe(skipped, finite)
        fields = dict(trainable=trainable, opt_state=opt_state, step=step, skipped=skipped)
        return state.replace(**fields), metrics  # type: ignore[attr-defined]

    def lower_update(self, train_batch: TrainBatch) -> jax.stages.Lowered:
        """The update lowered for a batch of `jax.ShapeDtypeStruct`s, to compile and inspect; nothing runs."""
        # Before the mesh is in use: optimizers make constants, and what is compiled for may have no device for them.
        arguments = self._arguments(self.abstract_state(), train_batch)
        with self._on_mesh():
            return self._update.lower(*arguments)

    def lower_score(self, train_batch: TrainBatch) -> jax.stages.Lowered:
        """The scoring of a minibatch lowered likewise: old or reference log-probs of all of its rows."""
        return self.lower_with(self.policy_params(self.abstract_state()), train_batch)

    def lower_with(self, params: Any, train_batch: TrainBatch, program: Any = None) -> jax.stages.Lowered:
        """The scoring by weights of the shapes `params`, or another jitted program of `score_with`, lowered
        likewise."""
        with self._on_mesh():
            return (program or self._score).lower(
                params, train_batch.packed, bare_rows(train_batch.rows), self._sampling
            )

    def check(self) -> None:
        """Raises for the last update too; `update` itself looks one update back, so as not to wait."""
        self._guard.check()

    def refresh_reference(self, state: TrainState, weight: float = 1.0) -> TrainState:
        """Moves the reference to the policy: `weight` of the way (1 copies it; less is an exponential average)."""
        if state.ref_trainable is None:
            raise ValueError("the state has no reference params; build the learner with LossNeeds(reference=True)")
        moved = _mix(state.trainable, state.ref_trainable, weight)
        return state.replace(ref_trainable=moved)  # type: ignore[attr-defined]

    def pushed_params(self, state: TrainState) -> Params:
        """The weights that rollouts have, as the model takes them."""
        return pushed_params(state, self.subtree)

    def params_before(self, state: TrainState) -> Params:
        """The weights that rollouts had before, as the model takes them."""
        return self.subtree.merge(state.before, state.base)

    def remember(self, state: TrainState) -> TrainState:
        """The state that keeps the weights which rollouts have as those that they had `before`: a copy, where the next
        update changes them."""
        before = self._copy(state.trainable) if state.pushed is None else state.pushed
        return state.replace(before=before)  # type: ignore[attr-defined]

    def push(self, state: TrainState, reset: ResetMoments = "none") -> TrainState:
        """The state in which rollouts have the policy's weights as they stand, with the moments of the optimizer begun
        anew as told. The moments' old arrays are donated."""
        fields: dict[str, Any] = {}
        if state.pushed is not None:
            fields["pushed"] = self._copy(state.trainable)
        if reset != "none":
            with self._on_mesh():
                fields["opt_state"] = self._reset(state.opt_state, state.trainable, reset)
        return state.replace(**fields)  # type: ignore[attr-defined]

    def _arguments(self, state: TrainState, batch: TrainBatch) -> tuple[Any, ...]:
        """Of the compiled update; the first four are donated."""
        return state.trainable, state.opt_state, state.step, state.skipped, state.base, batch, self._sampling

    def _shardings(self) -> TrainState:
        return state_shardings(
            self.config, self.optimizer, reference=self.needs.reference, mesh=self.mesh, subtree=self.subtree
        )

    def _split(self, batch: RolloutBatch, step: int | None = None) -> list[np.ndarray]:
        """Rows of each minibatch; in an order drawn for update `step` if the learner shuffles and it is given."""
        count = self.update_config.minibatches
        if count == 1:
            return [np.arange(len(batch.lengths))]

        # Padding rows are a group of their own, of no length.
        group_id = np.asarray(batch.group_id)
        groups = np.unique(group_id[np.asarray(batch.lengths) > 0])
        if len(groups) % count:
            raise ValueError(
                f"{len(groups)} groups do not divide into {count} minibatches of whole groups; choose a divisor"
            )
        if self.update_config.shuffle and step is not None:
            groups = np.random.default_rng([self.seed, step]).permutation(groups)
        return [np.flatnonzero(np.isin(group_id, part)) for part in np.split(groups, count)]

    def _uniforms(self, batch: RolloutBatch, step: int, epoch: int) -> Float[np.ndarray, "B T"]:
        """A number in [0, 1) per token of the rollout. Rows count by their place in it, so that neither padding,
        minibatches, packing nor devices matter."""
        count, width = np.shape(batch.tokens)
        key = functools.reduce(jax.random.fold_in, (UNIFORMS, step, epoch), jax.random.key(self.seed))
        return np.asarray(_draw(key, np.arange(count), width=width))

    def _put(self, tree: Any) -> Any:
        """Packed sequences, and the rows that they carry, split over the batch axes of the mesh; numbers of a whole
        microbatch everywhere."""
        mesh = self.mesh
        if mesh is None:
            return jax.device_put(tree)

        def put(x: Any) -> Any:
            return put_batch(mesh, x, axis=1) if np.ndim(x) > 1 else put_host(x, replicated(mesh))

        return jax.tree.map(put, tree)

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else use_mesh(self.mesh)

    def _score_minibatch(self, params: Params, batch: TrainBatch) -> Array:
        with self._on_mesh():
            return self._score(params, batch.packed, bare_rows(batch.rows), self._sampling)


def _check_shared(update: UpdateConfig, mesh: Mesh) -> None:
    """Refuses packed sequences of lengths that the devices along `sequence` cannot share."""
    parts = mesh.shape["sequence"]
    multiple = CHUNKS * parts
    devices = f"the {parts} devices of config.mesh.sequence, which have {CHUNKS} equal chunks each"
    if parts == 1:
        return
    if wrong := [length for length in update.length_buckets if length % multiple]:
        raise ValueError(
            f"config.update.length_buckets={update.length_buckets}: {wrong[0]} does not divide over {devices}; "
            f"take multiples of {multiple}"
        )
    if not update.length_buckets and update.pack_length % (4 * multiple):
        raise ValueError(
            f"config.update.pack_length={update.pack_length} and its quarters do not divide over {devices}; set it to "
            f"a multiple of {4 * multiple}, or config.update.length_buckets to multiples of {multiple}"
        )


def of_rows(allowed: Allowed | None, rows: np.ndarray) -> Allowed | None:
    """The masks of these rows of a batch."""
    return None if allowed is None else allowed._replace(which=allowed.which[rows])


@functools.partial(jax.jit, static_argnames="width")
def _draw(key, row_id, *, width: int) -> Array:
    return row_uniforms(key, row_id, width=width)


def _copied(tree):
    return jax.tree.map(jnp.copy, tree)


@jax.jit
def _mix(trainable, reference, weight):
    return jax.tree.map(lambda p, r: (weight * p + (1 - weight) * r).astype(r.dtype), trainable, reference)


def _takes_kernels(update: UpdateConfig, mesh: Mesh | None) -> bool:
    if update.attention_kernel is None:
        return device_kind(mesh).startswith(KERNEL_DEVICES)
    return update.attention_kernel


def _is_plain(sampling: SamplingParams) -> bool:
    """Whether these parameters leave the model's distribution as it is; greedy scores under it too."""
    if sampling.adjusts:
        return False
    temperature = float(sampling.temperature)
    untruncated = float(sampling.top_k) == 0 and float(sampling.top_p) == 1 and float(sampling.min_p) == 0
    return temperature == 0 or (temperature == 1 and untruncated)
