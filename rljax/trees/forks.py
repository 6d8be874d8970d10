"""Where to fork: scores of tokens and the choice among them, as pure functions on rows with static sizes.

A place to fork is named by the token that is drawn anew: at `[b, t]` a fork keeps the tokens of row `b` before `t`, so
its `fork_index` is `t`. `mask` marks the tokens that the policy sampled, `eligible` those that may be chosen; intersect
it with `first_of_place`, so that a prefix shared by several rows stands for one place. Choices are deterministic: among
equal scores the lower row wins, then the earlier position. To choose for each tree or prompt by itself, `vmap` over
`eligible`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from rljax.ops import as_float, masked_mean, masked_std
from rljax.trees import Tree
from rljax.types import ArrayLike


class Forks(NamedTuple):
    """`n` places. Where `is_active` is False there was none left, and `row` and `position` are 0."""

    row: Int[ArrayLike, "*n"]
    position: Int[ArrayLike, "*n"]
    is_active: Bool[ArrayLike, "*n"]


class Candidates(NamedTuple):
    """Scores in two tiers: `scores` where `is_strict`; and `fill` where `is_allowed`, for the slots that these
    leave."""

    scores: Float[ArrayLike, "B T"]
    is_strict: Bool[ArrayLike, "B T"]
    fill: Float[ArrayLike, "B T"]
    is_allowed: Bool[ArrayLike, "B T"]


# Scores


def surprisal(logprobs: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """`-log pi(token)` in nats (EPTree of TreeRL, 2506.11902), 0 off the mask."""
    return jnp.where(mask, -as_float(logprobs), 0)


def standardized(x: Float[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]) -> Float[Array, "B T"]:
    """`(x - mean) / (std + 1e-6)` over each row's tokens where `mask` (population std), 0 off it."""
    mask = jnp.asarray(mask)
    x = jnp.where(mask, as_float(x), 0)
    mean = masked_mean(x, mask, axis=1, keepdims=True)
    return jnp.where(mask, (x - mean) / (masked_std(x, mask, axis=1, keepdims=True) + 1e-6), 0)


def branching_score(
    omega: Float[ArrayLike, "B T"],
    entropies: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    *,
    low: float = 0.8,
    high: float = 1.2,
) -> Float[Array, "B T"]:
    """`Z(clip(Omega, low, high)) * Z(H)`, z-scores of each row (APPO, 2606.12384, 3.3); Omega as in
    `rljax.ops.future_value`. 0 everywhere when the policy has not moved. Tokens both certain and without influence
    score high too: choose by `branching_candidates`."""
    return standardized(jnp.clip(as_float(omega), low, high), mask) * standardized(entropies, mask)


def branching_candidates(
    omega: Float[ArrayLike, "B T"],
    entropies: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    *,
    low: float = 0.8,
    high: float = 1.2,
) -> Candidates:
    """`branching_score` behind its sign gate: strict are tokens with `Z(Omega) > 0` and `Z(H) > 0`; other tokens of the
    mask fill up by `Z(H)`. In a row whose clipped Omega has no spread (the policy has not moved) the score is `Z(H)`,
    and the gate its sign. Rows of fewer than two tokens, or of one entropy, have no candidates."""
    mask = jnp.asarray(mask)
    clipped = jnp.where(mask, jnp.clip(as_float(omega), low, high), 0)
    value = standardized(clipped, mask)
    entropy = standardized(entropies, mask)

    # Rounding leaves a spread of its own where the policy has not moved.
    is_flat = masked_std(clipped, mask, axis=1, keepdims=True) < 1e-6

    # One token, or one entropy, says nothing of where the policy hesitates.
    entropies = jnp.where(mask, as_float(entropies), 0)
    is_row = (jnp.sum(mask, axis=1) > 1) & (masked_std(entropies, mask, axis=1) > 0)
    is_allowed = mask & is_row[:, None]
    return Candidates(
        scores=jnp.where(is_flat, entropy, value * entropy),
        is_strict=is_allowed & (entropy > 0) & (is_flat | (value > 0)),
        fill=entropy,
        is_allowed=is_allowed,
    )


