"""What should a method bring on a task like mine? A simulation of the policy gradient without a model: `rljax snr`.

A completion is a row of tokens, each right with a chance of its own and worth 1 if all are right. A method samples
groups of such rows, as many and forked as it does, and its credit is the one that training uses. The policy has one
logit a token, p = sigmoid(z), so that a prompt's gradient estimate is

    g[t] = sum over rows that hold token t of A[row, t] (right[row, t] - p[t])

and what is reported is its squared signal to noise for each sampled token: |E g|^2 / trace Cov g / tokens of a prompt.
It grows with the number of prompts like the tokens do, so methods compare at equal tokens, whatever a step holds.

What is assumed, and what a real run may break:

- right or wrong is all that a token can be, independent of those before it, and the chances do not move: one update;
- prompts are alike; with a mixture of easy and hard ones groups without signal are more frequent;
- every token has a parameter of its own, so nothing is learned of one token from another;
- tokens are what costs. A larger ratio should learn faster at equal tokens; by how much it does not say, since Adam
  rescales gradients and the noise falls on parameters that all prompts share.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rljax.advantages import AdvantageFn, global_and_local, group_normalized, intra_and_inter_tree
from rljax.types import NO_PARENT, RolloutBatch

EXAMPLES = ("0.8*4", "0.85*16", "1*17,0.7*6,1")
"""Few decisions, many, and few that are late behind certain text."""
CHUNK = 2000
"""Groups that are simulated together."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the rows of a prompt are sampled and given credit."""

    chains: int
    """Independent rows."""
    points: int = 0
    """Forks of each chain's tree in a round; 0 forks nothing."""
    rounds: int = 1
    """Rounds of forks; from the second on forks are forked too."""
    places: Literal["random", "surprisal"] = "random"
    """Where: any token but the first, or those of the highest `-log p` (EPTree, 2506.11902)."""
    credit: AdvantageFn = dataclasses.field(default_factory=group_normalized)
    """What a row's tokens get."""

    def check(self) -> None:
        """ValueError for what cannot be sampled."""
        if self.chains < 1 or self.points < 0 or self.rounds < 1:
            raise ValueError(
                f"chains={self.chains} and rounds={self.rounds} must be at least 1, points={self.points} 0"
            )
        if self.chains * (1 + self.points * self.rounds) < 2:
            raise ValueError("a single row has nothing to be compared with; take more chains, or forks")


class Signal(NamedTuple):
    """What the gradient of a scheme is worth."""

    value: float
    """Squared signal to noise for 1000 sampled tokens."""
    error: float
    """Standard error of `value`, of ten parts of the simulation."""
    tokens: float
    """Sampled tokens of a prompt."""
    success: float
    """Chance that a row is right."""


class _Rows(NamedTuple):
    """Rows of `G` groups, `R` each, of `T` tokens. Rows of one tree lie side by side, its chain first."""

    right: np.ndarray
    """Bool [G, R, T]."""
    parent: np.ndarray
    """Int [G, R], the row forked; `NO_PARENT` for chains."""
    fork: np.ndarray
    """Int [G, R], the first token of a row's own."""


def signal_to_noise(chances: Sequence[float], scheme: Scheme, *, groups: int = 20_000, seed: int = 0) -> Signal:
    """The signal of `scheme` where token `t` is right with `chances[t]`, from `groups` simulated prompts. The same for
    the same seed. ValueError for chances outside (0, 1], for ones without any uncertain token, and for few groups."""
    scheme.check()
    p = np.asarray(chances, np.float64)
    if p.ndim != 1 or not len(p) or not ((p > 0) & (p <= 1)).all() or (p == 1).all():
        raise ValueError("chances must lie above 0 and be at most 1, and one of them below 1: else nothing is learned")
    if groups < 1000:
        raise ValueError(f"groups={groups} must be at least 1000: the noise of fewer hides the signal")

    rng = np.random.default_rng(seed)
    credit = _credit_of(scheme.credit)
    gradients = []
    tokens = 0.0
    solved = 0.0
    for start in range(0, groups, CHUNK):
        rows = sample_rows(p, scheme, min(CHUNK, groups - start), rng)
        advantages = np.asarray(credit(rows.right, rows.parent, rows.fork), np.float64)
        gradients.append((advantages * (rows.right - p)).sum(axis=1))
        tokens += (len(p) - rows.fork).sum()
        solved += rows.right.all(axis=2).mean(axis=1).sum()

    found = np.concatenate(gradients)
    cost = tokens / groups
    parts = [1e3 * _ratio(part) / cost for part in np.array_split(found, 10)]
    error = float(np.std(parts, ddof=1) / np.sqrt(len(parts)))
    return Signal(float(1e3 * _ratio(found) / cost), error, float(cost), float(solved / groups))


