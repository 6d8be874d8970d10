"""Scores completions with any number of weighted rewards; what goes wrong costs one sample, never the run."""

import math
import os
import pickle
import re
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from absl import logging

from rljax.tasks.callables import RewardInput, Wants, check_columns, inspect_reward, load_callable
from rljax.tasks.workers import DONE, RAISED, TIMEOUT, Job, Reply, WorkerPool, end_if_forked

EXCEPTION = "exception"
"""It raised, or exited."""
TIMED_OUT = "timeout"
"""It ran beyond its time."""
CRASH = "crash"
"""Its process died."""
NOT_FINITE = "not_finite"
"""It gave no finite number."""
NONE_APPLIES = "none_applies"
"""Every reward returned None for the sample."""
FAILURES = (EXCEPTION, TIMED_OUT, CRASH, NOT_FINITE, NONE_APPLIES)
"""Why a sample has no valid score."""

_FLOAT32_MAX = 3.4028234e38


@dataclass(frozen=True)
class RewardSpec:
    """One reward of a run."""

    reward: Callable[..., Any] | str
    """A callable (see `rljax.tasks.callables`), or its name `module:function`. Where it returns None it does not apply
    to the sample, whose other rewards count."""
    weight: float = 1.0
    """Multiplies its value in the sum of a sample's rewards."""
    name: str | None = None
    """Its key in `RewardResult.components`; None is the name of the callable."""
    timeout_s: float = 10.0
    """Seconds of one call: one sample, or a whole batch."""
    in_process: bool | None = None
    """True runs it in this process, fast but without a timeout; None does so for the built-in verifiers that cannot
    hang, and runs all else in worker processes."""


@dataclass(frozen=True)
class RewardResult:
    """What the rewards say of one sample. If a component fails, or none applies, the sample is not valid."""

    value: float
    """The weighted sum; 0 if the sample is not valid."""
    components: dict[str, float]
    """The unweighted rewards by name, without those that failed or do not apply."""
    is_valid: bool = True
    error: str | None = None
    """What failed, if anything."""
    decided_by: str = field(default="", compare=False)
    """The component by which the sample counts as solved; empty, or one that it lacks, is `value`."""
    is_void: bool = field(default=False, compare=False)
    """Whether it was cut off and may not earn: `value` is 0 at most, and `components` say what they would be worth."""
    not_applied: tuple[str, ...] = field(default=(), compare=False)
    """The rewards that returned None for the sample."""

    @property
    def is_solved(self) -> bool:
        """Whether what decides is worth 1 or more; False for a sample that is not valid."""
        return self.is_valid and self.part(self.decided_by) >= 1.0

    def part(self, name: str) -> float:
        """The component `name`, 0 at most if it may not earn; `value` where there is none of that name."""
        if name not in self.components:
            return self.value
        return min(self.components[name], 0.0) if self.is_void else self.components[name]

    def voided(self) -> "RewardResult":
        """The result of a completion that was cut off: it may not earn, but a penalty stays."""
        return replace(self, value=min(self.value, 0.0), is_void=True)


class _Outcome(NamedTuple):
    value: float | None  # None: the reward does not apply
    failure: str | None = None  # one of FAILURES
    message: str = ""


class _Scorer:
    """Calls one reward on inputs and turns whatever happens into outcomes. Picklable if the reward is."""

    def __init__(self, reward: Callable[..., Any], wants: Wants):
        self.reward = reward
        self.wants = wants

    def warm_up(self) -> None:
        """Whatever the reward does first and slowly, such as imports; a worker does it before its first job."""
        getattr(self.reward, "warm_up", lambda: None)()

    def __call__(self, inputs: Sequence[RewardInput]) -> list[_Outcome]:
        process = os.getpid()
        try:
            try:
                result = self.reward(**self.wants.keywords(inputs))
            finally:
                end_if_forked(process)
            if not self.wants.is_batch:
                return [_as_outcome(result)]
            result = result.tolist() if hasattr(result, "tolist") else list(result)
            if len(result) != len(inputs):
                raise ValueError(f"a batch reward returned {len(result)} values for {len(inputs)} samples")
            return [_as_outcome(value) for value in result]
        except (Exception, SystemExit):
            return [_Outcome(0.0, EXCEPTION, traceback.format_exc())] * len(inputs)


