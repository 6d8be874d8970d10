"""The actor's work in its order: rollouts by a fixed schedule and evaluations between them, beside training or in turn.

Tokens depend on the weights and on what names their random numbers, never on when they are made. So the same orders
give the same rollouts whether a thread works on them while the learner trains, or the caller between two steps.
"""

import ctypes
import functools
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from rljax.experiment.journal import Journal, Made
from rljax.experiment.player import PolicyPlayer
from rljax.experiment.recording import Recorder, Recording
from rljax.parallel import hand_over
from rljax.plans import RolloutPlan
from rljax.rollouts import (
    Actor,
    GroupRules,
    NoSignal,
    Rollout,
    RolloutConfig,
    ScoredGroup,
    collect,
    rejudged,
    seen_group,
)
from rljax.sampling import compile_count_here
from rljax.tasks import Curriculum, Evolving, Judging, medium_share
from rljax.types import Params

_PATIENCE_S = 10.0
"""How long the end of a run waits for the thread to leave what it does; the actor is closed behind it in any case."""

T = TypeVar("T")


class Beside(NamedTuple):
    """Devices of the actor's own."""

    mesh: Mesh
    layout: Any
    """A tree of shardings: where the actor's weights lie on them."""


class Cancelled(BaseException):
    """Raised within the actor's work when the run ends without it."""