def _ratio(gradients: np.ndarray) -> float:
    """|E g|^2 / trace Cov g of estimates [G, T]. The square of a mean is too large by its own variance."""
    noise = gradients.var(axis=0, ddof=1).sum()
    signal = (gradients.mean(axis=0) ** 2).sum() - noise / len(gradients)
    return float(signal / noise)


def sample_rows(p: np.ndarray, scheme: Scheme, groups: int, rng: np.random.Generator) -> _Rows:
    """Rows of `groups` prompts: chains, then forks of each tree in its rounds."""
    shape = (groups, scheme.chains)
    right = (rng.random((*shape, 1, len(p))) < p).astype(bool)  # [G, M, rows of a tree, T]
    parent = np.full((*shape, 1), -1)  # within the tree
    fork = np.zeros((*shape, 1), np.int64)
    is_forked = np.zeros((*shape, 1, len(p)), bool)
    column = np.arange(len(p))

    for _ in range(scheme.rounds if scheme.points else 0):
        # A row's own tokens but the first of a completion, and no place twice.
        allowed = (column >= fork[..., None]) & (column > 0) & ~is_forked
        allowed &= ~((column == fork[..., None]) & (parent[..., None] >= 0))
        scores = rng.random(right.shape)
        if scheme.places == "surprisal":
            with np.errstate(divide="ignore"):
                scores = np.where(right, -np.log(p), -np.log1p(-p)) + 1e-9 * scores
        ranked = np.where(allowed, scores, -np.inf).reshape(*shape, -1)
        chosen = np.argsort(-ranked, axis=-1, kind="stable")[..., : scheme.points]
        if np.isneginf(np.take_along_axis(ranked, chosen, axis=-1)).any():
            raise ValueError(f"completions of {len(p)} tokens have no {scheme.points} places to fork at; take fewer")
        source, place = np.divmod(chosen, len(p))

        # A fork keeps what is before its place, and draws the rest anew.
        kept = np.take_along_axis(right, source[..., None], axis=2)
        drawn = rng.random(kept.shape) < p
        np.put_along_axis(is_forked.reshape(*shape, -1), chosen, True, axis=-1)
        right = np.concatenate([right, np.where(column < place[..., None], kept, drawn)], axis=2)
        parent = np.concatenate([parent, source], axis=2)
        fork = np.concatenate([fork, place], axis=2)
        is_forked = np.concatenate([is_forked, np.zeros_like(drawn)], axis=2)

    first = np.arange(scheme.chains)[:, None] * right.shape[2]
    rows = np.where(parent >= 0, parent + first, NO_PARENT)
    return _Rows(right.reshape(groups, -1, len(p)), rows.reshape(groups, -1), fork.reshape(groups, -1))


@functools.cache
def _credit_of(advantage_fn: AdvantageFn):
    """`advantage_fn` on rows of many groups at once: (right, parent, fork) -> advantages [G, R, T]."""

    def of_group(right, parent, fork):
        rows, width = right.shape
        zeros = jnp.zeros((rows, width), jnp.float32)
        none = jnp.zeros(rows, jnp.int32)
        batch = RolloutBatch(
            tokens=right.astype(jnp.int32),
            action_mask=jnp.ones((rows, width), bool),
            behavior_logprobs=zeros,
            entropies=zeros,
            turn_ids=jnp.zeros((rows, width), jnp.int32),
            policy_version=jnp.zeros((rows, width), jnp.int32),
            lengths=jnp.full(rows, width, jnp.int32),
            reward=right.all(axis=1).astype(jnp.float32),
            is_valid=jnp.ones(rows, bool),
            is_truncated=jnp.zeros(rows, bool),
            group_id=none,
            episode_id=jnp.arange(rows, dtype=jnp.int32),
            source=none,
            parent_row=parent.astype(jnp.int32),
            fork_index=fork.astype(jnp.int32),
            fork_score=jnp.zeros(rows, jnp.float32),
            intervention=none,
        )
        return advantage_fn(batch)

    return jax.jit(jax.vmap(of_group))


