"""Methods side by side: runs that end when as many tokens are spent, and the picture of their curves."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.experiment.build import Run, build_actor
from rljax.experiment.train import train_step
from rljax.rollouts import Rollout


@dataclasses.dataclass
class Spent:
    """What a run has cost: tokens sampled in training, tokens trained on (each row counts its own), updates."""

    sampled: int = 0
    trained: int = 0
    steps: int = 0


def train_on_budget(
    run: Run,
    budget: int,
    look: Callable[[Spent], Any],
    *,
    of: str = "sampled",
    looks: int = 1,
    after: Callable[[dict[str, float], Rollout], Any] | None = None,
) -> Spent:
    """Trains `run`, whose state is set, until `budget` tokens are spent, `sampled` or `trained` as `of` says: measured,
    not planned. `look` is called at the start and when each of `looks` equal shares is spent, `after` at every step."""
    spent = Spent()
    stops = [budget * (i + 1) / looks for i in range(looks)]
    look(spent)
    while getattr(spent, of) < budget:
        metrics, rollout = train_step(run, spent.steps)
        spent.steps += 1
        spent.sampled += int(metrics["rollout/new_tokens"])
        spent.trained += int(sum(t.action_mask.sum() for t in rollout.trajectories))
        if after is not None:
            after(metrics, rollout)
        if getattr(spent, of) >= stops[0]:
            stops = [stop for stop in stops if stop > getattr(spent, of)] or [float("inf")]
            look(spent)
    return spent


def with_seed(run: Run, seed: int) -> Run:
    """The same run, not yet begun, with another seed and an actor of its own. Both share compiled programs and the
    learner, so use one at a time."""
    config = dataclasses.replace(run.config, seed=seed)
    run.learner.seed = seed
    return dataclasses.replace(
        run,
        config=config,
        curriculum=config.curriculum.make(run.dataset.train, seed),
        actor=build_actor(config, run.algorithm.plan, run.dataset, run.tokenizer, run.decoder, run.mesh),
        state=None,  # type: ignore[arg-type]
        evaluation=None,
    )


def draw_curves(axes: Any, curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> None:
    """For each name the mean over its curves of (thousands of tokens, score), and a band of one standard deviation."""
    for name, runs in curves.items():
        if not runs:
            continue
        length = min(map(len, runs))
        points = np.array([run[:length] for run in runs], float)  # [runs, points, 2]
        tokens, mean = points.mean(axis=0).T
        spread = points[..., 1].std(axis=0)
        (line,) = axes.plot(tokens / 1e3, mean, label=name, marker=".")
        axes.fill_between(tokens / 1e3, mean - spread, mean + spread, alpha=0.12, color=line.get_color())
    axes.grid(alpha=0.3)
