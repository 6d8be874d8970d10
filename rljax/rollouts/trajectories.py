"""A sample of a scored group as a trajectory, and as a line of the rollout log."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.plans import Column, RolloutPlan
from rljax.rollouts.actor import ScoredGroup
from rljax.sampling import Sample
from rljax.sampling.logits import MASKED
from rljax.sampling.slots import Grammar
from rljax.types import NO_PARENT, Allowed, Trajectory

_NO_STATE = -1


def trajectory_of(
    plan: RolloutPlan,
    group: ScoredGroup,
    index: int,
    version: int,
    columns: Sequence[Column] = (),
    *,
    group_id: int = 0,
    first_row: int = 0,
) -> Trajectory:
    """Sample `index` of `group`, prompt and completion in one sequence.

    `version` is that of the weights, where the sample does not tell it of each token. The group is the `group_id`-th of
    its rollout, and its first sample row `first_row` of it. `columns` are those that the trajectory gets, 0 where the
    sample has no value.
    """
    sample = group.samples[index]
    result = group.results[index]
    prompt_length = len(group.prompt)
    total = prompt_length + len(sample.tokens)

    def on_completion(values: Any, dtype: Any, fill: int = 0) -> np.ndarray:
        return np.concatenate([np.full(prompt_length, fill, dtype), np.asarray(values, dtype)])

    is_truncated = sample.finish_reason == "length"
    reward = result.value if result.is_valid else 0.0
    if plan.shape_reward is not None and result.is_valid:
        reward = plan.shape_reward(reward, len(sample.tokens))

    versions = np.full(total, version, np.int32)
    if sample.versions is not None:
        versions = on_completion(sample.versions, np.int32)
    is_child = sample.parent != NO_PARENT
    keys = _keys_of(group.prompt, sample) if sample.grammar or sample.is_penalised else None
    turn_fields = group.turn_fields[index] if group.turn_fields else {}

    return Trajectory(
        tokens=np.concatenate([np.asarray(group.prompt, np.int32), np.asarray(sample.tokens, np.int32)]),
        # Overlong filtering leaves a truncated row in the statistics of its group, without gradient.
        action_mask=on_completion(sample.sampled & (not (is_truncated and plan.mask_truncated)), bool),
        behavior_logprobs=on_completion(sample.logprobs, np.float32),
        entropies=on_completion(sample.entropies, np.float32),
        turn_ids=on_completion(group.steps[index], np.int32),
        policy_version=versions,
        prompt_id=group.example.id,
        task_id=group.example.task_id,
        group_id=group_id,
        episode_id=first_row + (group.episodes[index] if group.episodes else index),
        reward=float(reward),
        is_valid=result.is_valid,
        is_truncated=is_truncated,
        source=group.source,
        parent_row=first_row + sample.parent if is_child else NO_PARENT,
        fork_index=prompt_length + sample.fork_index if is_child else 0,
        fork_score=float(sample.fork_score),
        intervention=sample.intervention,
        experts=_experts(sample, total),
        columns={column.name: _value(column, group, index, on_completion) for column in columns},
        token_keys=keys,
        grammar=sample.grammar,
        grammar_turns=prompt_length + np.array(sample.turn_spans, np.int32) if sample.grammar else None,
        drawn=on_completion(sample.drawn, bool) if sample.is_penalised else None,
        **{
            name: on_completion(values, values.dtype, _NO_STATE if name == "state_ids" else 0)
            for name, values in turn_fields.items()
        },
    )


def _experts(sample: Sample, total: int) -> np.ndarray | None:
    """The record of a sample for all tokens of its row, of which the last was never fed: -1 there."""
    if sample.experts is None:
        return None
    missing = np.full((total - len(sample.experts), *sample.experts.shape[1:]), -1, np.int16)
    return np.concatenate([sample.experts, missing])


def _keys_of(prompt: Sequence[int], sample: Sample) -> np.ndarray:
    """What tokens are compared by, int64 [T]: behind one prefix the distribution is another one in another grammar,
    where the turn begins elsewhere, and where a token was given that the other row has sampled."""
    ids = np.concatenate([np.asarray(prompt, np.int64), np.asarray(sample.tokens, np.int64)])
    of_completion = ids[len(prompt) :]
    drawn = sample.drawn
    for start, stop in sample.turn_spans:
        salt = f"{len(prompt) + start} {sample.grammar}".encode()
        own = int.from_bytes(hashlib.sha256(salt).digest()[:4], "big") >> 1
        of_completion[start:stop] += np.where(drawn[start:stop], (own + 1) << 31, 0)
    return ids


def allowed_in(
    trajectories: Sequence[Trajectory], grammars: Callable[[str], Grammar], tokens: np.ndarray
) -> Allowed | None:
    """The masks that the tokens [B, T] of a batch were drawn under, found anew by following the grammar of each row, of
    which `trajectories` are the first: anew in each of its turns."""
    which = np.full(np.shape(tokens), -1, np.int32)
    masks: dict[bytes, int] = {}
    for row, trajectory in enumerate(trajectories):
        if trajectory.grammar_turns is None:
            continue
        for start, stop in trajectory.grammar_turns.tolist():
            followed = grammars(trajectory.grammar).begin()
            for place in range(start, stop):
                mask = followed.allowed().tobytes()
                which[row, place] = masks.setdefault(mask, len(masks))
                followed.advance(trajectory.tokens[place : place + 1].tolist())
    if not masks:
        return None
    return Allowed(np.stack([np.frombuffer(mask, np.uint32) for mask in masks]), which)


def columns_of(plan: RolloutPlan, groups: Sequence[ScoredGroup]) -> list[Column]:
    """The columns that the plan declares and that some sample of the rollout has a value for. A method decides by the
    absence of a column that its signal does not exist here, so one that nothing fills stays away."""
    return [
        column
        for column in plan.columns
        if any(_find(column, group, index) is not None for group in groups for index in range(len(group.samples)))
    ]


def _find(column: Column, group: ScoredGroup, index: int) -> Any:
    """The value of a sample under the column's name, None for none: what the column itself marks; of each token where
    the rollout has it so and the column asks for it; else a component of the reward (environments add up the counts of
    their steps there); else a number of the data row."""
    if column.mark is not None:
        sample = group.samples[index]
        marks = np.zeros(len(sample.tokens), np.float32)
        marks[column.mark(sample.tokens, sample.sampled)] = 1
        return marks

    if column.per != "row" and group.signals and column.name in group.signals[index]:
        return group.signals[index][column.name]

    components = group.results[index].components
    if column.name in components:
        return components[column.name]
    value = group.example.columns.get(column.name)
    return value if isinstance(value, (bool, int, float)) else None


def _value(column: Column, group: ScoredGroup, index: int, on_completion: Any) -> Any:
    found = _find(column, group, index)
    if column.per == "row":
        return 0.0 if found is None else float(found)
    # A number of the whole row stands on all tokens that were sampled.
    on_tokens = np.where(group.samples[index].sampled, 0.0 if found is None else found, 0.0)
    return on_completion(on_tokens, np.float32)


def record_of(group: ScoredGroup, index: int, trajectory: Trajectory, step: int) -> dict[str, Any]:
    """A JSON-ready line of the rollout log. `columns` are those of the data row, the right answer among them."""
    sample = group.samples[index]
    result = group.results[index]
    record = {
        "step": step + 1,  # counted as the metrics count: by finished steps
        "prompt_id": group.example.id,
        "sample": index,
        "prompt": group.example.prompt,
        "completion": group.texts[index],
        "columns": _as_json(group.example.columns),
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
    if sample.top_tokens is not None and sample.top_logprobs is not None:
        pairs = zip(sample.top_tokens.tolist(), sample.top_logprobs.tolist(), strict=True)
        # Of each token (id, log-prob), the best first, without those that could not be sampled.
        record["top_logprobs"] = [
            [[token, round(value, 5)] for token, value in zip(*one, strict=True) if value > MASKED / 2] for one in pairs
        ]
    if sample.forced:
        record["forced"] = [list(span) for span in sample.forced]
    return record


def _as_json(value: Any) -> Any:
    """Keys as text, which JSON wants; values that it lacks are left to the writer."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return value
