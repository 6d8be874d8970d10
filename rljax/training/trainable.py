"""What of a model is trained, and what it stands on."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from rljax.types import TrainState


class Subtree(NamedTuple):
    """How params fall into a trainable part and a frozen base, and how they come together again.

    Both functions only sort leaves: nothing is copied, and trees of arrays, of `jax.ShapeDtypeStruct`s and of shardings
    all pass.
    """

    split: Callable[[Any], tuple[Any, Any]]
    """`split(params) -> (trainable, base)`, pytrees; `base` is None where all is trained."""

    merge: Callable[[Any, Any], Any]
    """`merge(trainable, base) -> params`, the inverse."""

    base_dtype: str | None = None
    """dtype that the base is kept in, such as `bfloat16`; None is that of the params."""


EVERYTHING = Subtree(split=lambda params: (params, None), merge=lambda trainable, base: trainable)
"""All weights are trained."""


def subtree_of(trains: Callable[[str], bool], *, base_dtype: str | None = None) -> Subtree:
    """Trains the weights whose path `trains` holds of, such as `layers/q`; the others are the base.

    Params are nested dicts. `split` raises ValueError when no path is chosen.
    """

    def split(params: Any) -> tuple[Any, Any]:
        trainable: dict[str, Any] = {}
        base: dict[str, Any] = {}
        paths = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            names = [key.key for key in path]
            paths.append("/".join(names))
            _set(trainable if trains(paths[-1]) else base, names, leaf)

        if not trainable:
            raise ValueError(f"no weight is chosen to be trained; the paths are {', '.join(paths)}")
        return trainable, base or None

    def merge(trainable: Any, base: Any) -> Any:
        return trainable if base is None else _merged(trainable, base)

    return Subtree(split, merge, base_dtype)


def policy_params(state: TrainState, subtree: Subtree = EVERYTHING) -> Any:
    """The weights of a state as the model takes them: to sample with, to score, to export."""
    return subtree.merge(state.trainable, state.base)


def reference_params(state: TrainState, subtree: Subtree = EVERYTHING) -> Any:
    """The reference's weights as the model takes them. The base is the policy's own. ValueError without a reference."""
    if state.ref_trainable is None:
        raise ValueError("the state has no reference params; build the learner with LossNeeds(reference=True)")
    return subtree.merge(state.ref_trainable, state.base)


def pushed_params(state: TrainState, subtree: Subtree = EVERYTHING) -> Any:
    """The weights that rollouts have, as the model takes them: those that were pushed last, or the policy's own where
    every step pushes."""
    return subtree.merge(state.trainable if state.pushed is None else state.pushed, state.base)


def _set(tree: dict[str, Any], names: list[str], leaf: Any) -> None:
    *parents, last = names
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = leaf


def _merged(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(left)
    for name, value in right.items():
        merged[name] = _merged(left[name], value) if name in left else value
    return merged