def _as_outcome(value: Any) -> _Outcome:
    if value is None:
        return _Outcome(None)
    if not isinstance(value, (bool, int, float)) and getattr(value, "ndim", None) == 0:
        value = value.item()  # a scalar of numpy or jax
    if not isinstance(value, (bool, int, float)):
        return _Outcome(0.0, NOT_FINITE, f"it returned {value!r:.100} of type {type(value).__name__}, not a number")
    if not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:  # also false for NaN
        return _Outcome(0.0, NOT_FINITE, f"it returned {value!r:.100}, which is no finite float32")
    return _Outcome(float(value))


@dataclass(frozen=True)
class _Reward:
    name: str
    weight: float
    timeout_s: float
    in_process: bool
    scorer: _Scorer


class RewardRunner:
    """Scores samples with weighted rewards, slow or unsafe ones in worker processes.

    `rewards` holds `RewardSpec`s, bare callables or `(callable, weight)` pairs; `timeout_s` is for those without a
    spec. `workers` defaults to the number of cores, at most 8; none start if every reward runs in process.

    Use it as a context manager, or call `open` and `close`: no process starts before. Values do not depend on the
    number of workers or on the order of the samples. `failures` counts samples by kind since the start; the first
    failure of each reward and kind is logged with its traceback. `decided_by`, the first unless it is set to another,
    names the reward by which a sample counts as solved. Raises ValueError for no rewards, a signature that is none of a
    reward's, a repeated name, a weight or timeout out of range, or a reward that cannot be sent to a worker.
    """

    def __init__(
        self,
        rewards: Sequence[RewardSpec | tuple[Callable[..., Any] | str, float] | Callable[..., Any] | str],
        *,
        timeout_s: float = 10.0,
        workers: int | None = None,
        start_timeout_s: float = 60.0,
    ):
        self._rewards = [_resolve(_as_spec(reward, timeout_s)) for reward in rewards]
        names = [r.name for r in self._rewards]
        if not names:
            raise ValueError("a reward runner needs at least one reward; none was given")
        if len(set(names)) < len(names):
            raise ValueError(f"reward names {names} must differ; set RewardSpec.name")
        self.decided_by = names[0]

        self.failures: Counter[str] = Counter(dict.fromkeys(FAILURES, 0))
        self._logged: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._remote = [r for r in self._rewards if not r.in_process]
        self._pool: WorkerPool | None = None
        if self._remote:
            size = min(_cores(), 8) if workers is None else workers
            self._pool = WorkerPool([r.scorer for r in self._remote], size, start_timeout_s=start_timeout_s)

    def open(self) -> None:
        """Start the worker processes, where there are any to start. Does nothing if they stand.

        Raises ValueError, in one line, if a worker does not start or a reward does not load in it; RuntimeError if the
        runner was closed.
        """
        if self._pool is not None:
            self._pool.open()

    def __enter__(self) -> "RewardRunner":
        self.open()
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes. They cannot be started again."""
        if self._pool is not None:
            self._pool.close()

    @property
    def names(self) -> list[str]:
        """Names of the rewards, the keys of `RewardResult.components`."""
        return [r.name for r in self._rewards]

    def answer(self, completion: str, result: RewardResult) -> str | None:
        """What the deciding reward takes for the answer of a completion that it has scored, None for none.

        That is `reward.answer_in(completion)`, in a form in which equal answers are equal texts, or else
        `reward.extract(completion)`, of the reward itself or the one around which it is (`verify`). It runs in this
        process; where it raised or hung in the reward, whose `result` is then not valid, it is not asked again.
        """
        find = self._finder
        if find is None or not result.is_valid:
            return None
        try:
            return find(completion) or None
        except Exception:
            return None

    @property
    def finds_answers(self) -> bool:
        """Whether the deciding reward can say what it takes for the answer."""
        return self._finder is not None

    @property
    def _finder(self) -> Callable[[str], str | None] | None:
        reward: Any = next(r.scorer.reward for r in self._rewards if r.name == self.decided_by)
        while reward is not None:
            if find := getattr(reward, "answer_in", None) or getattr(reward, "extract", None):
                return find
            reward = getattr(reward, "verify", None)
        return None

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise ValueError, before anything is sampled, if a reward wants a column that the data lacks."""
        for reward in self._rewards:
            check_columns(reward.scorer.wants, reward.name, columns)

    def score(self, inputs: Sequence[RewardInput]) -> list[RewardResult]:
        """One result for each input, in order. Never raises for what a reward does; RuntimeError if rewards need worker
        processes and the runner is not open; WorkersFailed, which is one, if no worker starts any more."""
        if not inputs:
            return []
        with self._lock:
            outcomes = self._run_remote(inputs)
            for reward in self._rewards:
                if reward.in_process:
                    batches = _batches(reward, inputs)
                    outcomes[reward.name] = [o for batch in batches for o in reward.scorer(batch)]
            for reward in self._rewards:
                self._count(reward, outcomes[reward.name])
            return [self._combine({name: rows[i] for name, rows in outcomes.items()}) for i in range(len(inputs))]

    def _run_remote(self, inputs: Sequence[RewardInput]) -> dict[str, list[_Outcome]]:
        if self._pool is None:
            return {}
        jobs: list[Job] = []
        owners: list[tuple[_Reward, int]] = []
        for index, reward in enumerate(self._remote):
            batches = _batches(reward, inputs)
            jobs += [Job(index, batch, reward.timeout_s) for batch in batches]
            owners += [(reward, len(batch)) for batch in batches]

        # jobs of one reward are in the order of the inputs, and replies in that of the jobs
        outcomes: dict[str, list[_Outcome]] = {r.name: [] for r in self._remote}
        for (reward, size), reply in zip(owners, self._pool.run(jobs), strict=True):
            outcomes[reward.name] += _outcomes_of(reward, reply, size)
        return outcomes

    def _count(self, reward: _Reward, outcomes: Sequence[_Outcome]) -> None:
        for outcome in outcomes:
            if outcome.failure is not None:
                self._note(
                    reward.name,
                    outcome.failure,
                    f"Reward {reward.name} failed ({outcome.failure}); the sample takes no part. More of this kind are "
                    f"counted, not logged.\n{outcome.message}",
                )
        # of a reward for other rows, or of one that forgot its `return`
        if len(outcomes) > 1 and all(outcome.value is None for outcome in outcomes):
            self._log_once(
                (reward.name, NONE_APPLIES),
                f"Reward {reward.name} returned None for all of {len(outcomes)} samples, which says that it does not "
                "apply to them: it took no part in their scores.",
            )

    def _note(self, name: str, failure: str, text: str) -> None:
        self.failures[failure] += 1
        self._log_once((name, failure), text)

    def _log_once(self, kind: tuple[str, str], text: str) -> None:
        if kind not in self._logged:
            self._logged.add(kind)
            logging.warning("%s", text)

    def _combine(self, outcomes: dict[str, _Outcome]) -> RewardResult:
        components: dict[str, float] = {}
        weighted: list[float] = []
        for reward in self._rewards:
            outcome = outcomes[reward.name]
            if outcome.failure is None and outcome.value is not None:
                components[reward.name] = outcome.value
                weighted.append(reward.weight * outcome.value)

        errors = [
            f"{name}: {o.failure}: {o.message.strip().rsplit(chr(10), 1)[-1]}"
            for name, o in outcomes.items()
            if o.failure is not None
        ]
        if not errors and not components:
            errors = [f"{NONE_APPLIES}: {' and '.join(self.names)} returned None"]
            self._note(
                "", NONE_APPLIES, f"A sample has no score, since {' and '.join(self.names)} returned None for it."
            )
        if errors:
            return RewardResult(0.0, components, is_valid=False, error="; ".join(errors))
        # fsum: the value must not depend on the order in which rewards are listed
        not_applied = tuple(name for name in self.names if name not in components)
        return RewardResult(math.fsum(weighted), components, decided_by=self.decided_by, not_applied=not_applied)


