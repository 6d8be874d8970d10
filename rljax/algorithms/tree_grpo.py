"""Tree search for agents with group relative credit within trees and between them."""

import dataclasses

from rljax.advantages import intra_and_inter_tree
from rljax.algorithms.base import Algorithm
from rljax.algorithms.forest import ForestRecipe
from rljax.plans.fork_rules import random_step


@dataclasses.dataclass
class TreeGRPO(ForestRecipe):
    """Tree-GRPO, arXiv 2509.21240.

        A = (R - mean_tree) / (std_tree + epsilon) + (R - mean_group) / (std_group + epsilon)
        loss = mean over all tokens of the minibatch of the clipped surrogate (dual clip) + kl_coef * k3

    Forks are random ends of steps but the last, with replacement, and the root when `expand_from_root`, as in the
    released code, where shallow trees then cost more than the paper's budget. Deviations: token mean over the global
    minibatch (the paper: sequence mean; the code: token mean of a microbatch), a lone or flat tree adds 0.
    """

    kl_coef: float = 0.001
    dual_clip: float | None = 3.0
    expand_from_root: bool = True

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        rule = random_step(self.points, self.chains, from_root=self.expand_from_root)
        return self.compose(rule, intra_and_inter_tree(epsilon=self.epsilon))
