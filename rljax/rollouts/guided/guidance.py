"""Guidance from recorded actions, and the search for the shortest that helps (ActGuide-RL, 2605.12004). Host, numpy.

A task has `L` reference actions; guidance of level `k` shows the first `k` of them, level 0 is the plain prompt. The
search assumes that more guidance never does worse; where it does, it finds a longer one than needed.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from rljax.tasks.examples import Prompt, with_paragraph

HEADING = (
    "Reference plan. It may be incomplete, further calls may be necessary, and you may do otherwise. "
    "Think and act in your own words."
)
FINAL_ACTIONS = ("answer", "finish")
REVEALING_ARGUMENTS = ("goal",)


def reference_actions(
    actions: Sequence[Any],
    *,
    without: Collection[str] = FINAL_ACTIONS,
    without_arguments: Collection[str] = REVEALING_ARGUMENTS,
) -> list[dict[str, Any]]:
    """Recorded actions, each a mapping with a `name` and `arguments`, as guidance may show them: the actions `without`
    (they hold the answer) and the arguments `without_arguments` (they tell what for) left out.

    Raises ValueError for anything else than such mappings.
    """
    kept = []
    for i, action in enumerate(actions):
        name = action.get("name") if isinstance(action, Mapping) else None
        arguments = action.get("arguments", {}) if isinstance(action, Mapping) else None
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise ValueError(f"action {i} is {action!r:.100}; it must have a text as name and a mapping as arguments")

        if name not in without:
            shown = {k: v for k, v in arguments.items() if k not in without_arguments}
            kept.append({"name": name, "arguments": shown})
    return kept


def guidance_text(actions: Sequence[Mapping[str, Any]], k: int) -> str:
    """The first `k` actions as an advisory plan, a line `i. name: arguments as JSON` for each; empty for `k` 0. A text
    is the beginning of that of a larger `k`. Raises ValueError unless 0 <= k <= number of actions."""
    if not 0 <= k <= len(actions):
        raise ValueError(f"k={k} actions of guidance must be from 0 to {len(actions)}, the actions that there are")
    lines = [
        f"{i}. {action['name']}: {json.dumps(action.get('arguments', {}), ensure_ascii=False)}"
        for i, action in enumerate(actions[:k], 1)
    ]
    return "\n".join([HEADING, *lines]) if lines else ""


def guided_prompt(prompt: Prompt, actions: Sequence[Mapping[str, Any]], k: int) -> Prompt:
    """`prompt` with `guidance_text` as a last paragraph of its last user message, or of the text; the very prompt for
    `k` 0. Raises ValueError for messages without a user message of text."""
    return with_paragraph(prompt, guidance_text(actions, k))


class GuidanceSearch(NamedTuple):
    """A binary search over levels for each of N tasks at once. `best` is the lowest level that was seen to succeed, -1
    for none yet; `probes` counts those made, `budget` those allowed."""

    lo: Int[np.ndarray, " N"]
    hi: Int[np.ndarray, " N"]
    best: Int[np.ndarray, " N"]
    probes: Int[np.ndarray, " N"]
    budget: Int[np.ndarray, " N"]
    length: Int[np.ndarray, " N"]


class Found(NamedTuple):
    """The chosen level of each task, and whether that very level was seen to succeed."""

    level: Int[np.ndarray, " N"]
    is_verified: Bool[np.ndarray, " N"]


class SearchRule(NamedTuple):
    """How a search goes: `begin(lengths, budget)`, then `next_probe(state)` -> (levels [N], whether there is one [N])
    and `update_probe(state, success [N])` in turns until no task has a probe, and `found(state)`."""

    begin: Callable[..., GuidanceSearch]
    next_probe: Callable[[GuidanceSearch], tuple[np.ndarray, np.ndarray]]
    update_probe: Callable[[GuidanceSearch, np.ndarray], GuidanceSearch]
    found: Callable[[GuidanceSearch], Found]


def begin_search(lengths: Int[np.ndarray, " N"], budget: int | None = None) -> GuidanceSearch:
    """Searches levels 1 to `lengths`; level 0 has failed already. `budget` None is enough to finish:
    `floor(log2 L) + 1`."""
    return _begin(lengths, 1, budget)


def next_probe(state: GuidanceSearch) -> tuple[Int[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """The level to try for each task, and whether the search of it still wants to."""
    return (state.lo + state.hi) // 2, (state.lo <= state.hi) & (state.probes < state.budget)


def update_probe(state: GuidanceSearch, success: Bool[np.ndarray, " N"]) -> GuidanceSearch:
    """What the probes of `next_probe` say: `success[i]` if any rollout of task i succeeded. Tasks without a probe stay
    as they are."""
    level, is_active = next_probe(state)
    return _update(state, level, is_active, np.asarray(success, bool), level - 1)


def found(state: GuidanceSearch) -> Found:
    """The lowest level that succeeded, or else all actions, unverified."""
    is_verified = state.best >= 0
    return Found(np.where(is_verified, state.best, state.length), is_verified)


MINIMAL_SEARCH = SearchRule(begin_search, next_probe, update_probe, found)
"""What it returns was seen to work, wherever anything did."""


def begin_released(lengths: Int[np.ndarray, " N"], budget: int | None = 5) -> GuidanceSearch:
    """The search of the release, over levels from 0, which spends probes on the plain prompt."""
    return _begin(lengths, 0, budget)


def next_released(state: GuidanceSearch) -> tuple[Int[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """As `next_probe`, up to the last level but one."""
    return (state.lo + state.hi) // 2, (state.lo < state.hi) & (state.probes < state.budget)


def update_released(state: GuidanceSearch, success: Bool[np.ndarray, " N"]) -> GuidanceSearch:
    """As `update_probe`."""
    level, is_active = next_released(state)
    return _update(state, level, is_active, np.asarray(success, bool), level)


def found_released(state: GuidanceSearch) -> Found:
    """The lower bound, tried or not: with the budget spent it may be 0."""
    level = np.clip(state.lo, 0, state.length)
    return Found(level, (state.best >= 0) & (state.best == level))


RELEASED_SEARCH = SearchRule(begin_released, next_released, update_released, found_released)
"""As published, for comparison: it may return a level that was not tried, even 0."""


def _begin(lengths: np.ndarray, lowest: int, budget: int | None) -> GuidanceSearch:
    lengths = np.asarray(lengths, np.int32)
    if (lengths < 1).any():
        raise ValueError(f"a task of {int(lengths.min())} reference actions cannot be guided; leave it out")
    if budget is not None and budget < 1:
        raise ValueError(f"a probe budget of {budget} finds nothing; it must be at least 1, or None for enough")

    enough = np.frexp(lengths)[1].astype(np.int32)  # the number of binary digits of L
    nothing = np.zeros(lengths.shape, np.int32)
    allowed = enough + (lowest == 0) if budget is None else nothing + np.int32(budget)
    return GuidanceSearch(nothing + np.int32(lowest), lengths, nothing - 1, nothing, allowed, lengths)


def _update(
    state: GuidanceSearch, level: np.ndarray, is_active: np.ndarray, success: np.ndarray, below: np.ndarray
) -> GuidanceSearch:
    worked = is_active & success
    failed = is_active & ~success
    return state._replace(
        lo=np.where(failed, level + 1, state.lo),
        hi=np.where(worked, below, state.hi),
        best=np.where(worked, level, state.best),
        probes=state.probes + is_active.astype(np.int32),
    )
