"""What `rljax prefer` is set by."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from rljax.algorithms import DPO, PreferenceMethod
from rljax.settings import field
from rljax.training import OptimizerConfig


@runtime_checkable
class PreferenceRecipe(Protocol):
    """An entry of `rljax.algorithms.PREFERENCE_RECIPES`: hyperparameters that build a `PreferenceMethod`."""

    def build(self) -> PreferenceMethod: ...


@dataclasses.dataclass
class PreferenceConfig:
    """Updates on pairs of completions, of which one is preferred; nothing is sampled."""

    method: PreferenceRecipe = dataclasses.field(default_factory=DPO)
    """What is learned: `DPO`, `IPO`, `SimPO` or `KTO` for a policy, `BradleyTerry` for a reward model."""

    steps: int = field(default=100, least=1)
    """Updates."""

    batch_size: int = field(default=32, least=1)
    """Rows of the data in an update: pairs, or labelled completions."""

    pairs: Callable[[list[Any]], list[Any]] | None = None
    """Makes examples with the columns below of the data's, for training and held out alike; None takes the data as it
    is."""

    chosen_column: str = "chosen"
    """Column of the data with the preferred completion: a text, a list of texts by turns, or the assistant's message in
    a list."""

    rejected_column: str = "rejected"
    """Column with the other one."""

    completion_column: str = "completion"
    """Column with the completion of a labelled row, for `KTO` on data without pairs."""

    label_column: str = "label"
    """Column that says of such a row whether its completion is good: true or false."""

    evaluate_every: int = field(default=0, least=0)
    """Updates between two measures of accuracy on held-out pairs; 0 is at the end only."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=1e-6))
    """Its optimizer. The default rate is for a policy of billions of weights; a reward model bears a larger one."""
