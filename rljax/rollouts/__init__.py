"""Rollouts: from prompts to scored trajectories, by whatever plays the policy."""

from rljax.rollouts.actor import Actor, GroupRequest, RolloutSettings, ScoredGroup, known_example, number_groups
from rljax.rollouts.black_box import BlackBox, BlackBoxActor, ChatEndpoint, EndpointConfig
from rljax.rollouts.collect import NoSignal, Rollout, collect, rejudged, seen_group
from rljax.rollouts.config import ActorConfig, ActorParts
from rljax.rollouts.engines import (
    EngineFailed,
    EngineService,
    Remote,
    RemoteActor,
    RemoteBlackBox,
    RemoteMultiTurn,
    ScoringEngines,
)
from rljax.rollouts.groups import GroupRules, GroupsConfig
from rljax.rollouts.guided import Guided, GuidedActor
from rljax.rollouts.multi_turn import MultiTurn, MultiTurnActor
from rljax.rollouts.schedule import RolloutConfig
from rljax.rollouts.shared import Shared
from rljax.rollouts.single_turn import SingleTurn, SingleTurnActor

__all__ = [
    "Actor",
    "ActorConfig",
    "ActorParts",
    "BlackBox",
    "BlackBoxActor",
    "ChatEndpoint",
    "EndpointConfig",
    "EngineFailed",
    "EngineService",
    "GroupRequest",
    "GroupRules",
    "GroupsConfig",
    "Guided",
    "GuidedActor",
    "MultiTurn",
    "MultiTurnActor",
    "NoSignal",
    "Remote",
    "RemoteActor",
    "RemoteBlackBox",
    "RemoteMultiTurn",
    "Rollout",
    "RolloutConfig",
    "RolloutSettings",
    "ScoredGroup",
    "ScoringEngines",
    "Shared",
    "SingleTurn",
    "SingleTurnActor",
    "collect",
    "known_example",
    "number_groups",
    "rejudged",
    "seen_group",
]
