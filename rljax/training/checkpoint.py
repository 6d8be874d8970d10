"""Checkpoints that survive a kill at any moment, and that are known to be whole before they are used."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jaxtyping import Array

from rljax.parallel import barrier, gather, is_main_process, on_main
from rljax.training.mirror import Mirror, needs_mirror
from rljax.training.state import with_before
from rljax.training.storage import AnyPath, as_path, move_tree, remove_tree
from rljax.training.trainable import EVERYTHING, Subtree
from rljax.types import TrainState

LAYOUT = 2
"""Version of what a checkpoint holds; raised when a field of `TrainState` gets another name or meaning."""

UNREADABLE = "unreadable"
"""Checkpoints skipped for an older one go to `<folder>_unreadable/`."""


T = TypeVar("T")


class Refused(ValueError):
    """A checkpoint that is whole and does not belong here: of another layout, or over another base."""


class Incomplete(ValueError):
    """A checkpoint that relies on what is not there."""


class Unreadable(ValueError):
    """A checkpoint of which a process cannot read its part."""


class Checkpointer:
    """Asynchronous checkpoints in `folder`, one subfolder a step.

    The newest `keep_last` stay, and the `keep_best` with the highest `best_metric`; older ones go when the next save
    begins, so that one finished checkpoint is there at any time. What an interrupted save left is removed at start.

    Frozen base weights are not saved: they are loaded from the model again, and must be those of the save.

    `is_complete(step, host_state)` tells, where it is given, whether what a checkpoint relies on elsewhere is there.
    One that is not complete is passed over, and counts for none of the `keep_last`. `first_kept` is the oldest of
    these, None as long as there is none; it is known from the first save on.

    `check` is called before checkpoints are made or removed, to raise where the folder is another run's.

    In a bucket that Orbax cannot write to, such as `s3://`, checkpoints are made in a local folder and copied; a save
    then returns when it is there, and ValueError is raised on several processes.
    """

    def __init__(
        self,
        folder: str | AnyPath,
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        best_metric: str = "rollout/reward_mean",
        is_complete: Callable[[int, Mapping[str, Any]], bool] | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last={keep_last} must be at least 1 and keep_best={keep_best} at least 0")
        self.folder = as_path(folder)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.best_metric = best_metric
        self.is_complete = is_complete
        self.check = check
        self.first_kept: int | None = None
        self._known_complete: set[int] = set()

        # The folder must be there before any process looks into it.
        if is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
        barrier("checkpoint folder")
        self._mirror = Mirror(self.folder, cleans=True) if needs_mirror(self.folder) else None
        self._place: AnyPath = self.folder if self._mirror is None else self._mirror.local
        self._open()

    def _open(self) -> None:
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True, cleanup_tmp_directories=True)
        self._handlers: dict[str, Any] = {"state": ocp.StandardCheckpointHandler(), "host": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._place, options=options, item_handlers=self._handlers)

    @property
    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first: those that the main process sees, which all must ask."""
        return on_main(lambda: sorted(self._manager.all_steps()))

    def save(
        self, step: int, state: TrainState, host_state: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Begins to save; returns when `state` may be donated. `host_state` must be JSON. Waits for the save before."""
        # The order is important: the older ones go only when the last save is whole.
        self._manager.wait_until_finished()
        self._thin_out()

        saved = _without_base(state)
        host = {
            "layout": LAYOUT,
            "step": step,
            "host": dict(host_state),
            "fingerprint": fingerprint(saved),
            "base": fingerprint(_bases(state)),
            "score": None if metrics is None else _finite(metrics.get(self.best_metric)),
        }
        json.dumps(host, allow_nan=False)  # raises here, not in the writing thread
        args = ocp.args.Composite(state=ocp.args.StandardSave(saved), host=ocp.args.JsonSave(host))
        self._manager.save(step, args=args, force=True)
        if self._mirror is not None:
            self._manager.wait_until_finished()
            self._mirror.push()

    def wait(self) -> None:
        """Returns when what was saved is on disk; raises what the writing thread raised."""
        self._manager.wait_until_finished()
        self._thin_out()
        if self._mirror is not None:
            self._mirror.push()

    def close(self) -> None:
        """Waits, as `wait`, and ends the writing thread."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(self, target: TrainState) -> tuple[TrainState, dict[str, Any], int] | None:
        """(state, host state, step) of the newest checkpoint that is whole; None when there is none at all, or none of
        them is complete.

        `target` is a `TrainState` of `jax.ShapeDtypeStruct`s with the shardings to restore onto; they need not be those
        of the save. Its `base`, if it has one, is the loaded weights themselves (`with_base`), and part of what is
        returned. Older weights (`before`) that it asks for and a checkpoint lacks are the policy's. A checkpoint that
        cannot be read, or whose arrays are not bit for bit what was saved, is logged, set aside in
        `<folder>_unreadable/`, and the one before it used. Raises ValueError when there are checkpoints but none fits:
        then nothing is set aside, since the reason may be a changed model or optimizer.
        """
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(_bases(target))):
            raise ValueError("the target's base has shapes alone; load it: with_base(target, learner.base_of(params))")

        failures: dict[int, str] = {}
        incomplete: list[int] = []
        refused: Refused | None = None
        for step in reversed(self.steps):
            try:
                result = self._restore_step(step, target)
            except Exception as error:  # whatever a broken file leads to
                if isinstance(error, Refused):
                    refused = refused or error
                known = isinstance(error, (Refused, Unreadable, Incomplete))
                failures[step] = str(error) if known else _reason(error)
                if isinstance(error, Incomplete):
                    incomplete.append(step)
                logging.warning(
                    "checkpoint %s cannot be used (%s); trying the one before", self.folder / str(step), failures[step]
                )
            else:
                self._set_aside([step for step in failures if step not in incomplete])
                self.drop(incomplete)
                return result

        if refused is not None:
            raise refused
        if incomplete and len(incomplete) == len(failures):
            return None
        if failures:
            listed = "; ".join(f"step {step}: {reason}" for step, reason in failures.items())
            raise ValueError(
                f"no checkpoint in {self.folder} can be used ({listed}); if the model or the optimizer changed, "
                "start in a new folder"
            )
        return None

    def _restore_step(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any], int]:
        # What belongs elsewhere is refused by its host state, before any array is read.
        host = _together(lambda: self._read(step, "host", ocp.args.JsonRestore()))
        _check_layout(host, self.folder / str(step))
        _check_base(host, _bases(target), self.folder / str(step))
        if not on_main(lambda: self._has_all(step, host)):
            raise Incomplete("rollouts that it goes on with are not in the journal")

        # A recipe may have begun to ask for older weights, or no longer ask for them.
        holds_before = any(name.startswith("before/") for name in host["fingerprint"])
        stored = with_before(target, target.trainable if holds_before else None)
        saved = _together(lambda: self._read(step, "state", ocp.args.StandardRestore(_without_base(stored))))
        _check_contents(saved, host["fingerprint"])
        state = _with_base(saved, target)
        if holds_before != (target.before is not None):
            # Updates take the arrays of `trainable` for themselves.
            state = with_before(state, None if holds_before else jax.tree.map(jnp.copy, state.trainable))
        return state, host["host"], int(host["step"])

    def _read(self, step: int, name: str, args: Any) -> Any:
        # Without the manager, at whose barriers the others would wait for a process that fails here.
        return self._handlers[name].restore(epath.Path(self._place / str(step) / name), args=args)

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return

        # The manager keeps a list of what is there, so it is closed and opened anew around the move.
        self._manager.close()
        if is_main_process():
            for step in steps:
                goal = self.folder.parent / f"{self.folder.name}_{UNREADABLE}" / str(step)
                move_tree(self.folder / str(step), goal)
                remove_tree(self._place / str(step))
        barrier("set aside")
        self._open()

    def drop(self, steps: Sequence[int]) -> None:
        """Removes finished checkpoints."""
        for step in steps:
            self._manager.delete(step)

    def _has_all(self, step: int, host: Mapping[str, Any]) -> bool:
        return self.is_complete is None or self.is_complete(step, host["host"])

    def _complete(self) -> list[int]:
        """Steps whose checkpoint is complete, as this process sees it, oldest first."""
        for step in self._manager.all_steps():
            # What one relies on stays as long as it does, and host states may be large.
            if step in self._known_complete:
                continue
            try:
                host = {} if self.is_complete is None else self._read(step, "host", ocp.args.JsonRestore())
                if self._has_all(step, host):
                    self._known_complete.add(step)
            except Exception:  # a broken file is no checkpoint to go on from
                continue
        return sorted(self._known_complete.intersection(self._manager.all_steps()))

    def _thin_out(self) -> None:
        self.check()
        steps = self.steps
        last = on_main(self._complete)[-self.keep_last :]
        # One that is not complete yet may become it, and is newer than those that are.
        keep = {step for step in steps if not last or step >= last[0]}
        self.first_kept = last[0] if last else None

        if self.keep_best:
            # All delete the same ones.
            scores = on_main(lambda: {step: self._score(step) for step in steps})
            scored = sorted((score, step) for step, score in scores.items() if score is not None)
            keep |= {step for _, step in scored[-self.keep_best :]}

        self.drop([step for step in steps if step not in keep])

    def _score(self, step: int) -> float | None:
        try:
            return self._read(step, "host", ocp.args.JsonRestore())["score"]
        except Exception:  # a broken file has no score
            return None


