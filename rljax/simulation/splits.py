"""Which devices should roll out: every split of the hosts' devices, simulated."""

import dataclasses
from collections.abc import Sequence

from rljax.simulation.scenario import Scenario
from rljax.simulation.schedule import Outcome, simulate


def simulate_splits(scenario: Scenario) -> list[Outcome]:
    """The outcome of every split that the devices and their memory allow, from 0 (all do both in turn) on; of that one
    alone where engines sample.

    ValueError of one line where there is none.
    """
    found = []
    refused = ""
    for count in range(1 if scenario.engines else scenario.local_devices):
        split = dataclasses.replace(scenario, rollout_devices=count)
        try:
            split.check()
        except ValueError as error:
            refused = refused or str(error)
            continue
        found.append(simulate(split))
    if not found:
        raise ValueError(refused)
    return found


def best_split(outcomes: Sequence[Outcome]) -> Outcome:
    """The one with most steps an hour; of equal ones that with fewest devices for rollouts."""
    return max(outcomes, key=lambda outcome: outcome.steps_per_hour)
