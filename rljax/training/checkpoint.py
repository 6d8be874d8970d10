"""Checkpoints that survive a kill at any moment, and that are known to be whole before they are used."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import Array

from rljax.parallel import barrier, gather, is_main_process
from rljax.types import TrainState

UNREADABLE = "unreadable"
"""Checkpoints skipped for an older one go to `<folder>_unreadable/`."""


class Checkpointer:
    """Asynchronous checkpoints in `folder`, one subfolder a step.

    The newest `keep_last` stay, and the `keep_best` with the highest `best_metric`; older ones go when the next save
    begins, so that one finished checkpoint is there at any time. What an interrupted save left is removed at start.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        best_metric: str = "rollout/reward_mean",
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last={keep_last} must be at least 1 and keep_best={keep_best} at least 0")
        self.folder = Path(folder).absolute()
        self.keep_last, self.keep_best, self.best_metric = keep_last, keep_best, best_metric
        if is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
        barrier("checkpoint folder")
        self._open()

    def _open(self) -> None:
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True, cleanup_tmp_directories=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "host": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    @property
    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: TrainState, host_state: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Begins to save; returns when `state` may be donated. `host_state` must be JSON. Waits for the save before."""
        self._manager.wait_until_finished()
        self._thin_out()
        host = {
            "step": step,
            "host": dict(host_state),
            "fingerprint": fingerprint(state),
            "score": None if metrics is None else _finite(metrics.get(self.best_metric)),
        }
        json.dumps(host, allow_nan=False)  # raises here, not in the writing thread
        args = ocp.args.Composite(state=ocp.args.StandardSave(_fields(state)), host=ocp.args.JsonSave(host))
        self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Returns when what was saved is on disk; raises what the writing thread raised."""
        self._manager.wait_until_finished()
        self._thin_out()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def restore(self, target: TrainState) -> tuple[TrainState, dict[str, Any], int] | None:
        """(state, host state, step) of the newest checkpoint that is whole; None when there is none at all.

        `target` is a `TrainState` of `jax.ShapeDtypeStruct`s with the shardings to restore onto; they need not be those
        of the save. A checkpoint that cannot be read, or whose arrays are not bit for bit what was saved, is logged,
        set aside in `<folder>_unreadable/`, and the one before it used. Raises ValueError when there are checkpoints
        but none fits: then nothing is set aside, since the reason may be a changed model or optimizer.
        """
        failures: dict[int, str] = {}
        for step in reversed(self.steps):
            result, why = None, ""
            try:
                result = self._restore_step(step, target)
            except Exception as error:  # whatever a broken file makes the readers raise
                why = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error) else ''}"
            reasons = [reason for reason in gather(why) if reason]
            if not reasons and result is not None:
                self._set_aside(list(failures))
                return result
            failures[step] = reasons[0]
            logging.warning("checkpoint %s cannot be used (%s); trying the one before", self.folder / str(step), why)
        if failures:
            listed = "; ".join(f"step {step}: {reason}" for step, reason in failures.items())
            raise ValueError(
                f"no checkpoint in {self.folder} can be used ({listed}); if the model or the optimizer changed, "
                "start in a new folder"
            )
        return None

    def _restore_step(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any], int]:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_fields(target)), host=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        state, host = TrainState(**restored["state"]), restored["host"]
        _check_contents(state, host["fingerprint"])
        return state, host["host"], int(host["step"])

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        self._manager.close()
        if is_main_process():
            for step in steps:
                goal = self.folder.parent / f"{self.folder.name}_{UNREADABLE}" / str(step)
                goal.parent.mkdir(exist_ok=True)
                shutil.rmtree(goal, ignore_errors=True)
                (self.folder / str(step)).rename(goal)
        barrier("set aside")
        self._open()

    def _thin_out(self) -> None:
        steps = self.steps
        keep = set(steps[-self.keep_last :])
        if self.keep_best:
            scored = [(score, step) for step in steps if (score := self._score(step)) is not None]
            keep |= {step for _, step in sorted(scored)[-self.keep_best :]}
        for step in steps:
            if step not in keep:
                self._manager.delete(step)

    def _score(self, step: int) -> float | None:
        try:
            host = self._manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]
            return host["score"]
        except Exception:  # a broken file has no score
            return None


def restore_params(folder: str | Path, target: Any, step: int | None = None) -> tuple[Any, int]:
    """(params, step) of one checkpoint, without optimizer state; `step` None is the newest.

    `target` is the params' tree of `jax.ShapeDtypeStruct`s, with shardings if they are to be placed. Raises ValueError
    when there is no such checkpoint, and for one whose arrays are not what was saved.
    """
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "host": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(Path(folder).absolute(), item_handlers=handlers) as manager:
        steps = sorted(manager.all_steps())
        if not steps or step not in (None, *steps):
            raise ValueError(f"no checkpoint of step {step} in {folder}; there are {steps}")
        step = steps[-1] if step is None else step
        saved = manager.item_metadata(step)["state"].tree["params"]
        item = {"params": jax.tree.map(lambda t, s: t.update(dtype=s.dtype), target, saved)}
        arguments = ocp.checkpoint_utils.construct_restore_args(item)
        restore = ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=True)
        restored = manager.restore(step, args=ocp.args.Composite(state=restore, host=ocp.args.JsonRestore()))
        params = {"params": restored["state"]["params"]}
        _check_contents(params, restored["host"]["fingerprint"])
        return jax.tree.map(lambda x, t: x.astype(t.dtype), params["params"], target), step


def _fields(state: TrainState) -> dict[str, Any]:
    """What is saved of a state; nothing of a critic where there is none, as it was before there were any."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if name != "critic" or value is not None}


def _check_contents(state: Any, saved: Mapping[str, int]) -> None:
    """Raises ValueError unless the arrays are bit for bit those that were saved."""
    found = fingerprint(state)
    if wrong := [name for name in found if saved.get(name) != found[name]]:
        raise ValueError(
            f"the contents of {wrong[0]} ({len(wrong)} arrays in all) are not what was saved; the checkpoint is "
            "damaged, take another step"
        )


def _finite(value: Any) -> float | None:
    value = None if value is None else float(value)
    return value if value is not None and abs(value) < float("inf") else None


def fingerprint(state: Any) -> dict[str, int]:
    """A 32-bit checksum of every array of a tree, by path: equal for equal bits, on any sharding."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(state), strict=True)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    return dict(zip(names, map(int, jax.device_get(_checksums(leaves))), strict=True))


@jax.jit
def _checksums(leaves: tuple[Array, ...]) -> list[Array]:
    return [_checksum(jnp.asarray(x)) for x in leaves]


def _checksum(x: Array) -> Array:
    """Sum of the words, each times an odd number that depends on its place, modulo 2^32: exact in any order."""
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    words = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, width)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    odd = (place * jnp.uint32(2654435761)) | jnp.uint32(1)
    return jnp.sum(words.astype(jnp.uint32) * odd, dtype=jnp.uint32)