def _together(read: Callable[[], T]) -> T:
    """What `read` gives; Unreadable in all processes if it raises in one of them. It must not wait for others.

    What follows is computed by all, so that none may go on alone.
    """
    result: Any = None
    why = ""
    try:
        result = read()
    except Exception as error:  # whatever a broken file makes the readers raise
        why = _reason(error)
    reasons = [reason for reason in gather(why) if reason]
    if reasons:
        raise Unreadable(reasons[0])
    return result


def _reason(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"


def restore_params(
    folder: str | AnyPath, target: Any, step: int | None = None, *, subtree: Subtree = EVERYTHING, base: Any = None
) -> tuple[Any, int]:
    """(params, step) of one checkpoint, without optimizer state; `step` None is the newest.

    `target` is the params' tree of `jax.ShapeDtypeStruct`s, with shardings if they are to be placed. Of a run that
    trained a `subtree`, `base` is the frozen weights as its state held them. Raises ValueError when there is no such
    checkpoint, for one of another layout or base, and for one whose arrays are not what was saved.
    """
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "host": ocp.JsonCheckpointHandler()}
    mirror = Mirror(as_path(folder), cleans=False) if needs_mirror(as_path(folder)) else None
    place = as_path(folder) if mirror is None else mirror.local
    with ocp.CheckpointManager(place, item_handlers=handlers) as manager:
        steps = sorted(manager.all_steps())
        if not steps or step not in (None, *steps):
            raise ValueError(f"no checkpoint of step {step} in {folder}; there are {steps}")
        step = steps[-1] if step is None else step

        host = manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]
        _check_layout(host, as_path(folder) / str(step))
        bases = {} if base is None else {"base": base}
        of_policy = {name: value for name, value in host["base"].items() if not name.startswith("critic/")}
        _check_base({"base": of_policy}, bases, as_path(folder) / str(step))

        # Read in the dtype of the save, so that the checksum is of what was saved; cast when that is known to be right.
        wanted, _ = subtree.split(target)
        saved = manager.item_metadata(step)["state"].tree["trainable"]
        _check_shapes(saved, wanted, as_path(folder) / str(step))
        item = {"trainable": jax.tree.map(lambda t, s: t.update(dtype=s.dtype), wanted, saved)}
        arguments = ocp.checkpoint_utils.construct_restore_args(item)
        restore = ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=True)
        found = {"trainable": manager.restore(step, args=ocp.args.Composite(state=restore))["state"]["trainable"]}
        _check_contents(found, host["fingerprint"])

    params = subtree.merge(found["trainable"], base)
    return jax.tree.map(lambda x, t: x.astype(t.dtype), params, target), step


