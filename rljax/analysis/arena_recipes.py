"""Recipes that take a method apart, so that its runs cost what those of another one cost."""

import dataclasses

from rljax.algorithms import Algorithm
from rljax.experiment import Recipe


@dataclasses.dataclass
class FixedPrompts:
    """Credit and loss of a method, on every prompt that is drawn: groups without a signal are not replaced, which would
    cost tokens that no other method spends, and length is not punished."""

    recipe: Recipe

    def build(self) -> Algorithm:
        """Raises ValueError for hyperparameters that cannot work."""
        algorithm = self.recipe.build()
        return algorithm._replace(plan=algorithm.plan._replace(keep_group=None, shape_reward=None))
