"""Held-out evaluation: greedy accuracy, avg@k, pass@k and maj@k with intervals over problems."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rljax.evaluation.config import EvaluationConfig
from rljax.evaluation.estimators import bootstrap_interval, maj_at_k, pass_at_k
from rljax.plans import RolloutPlan
from rljax.rollouts import Actor, ScoredGroup, number_groups
from rljax.sampling import SamplingParams, sampling_params
from rljax.tasks import Example

EVALUATION_STEP = 2**30
"""Step folded into the keys of evaluation samples: no training step uses it, so they repeat from one evaluation to the
next (the same noise before and after) and never coincide with training samples."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over problems and its 95% interval (bootstrap over problems)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation; `problems` are JSON-ready records with completions, `metrics` plain numbers for the log."""

    step: int
    num_problems: int
    samples: int
    temperature: float
    top_p: float
    estimates: dict[str, Estimate]
    metrics: dict[str, float]
    problems: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def solved_shares(self) -> list[float]:
        """avg@k of each problem."""
        return [float(np.mean([r is not None and r >= 1.0 for r in p["rewards"]])) for p in self.problems]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Evaluation":
        estimates = {name: Estimate(**estimate) for name, estimate in data["estimates"].items()}
        return cls(**{**data, "estimates": estimates})


def evaluate(actor: Actor, examples: Sequence[Example], config: EvaluationConfig, *, step: int = 0) -> Evaluation:
    """`actor` answers every example as `config` says, with the weights that it has: those of training step `step`, as
    the result says. See `summarize`."""
    greedy, sampled = answers(actor, examples, config)
    return summarize(greedy, sampled, config, step=step)


def answers(
    actor: Actor, examples: Sequence[Example], config: EvaluationConfig
) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
    """A greedy answer to every example, and `config.samples` at `config.temperature`; groups in order."""
    greedy = _groups(actor, examples, 1, sampling_params(temperature=0.0), config.batch_prompts)
    sampled = _groups(actor, examples, config.samples, config.sampled(), config.batch_prompts)
    return greedy, sampled


def summarize(
    greedy: Sequence[ScoredGroup], sampled: Sequence[ScoredGroup], config: EvaluationConfig, *, step: int = 0
) -> Evaluation:
    """What `answers` came to.

    A problem counts as solved when its reward is at least 1. A sample whose reward failed counts as unsolved; the
    metrics say how many (`invalid_rewards`). Estimators: `rljax.evaluation.estimators`.
    """
    samples = config.samples
    solved = np.array([[_solved(result) for result in group.results] for group in sampled])
    counts = solved.sum(axis=1)
    per_problem = {"greedy": np.array([float(_solved(group.results[0])) for group in greedy])}
    per_problem[f"avg@{samples}"] = counts / samples
    for k in _powers_of_two(samples):
        if k > 1:
            per_problem[f"pass@{k}"] = np.array([pass_at_k(samples, int(c), k) for c in counts])
    if samples > 1:
        per_problem[f"maj@{samples}"] = np.array([_majority(group, samples) for group in sampled])

    estimates = {name: Estimate(float(v.mean()), *bootstrap_interval(v)) for name, v in per_problem.items()}
    lengths = [len(s.tokens) for g in sampled for s in g.samples]
    metrics = {name: estimate.value for name, estimate in estimates.items()} | {
        "length_mean": float(np.mean(lengths)),
        "truncated_share": float(np.mean([s.finish_reason == "length" for g in sampled for s in g.samples])),
        "invalid_rewards": float(sum(not r.is_valid for g in [*greedy, *sampled] for r in g.results)),
    }
    problems = [_record(g, s) for g, s in zip(greedy, sampled, strict=True)]
    return Evaluation(step, len(sampled), samples, config.temperature, config.top_p, estimates, metrics, problems)


def _groups(
    actor: Actor, examples: Sequence[Example], samples: int, sampling: SamplingParams, batch_prompts: int
) -> list[ScoredGroup]:
    """A group of `samples` for each example, in order."""
    evaluated = actor.for_evaluation(sampling)
    plan = RolloutPlan(group_size=samples)
    groups: list[ScoredGroup] = []
    for start in range(0, len(examples), batch_prompts):
        batch = examples[start : start + batch_prompts]
        evaluated.submit(number_groups(batch, samples), plan, EVALUATION_STEP)
        groups += evaluated.ready(len(batch))
    return groups


def _solved(result: Any) -> bool:
    return bool(result.is_valid and result.value >= 1.0)


def _majority(group: ScoredGroup, k: int) -> float:
    """maj@k of one problem: equal texts vote together, and a vote's gold is whether its text was rewarded."""
    answers: list[str | None] = [text.strip() or None for text in group.texts]
    winners = {a for a, r in zip(answers, group.results, strict=True) if a is not None and _solved(r)}
    merged = ["gold" if a in winners else a for a in answers]
    return float(maj_at_k(merged, "gold", k))


def _powers_of_two(limit: int) -> list[int]:
    powers = [2**i for i in range(limit.bit_length()) if 2**i <= limit]
    return powers if powers[-1] == limit else [*powers, limit]


def _record(greedy: ScoredGroup, sampled: ScoredGroup) -> dict[str, Any]:
    return {
        "prompt_id": greedy.example.id,
        "prompt": greedy.example.prompt,
        "greedy_completion": greedy.texts[0],
        "greedy_reward": greedy.results[0].value if greedy.results[0].is_valid else 0.0,
        "completions": sampled.texts,
        "rewards": [r.value if r.is_valid else None for r in sampled.results],
    }
