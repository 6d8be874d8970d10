"""What a recipe builds, and the checks that recipes share."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rljax.advantages import AdvantageFn
from rljax.losses import Loss, PenaltyFn, entropy_bonus, kl_penalty
from rljax.plans import RolloutPlan

Encode = Callable[[str], list[int]]
"""Text to token ids."""


class Algorithm(NamedTuple):
    """A published method: what to collect, how to give credit, what to minimise.

    `bind(encode, vocab_size)`, where a method speaks of words or of the vocabulary, gives the algorithm for a
    tokenizer; it raises ValueError for words that the tokenizer cannot encode.
    """

    plan: RolloutPlan
    advantage_fn: AdvantageFn
    loss: Loss
    bind: Callable[[Encode, int], "Algorithm"] | None = None


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
