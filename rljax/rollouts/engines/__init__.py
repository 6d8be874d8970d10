"""The policy in other processes: vLLM's protocol of token ids, both ends of it."""

from rljax.rollouts.engines.actor import Remote, RemoteActor
from rljax.rollouts.engines.client import EngineFailed
from rljax.rollouts.engines.scoring import ScoringEngines, TokenScores
from rljax.rollouts.engines.service import EngineService
from rljax.rollouts.engines.turns import RemoteBlackBox, RemoteMultiTurn

__all__ = [
    "EngineFailed",
    "EngineService",
    "Remote",
    "RemoteActor",
    "RemoteBlackBox",
    "RemoteMultiTurn",
    "ScoringEngines",
    "TokenScores",
]
