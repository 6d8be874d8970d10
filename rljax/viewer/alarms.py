"""What is wrong with a run, in plain words: rules over its last lines of metrics.

Bounds are those of docs/not-learning.md; a rule asks for more than one line where one line is noise.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

RECENT = 3
"""Lines of metrics that a rule looks at."""

Line = Mapping[str, Any]


class Alarm(NamedTuple):
    name: str
    metric: str
    """The metric that it was read off."""
    step: int
    """Of the last line."""
    text: str
    """What is seen, with its figure."""
    remedy: str


def find_alarms(lines: Sequence[Line], config: Mapping[str, Any] | None = None) -> list[Alarm]:
    """The alarms of a run by its lines of metrics, in order, and its config (`config.json`; without it, the defaults).

    A rule is silent where its metric is missing. An alarm holds of the last lines: it goes when the run recovers.
    """
    found = []
    for rule in RULES:
        alarm = rule(lines, config or {})
        if alarm is not None:
            found.append(alarm)
    return found


def _recent(lines: Sequence[Line], metric: str) -> list[float]:
    """Its values in the last lines, if all of these have it and it is finite there."""
    values = [_number(line, metric) for line in lines[-RECENT:]]
    return [value for value in values if value is not None] if None not in values else []


def _number(line: Line, metric: str) -> float | None:
    """What is not finite stands in a line by its name, as text."""
    value = line.get(metric)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _value(config: Mapping[str, Any], path: str, default: Any) -> Any:
    holder: Any = config
    for name in path.split("."):
        if not isinstance(holder, Mapping) or holder.get(name) is None:
            return default
        holder = holder[name]
    return holder


def _alarm(lines: Sequence[Line], metric: str, text: str, remedy: str, name: str) -> Alarm:
    return Alarm(name, metric, int(lines[-1].get("step", 0)), text, remedy)


def dead_groups(lines: Sequence[Line], config: Mapping[str, Any]) -> Alarm | None:
    metric = "rollout/no_signal_share"
    shares = _recent(lines, metric)
    if len(shares) < RECENT or min(shares) < 0.9:
        return None
    reward = _number(lines[-1], "rollout/reward_mean")
    mean = "" if reward is None else f" (mean {reward:.3g})"
    text = f"In {shares[-1]:.0%} of the groups all samples have the same reward{mean}, so nothing can be learned there."
    remedy = (
        "If prompts are never solved: easier data, a supervised warm-up (config.warmup), partial credit. If they are "
        "always solved: harder prompts. If they are one or the other: a larger config.algorithm.group_size."
    )
    return _alarm(lines, metric, text, remedy, "dead groups")


def broken_policy(lines: Sequence[Line], config: Mapping[str, Any]) -> Alarm | None:
    metric = "rollout/reward_mean"
    rewards = _recent(lines, metric)
    best = max((value for line in lines if (value := _number(line, metric)) is not None), default=0.0)
    if len(rewards) < RECENT or best < 0.1 or max(rewards) > 0.2 * best:
        return None
    text = f"The mean reward is {rewards[-1]:.3g}; it has been {best:.3g}. The policy has broken."
    remedy = "A lower config.optimizer.learning_rate or max_grad_norm; go on from an earlier checkpoint."
    return _alarm(lines, metric, text, remedy, "reward lost")


def kl(lines: Sequence[Line], config: Mapping[str, Any]) -> Alarm | None:
    metric = "loss/approx_kl"
    values = _recent(lines, metric)
    if not values or max(values) <= 0.3:
        return None
    text = f"The policy moves {max(values):.2g} nats per token within one rollout; 0.03 is usual with several updates."
    remedy = "Fewer config.update.epochs or minibatches, or a lower config.optimizer.learning_rate."
    return _alarm(lines, metric, text, remedy, "KL")


def clipping(lines: Sequence[Line], config: Mapping[str, Any]) -> Alarm | None:
    metric = "loss/clip_fraction"
    values = _recent(lines, metric)
    if not values or min(values) <= 0.3:
        return None
    text = f"The clip cuts the gradient of {values[-1]:.0%} of the tokens: the last updates train on stale data."
    remedy = "Fewer config.update.epochs or minibatches, or a lower config.optimizer.learning_rate."
    return _alarm(lines, metric, text, remedy, "clipping")


def entropy_collapse(lines: Sequence[Line], config: Mapping[str, Any]) -> Alarm | None:
    metric = "rollout/entropy"
    values = _recent(lines, metric)
    first = next((value for line in lines if (value := _number(line, metric)) is not None), 0.0)
    rewards = _recent(lines, "rollout/reward_mean")
    # A policy that becomes right loses entropy too, and that is no fault: a reward of 1 is a solved problem.
    if len(values) < RECENT or max(values) >= 0.1 * first or not rewards or max(rewards) >= 0.9:
        return None
    text = (
        f"Entropy fell from {first:.2g} to {values[-1]:.2g} nats per token while the mean reward is "
        f"{rewards[-1]:.2g}: samples of a group become one text."
    )
    remedy = "A higher clip_high, an entropy_coef, a higher config.sampling.temperature, larger groups, a lower rate."
    return _alarm(lines, metric, text, remedy, "entropy collapse")


def gap(lines: Sequence[Line], config: Mapping[str, Any]) -> Alarm | None:
    # Of older weights the gap measures how far the policy has moved since.
    if any((_number(line, "rollout/staleness_max") or 0.0) > 0 for line in lines[-RECENT:]):
        return None
    if _value(config, "rollout.staleness", 0):
        return None
    is_float32 = _value(config, "model.dtype", "auto") == "float32"
    metric, limit = ("rollout/logprob_gap_max", 5e-4) if is_float32 else ("rollout/logprob_gap_mean", 0.05)
    values = _recent(lines, metric)
    if not values or max(values) <= limit:
        return None
    text = (
        f"Sampler and trainer disagree by {max(values):.2g} nats on a token; {limit:g} is the bound for fresh samples."
    )
    remedy = "config.model.dtype='float32', or a recipe for such data (IcePop, DecoupledPPO)."
    return _alarm(lines, metric, text, remedy, "log-prob gap")


def staleness(lines: Sequence[Line], config: Mapping[str, Any]) -> Alarm | None:
    metric = "rollout/staleness_max"
    values = _recent(lines, metric)
    limit = max(4, 2 * int(_value(config, "rollout.staleness", 0)))
    if not values or max(values) <= limit:
        return None
    text = f"Tokens are trained on {max(values):.0f} hand-overs of weights after they were sampled."
    remedy = "Fewer groups in flight, config.rollout.groups.max_age, or a recipe for stale data (M2PO, VCPO)."
    return _alarm(lines, metric, text, remedy, "staleness")


def truncation(lines: Sequence[Line], config: Mapping[str, Any]) -> Alarm | None:
    metric = "rollout/truncated_share"
    values = _recent(lines, metric)
    if len(values) < RECENT or min(values) <= 0.3:
        return None
    text = f"{values[-1]:.0%} of the samples are cut off at the length limit."
    remedy = "A higher config.sampling.max_new_tokens; check the stop tokens and config.sampling.stop_strings."
    return _alarm(lines, metric, text, remedy, "truncation")


def failed_rewards(lines: Sequence[Line], config: Mapping[str, Any]) -> Alarm | None:
    metric = "rollout/invalid_rewards"
    values = _recent(lines, metric)
    if not values or max(values) == 0:
        return None
    text = f"The reward failed for {max(values):.0f} samples of a step; they are left out."
    remedy = "Rollouts, 'failed rewards', show what was raised; mend the reward or raise its timeout_s."
    return _alarm(lines, metric, text, remedy, "failed rewards")


def skipped_updates(lines: Sequence[Line], config: Mapping[str, Any]) -> Alarm | None:
    metric = "loss/skipped"
    # A count of those in a row: the last line tells all.
    count = _number(lines[-1], metric) if lines else None
    if not count:
        return None
    text = f"{count:.0f} updates in a row had a loss or gradient that is not finite, and were not applied."
    remedy = "The log names the cause; config.model.dtype='float32', a lower rate, the range of the reward."
    return _alarm(lines, metric, text, remedy, "updates skipped")


def empty_steps(lines: Sequence[Line], config: Mapping[str, Any]) -> Alarm | None:
    metric = "rollout/empty_steps"
    # A count of those in a row: the last line tells all.
    count = _number(lines[-1], metric) if lines else None
    if not count:
        return None
    text = f"{count:.0f} steps in a row had nothing to learn from."
    remedy = "The log says what the samples lack; look at the rollouts, those that were left out too."
    return _alarm(lines, metric, text, remedy, "empty steps")


RULES: tuple[Callable[[Sequence[Line], Mapping[str, Any]], Alarm | None], ...] = (
    empty_steps,
    skipped_updates,
    failed_rewards,
    broken_policy,
    dead_groups,
    truncation,
    entropy_collapse,
    gap,
    staleness,
    kl,
    clipping,
)
