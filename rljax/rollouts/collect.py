"""From prompts to scored trajectories: the host side of a rollout."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from rljax.plans import ForkPlan, Plan
from rljax.rollouts.forks import rounds_of
from rljax.sampling import Request, Sample, Sampler, SamplingParams
from rljax.tasks import Example, RewardInput, RewardResult, RewardRunner
from rljax.text import StepSplitter, Tokenizer, render_prompt
from rljax.types import NO_PARENT, Trajectory


class Rollout(NamedTuple):
    """What one step collected: a trajectory and a record for each sample, groups in order.

    A group has `group_size` samples, or fewer where forks were left out; `rewards` is NaN there and where a reward
    failed. `records` are JSON-ready lines for the rollout log; `stats` are metrics of this rollout, without prefix.
    """

    trajectories: list[Trajectory]
    records: list[dict[str, Any]]
    examples: list[Example]
    rewards: np.ndarray  # [groups, group_size] raw, before shaping
    stats: dict[str, float]

    def mean_rewards(self) -> list[float]:
        """Mean reward of each group over its valid samples; 0 where there is none."""
        return [float(row[~np.isnan(row)].mean()) if (~np.isnan(row)).any() else 0.0 for row in self.rewards]


class Scored(NamedTuple):
    """The samples of one prompt with their texts and rewards; `steps` numbers the steps of each completion.

    `turn_fields`: for each sample, fields of `Trajectory` that it fills (arrays are of the completion's tokens); and
    `episode`, the first sample of its episode, where an episode has several.
    """

    example: Example
    prompt: list[int]
    samples: list[Sample]
    texts: list[str]
    results: list[RewardResult]
    steps: list[np.ndarray]
    turn_fields: Sequence[Mapping[str, Any]] = ()


@runtime_checkable
class Play(Protocol):
    """Plays episodes: called as `sample_and_score` is, for `num_groups` groups of which some may be under way."""

    last_stats: dict[str, float]  # of the last call

    def missing(self, num_groups: int) -> int: ...

    def __call__(self, *args: Any, **setup: Any) -> list[Scored]: ...


def sample_and_score(
    examples: Sequence[Example],
    samples_each: int,
    *,
    sampler: Sampler,
    tokenizer: Tokenizer,
    reward_runner: RewardRunner,
    sampling: SamplingParams,
    seed: int,
    step: int,
    chat: bool | None = None,
    stop_strings: Sequence[str] = (),
    truncated_is_wrong: bool = False,
    phase: Callable[[str], AbstractContextManager] = nullcontext,
    seen: dict[int, int] | None = None,
    forks: ForkPlan | None = None,
) -> list[Scored]:
    """Samples every example `samples_each` times, or as `forks` says up to so many times, and runs the rewards on the
    texts. `phase(name)` is entered around each of the two, to time them. With `truncated_is_wrong` a completion cut off
    by the length limit is worth 0 at most, whatever its reward says.

    A prompt that occurs again gets fresh sample ids, so that its samples differ from the first ones; `seen` counts
    occurrences by prompt id, across calls when it is given.
    """
    prompts = [render_prompt(tokenizer, example.prompt, chat) for example in examples]
    seen = {} if seen is None else seen
    splitter = StepSplitter(tokenizer, forks.step_delimiters if forks else ())
    requests = []
    for example, prompt in zip(examples, prompts, strict=True):
        first = samples_each * seen.setdefault(example.id, 0)
        seen[example.id] += 1
        request = Request(prompt, example.id, tuple(range(first, first + (forks.chains if forks else samples_each))))
        if forks:
            rounds = rounds_of(
                forks,
                tokenizer.decode,
                lambda sample: splitter(sample.tokens),
                seed=seed,
                step=step,
                prompt_id=example.id,
                first_id=first,
                limit=sampler.spec.max_new_tokens,
            )
            request = request._replace(rounds=rounds)
        requests.append(request)
    with phase("sample"):
        groups = sampler.generate(requests, sampling, seed=seed, step=step)
    texts = [[completion_text(tokenizer, sample, stop_strings) for sample in group] for group in groups]
    inputs = [
        RewardInput(prompt=example.prompt, completion=text, token_ids=sample.tokens.tolist(), columns=example.columns)
        for example, group, group_texts in zip(examples, groups, texts, strict=True)
        for sample, text in zip(group, group_texts, strict=True)
    ]
    with phase("reward"):
        results = reward_runner.score(inputs)
    if truncated_is_wrong:
        flat = [sample for group in groups for sample in group]
        results = [
            replace(result, value=min(result.value, 0.0)) if sample.finish_reason == "length" else result
            for result, sample in zip(results, flat, strict=True)
        ]
    ends = np.cumsum([len(group) for group in groups]).tolist()
    return [
        Scored(
            example,
            prompts[i],
            groups[i],
            texts[i],
            results[ends[i] - len(groups[i]) : ends[i]],
            [splitter(sample.tokens) for sample in groups[i]],
        )
        for i, example in enumerate(examples)
    ]


def collect(
    plan: Plan,
    draw: Callable[[int], list[Example]],
    *,
    num_groups: int,
    step: int,
    play: Play | None = None,
    **sampling_setup: Any,
) -> Rollout:
    """Collects `num_groups` groups of `plan.group_size` samples for `step`; of at most so many if the plan forks.

    `draw(n)` gives the next `n` examples. Under dynamic sampling (`plan.keep_group`, DAPO 2503.14476) groups whose raw
    rewards carry no signal are dropped and more prompts are drawn, up to `plan.max_sampling_rounds` times; a
    `RuntimeError` says so when that does not fill the batch. `play` plays episodes in place of `sample_and_score`, to
    which `sampling_setup` goes otherwise.
    """
    kept: list[Scored] = []
    drawn = failed = 0
    seen: dict[int, int] = {}
    for _ in range(plan.max_sampling_rounds if plan.keep_group else 1):
        setup = {"step": step, "seen": seen, "forks": plan.forks, **sampling_setup}
        if play is None:
            scored = sample_and_score(draw(num_groups), plan.group_size, **setup)
        else:
            scored = play(draw(play.missing(num_groups)), plan.group_size, num_groups=num_groups, **setup)
        drawn += len(scored)
        failed += sum(not r.is_valid for group in scored for r in group.results)
        kept += [group for group in scored if plan.keep_group is None or plan.keep_group(_valid_rewards(group))]
        if len(kept) >= num_groups:
            break
    else:
        raise RuntimeError(
            f"dynamic sampling kept {len(kept)} of the {num_groups} groups it needs after {plan.max_sampling_rounds} "
            f"rounds ({drawn} prompts): nearly all groups have equal rewards; choose easier or harder prompts, "
            "a larger group_size, or an algorithm without dynamic sampling"
        )
    kept = kept[:num_groups]
    trajectories: list[Trajectory] = []
    records: list[dict[str, Any]] = []
    rewards = np.full((num_groups, plan.group_size), np.nan)
    for group_id, group in enumerate(kept):
        first_row = len(trajectories)
        for index, result in enumerate(group.results):
            trajectories.append(_trajectory(plan, group, index, group_id, first_row, step))
            records.append(_record(group, index, trajectories[-1], step))
            if result.is_valid:
                rewards[group_id, index] = result.value
    return Rollout(
        trajectories, records, [g.example for g in kept], rewards, _stats(plan, kept, rewards, drawn, failed)
    )


def completion_text(tokenizer: Tokenizer, sample: Sample, stop_strings: Sequence[str] = ()) -> str:
    """The completion as the reward sees it: special tokens left out, cut before the stop string that ended it."""
    text = tokenizer.decode(sample.tokens.tolist())
    if sample.finish_reason == "stop_string":
        starts = [text.find(stop) for stop in stop_strings if stop in text]
        text = text[: min(starts)] if starts else text
    return text


def _valid_rewards(group: Scored) -> np.ndarray:
    return np.array([r.value for r in group.results if r.is_valid], dtype=np.float64)


def _trajectory(plan: Plan, group: Scored, index: int, group_id: int, first_row: int, step: int) -> Trajectory:
    sample, result = group.samples[index], group.results[index]
    prompt_length, length = len(group.prompt), len(sample.tokens)
    total = prompt_length + length

    def on_completion(values, dtype, fill=0) -> np.ndarray:
        return np.concatenate([np.full(prompt_length, fill, dtype), np.asarray(values, dtype)])

    versions, truncated = sample.versions, sample.finish_reason == "length"
    fields = dict(group.turn_fields[index]) if group.turn_fields else {}
    for name, value in fields.items():
        if np.ndim(value):
            fields[name] = on_completion(value, value.dtype, -1 if name == "state_ids" else 0)
    reward = result.value if result.is_valid else 0.0
    if plan.shape_reward is not None and result.is_valid:
        reward = plan.shape_reward(reward, length)
    return Trajectory(
        tokens=np.concatenate([np.asarray(group.prompt, np.int32), np.asarray(sample.tokens, np.int32)]),
        action_mask=on_completion(sample.sampled & (not (truncated and plan.mask_truncated)), bool),
        behavior_logprobs=on_completion(sample.logprobs, np.float32),
        entropies=on_completion(sample.entropies, np.float32),
        turn_ids=on_completion(group.steps[index], np.int32),
        policy_version=np.full(total, step, np.int32) if versions is None else on_completion(versions, np.int32),
        prompt_id=group.example.id,
        task_id=group.example.task_id,
        group_id=group_id,
        episode_id=first_row + fields.pop("episode", index),
        reward=float(reward),
        is_valid=result.is_valid,
        is_truncated=truncated,
        parent_row=NO_PARENT if sample.parent == NO_PARENT else first_row + sample.parent,
        fork_index=0 if sample.parent == NO_PARENT else prompt_length + sample.fork_index,
        fork_score=float(sample.fork_score),
        intervention=sample.intervention,
        **fields,
    )


def _record(group: Scored, index: int, trajectory: Trajectory, step: int) -> dict[str, Any]:
    sample, result = group.samples[index], group.results[index]
    record = {
        "step": step + 1,  # counted as the metrics count: by finished steps
        "prompt_id": group.example.id,
        "sample": index,
        "prompt": group.example.prompt,
        "completion": group.texts[index],
        "reward": result.value if result.is_valid else None,
        "shaped_reward": trajectory.reward,
        "components": result.components,
        "error": result.error,
        "finish_reason": sample.finish_reason,
        "tokens": np.asarray(sample.tokens).tolist(),
        "logprobs": np.round(np.asarray(sample.logprobs, np.float64), 5).tolist(),
    }
    if sample.parent != NO_PARENT:
        record |= {"parent": sample.parent, "fork_index": sample.fork_index, "fork_score": float(sample.fork_score)}
    if sample.forced:
        record["forced"] = [list(span) for span in sample.forced]
    return record


def _stats(plan: Plan, kept: Sequence[Scored], rewards: np.ndarray, drawn: int, failed: int) -> dict[str, float]:
    samples = [s for g in kept for s in g.samples]
    lengths = np.array([len(s.tokens) for s in samples], np.float64)
    fresh = [_fresh(s) for s in samples]
    entropies = np.concatenate([s.entropies[new] for s, new in zip(samples, fresh, strict=True)])
    new_tokens = float(sum(new.sum() for new in fresh))
    valid = ~np.isnan(rewards)
    spread = np.array([np.ptp(row[ok]) if ok.any() else 0.0 for row, ok in zip(rewards, valid, strict=True)])
    stats = {
        "reward_mean": float(rewards[valid].mean()) if valid.any() else 0.0,
        "reward_std": float(rewards[valid].std()) if valid.any() else 0.0,
        "length_mean": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "entropy": float(entropies.mean()) if len(entropies) else 0.0,
        "truncated_share": float(np.mean([s.finish_reason == "length" for s in samples])),
        "no_signal_share": float(np.mean(spread == 0)),
        "invalid_rewards": float(failed),
        "prompts_drawn": float(drawn),
        "new_tokens": new_tokens,
    }
    if plan.forks:
        reused = float(sum(s.fork_index for s in samples))
        stats |= {
            "reused_tokens": reused,
            "forced_tokens": float(lengths.sum()) - reused - new_tokens,
            "leaves": float(len(samples)),
            "leaves_per_1k_tokens": 1000 * len(samples) / max(new_tokens, 1.0),
            "unused_forks": float(len(kept) * plan.group_size - len(samples)),
            **_fork_stats(kept),
        }
    return stats | _component_means(kept)


def _component_means(kept: Sequence[Scored]) -> dict[str, float]:
    """Mean of every component of the rewards over the samples that have it, where there are several."""
    parts: dict[str, list[float]] = {}
    for result in (r for g in kept for r in g.results if r.is_valid):
        for name, value in result.components.items():
            parts.setdefault(name, []).append(value)
    return {f"component/{name}": float(np.mean(values)) for name, values in parts.items()} if len(parts) > 1 else {}


def _fresh(sample: Sample) -> np.ndarray:
    """bool [T]: tokens that were sampled for this very sample."""
    mask = sample.sampled
    mask[: sample.fork_index] = False
    return mask


def _fork_stats(kept: Sequence[Scored]) -> dict[str, float]:
    """Where forks lie, and how a path that was kept compares with those that left it: under a rule that looks at the
    finished path the first is no fair sample."""
    depths, gaps = [], []
    for group in kept:
        for sample, result in zip(group.samples, group.results, strict=True):
            if sample.parent == NO_PARENT:
                continue
            parent = group.results[sample.parent]
            depths.append(sample.fork_index / len(group.samples[sample.parent].tokens))
            if parent.is_valid and result.is_valid:
                gaps.append(parent.value - result.value)
    return {
        "fork_depth": float(np.mean(depths)) if depths else 0.0,
        "original_minus_branch": float(np.mean(gaps)) if gaps else 0.0,
    }