class Pipeline:
    """Orders for `actor`, in their order: a rollout is sampled, collected, and shown to the curriculum.

    Rollout `s` is sampled by the weights that step `max(0, s - config.staleness)` has for it, exactly. With devices of
    the actor's own (`beside`) a thread works on the orders while this is open, as a context manager; else each order is
    carried out when it is given.

    With a `recording` rollouts are read from there instead of made. `recorder` keeps those that are made.

    What an order raises is raised when its result is asked for, and no later order is begun.
    """

    def __init__(
        self,
        actor: Actor,
        plan: RolloutPlan,
        curriculum: Curriculum,
        config: RolloutConfig,
        *,
        prompts: int,
        beside: Beside | None = None,
        player: PolicyPlayer | None = None,
    ):
        self.actor = actor
        self.plan = plan
        self.curriculum = curriculum
        self.config = config
        self.staleness = config.staleness
        self.beside = beside
        self.journal: Journal | None = None
        self.recorder: Recorder | None = None
        self.recording: Recording | None = None
        self.until: int | None = None
        self.waited_s = 0.0
        self._prompts = prompts
        self._player = player

        self._ordered = 0
        self._rollouts: dict[int, Future[Made]] = {}
        self._recorded: dict[int, Made] = {}
        self._taken: Made | None = None
        self._behind = ""

        self._jobs: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._idle_s = 0.0

    # The schedule.

    def order(self, now: int, params: Params) -> None:
        """Orders the rollouts that the weights of step `now` sample: all up to that of step `now + staleness` that have
        not been ordered, and none from step `until` on. `params` are those pushed last. They may be donated
        afterwards."""
        stop = now + self.staleness + 1
        if self.until is not None:
            stop = min(stop, self.until)
        if self._ordered >= stop:
            return

        weights = self._handed_over(params)
        version = self.config.version_of(now)
        for step in range(self._ordered, stop):
            self._rollouts[step] = self._do(functools.partial(self._make, step, version, [weights]))
            self._ordered = step + 1

    def take(self, step: int) -> Made:
        """The rollout of a step, when it is made; once. `waited_s` are the seconds that this took."""
        begin = time.perf_counter()
        made = self._rollouts[step].result()
        self.waited_s = time.perf_counter() - begin
        del self._rollouts[step]
        self._taken = made
        self._behind = made.behind
        return made

    def remember(self, params: Params, version: int) -> None:
        """Gives the actor weights that it is to have had before those of the first order."""
        weights = self._handed_over(params)
        self._do(functools.partial(self.actor.set_params, weights, version)).result()

    def evaluate(self, step: int, params: Params, work: Callable[[], T]) -> T:
        """What `work` gives when its turn has come and the actor has the weights `params`, which are those of `step`,
        pushed or not."""
        weights = self._handed_over(params)
        version = self.config.version_of(step)

        def evaluated() -> T:
            self.actor.set_params(weights, version)
            return work()

        return self._do(evaluated).result()

    # What a checkpoint needs.

    def checkpointed(self) -> None:
        """Tells the actor, between its orders, that a checkpoint is made of this moment."""
        self._do(self.actor.checkpointed)

    def place(self, step: int) -> dict[str, Any]:
        """What a checkpoint behind `step` steps says of the actor's side, JSON-ready: how many rollouts are ordered,
        and where curriculum and actor stand, unless the last of these rollouts tells it (in the journal)."""
        if self._ordered > step:
            return {"ordered": self._ordered}
        return {"ordered": self._ordered, **json.loads(self._behind or self.host_state())}

    def host_state(self) -> str:
        """Where curriculum and actor stand, as JSON; to be asked for between two orders."""
        return json.dumps({"curriculum": self.curriculum.state_dict(), "actor": self.actor.state_dict()})

    def go_on(self, step: int, ordered: int, recorded: Sequence[Made], host_state: str) -> None:
        """Goes on behind `step` steps, with curriculum and actor as they stand behind the last of `recorded`: rollouts
        from that of this step on. Those below `ordered` were sampled by weights that are gone. `host_state` is where
        curriculum and actor stood behind `step` steps."""
        self._ordered = step
        for made in recorded:
            if made.step < ordered:
                self._rollouts[made.step] = Future()
                self._rollouts[made.step].set_result(made)
                self._ordered = made.step + 1
            else:
                self._recorded[made.step] = made
        self._behind = host_state

    @property
    def is_recorded(self) -> bool:
        """Whether the rollout that was taken last was made by an earlier start of the run."""
        return self._taken is not None and self._taken.is_recorded

    def num_missing(self, stop: int) -> int:
        """Rollouts of steps before `stop` that are ordered and not made."""
        return sum(not future.done() for step, future in self._rollouts.items() if step < stop)

    def settle(self, stop: int, timeout_s: float) -> None:
        """Waits until those are made, or cannot be, for `timeout_s` seconds at most."""
        wait([future for step, future in self._rollouts.items() if step < stop], timeout_s)

    # The work.

    def _make(self, step: int, version: int, weights: list[Params]) -> Made:
        if self.recording is not None:
            return self._replayed(step)
        # Taken out of the order, so that what was handed over is freed once the actor has its own copy.
        self.actor.set_params(weights.pop(), version)
        # An actor may remember older weights, so it gets these for a rollout that was made before, too.
        recorded = self._recorded.pop(step, None)
        if recorded is not None:
            return recorded

        idle_s = self._idle_s
        compiled = compile_count_here()
        self._idle_s = 0.0
        evolved = self._evolve(step)
        # By its own name, since a thread of its own may make it while the learner is in another phase.
        with jax.profiler.TraceAnnotation("sample and judge"):
            rollout, lacking = self._roll_out(step, version)
        if not lacking:
            self.curriculum.observe(*rollout.observed())
        # What was sampled in vain tells of tasks that are too easy or too hard.
        if isinstance(self.curriculum, Evolving):
            seen = rollout.seen()
            self.curriculum.see(step, seen)
            evolved["medium_share"] = medium_share(seen)
        if evolved and self._player is not None:
            evolved["asked_tokens"] = float(self._player.tokens)
        rollout.stats.update({f"curriculum/{name}": value for name, value in evolved.items()})

        made = Made(
            step,
            version,
            rollout,
            lacking,
            self.host_state(),
            compiled=compile_count_here() - compiled if self._thread else 0,
            idle_s=idle_s,
        )
        # The order is important: what is in the journal is not made again, so it must be recorded.
        if self.recorder is not None:
            self.recorder.write(made)
        if self.journal is not None:
            self.journal.write(made)
        return made

    def _replayed(self, step: int) -> Made:
        """The rollout of a step as it was recorded. Curriculum and actor are said to stand where they stood then."""
        assert self.recording is not None
        made = self._recorded.pop(step, None) or self.recording.read(step)
        self.curriculum.load_state_dict(json.loads(made.behind)["curriculum"])
        if self.journal is not None:
            self.journal.write(made)
        return made

    def _evolve(self, step: int) -> dict[str, float]:
        """Lets a curriculum that makes tasks do so, with the weights of the rollout to come; its metrics."""
        if not isinstance(self.curriculum, Evolving) or self._player is None:
            return {}
        self._player.begin(step)
        return self.curriculum.evolve(step, self._player)

    def _rejudge(self, step: int, groups: Sequence[ScoredGroup]) -> Sequence[ScoredGroup]:
        """The groups with the rewards that the curriculum itself gives, where it does."""
        if not isinstance(self.curriculum, Judging) or self._player is None:
            return groups
        rewards = self.curriculum.judge(step, [seen_group(group) for group in groups], self._player)
        return [rejudged(group, own) for group, own in zip(groups, rewards, strict=True)]

    def _roll_out(self, step: int, version: int) -> tuple[Rollout, str]:
        """A rollout, and what it lacks to be learned from; "" where it lacks nothing."""
        groups = self.config.groups
        try:
            rollout = collect(
                self.actor,
                self.plan,
                lambda n: self.curriculum.sample(step, n),
                self._prompts,
                step,
                version,
                rules=GroupRules(groups.incomplete, groups.max_age, self.config.version_of(step)),
                rejudge=lambda found: self._rejudge(step, found),
            )
        except NoSignal as error:
            return error.rollout, str(error)

        if not np.isnan(rollout.rewards).all():
            return rollout, ""
        why = next((record["error"] for record in rollout.records if record["error"]), "no reward said why")
        return rollout, f"none of the {len(rollout.records)} samples has a valid reward; the first failed with: {why}"

    def _handed_over(self, params: Params) -> Params:
        """The weights as an order may keep them: the learner donates its own to the next update."""
        if self._thread is None or self.beside is None:
            return params
        return hand_over(params, self.beside.layout)

    # Who does it.

    def _do(self, work: Callable[[], T]) -> "Future[T]":
        """Has `work` done when all that was asked for before is done: now, or by the thread."""
        future: Future[T] = Future()
        if self._thread is None:
            future.set_result(work())
            self._free_weights()
        else:
            self._jobs.put((future, work))
        return future

    def _free_weights(self) -> None:
        """An actor that takes turns with the learner leaves it the room of its weights: each order brings them anew."""
        for decoder in self.actor.resting:
            decoder.drop_params()

    def __enter__(self) -> "Pipeline":
        if self.beside is not None:
            # No daemon: one that is within JAX when the interpreter ends would crash it.
            self._thread = threading.Thread(target=self._work, name="rollouts")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread, and what it does."""
        thread = self._thread
        if thread is None:
            return
        self._error = self._error or Cancelled()
        self._jobs.put(None)
        # As a signal does it in the main thread. A wait outside of Python ends first.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Cancelled))
        thread.join(_PATIENCE_S)
        if thread.is_alive():
            logging.getLogger(__name__).warning("a rollout is still under way; waiting for it to be given up")
        self._thread = None

    def _work(self) -> None:
        """The thread: what JAX puts somewhere by itself goes to its own devices."""
        assert self.beside is not None
        with jax.default_device(self.beside.mesh.devices.flat[0]):
            try:
                while self._work_once():
                    pass
            except Cancelled:
                pass

    def _work_once(self) -> bool:
        # Within a function, so that what an order holds is freed before the wait for the next.
        begin = time.perf_counter()
        job = self._jobs.get()
        self._idle_s += time.perf_counter() - begin
        if job is None:
            return False

        future, work = job
        if self._error is not None:
            future.set_exception(self._error)
            return True
        try:
            result = work()
        except BaseException as error:
            self._error = error
            future.set_exception(error)
        else:
            future.set_result(result)
        return True
