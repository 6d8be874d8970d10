"""What a run that was made says of the costs of its steps: the lines of its `metrics.jsonl`, and its rollouts."""

import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np

from rljax.simulation.engine import roll_out
from rljax.simulation.scenario import Scenario


@dataclasses.dataclass(frozen=True)
class Measured:
    """Medians of the steps of a run that compiled nothing; seconds of a step."""

    steps: int
    """How many steps they are of."""
    devices: int
    """Devices of the run, over all processes."""
    processes: int
    """Processes of the run."""
    rollout_devices: int
    """Devices of each process that rolled out while others trained; 0 where all did both."""
    engines: int
    """Engines in other processes that sampled; 0 where the run did."""
    sample_s: float
    """Of sampling, environments included, and of handing weights over to engines beside updates."""
    reward_s: float
    """Of judging, where that is not a part of sampling."""
    update_s: float
    """Of scoring and updating."""
    other_s: float
    """Of the rest of a step: collection, packing, copies of weights."""
    step_s: float
    """Of a whole step, from one to the next."""
    samples: int
    """Samples of a step."""
    turns: float
    """Mean turns of a sample; 1 without an environment."""
    tokens: float
    """Mean new tokens of a turn."""
    tokens_cv: float
    """Standard deviation of a sample's tokens over their mean; 0 where the rollouts were not kept."""


def read_run(folder: str | Path, group_size: int) -> Measured:
    """Reads a run folder, whose groups have `group_size` samples. ValueError of one line for a folder without the lines
    of a step that compiled nothing, or without a config."""
    path = Path(folder)
    file = path / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"--measured={folder} has no metrics.jsonl; name the folder of a run")

    lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    steps = [line for line in lines if line.get("compile/count") == 0 and "time/update_s" in line]
    if not steps:
        raise ValueError(
            f"--measured={folder} has no step that updated and compiled nothing among its {len(lines)}; let the run "
            "go on"
        )

    def middle(name: str) -> float:
        return statistics.median(line.get(name, 0.0) for line in steps)

    if not (path / "config.json").is_file():
        raise ValueError(f"--measured={folder} has no config.json; name the folder of a run")
    config = json.loads((path / "config.json").read_text())
    devices, processes = _machine(path)

    # Lengths say nothing of either: they hold what environments and forks put into a sample.
    samples = config["prompts_per_step"] * group_size
    played = max(round(middle("rollout/prompts_drawn")) * group_size, samples)
    turns = max(middle("play/turns") / played, 1.0)
    actor = config.get("actor", {})
    actor = actor.get("actor", actor)

    # A learner beside its actor waits for what is left of a rollout, not for the whole.
    is_beside = all("time/learner_wait_s" in line for line in steps)
    rollout = ("learner_wait",) if is_beside else ("sample", "reward")
    # In turn engines get their weights within the rest of a step.
    handed_s = middle("play/hand_over_s") if is_beside else 0.0
    phases = (*rollout, "score", "update")
    other = [line["time/total_s"] - sum(line.get(f"time/{phase}_s", 0.0) for phase in phases) for line in steps]
    return Measured(
        steps=len(steps),
        devices=devices,
        processes=processes,
        rollout_devices=int(config.get("rollout", {}).get("devices", 0)),
        engines=len(actor.get("engines", ())),
        sample_s=middle("time/sample_s") + handed_s,
        reward_s=middle("time/reward_s"),
        update_s=middle("time/score_s") + middle("time/update_s"),
        other_s=max(statistics.median(other), 0.0),
        step_s=middle("time/total_s"),
        samples=samples,
        turns=turns,
        tokens=middle("rollout/new_tokens") / samples / turns,
        tokens_cv=_spread(path),
    )


def _machine(path: Path) -> tuple[int, int]:
    """(devices, processes) of a run; one of each where it does not say."""
    file = path / "versions.json"
    if not file.is_file():
        return 1, 1
    versions = json.loads(file.read_text())
    return max(len(versions.get("devices", [])), 1), int(versions.get("processes", 1))


def _spread(path: Path) -> float:
    lengths = []
    for file in sorted((path / "rollouts").glob("step_*.jsonl"))[1:]:
        records = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        lengths += [len(record["tokens"]) for record in records if record.get("tokens")]
    return float(np.std(lengths) / np.mean(lengths)) if lengths else 0.0


def calibrated(scenario: Scenario, sample_s: float) -> Scenario:
    """The scenario with the `step_s` by which its rollouts take `sample_s` seconds on average, without judging: the
    nearest that is found, as turns that overtake each other in a queue let the seconds jump.

    ValueError where tools alone take longer than that.
    """
    few = dataclasses.replace(scenario, drawn=min(scenario.drawn, 4))

    def taken(step_s: float) -> float:
        return float(roll_out(dataclasses.replace(few, step_s=step_s)).sample_s.mean())

    least = taken(0.0)
    if least >= sample_s:
        raise ValueError(
            f"tools and prompts alone take {least:.3g} s of a rollout, and {sample_s:.3g} s were measured; give a "
            "smaller tool_s"
        )
    # Without tools the seconds grow in proportion, so that the first guess is right.
    step_s = sample_s / taken(1.0)
    tried: list[tuple[float, float]] = []
    for _ in range(20):
        seconds = taken(step_s)
        tried.append((abs(seconds - sample_s), step_s))
        if tried[-1][0] <= 1e-9 * sample_s:
            break
        step_s *= (sample_s - least) / max(seconds - least, 1e-12)
    return dataclasses.replace(scenario, step_s=min(tried)[1])
