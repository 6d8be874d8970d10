"""Held-out evaluation: greedy accuracy, avg@k, pass@k and maj@k with intervals over problems."""

import dataclasses
from collections.abc import Callable, Sequence
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

Answered = Callable[[int], None]
"""Told after every batch how many examples have been answered; examples that are answered twice, greedily and
sampled, count twice."""

RIGHT = True
"""The vote of every right answer; no text equals it."""


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
        return [float(np.mean(p["solved"])) for p in self.problems]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Evaluation":
        """The inverse of `to_dict`. Records that do not say which samples are solved go by the weighted sum of the
        rewards, as the metrics beside them do."""
        estimates = {name: Estimate(**estimate) for name, estimate in data["estimates"].items()}
        problems = [_with_solved(problem) for problem in data["problems"]]
        return cls(**{**data, "estimates": estimates, "problems": problems})


def evaluate(
    actor: Actor,
    examples: Sequence[Example],
    config: EvaluationConfig,
    *,
    step: int = 0,
    report: Answered = lambda count: None,
) -> Evaluation:
    """`actor` answers every example as `config` says, with the weights that it has: those of training step `step`, as
    the result says. See `summarize`."""
    greedy, sampled = answers(actor, examples, config, report=report)
    return summarize(greedy, sampled, config, step=step)


def answers(
    actor: Actor, examples: Sequence[Example], config: EvaluationConfig, *, report: Answered = lambda count: None
) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
    """A greedy answer to every example, and `config.samples` at `config.temperature`; groups in order."""
    greedy = greedy_answers(actor, examples, config, report=report)
    sampled = sampled_answers(actor, examples, config, report=lambda count: report(len(greedy) + count))
    return greedy, sampled


def greedy_answers(
    actor: Actor, examples: Sequence[Example], config: EvaluationConfig, *, report: Answered = lambda count: None
) -> list[ScoredGroup]:
    """A greedy answer to every example, groups in order."""
    return _groups(actor, examples, 1, sampling_params(temperature=0.0), config.batch_prompts, report)


def sampled_answers(
    actor: Actor, examples: Sequence[Example], config: EvaluationConfig, *, report: Answered = lambda count: None
) -> list[ScoredGroup]:
    """`config.samples` answers to every example at `config.temperature`, groups in order."""
    return _groups(actor, examples, config.samples, config.sampled(), config.batch_prompts, report)


def summarize(
    greedy: Sequence[ScoredGroup], sampled: Sequence[ScoredGroup], config: EvaluationConfig, *, step: int = 0
) -> Evaluation:
    """What `answers` came to.

    A sample is solved when what `config.solved_by` names is at least 1, whatever other rewards say. A sample whose
    reward failed counts as unsolved; the metrics say how many (`invalid_rewards`). maj@k votes on the answers that this
    reward extracts, and is left out where nothing extracts them. Estimators: `rljax.evaluation.estimators`. ValueError
    when no sample has anything of that name.
    """
    _check_decides(config.solved_by, [*greedy, *sampled])
    samples = config.samples
    solved = np.array([[result.is_solved for result in group.results] for group in sampled])
    counts = solved.sum(axis=1)

    # one value for each problem, whose mean is the estimate
    per_problem = {"greedy": np.array([float(group.results[0].is_solved) for group in greedy])}
    per_problem[f"avg@{samples}"] = counts / samples
    for k in _powers_of_two(samples):
        if k > 1:
            per_problem[f"pass@{k}"] = np.array([pass_at_k(samples, int(c), k) for c in counts])
    if samples > 1 and all(group.answers for group in sampled):
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
    actor: Actor,
    examples: Sequence[Example],
    samples: int,
    sampling: SamplingParams,
    batch_prompts: int,
    report: Answered,
) -> list[ScoredGroup]:
    """A group of `samples` for each example, in order."""
    evaluated = actor.for_evaluation(sampling)
    plan = RolloutPlan(group_size=samples)
    groups: list[ScoredGroup] = []
    for start in range(0, len(examples), batch_prompts):
        batch = examples[start : start + batch_prompts]
        evaluated.submit(number_groups(batch, samples), plan, EVALUATION_STEP)
        groups += evaluated.ready(len(batch))
        report(len(groups))
    return groups


def _check_decides(solved_by: str, groups: Sequence[ScoredGroup]) -> None:
    results = [result for group in groups for result in group.results if result.is_valid]
    known = sorted({name for result in results for name in (*result.components, *result.not_applied)})
    if solved_by and results and solved_by not in known:
        raise ValueError(
            f"config.evaluation.solved_by={solved_by!r} is no reward or count of any sample; there are "
            f"{', '.join(known)}"
        )


def _majority(group: ScoredGroup, k: int) -> float:
    """maj@k of one problem: equal answers vote together, and those that were right as one, however they are written."""
    pairs = zip(group.answers, group.results, strict=True)
    right = {answer for answer, result in pairs if answer is not None and result.is_solved}
    votes = [RIGHT if answer in right else answer for answer in group.answers]
    return float(maj_at_k(votes, RIGHT, k))


def _powers_of_two(limit: int) -> list[int]:
    powers = [2**i for i in range(limit.bit_length()) if 2**i <= limit]
    return powers if powers[-1] == limit else [*powers, limit]


def _with_solved(problem: dict[str, Any]) -> dict[str, Any]:
    if "solved" in problem:
        return problem
    return problem | {"solved": [reward is not None and reward >= 1.0 for reward in problem["rewards"]]}


def _record(greedy: ScoredGroup, sampled: ScoredGroup) -> dict[str, Any]:
    return {
        "prompt_id": greedy.example.id,
        "prompt": greedy.example.prompt,
        "greedy_completion": greedy.texts[0],
        "greedy_reward": greedy.results[0].value if greedy.results[0].is_valid else 0.0,
        "completions": sampled.texts,
        "answers": list(sampled.answers),
        "rewards": [r.value if r.is_valid else None for r in sampled.results],
        "solved": [r.is_solved for r in sampled.results],
    }
