"""Metrics of a rollout."""

from collections.abc import Sequence

import numpy as np

from rljax.plans import RolloutPlan
from rljax.rollouts.actor import ScoredGroup
from rljax.sampling import Sample
from rljax.tasks.skills import SKILLS, skill_of_label
from rljax.types import NO_PARENT, Trajectory


def rollout_stats(
    plan: RolloutPlan, groups: Sequence[ScoredGroup], rewards: np.ndarray, *, drawn: int, failed: int
) -> dict[str, float]:
    """Metrics of the groups that are trained on, without prefix. `rewards` are raw, float64 [groups, group_size], NaN
    for none; `drawn` groups were sampled for these, with `failed` invalid rewards among them. A mean of nothing is NaN:
    0 would be a score."""
    samples = [sample for group in groups for sample in group.samples]
    lengths = np.array([len(sample.tokens) for sample in samples], np.float64)

    # What a fork inherits was sampled once, and counts with the sample that it is from.
    fresh = [_fresh(sample) for sample in samples]
    entropies = np.concatenate([sample.entropies[new] for sample, new in zip(samples, fresh, strict=True)])
    new_tokens = float(sum(new.sum() for new in fresh))

    # A group in which nothing is valid teaches as little as one of equal rewards.
    is_valid = ~np.isnan(rewards)
    spread = np.array([np.ptp(row[ok]) if ok.any() else 0.0 for row, ok in zip(rewards, is_valid, strict=True)])

    stats = {
        "reward_mean": float(rewards[is_valid].mean()) if is_valid.any() else np.nan,
        "reward_std": float(rewards[is_valid].std()) if is_valid.any() else np.nan,
        "length_mean": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "entropy": float(entropies.mean()) if len(entropies) else np.nan,
        "truncated_share": float(np.mean([sample.finish_reason == "length" for sample in samples])),
        "no_signal_share": float(np.mean(spread == 0)),
        "invalid_rewards": float(failed),
        "prompts_drawn": float(drawn),
        "new_tokens": new_tokens,
    }

    if plan.forks:
        reused = float(sum(sample.fork_index for sample in samples))
        stats |= {
            "reused_tokens": reused,
            "forced_tokens": float(lengths.sum()) - reused - new_tokens,
            "leaves": float(len(samples)),
            "leaves_per_1k_tokens": 1000 * len(samples) / max(new_tokens, 1.0),
            "unused_forks": float(len(groups) * plan.group_size - len(samples)),
            **_fork_stats(groups),
        }
    return stats | expert_stats(samples) | _component_means(groups) | _skill_rates(groups)


def expert_stats(samples: Sequence[Sample]) -> dict[str, float]:
    """How the sampled tokens spread over the experts of a layer, as means over layers: the exponential of the entropy
    of their shares, which is the number of experts where all take as many; and the share of tokens that pass the
    busiest one. Nothing without a record of all samples."""
    recorded = [
        sample.experts[len(sample.experts) - len(sample.tokens) :][_fresh(sample)]
        for sample in samples
        if sample.experts is not None
    ]
    if len(recorded) < len(samples) or not sum(map(len, recorded)):
        return {}

    tokens = np.concatenate(recorded)
    counts = [np.bincount(layer.reshape(-1)) for layer in tokens.swapaxes(0, 1)]
    shares = [count[count > 0] / count.sum() for count in counts]
    return {
        "experts_in_use": float(np.mean([np.exp(-np.sum(share * np.log(share))) for share in shares])),
        "busiest_expert": float(np.mean([count.max() / len(tokens) for count in counts])),
    }


def staleness_stats(trajectories: Sequence[Trajectory], version: int) -> dict[str, float]:
    """How many hand-overs the weights that sampled a token were behind those of `version`, which are first updated by
    it, over the tokens that may receive gradient: 0 on-policy, NaN without tokens."""
    ages = [version - one.policy_version[one.action_mask] for one in trajectories]
    age = np.concatenate(ages) if ages else np.empty(0)
    if not len(age):
        return {"staleness": np.nan, "staleness_max": np.nan}
    return {"staleness": float(age.mean()), "staleness_max": float(age.max())}


def _component_means(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Mean of every component of the rewards over the samples that have it, where there are several."""
    parts: dict[str, list[float]] = {}
    for result in (r for group in groups for r in group.results if r.is_valid):
        for name, value in result.components.items():
            parts.setdefault(name, []).append(value)
    if len(parts) < 2:
        return {}
    return {f"component/{name}": float(np.mean(values)) for name, values in parts.items()}


def _skill_rates(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Share of solved samples by the skills that their prompts hold (`rljax.tasks.with_skills`), over the samples that
    could be judged."""
    parts: dict[str, list[float]] = {}
    for group in groups:
        solved = [float(result.is_solved) for result in group.results if result.is_valid]
        for label in group.example.columns.get(SKILLS, ()):
            parts.setdefault(skill_of_label(label), []).extend(solved)
    return {f"skill/{name}": float(np.mean(values)) for name, values in sorted(parts.items()) if values}


def _fresh(sample: Sample) -> np.ndarray:
    """bool [T]: tokens that were sampled for this very sample, and not inherited by a fork."""
    mask = sample.sampled
    mask[: sample.fork_index] = False
    return mask


def _fork_stats(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Where forks lie, and how a path that was kept compares with those that left it: under a rule that looks at the
    finished path the first is no fair sample."""
    depths = []
    gaps = []
    for group in groups:
        for sample, result in zip(group.samples, group.results, strict=True):
            if sample.parent == NO_PARENT:
                continue
            depths.append(sample.fork_index / len(group.samples[sample.parent].tokens))
            parent = group.results[sample.parent]
            if parent.is_valid and result.is_valid:
                gaps.append(parent.value - result.value)
    return {
        "fork_depth": float(np.mean(depths)) if depths else np.nan,
        "original_minus_branch": float(np.mean(gaps)) if gaps else np.nan,
    }
