"""Where to fork: rules over the samples of a prompt so far, built from the scores and choices of `rljax.trees.forks`.

A rule gets a `PartialGroup` and returns fork points. Positions count completion tokens; to fork *at* token `t` keeps
the tokens before it, so that `t` itself is drawn anew. Rules that pick by chance draw from `PartialGroup.key`, a
function of the run's seed, the step, the prompt and the round alone. Each rule is one jitted program of fixed shape.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rljax.batching import stack
from rljax.ops import future_value
from rljax.plans import NEWEST_LOGPROBS, ForkPoint, ForkRule
from rljax.trees import Tree, build_tree
from rljax.trees.forks import (
    Forks,
    branching_candidates,
    consecutive_forks,
    draw_forks,
    entropy_change,
    first_of_place,
    fork_counts,
    fork_probability,
    penalized,
    select_forks,
    surprisal,
    turn_starts,
    turn_surprisal,
    without_tail,
)
from rljax.types import (
    INTERVENTION_INJECT,
    INTERVENTION_SUPPRESS,
    ArrayLike,
    RolloutBatch,
    Trajectory,
)


@dataclasses.dataclass(frozen=True)
class PartialGroup:
    """The samples of one prompt when a round of forks begins, as a batch of fixed shape.

    `batch` holds completions alone, without their prompt: rows are the samples that may be forked, the first `chains`
    of which are independent; `turn_ids` numbers the steps. `decode` turns token ids into text.
    """

    batch: RolloutBatch
    chains: int
    round: int
    key: Array
    decode: Callable[[Sequence[int]], str]

    def before(self, words: Sequence[str]) -> Bool[np.ndarray, "B T"]:
        """Tokens up to the one with which the text first holds one of `words` (in lower case); all without words."""
        mask = np.ones(np.shape(self.batch.tokens), bool)
        if words:
            for row, tokens, length in zip(mask, self.batch.tokens, self.batch.lengths, strict=True):
                row[_first_with(self.decode, tokens[:length].tolist(), words) + 1 :] = False
        return mask

    def within(self, span: Sequence[str]) -> Bool[np.ndarray, "B T"]:
        """Tokens between the two texts of `span`, such as `<think>` and `</think>`, each time they occur; to the end
        where the second is missing. All without a span."""
        mask = np.full(np.shape(self.batch.tokens), not span)
        for row, tokens, length in zip(mask, self.batch.tokens, self.batch.lengths, strict=True):
            if span:
                row[:length] = _between(self.decode, np.asarray(tokens[:length]).tolist(), *span)
        return mask


Choice = Callable[[RolloutBatch, Tree, Array, Array], tuple[Forks, Array]]
"""(batch, its tree, eligible [B, T], key) -> (places, the scores [B, T] that chose them)."""


def rule_of(choose: Choice, *, tail: float = 0.0, last_words: Sequence[str] = (), span: Sequence[str] = ()) -> ForkRule:
    """A rule that forks where `choose` says. Eligible are a sample's own tokens, but not its first (the same prefix as
    its own fork), not where it was forked before, not the last `tail` of the completion (and, with a tail, not its
    first token, which makes one more independent sample), none after the first of `last_words`, and of `span`, two
    texts, only what stands between them."""

    @jax.jit
    def run(batch: RolloutBatch, mask: Array, key: Array) -> tuple[Forks, Array]:
        tree = build_tree(batch)
        sampled = jnp.asarray(batch.action_mask)
        eligible = first_of_place(tree, sampled) & mask
        eligible &= fork_counts(tree, batch.parent_row, batch.fork_index) == 0
        eligible &= without_tail(sampled, fraction=tail) if tail else jnp.arange(sampled.shape[1]) > 0
        forks, scores = choose(batch, tree, eligible, key)
        return forks, scores[forks.row, forks.position]

    def rule(group: PartialGroup) -> list[ForkPoint]:
        forks, scores = jax.device_get(run(group.batch, group.before(last_words) & group.within(span), group.key))
        return _points(forks, scores)

    return rule


def _points(forks: Forks, scores: ArrayLike) -> list[ForkPoint]:
    fields = zip(*(np.ravel(x).tolist() for x in (*forks, scores)), strict=True)
    return [ForkPoint(row, position, score) for row, position, is_active, score in fields if is_active]


def each_tree(
    choose: Callable[..., Forks], tree: Tree, chains: int, eligible: Bool[ArrayLike, "B T"], *args: Any
) -> Forks:
    """`choose(eligible, *args)` on the samples of each tree by itself; fields `[chains, n]`. `args` have one entry a
    tree."""
    own = tree.root_rows == jnp.arange(chains)[:, None]
    return jax.vmap(choose)(jnp.asarray(eligible) & own[..., None], *args)


def random_step(points: int, chains: int, *, from_root: bool = True) -> ForkRule:
    """For each tree `points` draws, with replacement, among the ends of its steps but the last of a path, and its root
    when `from_root` (Tree-GRPO, 2509.21240)."""

    def choose(batch, tree, eligible, key):
        mask = jnp.asarray(batch.action_mask)
        starts = turn_starts(batch.turn_ids, mask) & first_of_place(tree, mask)
        rows = jnp.arange(mask.shape[0])[:, None]
        columns = jnp.arange(mask.shape[1])
        is_root = (columns == 0) & (rows < chains)
        starts = jnp.where(is_root, from_root & (jnp.asarray(batch.lengths)[:, None] > 0), starts)
        draw = functools.partial(_draw, n=points)
        forks = each_tree(draw, tree, chains, starts, jax.random.split(key, chains))
        return forks, jnp.zeros(mask.shape)

    return rule_of(choose)


def _draw(eligible: Array, key: Array, *, n: int) -> Forks:
    return draw_forks(key, eligible, n)


def random_token(points: int, chains: int, *, tail: float = 0.1, last_words: Sequence[str] = ()) -> ForkRule:
    """For each tree `points` of its eligible tokens by chance: the control of every rule that looks."""
    return top_tokens(
        lambda batch, key: jax.random.uniform(key, jnp.shape(batch.tokens)),
        points,
        chains,
        tail=tail,
        last_words=last_words,
    )


def top_surprisal(
    points: int, chains: int, *, tail: float = 0.1, last_words: Sequence[str] = ("answer", "conclusion")
) -> ForkRule:
    """For each tree its eligible tokens of the highest `-log pi(token)` (EPTree of TreeRL, 2506.11902)."""
    return top_tokens(
        lambda batch, key: surprisal(batch.behavior_logprobs, batch.action_mask),
        points,
        chains,
        tail=tail,
        last_words=last_words,
    )


def top_entropy(
    points: int, chains: int, *, tail: float = 0.1, last_words: Sequence[str] = ("answer", "conclusion")
) -> ForkRule:
    """For each tree its eligible tokens drawn from the distributions of the highest entropy."""
    return top_tokens(lambda batch, key: jnp.asarray(batch.entropies), points, chains, tail=tail, last_words=last_words)


def top_tokens(
    score: Callable[[RolloutBatch, Array], Float[Array, "B T"]],
    points: int,
    chains: int,
    *,
    tail: float = 0.0,
    last_words: Sequence[str] = (),
) -> ForkRule:
    """For each tree the `points` eligible tokens of the highest `score(batch, key)`; ties go to the earlier sample,
    then token."""

    def choose(batch, tree, eligible, key):
        scores = score(batch, key)
        return each_tree(lambda e: select_forks(scores, e, points), tree, chains, eligible), scores

    return rule_of(choose, tail=tail, last_words=last_words)


def top_branching_score(
    points: int, *, discount: float = 2 ** (-1 / 32), tail: float = 0.0, span: Sequence[str] = ()
) -> ForkRule:
    """The `points` best tokens of the prompt's samples by APPO's branching score (2606.12384, 3.3 and 3.4): where the
    policy hesitated, and what it has since come to like the rest of the sample for.

    The future value is of the newest log-probs against those that the samples were drawn with, at `discount` a token,
    for a plan with `lagged_chains`. Without them the samples are the newest policy's own: the future value is 1
    everywhere, and the score is `Z(H)`, behind its sign gate and filled up by `Z(H)`. With `span` only tokens between
    these two texts count.
    """

    def choose(batch, tree, eligible, key):
        newest = batch.columns.get(NEWEST_LOGPROBS)
        omega = jnp.ones(jnp.shape(batch.tokens))
        if newest is not None:
            omega = future_value(newest - batch.behavior_logprobs, batch.action_mask, discount=discount)
        found = branching_candidates(omega, batch.entropies, batch.action_mask)
        then = (found.fill, found.is_allowed & eligible)
        return select_forks(found.scores, found.is_strict & eligible, points, then=then), found.scores

    return rule_of(choose, tail=tail, span=span)


def entropy_jump(
    points: int,
    *,
    scale: float,
    window: int = 20,
    base: float = 0.5,
    weight: float = 0.2,
    penalty: float = 0.0,
) -> ForkRule:
    """A fork at the start of a step, after the first, with probability `clip(base + weight dH, 0, 1)`, at most `points`
    in a round, those of the largest jump dH of entropy first (ARPO, 2507.19849; `rljax.trees.forks.entropy_change`).
    `penalty` takes from the probability for each fork in a row before it (AEPO, 2510.14545)."""

    def choose(batch, tree, eligible, key):
        mask = jnp.asarray(batch.action_mask)
        starts = turn_starts(batch.turn_ids, mask)
        jump = entropy_change(batch.entropies, mask, batch.turn_ids, window=window, scale=scale)

        # The first step has no place before it to fork at.
        counts = fork_counts(tree, batch.parent_row, batch.fork_index)
        chance = penalized(
            fork_probability(jump, base=base, weight=weight),
            consecutive_forks(counts, starts & (jnp.arange(mask.shape[1]) > 0)),
            penalty=penalty,
        )

        is_drawn = jax.random.uniform(key, mask.shape) < chance
        return select_forks(jump, eligible & starts & is_drawn, points), jump

    return rule_of(choose)


def filled(rule: ForkRule, points: int) -> ForkRule:
    """`rule`, with independent samples in place of the forks that `points` has room for and it did not ask for."""

    def all_points(group: PartialGroup) -> list[ForkPoint]:
        found = list(rule(group))[:points]
        return found + [ForkPoint(i % group.chains, 0) for i in range(points - len(found))]

    return all_points


def top_turn_surprisal(points: int, *, penalty: float = 0.0) -> ForkRule:
    """The `points` steps of the prompt's samples with the highest mean surprisal less `penalty` for each child that is
    there already (AT2PO, 2601.04767)."""

    def choose(batch, tree, eligible, key):
        mask = jnp.asarray(batch.action_mask)
        counts = fork_counts(tree, batch.parent_row, batch.fork_index)
        scores = turn_surprisal(batch.behavior_logprobs, mask, batch.turn_ids, counts, penalty=penalty)
        starts = turn_starts(batch.turn_ids, mask) & first_of_place(tree, mask)
        return select_forks(scores, starts & (jnp.arange(mask.shape[1]) > 0), points), scores

    return rule_of(choose)


def summary_points(
    find: Callable[[np.ndarray, np.ndarray], Sequence[int]],
    inject: Sequence[Sequence[int]],
    chains: int,
    *,
    middle: float = 0.8,
) -> ForkRule:
    """One fork of each chain in a round (ReSum, 2606.13316, section 4): before its next natural phrase, which is then
    missing from the fork, or, when it has none left, at a random place of its middle (a share `middle` of the
    completion), with one of the phrases `inject`, as token ids.

    `find(token ids, which of them were sampled)` gives the tokens with which natural phrases begin, such as a
    `PhraseFinder`. The plan's `suppressed` keeps them from beginning again where one was cut off.
    """

    def rule(group: PartialGroup) -> list[ForkPoint]:
        batch = group.batch
        chance = np.asarray(jax.random.uniform(group.key, np.shape(batch.tokens)))
        points = []
        for chain in range(group.chains):
            length = int(batch.lengths[chain])
            sampled = np.asarray(batch.action_mask[chain, :length])

            # Natural phrases are used up in order, one a round. A fork at 0 would be one more independent sample.
            tokens = np.asarray(batch.tokens[chain, :length])
            natural = [place for place in find(tokens, sampled) if place > 0]
            if group.round < len(natural):
                points.append(ForkPoint(chain, natural[group.round], 1.0, (), INTERVENTION_SUPPRESS))
                continue

            cut = (1 - middle) / 2 * length
            place = np.arange(length)
            inner = sampled & (place >= max(cut, 1)) & (place < max(length - cut, 2))
            if inner.any():
                drawn = int(np.where(inner, chance[chain, :length], -1).argmax())
                # Phrases take turns over rounds and chains.
                phrase = tuple(inject[(group.round + chain) % len(inject)])
                points.append(ForkPoint(chain, drawn, 0.0, phrase, INTERVENTION_INJECT))
        return points

    return rule


def partial_batch(
    samples: Sequence[Any],
    rows: int,
    width: int,
    steps: Sequence[np.ndarray],
    columns: Mapping[str, Sequence[np.ndarray]] = MappingProxyType({}),
) -> RolloutBatch:
    """Samples of one prompt as a `RolloutBatch` `[rows, width]` of completions alone, in one group. `steps` numbers the
    steps of each; `columns` have a float32 [T] for each."""
    made = [
        Trajectory(
            tokens=np.asarray(sample.tokens, np.int32),
            action_mask=sample.sampled,
            behavior_logprobs=sample.logprobs,
            entropies=sample.entropies,
            turn_ids=np.asarray(step, np.int32),
            policy_version=np.zeros(len(sample.tokens), np.int32),
            prompt_id=0,
            group_id=0,
            episode_id=i,
            parent_row=sample.parent,
            fork_index=sample.fork_index,
            fork_score=float(sample.fork_score),
            intervention=sample.intervention,
            columns={name: values[i] for name, values in columns.items()},
        )
        for i, (sample, step) in enumerate(zip(samples, steps, strict=True))
    ]
    # One entry in each table: the rules are compiled once for all rounds.
    return stack(made, row_buckets=(rows,), length_buckets=(width,))


def _first_with(decode: Callable[[Sequence[int]], str], ids: Sequence[int], words: Sequence[str]) -> int:
    """The first token up to which the text holds one of `words`; the number of tokens if none does."""

    def holds(count: int) -> bool:
        text = decode(ids[:count]).lower()
        return any(word in text for word in words)

    if not holds(len(ids)):
        return len(ids)
    # The text grows with the count, so the first place is found by halving.
    low = 0
    high = len(ids)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high - 1


def _between(decode: Callable[[Sequence[int]], str], ids: Sequence[int], start: str, end: str) -> list[bool]:
    """Which tokens have all of their text between `start` and `end`."""
    pieces = [decode([token]) for token in ids]
    text = "".join(pieces)
    inside = []
    place = 0
    while (opened := text.find(start, place)) >= 0:
        closed = text.find(end, opened + len(start))
        inside.append((opened + len(start), closed if closed >= 0 else len(text)))
        place = inside[-1][1] + 1
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    starts = [stop - len(piece) for stop, piece in zip(ends, pieces, strict=True)]
    return [any(a <= first and last <= b for a, b in inside) for first, last in zip(starts, ends, strict=True)]
