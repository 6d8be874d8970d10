"""Conversations spoken by engines in other processes: episodes in an environment, and agents behind an endpoint."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rljax.envs import EnvironmentPool
from rljax.plans import RolloutPlan
from rljax.rollouts.actor import RolloutSettings, ScoredGroup, TurnSource
from rljax.rollouts.black_box import BlackBox, BlackBoxActor, ChatEndpoint
from rljax.rollouts.black_box.actor import Agent
from rljax.rollouts.config import ActorParts, stops_of
from rljax.rollouts.engines.build import check_forks_served, fleet_of
from rljax.rollouts.engines.client import EngineFailed
from rljax.rollouts.engines.config import EnginesConfig
from rljax.rollouts.engines.remote_turns import RemoteTurnDecoder
from rljax.rollouts.multi_turn import MultiTurn, MultiTurnActor
from rljax.sampling import RowScorer, SamplingConfig, TurnDecoderSpec
from rljax.tasks import RewardRunner
from rljax.text import Dialogue
from rljax.types import Params


def decoder_over(
    config: EnginesConfig, parts: ActorParts, spec: TurnDecoderSpec, stop_strings: tuple[str, ...]
) -> RemoteTurnDecoder:
    """What decodes turns by engines, closed."""
    stops = stops_of(parts, stop_strings)
    longest = spec.context_length - spec.max_new_tokens
    return RemoteTurnDecoder(fleet_of(config, parts, stops, longest=longest), parts.decoder, spec, stops)


@dataclasses.dataclass
class RemoteMultiTurn(EnginesConfig, MultiTurn):
    """`MultiTurn` whose turns are said by engines in other processes that speak vLLM's protocol of token ids (`rljax
    serve`, vLLM). Engines need room for `context_length` tokens.

    Each turn is a request with the whole conversation. A step waits for the turns under way at its end, so that none is
    said by two weights; their episodes go on at the next step where there are `groups_in_flight`.
    """

    def check(self, plan: RolloutPlan, sampling: SamplingConfig, pack_length: int) -> None:
        self.check_engines()
        check_forks_served(self, plan)
        super().check(plan, sampling, pack_length)

    def turn_decoder(self, parts: ActorParts, *, groups_in_flight: int, stop_strings: tuple[str, ...]) -> TurnSource:
        return decoder_over(self, parts, self.turn_spec(parts, groups_in_flight), stop_strings)

    def actor_of(
        self,
        decoders: Sequence[TurnSource],
        pool: EnvironmentPool,
        dialogue: Dialogue,
        parts: ActorParts,
        scorer: RowScorer | None,
    ) -> MultiTurnActor:
        (decoder,) = decoders
        assert isinstance(decoder, RemoteTurnDecoder) and scorer is None
        return RemoteMultiTurnActor(decoder, pool, dialogue, parts.settings, self, batch=parts.groups)


class RemoteMultiTurnActor(MultiTurnActor):
    """A `MultiTurnActor` whose turns are said by engines. The `Actor` protocol says the rest."""

    def __init__(
        self,
        decoder: RemoteTurnDecoder,
        pool: EnvironmentPool,
        dialogue: Dialogue,
        settings: RolloutSettings,
        config: MultiTurn,
        *,
        batch: int,
    ):
        super().__init__([decoder], pool, dialogue, settings, config, batch=batch)
        self.decoder = decoder

    def __enter__(self) -> "RemoteMultiTurnActor":
        self.decoder.fleet.__enter__()
        try:
            super().__enter__()
        except BaseException:
            self.decoder.fleet.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.decoder.fleet.__exit__(*error)
            self.decoder.close()

    def ready(self, n: int) -> list[ScoredGroup]:
        """Raises EngineFailed for an engine that the run cannot go on with."""
        groups = super().ready(n)
        self.stats |= self.decoder.fleet.stats()
        return groups


@dataclasses.dataclass
class RemoteBlackBox(EnginesConfig, BlackBox):
    """`BlackBox` whose policy is engines in other processes that speak vLLM's protocol of token ids (`rljax serve`,
    vLLM). The agent speaks with this run's endpoint, which records, and the endpoint asks the engines. They need room
    for `context_length` tokens."""

    def check(self, plan: RolloutPlan, sampling: SamplingConfig, pack_length: int) -> None:
        self.check_engines()
        super().check(plan, sampling, pack_length)

    def turn_decoder(self, parts: ActorParts, *, groups_in_flight: int, stop_strings: tuple[str, ...]) -> TurnSource:
        return decoder_over(self, parts, self.turn_spec(parts, groups_in_flight), stop_strings)

    def actor_of(
        self, endpoint: ChatEndpoint, agent: Agent, rewards: RewardRunner | None, settings: RolloutSettings
    ) -> BlackBoxActor:
        return RemoteBlackBoxActor(endpoint, agent, rewards, settings, self)


class RemoteBlackBoxActor(BlackBoxActor):
    """A `BlackBoxActor` whose endpoint asks engines. The `Actor` protocol says the rest."""

    @property
    def _decoder(self) -> RemoteTurnDecoder:
        decoder = self.endpoint.decoder
        assert isinstance(decoder, RemoteTurnDecoder)
        return decoder

    def __enter__(self) -> "RemoteBlackBoxActor":
        self._decoder.fleet.__enter__()
        try:
            super().__enter__()
        except BaseException:
            self._decoder.fleet.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        # Engines first: the endpoint waits for turns under way, and those of engines that are given up end at once.
        try:
            self._decoder.fleet.__exit__(*error)
        finally:
            super().__exit__(*error)
            self._decoder.close()

    def set_params(self, params: Params, version: int) -> None:
        """Returns when every engine speaks with these weights. Raises EngineFailed where one cannot be brought to
        that."""
        super().set_params(params, version)

    def ready(self, n: int) -> list[ScoredGroup]:
        """Raises EngineFailed for an engine that the run cannot go on with."""
        try:
            groups = super().ready(n)
        except RuntimeError as error:
            # What failed is an engine and no decoder, and says itself what to do.
            if isinstance(error.__cause__, EngineFailed):
                raise error.__cause__ from None
            raise
        self.stats |= self._decoder.fleet.stats()
        return groups
