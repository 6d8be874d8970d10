"""Studies of what training did: a policy beside its base, and methods beside each other at equal cost.

`study` is `rljax study`, over `two_models` (decoding with both) and `shifts` (how far apart they are at every
token). `study_surgery` is `rljax study surgery`, over `surgery` (edits of weights). `study_cogmath`,
`study_longcontext` and `study_geosketch` are `rljax study` of these words; all three ask by `suites`. `task_vectors`
overwrites attention heads. `agent_demo` is `rljax agent-demo`, over `compare` (runs that end at a budget). `arena` is
`rljax arena`; its tasks are in `arena_tasks` and what their runs are like in `arena_configs`. `snr` is `rljax snr`.
"""

from rljax.analysis.shifts import Shifts, ShiftSummary, summarize_shifts, token_shifts
from rljax.analysis.two_models import Choice, Prompts, TwoModelSamples, TwoModelSpec, generate_with_two

__all__ = [
    "Choice",
    "Prompts",
    "ShiftSummary",
    "Shifts",
    "TwoModelSamples",
    "TwoModelSpec",
    "generate_with_two",
    "summarize_shifts",
    "token_shifts",
]
