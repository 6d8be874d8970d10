"""Prompts answered in one turn by engines in other processes, and scored by rewards on the text."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rljax.models import DecoderConfig, base_config, merged_params, save_hf
from rljax.parallel import require_one_process
from rljax.plans import RolloutPlan
from rljax.rollouts.actor import Decoder, ScoredGroup
from rljax.rollouts.config import ActorParts, make_rewards, stops_of
from rljax.rollouts.engines.config import EnginesConfig
from rljax.rollouts.engines.fleet import Export, Fleet
from rljax.rollouts.engines.remote_sampler import RemoteSampler, SamplingProbe
from rljax.rollouts.single_turn import PromptActor, playable_rows
from rljax.sampling import SamplingConfig
from rljax.settings import field
from rljax.tasks import Dataset, RewardConfig
from rljax.text import Tokenizer, render_prompt
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
        forks = plan.forks
        if forks is None:
            return
        if self.engine == "vllm":
            raise ValueError(
                "config.actor.engine='vllm' says no entropies and knows nothing of forks, which config.algorithm makes;"
                " serve with engine='rljax', or choose an algorithm without forks"
            )
        if forks.suppressed or forks.lagged_chains:
            what = "begin with other tokens than some" if forks.suppressed else "come from older weights"
            raise ValueError(f"forks that {what} are not served by engines; use config.actor=SingleTurn(...)")

    def build(self, parts: ActorParts) -> "RemoteActor":
        require_one_process("a run with config.actor=Remote(...)")
        rewards = make_rewards(self.rewards, parts)
        if rewards is None:
            raise ValueError(
                "config.actor.rewards is empty and the data has no verifier of its own; add e.g. "
                "rewards=(RewardConfig('my_rewards:correct'),)"
            )
        stops = stops_of(parts)
        new_tokens = parts.sampling.max_new_tokens
        probe = SamplingProbe(
            parts.decoder, self._probed(parts), parts.settings.sampling, stops, limit=new_tokens, mesh=parts.mesh
        )
        export = exporter(parts.decoder, parts.tokenizer, self.weights_dtype)
        fleet = Fleet(self, export, probe, bound=self.bound(parts.decoder.dtype))
        sampler = RemoteSampler(fleet, parts.decoder, stops, max_new_tokens=new_tokens)
        return RemoteActor(sampler, parts.tokenizer, rewards, parts.settings)

    def check_prompts(self, parts: ActorParts, pack_length: int) -> Dataset:
        def raised(longest: int) -> str:
            return f"raise config.actor.longest_prompt={self.longest_prompt} to at least {longest}"

        return playable_rows(parts, pack_length, self.longest_prompt, raised, drop=self.drop_long_prompts)

    def _probed(self, parts: ActorParts) -> list[list[int]]:
        """Ids of the first prompts that are no longer than allowed."""
        found: list[list[int]] = []
        for example in parts.dataset.train:
            prompt = render_prompt(parts.tokenizer, example.prompt, parts.settings.chat)
            if len(prompt) <= self.longest_prompt and prompt not in found:
                found.append(prompt)
            if len(found) == self.probes:
                break
        if not found:
            raise ValueError(f"no training prompt has at most config.actor.longest_prompt={self.longest_prompt} tokens")
        return found


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


def exporter(decoder: DecoderConfig, tokenizer: Tokenizer, dtype: str) -> Export:
    """Writes weights in `dtype`, adapters merged into them, with the tokenizer."""

    def export(folder: Path, params: Params) -> None:
        # In float32, and rounded once: what adapters add may be less than what a narrower weight can show.
        if decoder.lora is not None:
            params = merged_params(decoder, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params))
        cast = jax.tree.map(lambda x: x if x.dtype == dtype else jnp.asarray(x, dtype), params)
        save_hf(folder, base_config(decoder), cast, tokenizer=tokenizer)

    return export
