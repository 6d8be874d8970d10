"""What a recipe builds, and the checks that recipes share."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from rljax.advantages import AdvantageFn, group_normalized
from rljax.losses import (
    ComparedWith,
    Loss,
    PenaltyFn,
    SurrogateFn,
    clipped,
    compared_with,
    entropy_bonus,
    kl_penalty,
)
from rljax.plans import RolloutPlan

Encode = Callable[[str], list[int]]
"""Text to token ids."""


@runtime_checkable
class Vocabulary(Protocol):
    """What a method may ask of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Algorithm(NamedTuple):
    """A published method: what to collect, how to give credit, what to minimise.

    `bind(tokenizer)`, where a method speaks of words or of the vocabulary, gives the algorithm for a tokenizer; it
    raises ValueError for words that the tokenizer cannot encode.
    """

    plan: RolloutPlan
    advantage_fn: AdvantageFn
    loss: Loss
    bind: Callable[[Vocabulary], "Algorithm"] | None = None

    def compared_with(self) -> ComparedWith:
        """Which policies the loss compares the current one with (`rljax.losses.compared_with`)."""
        columns = {column.name: column.per != "row" for column in self.plan.columns}
        columns |= dict.fromkeys(self.plan.teacher_columns, True)
        return compared_with(self.loss, columns)


@dataclasses.dataclass
class Recipe:
    """What every recipe over independent samples has. A recipe's `build()` composes its `Algorithm` of these parts."""

    needs_group: ClassVar[bool] = True
    """Whether the samples of a prompt are each other's baseline; else one of each suffices."""

    group_size: int = 8
    """Samples of a prompt."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference model. 0 needs no reference."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    def check(self) -> None:
        """Raises ValueError for hyperparameters that cannot work."""
        if self.needs_group:
            check_group(self)
        check_at_least(self, 1, "group_size")
        check_at_least(self, 0, "kl_coef", "entropy_coef")

    def plan(self) -> RolloutPlan:
        """Groups of `group_size`, with a reference model where the KL counts."""
        return RolloutPlan(group_size=self.group_size, needs_ref=self.kl_coef > 0)

    def penalties(self) -> tuple[PenaltyFn, ...]:
        """The terms of the loss whose coefficient is above 0: KL (k3) and entropy bonus."""
        return kl_and_entropy(self.kl_coef, self.entropy_coef)

    def compose(self, advantage_fn: AdvantageFn, loss: Loss, plan: RolloutPlan | None = None) -> Algorithm:
        """The algorithm, after the checks; `plan` in place of the recipe's own."""
        self.check()
        return Algorithm(plan=self.plan() if plan is None else plan, advantage_fn=advantage_fn, loss=loss)


@dataclasses.dataclass
class GroupRecipe(Recipe):
    """GRPO's parts (2402.03300), which many methods keep: credit by the group, and the clipped surrogate.

    A = (R - mean) / (std + epsilon) of the group
    max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
    """

    clip_low: float = 0.2
    """How far below 1 a ratio keeps its gradient."""
    clip_high: float = 0.2
    """How far above 1 a ratio keeps its gradient."""
    epsilon: float = 1e-6
    """Added to the std of the group."""

    def check(self) -> None:
        super().check()
        check_clip(self)
        check_at_least(self, 0, "epsilon")

    def credit(self) -> AdvantageFn:
        """`group_normalized`, with this `epsilon`."""
        return group_normalized(epsilon=self.epsilon)

    def surrogate(self, dual_clip: float | None = None) -> SurrogateFn:
        """`clipped`, to this interval."""
        return clipped(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=dual_clip)


def encoded_phrases(encode: Encode, phrases: Sequence[str], what: str) -> list[list[int]]:
    """Token ids of `phrases`. ValueError for none, and for one without tokens."""
    if not phrases:
        raise ValueError(f"{what} has no phrases; give at least one")
    found = []
    for phrase in phrases:
        try:
            ids = list(encode(phrase))
        except ValueError as error:
            raise ValueError(f"{what}: the tokenizer cannot encode the phrase {phrase!r}: {error}") from None
        if not ids:
            raise ValueError(f"{what}: the phrase {phrase!r} has no tokens; choose another")
        found.append(ids)
    return found


def kl_and_entropy(kl_coef: float, entropy_coef: float) -> tuple[PenaltyFn, ...]:
    """The penalties with a coefficient above 0: k3 to the reference model, entropy bonus."""
    kl = (kl_penalty(kl_coef),) if kl_coef else ()
    return kl + ((entropy_bonus(entropy_coef),) if entropy_coef else ())


def check_group(recipe: Any) -> None:
    """Raises ValueError for a group that cannot serve as its own baseline."""
    if recipe.group_size < 2:
        raise ValueError(
            f"{type(recipe).__name__} compares the samples of a prompt, so group_size={recipe.group_size} must be at "
            "least 2; for one sample per prompt take Reinforce or ReinforcePlusPlus"
        )


def check_at_least(recipe: Any, minimum: float | int, *names: str) -> None:
    """Raises ValueError for a hyperparameter below `minimum`."""
    for name in names:
        value = getattr(recipe, name)
        if not value >= minimum:
            raise ValueError(f"{type(recipe).__name__}: {name}={value} must be at least {minimum:g}")


def check_clip(recipe: Any) -> None:
    """Raises ValueError for an impossible clip interval [1 - clip_low, 1 + clip_high], or dual clip inside it."""
    check_at_least(recipe, 0, "clip_low", "clip_high")
    name = type(recipe).__name__
    if recipe.clip_low > 1:
        raise ValueError(f"{name}: clip_low={recipe.clip_low} must be at most 1; ratios are positive")
    dual_clip = getattr(recipe, "dual_clip", None)
    if dual_clip is not None and not dual_clip > 1 + recipe.clip_high:
        raise ValueError(
            f"{name}: dual_clip={dual_clip} must be above 1 + clip_high = {1 + recipe.clip_high:g}; None is off"
        )