def _batches(reward: _Reward, inputs: Sequence[RewardInput]) -> list[Sequence[RewardInput]]:
    """The calls of a reward: one for all inputs, or one each."""
    return [inputs] if reward.scorer.wants.is_batch else [[one] for one in inputs]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _outcomes_of(reward: _Reward, reply: Reply, size: int) -> list[_Outcome]:
    """Of one call of a reward for `size` samples."""
    if reply.kind == DONE:
        # the process answers for code that may have written to its socket, so nothing about it is taken for granted
        values = reply.value if isinstance(reply.value, list) and len(reply.value) == size else []
        outcomes = [_Outcome(*value) for value in values if isinstance(value, tuple) and len(value) == 3]
        if len(outcomes) == size and all(map(_is_outcome, outcomes)):
            return outcomes
        return [_Outcome(0.0, CRASH, f"its worker process answered {reply.value!r:.100}")] * size
    # what fails a batch reward fails all samples of the batch
    return [_failed(reward, reply)] * size


def _is_outcome(outcome: _Outcome) -> bool:
    is_number = type(outcome.value) is float and -_FLOAT32_MAX <= outcome.value <= _FLOAT32_MAX
    return (
        (is_number or outcome.value is None)
        and outcome.failure in (None, *FAILURES)
        and isinstance(outcome.message, str)
    )


