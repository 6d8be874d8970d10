"""A run on a cluster that is not here, simulated: throughput, idle devices, lost work, and the split that is best."""

from rljax.simulation.costs import Machine, ModelSize, costs_of
from rljax.simulation.engine import RolloutTimes, draw_tokens, draw_turns, roll_out
from rljax.simulation.measured import Measured, calibrated, read_run
from rljax.simulation.scenario import Scenario, replaced, with_values
from rljax.simulation.schedule import Outcome, simulate
from rljax.simulation.splits import best_split, simulate_splits

__all__ = [
    "Machine",
    "Measured",
    "ModelSize",
    "Outcome",
    "RolloutTimes",
    "Scenario",
    "best_split",
    "calibrated",
    "costs_of",
    "draw_tokens",
    "draw_turns",
    "read_run",
    "replaced",
    "roll_out",
    "simulate",
    "simulate_splits",
    "with_values",
]
