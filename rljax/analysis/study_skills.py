"""What `rljax study skills` does: a repository of skills evolves (SkillClaw, 2604.08377), from several warm starts.

Each seed trains the config's model on its demonstrations. Its weights then stay, and two repositories grow from
nothing over the same days: one behind the gate of `config.skills`, and, as a control, one that deploys whatever is
proposed. Held-out examples are answered with the skills that each of them deploys.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.analysis.compare import of_seeds
from rljax.experiment.build import Run, build
from rljax.experiment.config import Config, to_dict
from rljax.experiment.report import aligned, describe_run, say
from rljax.experiment.sft import warm_up
from rljax.experiment.skill_days import Day, SkillDays, check_skills
from rljax.experiment.stage_parts import weights_name
from rljax.parallel import use_mesh
from rljax.tasks import Gate
from rljax.training import RunFolder, fingerprint, versions

OPEN = Gate(margin=-1.0, max_broken=2**31)
"""Lets everything pass: no mean falls by more than 1."""


def study_skills(config: Config, workdir: str, *, seeds: int = 3) -> dict[str, Any]:
    """Runs the study, prints its table, writes `skills.json` into `workdir` and returns what that holds. `seeds` are
    warm starts.

    ValueError, before any training, for what `check_skills` refuses and for fewer than one seed.
    """
    if seeds < 1:
        raise ValueError(f"--seeds={seeds} must be at least 1")
    run = build(config)
    check_skills(run)
    say(describe_run(run))

    found = []
    with RunFolder(workdir, config=to_dict(config), fresh=True) as folder:
        for one in of_seeds(run, seeds):
            found.append(_one_seed(one, folder, Path(workdir) / f"seed-{one.config.seed}"))

        lines = summarise(found)
        report = {
            "study": "skills",
            "lines": lines,
            "handed_in": handed_in(found),
            "verdict": verdict(found),
            "seeds": found,
            "versions": versions(),
        }
        file = folder.write_json("skills.json", report)
    say(f"\n{table(lines)}\n\n{report['verdict']}\nfigures {file}")
    return report


def _one_seed(run: Run, folder: RunFolder, place: Path) -> dict[str, Any]:
    own = run.config.skills
    gates = {"gated": Gate(own.margin, own.max_broken), "open": OPEN}
    shutil.rmtree(place, ignore_errors=True)
    with run.actor, use_mesh(run.mesh):
        params = jax.tree.map(jnp.asarray, warm_up(run, folder))
        run.actor.set_params(params, 0)
        weights = weights_name(fingerprint(params))
        days = {name: _days(run, weights, place / name, gate) for name, gate in gates.items()}
    return {"seed": run.config.seed, **{name: [day.to_dict() for day in each] for name, each in days.items()}}


def _days(run: Run, weights: str, place: Path, gate: Gate) -> list[Day]:
    users = SkillDays(run, weights, place)
    days = [users.before()]
    say(f"{place}: without skills, held out {days[0].held_out:.3f}")
    for number in range(1, run.config.skills.days + 1):
        days.append(users.day(number, gate))
        say(f"{place}: day {number}, held out {days[-1].held_out:.3f}")
        for decision in days[-1].decisions:
            say(f"  {decision.describe()}")
    return days


def summarise(seeds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each day: held-out success by seed behind the gate and without it, and how many proposals each had
    and deployed."""
    lines = []
    for number in range(len(seeds[0]["gated"])):
        line: dict[str, Any] = {"day": number}
        for name in ("gated", "open"):
            days = [seed[name][number] for seed in seeds]
            line[name] = [day["held_out"] for day in days]
            line[f"{name}_proposed"] = sum(len(day["decisions"]) for day in days)
            line[f"{name}_deployed"] = sum(one["deployed"] for day in days for one in day["decisions"])
        lines.append(line)
    return lines


def handed_in(seeds: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Of the proposals without evidence, which people handed in: how many there were behind the gate, and how many
    passed it."""
    those = [one for seed in seeds for day in seed["gated"] for one in day["decisions"] if not one["evidence"]]
    return {"proposed": len(those), "deployed": sum(one["deployed"] for one in those)}


def verdict(seeds: Sequence[dict[str, Any]]) -> str:
    """One line: the gain of every seed over no skills, the largest fall of a night, the gain over a repository without
    a gate, and what became of proposals that people handed in. Whether a fall is noise is for the reader."""
    gains = [seed["gated"][-1]["held_out"] - seed["gated"][0]["held_out"] for seed in seeds]
    steps = [np.diff([day["held_out"] for day in seed["gated"]]) for seed in seeds]
    beside = [seed["gated"][-1]["held_out"] - seed["open"][-1]["held_out"] for seed in seeds]
    told = handed_in(seeds)
    word = "above" if min(gains) > 0 else "not above"
    return (
        f"success with the evolved repository is {word} that with none in every seed ({_signed(gains)}); the largest "
        f"fall of a night is {max(0.0, -float(np.min(np.concatenate(steps)))):.3f}; beside a repository without a gate "
        f"{_signed(beside)}; of {told['proposed']} proposals that people handed in {told['deployed']} passed"
    )


def table(lines: Sequence[dict[str, Any]]) -> str:
    """A line for each day; means over seeds."""
    rows: list[tuple[str, ...]] = [("day", "gated", "proposed", "deployed", "no gate", "proposed", "deployed")]
    for line in lines:
        figures: list[str] = []
        for name in ("gated", "open"):
            counts = [str(line[f"{name}_{what}"]) for what in ("proposed", "deployed")]
            figures += [f"{float(np.mean(line[name])):.3f}", *counts]
        rows.append((str(line["day"]), *figures))
    return aligned(rows)


def _signed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.3f}" for value in values)