def _failed(reward: _Reward, reply: Reply) -> _Outcome:
    if reply.kind == TIMEOUT:
        return _Outcome(
            0.0, TIMED_OUT, f"it ran longer than {reward.timeout_s} s and was ended; raise timeout_s if it may"
        )
    return _Outcome(0.0, EXCEPTION if reply.kind == RAISED else CRASH, str(reply.value))


def _as_spec(reward: Any, timeout_s: float) -> RewardSpec:
    if isinstance(reward, RewardSpec):
        return reward
    if isinstance(reward, tuple):
        return RewardSpec(reward[0], weight=reward[1], timeout_s=timeout_s)
    return RewardSpec(reward, timeout_s=timeout_s)


def _resolve(spec: RewardSpec) -> _Reward:
    function = load_callable(spec.reward) if isinstance(spec.reward, str) else spec.reward
    if not callable(function):
        raise ValueError(f"reward {function!r} cannot be called; give a function, or its name 'module:function'")

    name = spec.name or _name(function)
    if not math.isfinite(spec.weight):
        raise ValueError(f"weight {spec.weight} of reward {name} must be a finite number")
    if not 0 < spec.timeout_s < math.inf:
        raise ValueError(f"timeout_s {spec.timeout_s} of reward {name} must be a positive number of seconds")

    wants = inspect_reward(function, name)
    in_process = getattr(function, "is_cheap", False) if spec.in_process is None else spec.in_process
    if in_process and getattr(function, "needs_process", False):
        raise ValueError(f"reward {name} relies on signals, so it must run in a worker process; leave in_process unset")
    # here, and not when workers start: a run is refused before anything is opened
    if not in_process:
        _check_picklable(function, name)
    return _Reward(name, float(spec.weight), float(spec.timeout_s), in_process, _Scorer(function, wants))


def _name(function: Callable[..., Any]) -> str:
    own = getattr(function, "__name__", None) or getattr(function, "name", None)
    return own if isinstance(own, str) else re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(function).__name__).lower()


def _check_picklable(function: Callable[..., Any], name: str) -> None:
    remedy = (
        "define it at the top level of a module that can be imported, or set RewardSpec.in_process "
        "(then nothing stops it if it hangs)"
    )
    if getattr(function, "__module__", None) == "__main__" or type(function).__module__ == "__main__":
        raise ValueError(f"reward {name} is defined in the main script, which worker processes do not run; {remedy}")
    try:
        pickle.dumps(function)
    except Exception as error:
        raise ValueError(f"reward {name} cannot be sent to a worker process ({error}); {remedy}") from None
