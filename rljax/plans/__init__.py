"""What a rollout is to collect, as plain data, and the rules by which it forks."""

from rljax.plans.plan import (
    NEWEST_LOGPROBS,
    Column,
    CriticSpec,
    ForkPlan,
    ForkPoint,
    ForkRule,
    RolloutPlan,
    TeacherSpec,
    has_signal,
    not_worse,
    soft_overlong_punishment,
)

__all__ = [
    "NEWEST_LOGPROBS",
    "Column",
    "CriticSpec",
    "ForkPlan",
    "ForkPoint",
    "ForkRule",
    "RolloutPlan",
    "TeacherSpec",
    "has_signal",
    "not_worse",
    "soft_overlong_punishment",
]
