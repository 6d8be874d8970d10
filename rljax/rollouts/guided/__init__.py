"""Rollouts with as little guidance as it takes, where plain ones fail throughout (ActGuide-RL, 2605.12004)."""

from rljax.rollouts.guided.actor import Guided, GuidedActor, GuidedGroups, collect_guided

__all__ = ["Guided", "GuidedActor", "GuidedGroups", "collect_guided"]
