"""From prompts to scored trajectories: the host side of a rollout."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from rljax.rollouts.plans import Plan
from rljax.sampling import Request, Sample, Sampler, SamplingParams
from rljax.tasks import Example, RewardInput, RewardResult, RewardRunner
from rljax.text import Tokenizer, render_prompt
from rljax.types import Trajectory


class Rollout(NamedTuple):
    """What one step collected: `len(trajectories) == len(records) == groups x group size`, groups in order.

    `records` are JSON-ready lines for the rollout log; `stats` are metrics of this rollout, without prefix.
    """

    trajectories: list[Trajectory]
    records: list[dict[str, Any]]
    examples: list[Example]
    rewards: np.ndarray  # [groups, group_size] raw, before shaping
    stats: dict[str, float]


class Scored(NamedTuple):
    """The samples of one prompt with their texts and rewards."""

    example: Example
    prompt: list[int]
    samples: list[Sample]
    texts: list[str]
    results: list[RewardResult]


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
) -> list[Scored]:
    """Samples every example `samples_each` times and runs the rewards on the texts. `phase(name)` is entered around
    each of the two, to time them. With `truncated_is_wrong` a completion cut off by the length limit is worth 0 at
    most, whatever its reward says.

    A prompt that occurs again gets fresh sample ids, so that its samples differ from the first ones; `seen` counts
    occurrences by prompt id, across calls when it is given.
    """
    prompts = [render_prompt(tokenizer, example.prompt, chat) for example in examples]
    seen = {} if seen is None else seen
    requests = []
    for example, prompt in zip(examples, prompts, strict=True):
        first = samples_each * seen.setdefault(example.id, 0)
        seen[example.id] += 1
        requests.append(
            Request(prompt=prompt, prompt_id=example.id, sample_ids=tuple(range(first, first + samples_each)))
        )
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
    return [
        Scored(example, prompts[i], groups[i], texts[i], results[i * samples_each : (i + 1) * samples_each])
        for i, example in enumerate(examples)
    ]


def collect(
    plan: Plan,
    draw: Callable[[int], list[Example]],
    *,
    num_groups: int,
    step: int,
    **sampling_setup: Any,
) -> Rollout:
    """Collects `num_groups` groups of `plan.group_size` samples for `step`.

    `draw(n)` gives the next `n` examples. Under dynamic sampling (`plan.keep_group`, DAPO 2503.14476) groups whose raw
    rewards carry no signal are dropped and more prompts are drawn, up to `plan.max_sampling_rounds` times; a
    `RuntimeError` says so when that does not fill the batch. `sampling_setup` goes to `sample_and_score`.
    """
    kept: list[Scored] = []
    drawn = failed = 0
    seen: dict[int, int] = {}
    for _ in range(plan.max_sampling_rounds if plan.keep_group else 1):
        scored = sample_and_score(draw(num_groups), plan.group_size, step=step, seen=seen, **sampling_setup)
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
    for group_id, group in enumerate(kept):
        for sample_index, (sample, text, result) in enumerate(
            zip(group.samples, group.texts, group.results, strict=True)
        ):
            trajectory = _trajectory(plan, group, sample, result, group_id, len(trajectories), step)
            trajectories.append(trajectory)
            records.append(_record(group, sample_index, sample, text, result, trajectory, step))
    rewards = np.array([[r.value if r.is_valid else np.nan for r in group.results] for group in kept])
    return Rollout(trajectories, records, [g.example for g in kept], rewards, _stats(kept, rewards, drawn, failed))


def completion_text(tokenizer: Tokenizer, sample: Sample, stop_strings: Sequence[str] = ()) -> str:
    """The completion as the reward sees it: special tokens left out, cut before the stop string that ended it."""
    text = tokenizer.decode(sample.tokens.tolist())
    if sample.finish_reason == "stop_string":
        starts = [text.find(stop) for stop in stop_strings if stop in text]
        text = text[: min(starts)] if starts else text
    return text


def _valid_rewards(group: Scored) -> np.ndarray:
    return np.array([r.value for r in group.results if r.is_valid], dtype=np.float64)


def _trajectory(
    plan: Plan, group: Scored, sample: Sample, result: RewardResult, group_id: int, row: int, step: int
) -> Trajectory:
    prompt_length, length = len(group.prompt), len(sample.tokens)
    total = prompt_length + length

    def on_completion(values, dtype) -> np.ndarray:
        return np.concatenate([np.zeros(prompt_length, dtype), np.asarray(values, dtype)])

    truncated = sample.finish_reason == "length"
    reward = result.value if result.is_valid else 0.0
    if plan.shape_reward is not None and result.is_valid:
        reward = plan.shape_reward(reward, length)
    return Trajectory(
        tokens=np.concatenate([np.asarray(group.prompt, np.int32), np.asarray(sample.tokens, np.int32)]),
        action_mask=on_completion(np.full(length, not (truncated and plan.mask_truncated)), bool),
        behavior_logprobs=on_completion(sample.logprobs, np.float32),
        entropies=on_completion(sample.entropies, np.float32),
        turn_ids=np.zeros(total, np.int32),
        policy_version=np.full(total, step, np.int32),
        prompt_id=group.example.id,
        group_id=group_id,
        episode_id=row,
        reward=float(reward),
        is_valid=result.is_valid,
        is_truncated=truncated,
    )


def _record(
    group: Scored, sample_index: int, sample: Sample, text: str, result: RewardResult, trajectory: Trajectory, step: int
) -> dict[str, Any]:
    return {
        "step": step + 1,  # counted as the metrics count: by finished steps
        "prompt_id": group.example.id,
        "sample": sample_index,
        "prompt": group.example.prompt,
        "completion": text,
        "reward": result.value if result.is_valid else None,
        "shaped_reward": trajectory.reward,
        "components": result.components,
        "error": result.error,
        "finish_reason": sample.finish_reason,
        "tokens": np.asarray(sample.tokens).tolist(),
        "logprobs": np.round(np.asarray(sample.logprobs, np.float64), 5).tolist(),
    }


def _stats(kept: Sequence[Scored], rewards: np.ndarray, drawn: int, failed: int) -> dict[str, float]:
    lengths = np.array([len(s.tokens) for g in kept for s in g.samples], np.float64)
    entropies = np.concatenate([s.entropies for g in kept for s in g.samples])
    valid = ~np.isnan(rewards)
    spread = np.array([np.ptp(row[ok]) if ok.any() else 0.0 for row, ok in zip(rewards, valid, strict=True)])
    return {
        "reward_mean": float(rewards[valid].mean()) if valid.any() else 0.0,
        "reward_std": float(rewards[valid].std()) if valid.any() else 0.0,
        "length_mean": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "entropy": float(entropies.mean()) if len(entropies) else 0.0,
        "truncated_share": float(np.mean([s.finish_reason == "length" for g in kept for s in g.samples])),
        "no_signal_share": float(np.mean(spread == 0)),
        "invalid_rewards": float(failed),
        "prompts_drawn": float(drawn),
        "new_tokens": float(lengths.sum()),
    }