def usual_schemes() -> Mapping[str, Scheme]:
    """GRPO, and forks with several kinds of credit, by name. `4x2` is 4 chains with 2 forks each, which at random
    places cost about as many tokens as 8 independent rows."""
    grpo = group_normalized()
    tree_grpo = intra_and_inter_tree()
    treerl = global_and_local()
    return {
        "GRPO 8": Scheme(8, credit=grpo),
        "GRPO 4": Scheme(4, credit=grpo),
        "GRPO 2": Scheme(2, credit=grpo),
        "random forks 4x2": Scheme(4, 2, credit=grpo),
        "random forks 2x2": Scheme(2, 2, credit=grpo),
        "random forks 4x2, Tree-GRPO's credit": Scheme(4, 2, credit=tree_grpo),
        "random forks 2x2, Tree-GRPO's credit": Scheme(2, 2, credit=tree_grpo),
        "random forks 1x2, Tree-GRPO's credit": Scheme(1, 2, credit=tree_grpo),
        "random forks 4x2, TreeRL's credit": Scheme(4, 2, credit=treerl),
        "surprisal forks 4x2": Scheme(4, 2, places="surprisal", credit=grpo),
        "surprisal forks 4x2x2": Scheme(4, 2, rounds=2, places="surprisal", credit=grpo),
        "surprisal forks 4x2, Tree-GRPO's credit": Scheme(4, 2, places="surprisal", credit=tree_grpo),
        "surprisal forks 4x2, TreeRL's credit": Scheme(4, 2, places="surprisal", credit=treerl),
    }


def parse_chances(text: str) -> tuple[float, ...]:
    """`1*17,0.7*6` to 17 tokens that are certain and six that are right with 0.7. ValueError for what is none."""
    chances: list[float] = []
    for part in text.split(","):
        chance, star, count = part.partition("*")
        try:
            chances += [float(chance)] * (int(count) if star else 1)
        except ValueError:
            raise ValueError(f"--chances={text}: {part!r} is no chance*count, such as 0.8*4 or 1*17,0.7*6") from None
    return tuple(chances)


def signal_table(tasks: Mapping[str, Sequence[float]], *, groups: int) -> list[tuple[str, ...]]:
    """A line for each of `usual_schemes`, with its value, and its ratio to GRPO 8, on each of `tasks`."""
    found = {
        name: [signal_to_noise(chances, scheme, groups=groups) for chances in tasks.values()]
        for name, scheme in usual_schemes().items()
    }
    rows = [("method", *tasks)]
    for name, signals in found.items():
        cells = []
        for signal, base in zip(signals, found["GRPO 8"], strict=True):
            cells.append(f"{signal.value:.3g} ± {signal.error:.1g} ({signal.value / base.value:.2f})")
        rows.append((name, *cells))
    return rows


def page(rows: Sequence[Sequence[str]], command: str) -> str:
    """A table of `signal_table` as Markdown, with what it assumes."""
    about, _, assumptions = (__doc__ or "").partition("What is assumed")
    lines = ["# Signal to noise, simulated", "", f"    {command}", ""]
    lines += [about.partition("\n\n")[2].strip(), "", f"What is assumed{assumptions.rstrip()}", ""]
    lines += ["| " + " | ".join(cell.replace("*", " x ") for cell in row) + " |" for row in rows]
    lines.insert(len(lines) - len(rows) + 1, "|---" * len(rows[0]) + "|")
    lines += ["", "In brackets: the ratio to GRPO with 8 samples. `0.8 x 4` is four tokens, each right with 0.8.", ""]
    return "\n".join(lines)
