"""What a rollout is to collect, as plain data, and the rules by which it forks."""

from rljax.plans.plan import (
    CriticPlan,
    ForkPlan,
    ForkPoint,
    ForkRule,
    Plan,
    has_signal,
    not_worse,
    soft_overlong_punishment,
)

__all__ = [
    "CriticPlan",
    "ForkPlan",
    "ForkPoint",
    "ForkRule",
    "Plan",
    "has_signal",
    "not_worse",
    "soft_overlong_punishment",
]
