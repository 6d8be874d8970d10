"""What a rollout is to collect, as plain data, and the rules by which it forks."""

from rljax.plans.plan import (
    Column,
    CriticSpec,
    ForkPlan,
    ForkPoint,
    ForkRule,
    RolloutPlan,
    has_signal,
    not_worse,
    soft_overlong_punishment,
)

__all__ = [
    "Column",
    "CriticSpec",
    "ForkPlan",
    "ForkPoint",
    "ForkRule",
    "RolloutPlan",
    "has_signal",
    "not_worse",
    "soft_overlong_punishment",
]
