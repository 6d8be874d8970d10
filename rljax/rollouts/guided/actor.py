"""Rollouts with as little guidance as it takes, where plain ones fail throughout (ActGuide-RL, 2605.12004). Host.

Training sees the plain prompt: a guided group keeps the tokens that were sampled and the log-probs of the prompt they
were sampled under, its `prompt` is the plain one, and its rows have the source `SOURCE_GUIDED`. Never guide an
evaluation.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from rljax.rollouts.collect import Scored, sample_and_score
from rljax.rollouts.guided.guidance import (
    FINAL_ACTIONS,
    MINIMAL_SEARCH,
    SearchRule,
    guided_prompt,
    reference_actions,
)
from rljax.tasks import Example
from rljax.tasks.examples import digest
from rljax.types import SOURCE_GUIDED

Play = Callable[[list[Example], int], list[Scored]]
"""(examples, samples of each) -> their groups, in order."""

QUOTES_PLAN = re.compile(r"\b(?:reference plan|the plan|(?:step|item) \d+ of the)\b", re.IGNORECASE)


class Guided(NamedTuple):
    """The groups of all examples, in order; the level of guidance of each (0: plain), whether that level had succeeded
    in the search, and metrics without prefix."""

    groups: list[Scored]
    levels: Int[np.ndarray, " N"]
    is_verified: Bool[np.ndarray, " N"]
    stats: dict[str, float]


def collect_guided(
    play: Play,
    examples: Sequence[Example],
    samples_each: int,
    *,
    column: str = "actions",
    probe_samples: int = 2,
    budget: int | None = None,
    threshold: float = 0.0,
    rule: SearchRule = MINIMAL_SEARCH,
    without: Sequence[str] = FINAL_ACTIONS,
) -> Guided:
    """Plays every example `samples_each` times. A hard one, whose best reward is at most `threshold` and whose column
    `column` has reference actions (`reference_actions`; those `without` are never shown), is searched by `rule` with
    `probe_samples` rollouts a probe and at most `budget` probes, all hard ones at once; then `samples_each` guided
    rollouts take the place of its failures. Rollouts of probes are thrown away: that one of them succeeded is why the
    level was chosen.

    Guided examples have ids of their own, so that no rollout repeats the random numbers of another. An example whose
    rollouts were all invalid is not hard. ValueError for reference actions that are none, and for
    guidance that an environment does not pass on.

    Stats: shares of groups that were hard and that are guided; of guided groups the shares solved and without signal,
    the mean level and its share of the plan, the share verified; probes per hard task; rollouts and sampled tokens of
    probes, and the tokens of the plain rollouts that were replaced; the share of guided texts that speak of a plan.
    """
    groups = play(list(examples), samples_each)
    actions = [reference_actions(e.columns.get(column) or (), without=without) for e in examples]
    hard = [i for i, group in enumerate(groups) if actions[i] and _fails(group, threshold)]
    levels, is_verified = np.zeros(len(examples), np.int32), np.zeros(len(examples), bool)
    replaced = [groups[i] for i in hard]
    probes: list[Scored] = []
    search = None
    if hard:
        search = rule.begin(np.array([len(actions[i]) for i in hard], np.int32), budget)
        while (step := rule.next_probe(search))[1].any():
            chosen = [(i, int(level)) for i, level, is_active in zip(hard, *step, strict=True) if is_active]
            played = play([_guide(examples[i], actions[i], level, "probe") for i, level in chosen], probe_samples)
            success = np.zeros(len(hard), bool)
            success[step[1]] = [_succeeds(group, threshold) for group in played]
            search = rule.update_probe(search, success)
            probes += played
        levels[hard], is_verified[hard] = rule.found(search)
        guided = play([_guide(examples[i], actions[i], int(levels[i]), "guided") for i in hard], samples_each)
        for i, group in zip(hard, guided, strict=True):
            groups[i] = _unguided(group, groups[i], int(levels[i]))
    lengths = np.array([len(a) for a in actions], np.int32)
    stats = _stats(groups, levels, is_verified, lengths, hard, threshold)
    stats |= {
        "probes_per_hard_task": float(search.probes.mean()) if search else 0.0,
        "probe_rollouts": float(sum(len(group.samples) for group in probes)),
        "probe_tokens": _tokens(probes),
        "replaced_tokens": _tokens(replaced),
    }
    return Guided(groups, levels, is_verified, stats)


def _guide(example: Example, actions: Sequence[dict[str, Any]], level: int, purpose: str) -> Example:
    return replace(
        example,
        prompt=guided_prompt(example.prompt, actions, level),
        id=digest([example.id, level, purpose]) >> 97,
    )


def _unguided(guided: Scored, plain: Scored, level: int) -> Scored:
    """The guided samples behind the plain prompt. Raises ValueError if they had read nothing else than that."""
    if not level:
        return guided._replace(example=plain.example)
    if _values(guided) and list(guided.prompt) == list(plain.prompt):
        raise ValueError(
            f"the guidance of example {plain.example.id} did not reach the policy: what it read is the plain prompt; "
            "let the environment's reset return the column prompt of its row"
        )
    told = guided.turn_fields or [{}] * len(guided.samples)
    fields = [{**fields, "source": SOURCE_GUIDED} for fields in told]
    return guided._replace(example=plain.example, prompt=plain.prompt, turn_fields=fields)


def _values(group: Scored) -> list[float]:
    return [result.value for result in group.results if result.is_valid]


def _succeeds(group: Scored, threshold: float) -> bool:
    return any(value > threshold for value in _values(group))


def _fails(group: Scored, threshold: float) -> bool:
    return bool(_values(group)) and not _succeeds(group, threshold)


def _tokens(groups: Sequence[Scored]) -> float:
    return float(sum(sample.sampled.sum() for group in groups for sample in group.samples))


def _stats(
    groups: Sequence[Scored],
    levels: np.ndarray,
    is_verified: np.ndarray,
    lengths: np.ndarray,
    hard: Sequence[int],
    threshold: float,
) -> dict[str, float]:
    is_guided = levels > 0
    guided = [group for group, level in zip(groups, levels, strict=True) if level]
    texts = [text for group in guided for text in group.texts]
    flat = [len(set(_values(group))) < 2 for group in guided]

    def mean(values: Any) -> float:
        return float(np.mean(values)) if len(values) else 0.0

    return {
        "guided_share": mean(is_guided),
        "hard_share": len(hard) / max(len(groups), 1),
        "solved_with_guidance": mean([_succeeds(group, threshold) for group in guided]),
        "guided_no_signal_share": mean(flat),
        "guidance_level_mean": mean(levels[is_guided]),
        "guidance_share_of_plan": mean(levels[is_guided] / np.maximum(lengths[is_guided], 1)),
        "guidance_verified_share": mean(is_verified[is_guided]),
        "quotes_plan_share": mean([bool(QUOTES_PLAN.search(text)) for text in texts]),
    }


class GuidedPlayer:
    """`collect_guided` with these `options`, as a way to collect: `plain` is called as `sample_and_score` is."""

    def __init__(self, plain: Callable[..., list[Scored]] = sample_and_score, **options: Any):
        self._plain, self._options = plain, options
        self.last_stats: dict[str, float] = {}

    def missing(self, num_groups: int) -> int:
        return num_groups

    def __call__(
        self, examples: Sequence[Example], samples_each: int, *, num_groups: int | None = None, **setup: Any
    ) -> list[Scored]:
        found = collect_guided(
            lambda chosen, each: self._plain(chosen, each, **setup), examples, samples_each, **self._options
        )
        self.last_stats = found.stats
        return found.groups
