"""Forests forked at the policy's most uncertain tokens, with a process reward from the leaves."""

import dataclasses
from collections.abc import Callable

from rljax.advantages import AdvantageFn, global_and_local, global_and_local_released
from rljax.algorithms.base import Algorithm
from rljax.algorithms.forest import ForestRecipe
from rljax.plans import ForkRule
from rljax.plans.fork_rules import top_surprisal


@dataclasses.dataclass
class TreeRL(ForestRecipe):
    """TreeRL with EPTree, arXiv 2506.11902.

        A(s) = [ (V(s) - V(root)) + (V(s) - V(parent(s))) ] / sqrt(count(s))     on every token of node s

    `V` is the mean reward of the leaves below a node, `count` their number. Each tree forks at its `points` tokens of
    the highest `-log pi`, but not in the last `tail` of a completion nor after one of `last_words`; the token itself is
    drawn anew. That conditions on what was drawn and biases the kept path (the metric `original_minus_branch`);
    `fork_rule=random_token` is the control, `top_entropy` the other reading. `released` takes the credit of the
    released code. Deviations: KL as k3 in the loss; a branch may be as long as what is left of the completion's limit.
    `prefix_power` multiplies the damping, so 1 is the paper.
    """

    chains: int = 6
    branches: int = 2
    clip_high: float = 0.26
    kl_coef: float = 1e-4
    fork_rule: Callable[..., ForkRule] = top_surprisal
    tail: float = 0.1
    last_words: tuple[str, ...] = ("answer", "conclusion")
    released: bool = False

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        rule = self.fork_rule(self.points, self.chains, tail=self.tail, last_words=self.last_words)
        credit: AdvantageFn = global_and_local_released() if self.released else global_and_local()
        return self.compose(rule, credit)