def entropy_change(
    entropies: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    turn_ids: Int[ArrayLike, "B T"],
    *,
    window: int = 20,
    scale: float,
) -> Float[Array, "B T"]:
    """How much more the policy hesitates after a turn than it did at first (ARPO, 2507.19849, 3.1): at the first token
    of every turn but the first

        dH = sum_{j < window} (H_turn[j] - H_first[j]) / scale

    over the first `window` sampled tokens of either turn, as many as both have; 0 elsewhere. `scale` is the size of the
    vocabulary in the paper, its logarithm in the released code.
    """
    mask = jnp.asarray(mask)
    turn_ids = jnp.asarray(turn_ids)
    rows, width = mask.shape
    entropies = jnp.where(mask, as_float(entropies), 0)

    # The place of each token in its turn, counting sampled tokens alone.
    starts = turn_starts(turn_ids, mask)
    column = jnp.arange(width)
    start = jax.lax.cummax(jnp.where(starts, column, -1), axis=1)
    seen = jnp.cumsum(mask, axis=1)
    rank = seen - jnp.take_along_axis(seen, jnp.maximum(start, 0), axis=1)
    turn = jnp.cumsum(starts, axis=1)
    size = min(window, width)
    in_window = mask & (rank < size)

    # The first turn's entropies by place, which every later turn is compared with.
    line = jnp.broadcast_to(jnp.arange(rows)[:, None], mask.shape)
    slot = jnp.where(in_window & (turn == 1), rank, size)
    first = jnp.zeros((rows, size), entropies.dtype).at[line, slot].set(entropies, mode="drop")

    # As many tokens as both turns have.
    length = jnp.sum(in_window & (turn == 1), axis=1, keepdims=True)
    counts = in_window & (rank < length)
    change = jnp.where(counts, entropies - jnp.take_along_axis(first, jnp.minimum(rank, size - 1), axis=1), 0)
    total = jnp.zeros_like(entropies).at[line, jnp.where(counts, start, width)].add(change, mode="drop")
    return jnp.where(starts & (turn > 1), total / scale, 0)


def fork_probability(
    change: Float[ArrayLike, "*shape"] | float, *, base: float = 0.5, weight: float = 0.2
) -> Float[Array, "*shape"]:
    """`clip(base + weight * change, 0, 1)` (ARPO, 2507.19849, as released). The paper forks where the unclipped value
    is above a threshold, 0.5."""
    return jnp.clip(base + weight * jnp.asarray(change), 0, 1)


def penalized(
    score: Float[ArrayLike, "*shape"], consecutive: Int[ArrayLike, "*shape"], *, penalty: float = 0.05
) -> Float[Array, "*shape"]:
    """`score * max(1 - penalty * consecutive, 0)` (AEPO, 2510.14545), see `consecutive_forks`."""
    return as_float(score) * jnp.maximum(1 - penalty * jnp.asarray(consecutive), 0)


