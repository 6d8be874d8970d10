"""Which of many texts to read, and what of them was needed: pure functions of scores, links and ids.

How sure a ranking is, and one ranking of several by that: MemGAS (2505.19549). Labels of the nodes of a graph, and the
part of it that is kept: Align-GRAG (2505.16237). One answer of several that agree: GenKI (2505.19660).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

_FLAT = 1e-12
"""Variance below which a component of a mixture counts as a point."""


def entropy(scores: Float[np.ndarray, " N"], *, temperature: float) -> float:
    """Entropy in nats of `softmax(scores / temperature)`: from 0, where one score stands out, to ln N."""
    p = _softmax(np.asarray(scores, np.float64) / temperature)
    return float(-(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum())


def relative_certainty(nats: float, count: int) -> float:
    """`1 - H / ln N`, in [0, 1], of an entropy H over N scores; 1 for a single one."""
    return 1.0 - nats / math.log(count) if count > 1 else 1.0


def released_certainty(nats: float, count: int) -> float:
    """`1 - H`, as MemGAS has it. It is below 0 from one nat on, so that of two unsure rankings the less sure one gets
    the higher weight: for comparison only."""
    del count
    return 1.0 - nats


def router_weights(certainties: Sequence[float]) -> Float[np.ndarray, " G"]:
    """The weight of each ranking, in proportion to how sure it is; they sum to 1. Equal ones where none is sure."""
    c = np.asarray(certainties, np.float64)
    total = c.sum()
    return c / total if total else np.full(len(c), 1.0 / len(c))


def accepted(scores: Float[np.ndarray, " N"], *, rounds: int = 100) -> Bool[np.ndarray, " N"]:
    """Which scores belong to the upper of two Gaussians that are fitted to them by expectation and maximisation.

    The fit begins with the lowest and the highest score as means, so it depends on the scores alone. Where all scores
    are equal there is nothing to fit, and the first one is accepted.
    """
    x = np.asarray(scores, np.float64)
    if len(x) == 0 or x.min() == x.max():
        return np.arange(len(x)) == 0

    # Scaled, so that the floor of a variance means the same for scores of any size.
    x = (x - x.min()) / (x.max() - x.min())
    mean = np.array([0.0, 1.0])
    variance = np.full(2, x.var())
    share = np.full(2, 0.5)
    upper = x > 0.5
    for number in range(rounds):
        log_density = np.log(share) - 0.5 * np.log(variance) - (x[:, None] - mean) ** 2 / (2.0 * variance)
        density = np.exp(log_density - log_density.max(axis=1, keepdims=True))
        p = density / density.sum(axis=1, keepdims=True)
        mass = np.maximum(p.sum(axis=0), _FLAT)
        mean = (p * x[:, None]).sum(axis=0) / mass
        variance = np.maximum((p * (x[:, None] - mean) ** 2).sum(axis=0) / mass, 1e-6)
        share = mass / mass.sum()

        before = upper
        upper = p[:, mean.argmax()] > 0.5
        if number and (before == upper).all():
            break
    # A broad lower component may claim the very top; what is above an accepted score is accepted.
    return x >= x[upper].min() if upper.any() else x == x.max()


def pagerank(
    links: Float[np.ndarray, "N N"], restart: Float[np.ndarray, " N"], *, damping: float, tolerance: float = 1e-12
) -> Float[np.ndarray, " N"]:
    """Where a walk is found that follows a link with probability `damping`, and else starts again.

    `links[i, j]` is the weight of the link from i to j, 0 or more, and `restart` where a walk starts, in any scale.
    From a node without links it starts again. ValueError unless 0 <= damping < 1 and `restart` has a positive sum.
    """
    start = np.asarray(restart, np.float64)
    if not 0.0 <= damping < 1.0 or not start.sum() > 0.0 or start.min() < 0.0:
        raise ValueError(f"damping {damping} must be in [0, 1), and the restart of sum {start.sum()} not negative")
    start = start / start.sum()
    out = np.asarray(links, np.float64).sum(axis=1, keepdims=True)
    walk = np.where(out > 0.0, links / np.where(out > 0.0, out, 1.0), start)

    # What is left of an error shrinks by the damping in each round.
    found = start
    rounds = math.ceil(math.log(tolerance) / math.log(damping)) if damping else 1
    for _ in range(rounds):
        found = (1.0 - damping) * start + damping * (found @ walk)
    return found


def evidence_labels(similarities: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """How much each node is to count, `softmax` of its similarity to a chain of reasoning that knows the answer: a
    label for training and for rewards, never a part of a prompt (Align-GRAG, `p_reason`)."""
    return _softmax(np.asarray(similarities, np.float64))


def alignment_loss(labels: Float[np.ndarray, " N"], predicted: Float[np.ndarray, " N"]) -> float:
    """`1/N * sum labels log(labels / predicted)` (Align-GRAG, L_NA). The factor 1/N weighs graphs by their size."""
    p = np.asarray(labels, np.float64)
    q = np.asarray(predicted, np.float64)
    return float((p * (np.log(p) - np.log(q))).sum() / len(p))


def pruned(
    scores: Float[np.ndarray, " N"], links: Bool[np.ndarray, "N N"], num_seeds: int
) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " K"]]:
    """(seeds, kept): the nodes with the `num_seeds` highest scores above 0, best first, and these with all that they
    are linked with, in order of index (Align-GRAG). Of equal scores the earlier node is first."""
    order = np.argsort(-scores, kind="stable")[:num_seeds]
    seeds = order[scores[order] > 0]
    kept = np.asarray(links[seeds].any(axis=0))
    kept[seeds] = True
    return seeds, np.flatnonzero(kept)


def recall_any(ranking: Sequence[str], needed: Collection[str], k: int) -> float:
    """1 if any of the needed ids is among the first k, else 0."""
    return float(any(id_ in needed for id_ in ranking[:k]))


def recall_all(ranking: Sequence[str], needed: Collection[str], k: int) -> float:
    """1 if all of the needed ids are among the first k, else 0."""
    return float(set(needed) <= set(ranking[:k]))


def ndcg(relevances: Sequence[int | float], k: int) -> float:
    """`sum rel_i / log2(i + 1)` over the first k ranks, i from 1, by what the best order of the same relevances has; 0
    where nothing is relevant. (MemGAS reports a form in which ranks 1 and 2 weigh the same.)"""

    def gain(ordered: Sequence[int | float]) -> float:
        return math.fsum(relevance / math.log2(i + 1) for i, relevance in enumerate(ordered[:k], start=1))

    best = gain(sorted(relevances, reverse=True))
    return gain(relevances) / best if best else 0.0


def evidence_recall(opened: Collection[str], evidence: Mapping[str, int | float]) -> float:
    """The share of the evidence that was opened, by its weights; 0 where none is needed."""
    total = math.fsum(evidence.values())
    return math.fsum(weight for id_, weight in evidence.items() if id_ in opened) / total if total else 0.0


def token_f1(a: str, b: str) -> float:
    """2 * shared / (words of a + words of b), in lower case, of words as often as they occur; 1 for two empty texts."""
    one = _words(a)
    other = _words(b)
    total = one.total() + other.total()
    return 2.0 * (one & other).total() / total if total else 1.0


def most_consistent(candidates: Sequence[str], fits: Callable[[str], bool]) -> str | None:
    """Of the candidates that `fits` lets pass the one that the others agree with most, by the mean of `token_f1`; of
    equal ones the shorter, then the earlier. None where none passes (for GenKI's stage of answers, whose formula is not
    published)."""
    passing = [candidate for candidate in candidates if fits(candidate)]

    def agreement(i: int) -> float:
        others = [token_f1(passing[i], other) for j, other in enumerate(passing) if j != i]
        return math.fsum(others) / max(len(others), 1)

    # Rounded: means of equal parts may differ in their last bit.
    ranked = sorted(range(len(passing)), key=lambda i: (-round(agreement(i), 12), len(passing[i]), i))
    return passing[ranked[0]] if ranked else None


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def _softmax(x: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    e = np.exp(x - x.max())
    return e / e.sum()
