"""Methods side by side: runs that end when as many tokens are spent, and the picture of their curves."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.experiment.build import Run, build, build_actor, make_curriculum
from rljax.experiment.train import train_step
from rljax.rollouts import Rollout


@dataclasses.dataclass
class Spent:
    """What a run has cost so far."""

    sampled: int = 0
    """Tokens sampled in training, those that a curriculum asked for among them."""
    trained: int = 0
    """Tokens trained on; rows that share tokens count them once each."""
    steps: int = 0
    """Rollouts."""


def train_on_budget(
    run: Run,
    budget: int,
    look: Callable[[Spent], Any],
    *,
    of: str = "sampled",
    looks: int = 1,
    after: Callable[[dict[str, float], Rollout], Any] | None = None,
) -> Spent:
    """Trains `run`, whose state is set, until `budget` tokens are spent; returns what was.

    `of` is the field of `Spent` that the budget counts, `sampled` or `trained`, as measured. `look` is called at the
    start and when each of `looks` equal shares of the budget is spent, and ends it when it returns True; `after` is
    called at every step with its metrics.
    """
    spent = Spent()
    stops = [budget * (i + 1) / looks for i in range(looks)]
    is_enough = look(spent) is True

    while getattr(spent, of) < budget and not is_enough:
        metrics, rollout = train_step(run, spent.steps)
        spent.steps += 1
        # What a curriculum asks of the policy is paid for like any other token.
        asked = metrics.get("rollout/curriculum/asked_tokens", 0.0)
        spent.sampled += int(metrics["rollout/new_tokens"] + asked)
        spent.trained += int(sum(t.action_mask.sum() for t in rollout.trajectories))
        if after is not None:
            after(metrics, rollout)

        # A long step may pass several stops; they make one look. Behind the last one nothing is left to stop at.
        if getattr(spent, of) >= stops[0]:
            stops = [stop for stop in stops if stop > getattr(spent, of)] or [float("inf")]
            is_enough = look(spent) is True
    return spent


def with_seed(run: Run, seed: int) -> Run:
    """The same run, not yet begun, with another seed and an actor of its own.

    Both share the learner and its compiled programs, so use one at a time.
    """
    config = dataclasses.replace(run.config, seed=seed)
    run.learner.seed = seed
    actor, _ = build_actor(config, run.algorithm.plan, run.dataset, run.tokenizer, run.decoder, run.rollout_mesh)
    # A run that has not begun has no state, which its type does not allow to be given.
    made = copy.copy(run)
    made.config = config
    made.curriculum = make_curriculum(config, run.dataset)
    made.actor = actor
    made.state = None  # type: ignore[assignment]
    made.evaluation = None
    made.__post_init__()
    return made


def of_seeds(run: Run, count: int) -> Iterator[Run]:
    """The run, then `count` - 1 like it of the seeds that follow its own, each built when it is asked for."""
    yield run
    for seed in range(run.config.seed + 1, run.config.seed + count):
        yield build(dataclasses.replace(run.config, seed=seed))


def draw_curves(axes: Any, curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> None:
    """Draws a line for each name: the mean over its curves, and a band of one standard deviation.

    A curve is a list of (tokens, score), one for each seed; the axis counts thousands of tokens.
    """
    for name, runs in curves.items():
        if not runs:
            continue

        # Seeds may end after different numbers of looks; only what all of them have can be averaged.
        length = min(map(len, runs))
        points = np.array([run[:length] for run in runs], float)  # [runs, points, 2]
        tokens, mean = points.mean(axis=0).T
        spread = points[..., 1].std(axis=0)
        (line,) = axes.plot(tokens / 1e3, mean, label=name, marker=".")
        axes.fill_between(tokens / 1e3, mean - spread, mean + spread, alpha=0.12, color=line.get_color())
    axes.grid(alpha=0.3)