def consecutive_forks(counts: Int[ArrayLike, "B T"], starts: Bool[ArrayLike, "B T"]) -> Int[Array, "B T"]:
    """At each turn start, the turn starts just before it on the path that were all forked at; 0 elsewhere. `counts` is
    `fork_counts`; a turn without a fork begins anew."""
    starts = jnp.asarray(starts)
    number = jnp.cumsum(starts, axis=1)
    quiet = jax.lax.cummax(jnp.where(starts & (jnp.asarray(counts) == 0), number, 0), axis=1)
    before = jnp.pad(quiet[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(starts, number - 1 - before, 0)


def turn_surprisal(
    logprobs: Float[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    turn_ids: Int[ArrayLike, "B T"],
    counts: Int[ArrayLike, "B T"],
    *,
    penalty: float,
) -> Float[Array, "B T"]:
    """At each turn start, the mean surprisal of the turn's tokens, less `penalty` for each child that the place already
    has: the turn that stands there and the forks in `counts` (AT2PO, 2601.04767); 0 elsewhere."""
    mask = jnp.asarray(mask)
    rows, width = mask.shape
    starts = turn_starts(turn_ids, mask)
    start = jax.lax.cummax(jnp.where(starts, jnp.arange(width), -1), axis=1)
    where = (jnp.broadcast_to(jnp.arange(rows)[:, None], mask.shape), jnp.where(mask, start, width))
    total = jnp.zeros(mask.shape, jnp.result_type(float)).at[where].add(surprisal(logprobs, mask), mode="drop")
    count = jnp.zeros(mask.shape, jnp.int32).at[where].add(1, mode="drop")
    return jnp.where(starts, total / jnp.maximum(count, 1) - penalty * (1 + jnp.asarray(counts)), 0)


# Places


def turn_starts(turn_ids: Int[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]) -> Bool[Array, "B T"]:
    """The first sampled token of every turn; what is not sampled, such as tool results, begins none."""
    turn_ids = jnp.asarray(turn_ids)
    mask = jnp.asarray(mask)
    last = jax.lax.cummax(jnp.where(mask, jnp.arange(mask.shape[1]), -1), axis=1)
    last = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous = jnp.take_along_axis(turn_ids, jnp.maximum(last, 0), axis=1)
    return mask & ((last < 0) | (previous != turn_ids))


def fork_counts(tree: Tree, parent_row: Int[ArrayLike, " B"], fork_index: Int[ArrayLike, " B"]) -> Int[Array, "B T"]:
    """How often each place was forked at so far, on all rows that pass it."""
    owners = jnp.asarray(tree.owners)
    parent = jnp.asarray(parent_row)
    fork = jnp.asarray(fork_index)
    rows, width = owners.shape
    # A place is named by the owner of the token before it.
    before = jnp.concatenate([jnp.arange(rows)[:, None], owners[:, :-1]], axis=1)
    where = (jnp.where(parent >= 0, before[jnp.maximum(parent, 0), fork], rows), fork)
    counts = jnp.zeros((rows, width), jnp.int32).at[where].add(1, mode="drop")
    return counts[before, jnp.arange(width)]


def first_of_place(tree: Tree, mask: Bool[ArrayLike, "B T"]) -> Bool[Array, "B T"]:
    """`mask` without the tokens that a row inherited, and without its first own one, which has the prefix of its
    fork."""
    owners = jnp.asarray(tree.owners)
    rows = jnp.arange(owners.shape[0])[:, None]
    is_own = owners == rows
    follows = jnp.pad(is_own[:, :-1], ((0, 0), (1, 0)))
    is_root = (jnp.asarray(tree.root_rows) == rows[:, 0])[:, None]
    return jnp.asarray(mask) & is_own & (follows | is_root)


def without_tail(mask: Bool[ArrayLike, "B T"], *, fraction: float) -> Bool[Array, "B T"]:
    """`mask` without the first and the last `fraction` (rounded up) of each row's masked tokens: a fork at the first is
    one more independent sample, one in the final answer only words it again (TreeRL, 2506.11902)."""
    mask = jnp.asarray(mask)
    rank = jnp.cumsum(mask, axis=1)
    total = rank[:, -1:]
    return mask & (rank > 1) & (rank <= total - jnp.ceil(fraction * total))


# Choice


@functools.partial(jax.jit, static_argnames=("n", "min_distance"))
def select_forks(
    scores: Float[ArrayLike, "B T"],
    eligible: Bool[ArrayLike, "B T"],
    n: int,
    *,
    min_distance: int = 1,
    then: tuple[Float[ArrayLike, "B T"], Bool[ArrayLike, "B T"]] | None = None,
) -> Forks:
    """The `n` eligible places of the highest scores, any two of one row at least `min_distance` apart.

    Slots that these leave are filled from `then`, another (scores, eligible), and else stay inactive. NaN and -inf are
    never chosen. `n` and `min_distance` are static.
    """
    tiers = [(scores, eligible)] if then is None else [(scores, eligible), then]
    # -inf marks what may not be chosen; NaN compares as not above it, so it goes too.
    keys = [jnp.where(jnp.asarray(e) & (as_float(s) > -jnp.inf), as_float(s), -jnp.inf) for s, e in tiers]
    rows, width = jnp.shape(scores)
    row = jnp.arange(rows)[:, None]
    column = jnp.arange(width)

    def choose(is_free: Array, _: None) -> tuple[Array, Forks]:
        place = jnp.zeros((), jnp.int32)
        is_active = jnp.asarray(False)
        # From the last tier to the first, so that an earlier one that has anything goes before.
        for key in reversed(keys):
            key = jnp.where(is_free, key, -jnp.inf).ravel()
            best = jnp.argmax(key).astype(jnp.int32)
            is_any = key[best] > -jnp.inf
            place = jnp.where(is_any, best, place)
            is_active = is_any | is_active

        # What lies too near the chosen place is no longer free.
        r = place // width
        t = place % width
        is_near = (row == r) & (jnp.abs(column - t) < max(min_distance, 1))
        return is_free & ~(is_near & is_active), Forks(r, t, is_active)

    _, forks = jax.lax.scan(choose, jnp.ones((rows, width), bool), None, length=n)
    return forks


@functools.partial(jax.jit, static_argnames=("n", "min_distance"))
def select_forks_per_row(
    scores: Float[ArrayLike, "B T"],
    eligible: Bool[ArrayLike, "B T"],
    n: int,
    *,
    min_distance: int = 1,
    then: tuple[Float[ArrayLike, "B T"], Bool[ArrayLike, "B T"]] | None = None,
) -> Forks:
    """`select_forks` within each row: fields `[B, n]`."""
    second = (scores, jnp.zeros(jnp.shape(scores), bool)) if then is None else then

    def one(*row: Array) -> Forks:
        s, e, s2, e2 = (x[None] for x in row)
        return select_forks(s, e, n, min_distance=min_distance, then=(s2, e2))

    forks = jax.vmap(one)(*map(jnp.asarray, (scores, eligible, *second)))
    rows = jnp.broadcast_to(jnp.arange(forks.row.shape[0])[:, None], forks.row.shape)
    return forks._replace(row=jnp.where(forks.is_active, rows, 0))


def draw_forks(key: Key[Array, ""], eligible: Bool[ArrayLike, "B T"], n: int) -> Forks:
    """`n` eligible places, uniform and with replacement (Tree-GRPO, 2509.21240). Consumes `key`."""
    flat = jnp.cumsum(jnp.asarray(eligible).ravel())
    count = flat[-1]
    width = jnp.shape(eligible)[1]
    drawn = jax.random.randint(key, (n,), 1, jnp.maximum(count, 1) + 1)
    place = jnp.where(count > 0, jnp.searchsorted(flat, drawn), 0).astype(jnp.int32)
    return Forks(place // width, place % width, jnp.full(n, count > 0))


def initial_rows(
    budget: int,
    prompt_entropy: Float[ArrayLike, ""] | float,
    tool_entropy: Float[ArrayLike, ""] | float,
    *,
    beta: float = 1.0,
) -> Float[Array, ""]:
    """`budget * sigmoid(beta (H_prompt - H_tool))`: how many of a prompt's rows to start from scratch, the rest being
    forks (AEPO, 2510.14545). The released code takes `beta` 0.5 and `clip(floor(..) + 1, 1, budget)`."""
    return budget * jax.nn.sigmoid(beta * (jnp.asarray(prompt_entropy) - tool_entropy))
