"""Prompts answered in one turn by engines in other processes, and scored by rewards on the text."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rljax.plans import RolloutPlan
from rljax.rollouts.actor import Actor, Decoder, ScoredGroup
from rljax.rollouts.config import ActorParts, make_rewards, stops_of
from rljax.rollouts.engines.build import check_forks_served, fleet_of
from rljax.rollouts.engines.config import EnginesConfig
from rljax.rollouts.engines.remote_sampler import RemoteSampler
from rljax.rollouts.single_turn import PromptActor, playable_rows
from rljax.sampling import SamplingConfig
from rljax.settings import field
from rljax.tasks import Dataset, RewardConfig
from rljax.types import Params


@dataclasses.dataclass
class Remote(EnginesConfig):
    """Prompts are answered in one turn, by engines in other processes that speak vLLM's protocol of token ids
    (`rljax serve`, vLLM); rewards score the text."""

    rewards: tuple[RewardConfig, ...] = ()
    """What a completion is worth; several add up by weight. Empty takes the verifier that comes with the data."""
    longest_prompt: int = field(default=512, least=1)
    """Tokens of the longest prompt."""
    drop_long_prompts: bool = False
    """Whether rows whose prompt is longer are left out of training and evaluation, with a line that says how many. Else
    they end the start, and the first of them is named."""

    @property
    def off_policy(self) -> str:
        return ""

    def check(self, plan: RolloutPlan, sampling: SamplingConfig, pack_length: int) -> None:
        self.check_engines()
        check_forks_served(self, plan)

    def build(self, parts: ActorParts) -> Actor:
        parts.refuse_in_step("engines")
        rewards = make_rewards(self.rewards, parts)
        if rewards is None:
            raise ValueError(
                "config.actor.rewards is empty and the data has no verifier of its own; add e.g. "
                "rewards=(RewardConfig('my_rewards:correct'),)"
            )
        stops = stops_of(parts)
        new_tokens = parts.sampling.max_new_tokens
        fleet = fleet_of(self, parts, stops, longest=self.longest_prompt)
        sampler = RemoteSampler(fleet, parts.decoder, stops, max_new_tokens=new_tokens)
        return parts.shared(RemoteActor(sampler, parts.tokenizer, rewards, parts.settings))

    def check_prompts(self, parts: ActorParts, pack_length: int) -> Dataset:
        def raised(longest: int) -> str:
            return f"raise config.actor.longest_prompt={self.longest_prompt} to at least {longest}"

        return playable_rows(parts, pack_length, self.longest_prompt, raised, drop=self.drop_long_prompts)


class RemoteActor(PromptActor):
    """A `PromptActor` whose sampler is engines. The `Actor` protocol says the rest."""

    sampler: RemoteSampler

    def __enter__(self) -> "RemoteActor":
        # Engines first: what they need may be missing, and then no process of a reward is left behind.
        self.sampler.fleet.__enter__()
        try:
            super().__enter__()
        except BaseException:
            self.sampler.fleet.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.sampler.fleet.__exit__(*error)

    def set_params(self, params: Params, version: int) -> None:
        """Returns when every engine speaks with these weights. Raises EngineFailed where one cannot be brought to
        that."""
        self.sampler.fleet.hand_over(params, version)

    def ready(self, n: int) -> list[ScoredGroup]:
        """Raises EngineFailed for an engine that the run cannot go on with."""
        groups = super().ready(n)
        self.stats = self.sampler.fleet.stats()
        return groups

    @property
    def decoders(self) -> Sequence[Decoder]:
        """None here: the engines' memory is their own."""
        return ()

    def cache_bytes(self) -> int:
        return 0

    def longest_row(self, prompt_length: int) -> int:
        return prompt_length + self.sampler.max_new_tokens