def _check_shapes(saved: Any, wanted: Any, path: AnyPath) -> None:
    """ValueError for weights that are not those of the model wanted."""
    shapes = [
        {jax.tree_util.keystr(place, simple=True, separator="/"): tuple(leaf.shape) for place, leaf in leaves}
        for leaves, _ in map(jax.tree_util.tree_flatten_with_path, (saved, wanted))
    ]
    has, wants = shapes
    name = next((name for name in sorted({*has, *wants}) if has.get(name) != wants.get(name)), None)
    if name is not None:
        raise ValueError(
            f"checkpoint {path} is of another model: its weights {name} have the shape {has.get(name)}, and those of "
            f"config.model {wants.get(name)}; give the config of the run that wrote it"
        )


def _without_base(state: TrainState) -> dict[str, Any]:
    """What is saved of a state: all but the base, which the model's files hold; where there are any, a critic and the
    weights that rollouts keep or had before."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    del fields["base"]

    # Orbax takes a field of None for a part of the tree, which a checkpoint of before that field does not have.
    for name in ("critic", "pushed", "before"):
        if fields[name] is None:
            del fields[name]
    if state.critic is not None:
        fields["critic"] = _without_base(state.critic)
    return fields


def _with_base(saved: Mapping[str, Any], target: TrainState) -> TrainState:
    """The inverse, with the base of `target`."""
    fields = dict(saved)
    if target.critic is not None:
        fields["critic"] = _with_base(fields["critic"], target.critic)
    return TrainState(**fields, base=target.base)


def _bases(state: TrainState) -> dict[str, Any]:
    """The frozen weights of policy and critic, those that there are."""
    bases: dict[str, Any] = {} if state.base is None else {"base": state.base}
    of_critic = {} if state.critic is None else _bases(state.critic)
    return bases | ({"critic": of_critic} if of_critic else {})


def _check_layout(host: Mapping[str, Any], where: AnyPath) -> None:
    found = host.get("layout")
    if found != LAYOUT:
        what = "before layouts were numbered" if found is None else f"in layout {found}"
        raise Refused(
            f"the checkpoint {where} was written {what}, and this release reads layout {LAYOUT}; convert it with the "
            "release that wrote it (`rljax convert`) and start from the weights, or start in a new folder"
        )


def _check_base(host: Mapping[str, Any], bases: Mapping[str, Any], where: AnyPath) -> None:
    """Raises unless the frozen weights at hand are bit for bit those that the checkpoint was trained over."""
    found = fingerprint(bases)
    saved = host["base"]
    if found == saved:
        return

    differing = sorted(name for name in {*found, *saved} if found.get(name) != saved.get(name))
    raise Refused(
        f"the checkpoint {where} was trained over other frozen weights than these ({differing[0]} is the first of "
        f"{len(differing)} that differ); load the model that its run began with"
    )


def _check_contents(state: Any, saved: Mapping[str, int]) -> None:
    """Raises ValueError unless the arrays are bit for bit those that were saved."""
    found = fingerprint(state)
    wrong = [name for name in found if saved.get(name) != found[name]]
    if wrong:
        raise ValueError(
            f"the contents of {wrong[0]} ({len(wrong)} arrays in all) are not what was saved; the checkpoint is "
            "damaged, take another step"
        )


def _finite(value: Any) -> float | None:
    """The value as JSON can hold it: None for one that is missing, NaN or infinite."""
    if value is None or not abs(float(value)) < float("inf"):
        return None
    return float(value)


def fingerprint(state: Any) -> dict[str, int]:
    """A 32-bit checksum of every array of a tree, by path: equal for equal bits, on any sharding."""
    named = jax.tree_util.tree_leaves_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named]
    sums = jax.device_get(_checksums(tuple(leaf for _, leaf in named)))
    return dict(zip(names, map(int, sums), strict=True))


@jax.jit
def _checksums(leaves: tuple[Array, ...]) -> list[Array]:
    return [_checksum(jnp.asarray(x)) for x in leaves]


def _checksum(x: Array) -> Array:
    """Sum of the words, each times an odd number that depends on its place, modulo 2^32: exact in any order."""
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    words = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, width)

    # The place is counted in row-major order whatever the sharding, by the iota of each axis.
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)

    # Odd factors are units modulo 2^32: no changed word can vanish in its product.
    odd = (place * jnp.uint32(2654435761)) | jnp.uint32(1)
    return jnp.sum(words.astype(jnp.uint32) * odd, dtype=jnp.uint32)
