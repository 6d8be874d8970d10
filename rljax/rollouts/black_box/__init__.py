"""Agents that cannot be changed: they speak with the policy through an endpoint in OpenAI's manner."""

from rljax.rollouts.black_box.actor import BlackBox, BlackBoxActor
from rljax.rollouts.black_box.address import EndpointConfig
from rljax.rollouts.black_box.endpoint import ChatEndpoint
from rljax.rollouts.black_box.folding import FoldingAgent, folded

__all__ = ["BlackBox", "BlackBoxActor", "ChatEndpoint", "EndpointConfig", "FoldingAgent", "folded"]
