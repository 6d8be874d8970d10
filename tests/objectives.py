"""Shared by the tests of objectives: the worked examples' fixture, and small random batches."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from rljax.types import TEACHER_LOGPROBS, RolloutBatch, Rows

NAN = float("nan")

# The shared fixture of the method sheet; position [1, 3] is masked and holds garbage.
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
OLD = np.array([[-1.20, -0.40, -2.30, -0.10], [-0.70, -1.60, -2.00, -9.0]])
LOGPROBS = np.array([[-1.10, -0.70, -1.90, -0.10], [-0.50, -2.10, -0.50, -1.0]])
REF = np.array([[-1.30, -0.35, -2.00, -0.20], [-0.60, -1.90, -1.40, -4.0]])
BEHAVIOR = np.array([[-1.25, -0.40, -2.10, -0.10], [-0.70, -1.65, -2.60, -9.0]])
ADVANTAGES = np.array([[1, 1, 1, 1], [-0.5, -0.5, -0.5, -0.5]])


@contextlib.contextmanager
def float64():
    """Double precision inside the block."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def make_rows(mask, *, aggregate, old, advantages, behavior=None, ref=None, token_weights=None) -> Rows:
    """Rows of one microbatch that is the whole minibatch."""
    mask = np.asarray(mask, bool)
    weights = aggregate(mask) if token_weights is None else token_weights
    return Rows(
        loss_mask=mask,
        loss_weights=weights,
        token_count=jnp.asarray(mask.sum(), jnp.result_type(float)),
        advantages=jnp.asarray(advantages, jnp.result_type(float)),
        behavior_logprobs=jnp.asarray(old if behavior is None else behavior),
        old_logprobs=jnp.asarray(old),
        source=np.zeros(len(mask), np.int32),
        ref_logprobs=None if ref is None else jnp.asarray(ref),
    )


def fixture_rows(aggregate, **changes) -> Rows:
    given = {"old": OLD, "advantages": ADVANTAGES, "behavior": BEHAVIOR, "ref": REF} | changes
    return make_rows(MASK, aggregate=aggregate, **given)


def term(function, logprobs, rows):
    """A weight, filter or report of `policy_loss`, where the entropies do not matter: they are 0."""
    logprobs = jnp.asarray(logprobs)
    return function(logprobs, jnp.zeros(logprobs.shape, logprobs.dtype), rows)


def value_and_grad(loss, rows, logprobs=LOGPROBS, entropies=None):
    """Loss, metrics and gradient with respect to the log-probs, in the precision in force."""
    logprobs = jnp.asarray(logprobs)
    entropies = jnp.zeros_like(logprobs) if entropies is None else jnp.asarray(entropies)
    (value, metrics), gradient = jax.value_and_grad(loss.loss, has_aux=True)(logprobs, entropies, rows)
    return float(value), {name: float(v) for name, v in metrics.items()}, np.asarray(gradient)


def make_batch(*, group_id, rewards, lengths, prompt=2, width=None, is_valid=None, seed=0, dtype=np.float32):
    """A random RolloutBatch: `prompt` prompt tokens, `lengths` action tokens, NaN in padding."""
    rng = np.random.default_rng(seed)
    group_id, lengths = np.asarray(group_id, np.int32), np.asarray(lengths)
    rows = len(group_id)
    width = width or prompt + int(lengths.max(initial=1))
    position = np.arange(width)
    action_mask = (position >= prompt) & (position < prompt + lengths[:, None])
    logprobs = -rng.exponential(size=(rows, width)).astype(dtype)
    ref = (logprobs + 0.3 * rng.normal(size=logprobs.shape)).astype(dtype)
    tokens, values = rng.integers(0, 7, (rows, width)).astype(np.int32), rng.normal(size=(rows, width)).astype(dtype)
    teacher = logprobs + 0.3 * rng.normal(size=logprobs.shape)
    integers = np.zeros(rows, np.int32)
    return RolloutBatch(
        tokens=tokens,
        action_mask=action_mask,
        behavior_logprobs=np.where(action_mask, logprobs, np.nan).astype(dtype),
        entropies=np.where(action_mask, 1.0, 0.0).astype(dtype),
        turn_ids=np.zeros((rows, width), np.int32),
        policy_version=np.zeros((rows, width), np.int32),
        lengths=(prompt + lengths).astype(np.int32),
        reward=np.asarray(rewards, dtype),
        is_valid=np.ones(rows, bool) if is_valid is None else np.asarray(is_valid, bool),
        is_truncated=np.zeros(rows, bool),
        group_id=group_id,
        episode_id=np.arange(rows, dtype=np.int32),
        source=integers,
        parent_row=integers - 1,
        fork_index=integers,
        fork_score=np.zeros(rows, dtype),
        intervention=integers,
        ref_logprobs=np.where(action_mask, ref, np.nan).astype(dtype),
        values=np.where(action_mask, values, np.nan).astype(dtype),
        columns={TEACHER_LOGPROBS: np.where(action_mask, teacher, np.nan).astype(dtype)},
    )


def map_fields(batch, function):
    """`batch` with every array field, and every column, replaced by `function(field)`."""
    return jax.tree.map(function, batch)
