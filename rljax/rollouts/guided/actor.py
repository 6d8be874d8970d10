"""Rollouts with as little guidance as it takes, where plain ones fail throughout (ActGuide-RL, 2605.12004). Host.

Training sees the plain prompt: a guided group keeps the tokens that were sampled and the log-probs of the prompt they
were sampled under, its `prompt` is the plain one, and its rows have the source `SOURCE_GUIDED`. Never guide an
evaluation.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from rljax.plans import RolloutPlan
from rljax.rollouts.actor import Actor, Decoder, ScoredGroup, number_groups
from rljax.rollouts.config import ActorParts
from rljax.rollouts.engines import Remote
from rljax.rollouts.guided.guidance import (
    FINAL_ACTIONS,
    MINIMAL_SEARCH,
    SearchRule,
    guided_prompt,
    reference_actions,
)
from rljax.rollouts.multi_turn import MultiTurn
from rljax.rollouts.orders import Order, QueuedActor
from rljax.rollouts.single_turn import SingleTurn
from rljax.sampling import SamplingConfig, SamplingParams
from rljax.tasks import Dataset, Example
from rljax.tasks.examples import digest
from rljax.types import SOURCE_GUIDED, Params

PlayGroups = Callable[[list[Example], int], list[ScoredGroup]]
"""(examples, samples of each) -> their groups, in order."""

QUOTES_PLAN = re.compile(r"\b(?:reference plan|the plan|(?:step|item) \d+ of the)\b", re.IGNORECASE)


@dataclasses.dataclass
class Guided:
    """Guided rollouts where plain ones all fail (ActGuide-RL, 2605.12004; `rljax.rollouts.guided`)."""

    actor: SingleTurn | MultiTurn | Remote = dataclasses.field(default_factory=SingleTurn)
    """How plain and guided rollouts are made."""
    column: str = "actions"
    """Column of the data that holds reference actions."""
    probes: int = 2
    """Rollouts that try a level of guidance."""
    budget: int = 0
    """Most levels that are tried for an example; 0 is as many as the search needs."""
    threshold: float = 0.0
    """An example is hard if its best reward is at most this."""

    @property
    def off_policy(self) -> str:
        # Guided rows were sampled under a prompt that the trained policy does not see.
        return "config.actor=Guided(...)"

    def check(self, plan: RolloutPlan, sampling: SamplingConfig, pack_length: int) -> None:
        if plan.forks is not None:
            raise ValueError(
                "config.actor=Guided(...) and an algorithm that forks do not go together; leave one of them out"
            )

        if self.probes < 1 or self.budget < 0:
            raise ValueError(
                f"config.actor.probes={self.probes} must be at least 1 and budget={self.budget} at least 0"
            )
        if not self.column:
            raise ValueError("config.actor.column is empty; name the column of the data that holds reference actions")

        # Probes and guided rollouts are groups of a size of their own, which no later step could use.
        if isinstance(self.actor, MultiTurn) and self.actor.groups_in_flight:
            raise ValueError(
                f"config.actor.actor.groups_in_flight={self.actor.groups_in_flight} and guidance exclude each other; "
                "set it to 0"
            )

        # Guided rows are trained without the guidance, and a record says how they were computed with it.
        if isinstance(self.actor, SingleTurn) and self.actor.record_experts:
            raise ValueError("config.actor.actor.record_experts=True and guidance exclude each other; set it to False")

        self.actor.check(plan, sampling, pack_length)

    def build(self, parts: ActorParts) -> "GuidedActor":
        return GuidedActor(self.actor.build(parts), self)

    def check_prompts(self, parts: ActorParts, pack_length: int) -> Dataset:
        return self.actor.check_prompts(parts, pack_length)


class GuidedGroups(NamedTuple):
    """The groups of all examples, in order; the level of guidance of each (0: plain), whether that level had succeeded
    in the search, and metrics without prefix."""

    groups: list[ScoredGroup]
    levels: Int[np.ndarray, " N"]
    is_verified: Bool[np.ndarray, " N"]
    stats: dict[str, float]


def collect_guided(
    play: PlayGroups,
    examples: Sequence[Example],
    samples_each: int,
    config: Guided,
    *,
    rule: SearchRule = MINIMAL_SEARCH,
    without: Sequence[str] = FINAL_ACTIONS,
) -> GuidedGroups:
    """Plays every example `samples_each` times. A hard one, whose best reward is at most `config.threshold` and whose
    column `config.column` has reference actions (`reference_actions`; those `without` are never shown), is searched by
    `rule` with `config.probes` rollouts a probe and at most `config.budget` probes, all hard ones at once; then
    `samples_each` guided rollouts take the place of its failures. Rollouts of probes are thrown away: that one of them
    succeeded is why the level was chosen.

    Guided examples have ids of their own, so that no rollout repeats the random numbers of another. An example whose
    rollouts were all invalid is not hard. ValueError for reference actions that are none, and for
    guidance that an environment does not pass on.

    Stats: shares of groups that were hard and that are guided; of guided groups the shares solved and without signal,
    the mean level and its share of the plan, the share verified; probes per hard task; rollouts and sampled tokens of
    probes, and the tokens of the plain rollouts that were replaced; the share of guided texts that speak of a plan.
    """
    groups = play(list(examples), samples_each)
    actions = [reference_actions(e.columns.get(config.column) or (), without=without) for e in examples]
    hard = [i for i, group in enumerate(groups) if actions[i] and _fails(group, config.threshold)]
    levels = np.zeros(len(examples), np.int32)
    is_verified = np.zeros(len(examples), bool)
    replaced = [groups[i] for i in hard]
    probes: list[ScoredGroup] = []
    search = None

    if hard:
        search = rule.begin(np.array([len(actions[i]) for i in hard], np.int32), config.budget or None)

        # All hard examples are probed in one call, or each level of the search would decode a handful of rows.
        while True:
            probed, is_active = rule.next_probe(search)
            if not is_active.any():
                break
            chosen = [(i, int(level)) for i, level, is_on in zip(hard, probed, is_active, strict=True) if is_on]
            played = play([_guide(examples[i], actions[i], level, "probe") for i, level in chosen], config.probes)
            success = np.zeros(len(hard), bool)
            success[is_active] = [_succeeds(group, config.threshold) for group in played]
            search = rule.update_probe(search, success)
            probes += played

        # Played anew: rollouts of the probes are there because they succeeded, which would bias the group.
        level, was_seen = rule.found(search)
        levels[hard] = level
        is_verified[hard] = was_seen
        guided = play([_guide(examples[i], actions[i], int(levels[i]), "guided") for i in hard], samples_each)
        for i, group in zip(hard, guided, strict=True):
            groups[i] = _unguided(group, groups[i], int(levels[i]))

    lengths = np.array([len(a) for a in actions], np.int32)
    stats = _stats(groups, levels, is_verified, lengths, hard, config.threshold)
    stats |= {
        "probes_per_hard_task": float(search.probes.mean()) if search else 0.0,
        "probe_rollouts": float(sum(len(group.samples) for group in probes)),
        "probe_tokens": _tokens(probes),
        "replaced_tokens": _tokens(replaced),
    }
    return GuidedGroups(groups, levels, is_verified, stats)


def _guide(example: Example, actions: Sequence[dict[str, Any]], level: int, purpose: str) -> Example:
    # The id names the random numbers, so every level and purpose has its own. An id has 31 of the digest's 128 bits.
    return replace(
        example,
        prompt=guided_prompt(example.prompt, actions, level),
        id=digest([example.id, level, purpose]) >> 97,
    )


def _unguided(guided: ScoredGroup, plain: ScoredGroup, level: int) -> ScoredGroup:
    """The guided samples behind the plain prompt. Raises ValueError if they had read nothing else than that."""
    if not level:
        return guided._replace(example=plain.example)
    if _values(guided) and list(guided.prompt) == list(plain.prompt):
        raise ValueError(
            f"the guidance of example {plain.example.id} did not reach the policy: what it read is the plain prompt; "
            "let the environment's reset return the column prompt of its row"
        )
    return guided._replace(example=plain.example, prompt=plain.prompt, source=SOURCE_GUIDED)


def _values(group: ScoredGroup) -> list[float]:
    return [result.value for result in group.results if result.is_valid]


def _succeeds(group: ScoredGroup, threshold: float) -> bool:
    return any(value > threshold for value in _values(group))


def _fails(group: ScoredGroup, threshold: float) -> bool:
    return bool(_values(group)) and not _succeeds(group, threshold)


def _tokens(groups: Sequence[ScoredGroup]) -> float:
    return float(sum(sample.sampled.sum() for group in groups for sample in group.samples))


def _stats(
    groups: Sequence[ScoredGroup],
    levels: np.ndarray,
    is_verified: np.ndarray,
    lengths: np.ndarray,
    hard: Sequence[int],
    threshold: float,
) -> dict[str, float]:
    # Over guided groups, not hard ones: the released search may settle on level 0, which is the plain prompt.
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


class GuidedActor(QueuedActor):
    """`collect_guided` around another actor, whose groups must not outlive a call. Evaluations are never guided."""

    def __init__(self, plain: Actor, config: Guided):
        super().__init__()
        self.plain = plain
        self.config = config

    def __enter__(self) -> "GuidedActor":
        self.plain.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.plain.__exit__(*error)

    def set_params(self, params: Params, version: int) -> None:
        self.plain.set_params(params, version)

    def for_evaluation(self, sampling: SamplingParams) -> Actor:
        return self.plain.for_evaluation(sampling)

    @property
    def decoders(self) -> Sequence[Decoder]:
        return self.plain.decoders

    @property
    def resting(self) -> Sequence[Decoder]:
        return self.plain.resting

    def cache_bytes(self) -> int:
        return self.plain.cache_bytes()

    def longest_row(self, prompt_length: int) -> int:
        return self.plain.longest_row(prompt_length)

    def older(self, version: int) -> int:
        return self.plain.older(version)

    def checkpointed(self) -> None:
        self.plain.checkpointed()

    def ready(self, n: int) -> list[ScoredGroup]:
        self.seconds = {}
        return [group for order in self._orders.take(n) for group in self._play(order)]

    def _play(self, order: Order) -> list[ScoredGroup]:
        seen: dict[int, int] = {}  # of guided examples, which have ids of their own
        plain_requests = [order.requests]

        def play(examples: list[Example], samples_each: int) -> list[ScoredGroup]:
            # The first call is for the plain examples, which were numbered when they were asked for.
            requests = plain_requests.pop() if plain_requests else number_groups(examples, samples_each, seen)
            self.plain.submit(requests, order.plan._replace(group_size=samples_each), order.step)
            groups = self.plain.ready(len(requests))

            # Seconds of an actor are those of its last call, and this one makes several.
            for phase, spent in self.plain.seconds.items():
                self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
            return groups

        examples = [request.example for request in order.requests]
        found = collect_guided(play, examples, order.plan.group_size, self.config)
        self.stats = found.stats
        return found.groups
