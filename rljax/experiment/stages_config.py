"""What `rljax stages` is set by."""

import dataclasses
from collections.abc import Callable
from typing import Any

from rljax.settings import field
from rljax.training import OptimizerConfig


@dataclasses.dataclass
class StagesConfig:
    """Rounds of stages that make rows, and of supervised updates on them; `config.warmup` comes first."""

    make: Callable[[Any], list[Any]] | None = None
    """`make(parts)`: the stages of a round in their order (`rljax.tasks.stage`). `parts` holds the policy as it stands
    and the run's rewards (`StageParts`)."""

    rounds: int = field(default=1, least=1)
    """Times that rows are made and trained on; above 1 it is expert iteration. More of them go on from where fewer
    ended."""

    keeps_weights: bool = False
    """Whether a round trains the weights of the round before. Else each trains those of the start anew (STaR, ReST-EM),
    and only the rows carry over what was learned."""

    steps: int = field(default=100, least=1)
    """Updates of a round."""

    batch_size: int = field(default=64, least=1)
    """Rows in an update."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """Its optimizer; moments end with the round."""
