"""The schedule of a run: rollouts and updates that wait for each other, checkpoints, and failures that end them."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from rljax.simulation.engine import RolloutTimes, environment, roll_out
from rljax.simulation.scenario import Scenario

HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a simulated run came to."""

    scenario: Scenario
    """What was simulated."""
    seconds: float
    """Of the whole run, restarts included."""
    rollout_s: float
    """Mean seconds of a rollout, judging and gathering included."""
    update_s: float
    """Seconds of an update with its hand-over, without checkpoints."""
    tokens_per_s: float
    """New tokens that were trained on, a second of the run."""
    staleness: dict[int, float]
    """Share of the groups by the updates between the weights that sampled their first tokens and those they train."""
    rollout_idle: float
    """Share of the run in which devices that roll out had nothing to do, restarts not counted; 0 where all do both."""
    trainer_idle: float
    """The same of devices that train."""
    empty_rows: float
    """Share of the decoders' rows without a turn, while they roll out."""
    failures: int
    """Failures that were met."""
    lost: float
    """Share of all device-seconds in which nothing was done that lasted: restarts, and work that was done again."""
    writing: float
    """Share of the run in which training stood still for a checkpoint."""

    @property
    def steps_per_hour(self) -> float:
        return self.scenario.steps * HOUR / self.seconds

    @property
    def step_s(self) -> float:
        return self.seconds / self.scenario.steps


def simulate(scenario: Scenario, rollouts: RolloutTimes | None = None) -> Outcome:
    """Simulates a run. Deterministic for its seed.

    Rollout `s` is sampled by weights of version `max(0, s - staleness)`, one rollout after another, and update `s`
    takes it once it is whole. With devices of their own both go on side by side; otherwise one waits for the other.
    After a failure the run goes on from its newest complete checkpoint: one of step `s` whose rollouts up to
    `s + staleness - 1` are in the journal. No rollout in the journal is made again.

    `rollouts` are those of `roll_out(scenario)`, for callers that vary what does not change them. ValueError for a
    scenario that cannot be, and where simpy is not installed.
    """
    scenario.check()
    rollouts = roll_out(scenario) if rollouts is None else rollouts
    history = _History(scenario, rollouts)
    failing = np.random.default_rng([scenario.seed, 3])
    rate = scenario.failures * scenario.devices / HOUR

    now = 0.0
    end = now + failing.exponential(1 / rate) if rate else None
    while True:
        attempt = _Attempt(history, now)
        now = attempt.run(end)
        if history.done == scenario.steps:
            break
        assert end is not None

        history.fail(attempt)
        # A failure within a restart begins it anew.
        while True:
            until = now + scenario.restart_s
            end = now + failing.exponential(1 / rate)
            history.down_s += min(end, until) - now
            now = min(end, until)
            if now == until:
                break
            history.failures += 1
    return history.outcome(now)


class _History:
    """What lasts beyond a failure, and what is counted over the whole run."""

    def __init__(self, scenario: Scenario, rollouts: RolloutTimes):
        self.scenario = scenario
        self.rollouts = rollouts
        self.rollout_s = rollouts.seconds.tolist()
        self.hand_over_s = scenario.hand_over_bytes / scenario.hand_over_bandwidth
        sent_s = scenario.update_bytes / scenario.network_bandwidth
        self.update_s = max(scenario.update_s / scenario.training_devices, sent_s) + scenario.update_fixed_s
        self.write_s = scenario.checkpoint_bytes / scenario.checkpoint_bandwidth

        self.done = 0
        """Updates whose weights exist; back to a checkpoint after a failure."""
        self.written = [0]
        """Steps whose checkpoint is on the disk, the newest last."""
        self.journal: dict[int, int] = {}
        """Version of the weights of every finished rollout."""

        self.failures = 0
        self.down_s = 0.0
        self.redone_device_s = 0.0
        self.waited = {"rollout": 0.0, "trainer": 0.0}
        self.stalled_s = 0.0

    def seconds_of(self, rollout: int) -> float:
        return self.rollout_s[rollout % len(self.rollout_s)]

    def version_of(self, rollout: int) -> int:
        return max(0, rollout - self.scenario.staleness)

    def fail(self, attempt: "_Attempt") -> None:
        """Goes back to the newest complete checkpoint, and counts what has to be done again."""
        scenario = self.scenario
        self.failures += 1
        while not self._is_complete(self.written[-1]):
            self.written.pop()
        back = self.written[-1]

        # Engines are none of the run's devices.
        own = scenario.hosts * scenario.rollout_devices if scenario.is_beside else scenario.devices
        updates = (self.done - back) * (self.update_s + self.hand_over_s) + attempt.spent("trainer")
        self.redone_device_s += updates * scenario.training_devices + attempt.spent("rollout") * own
        self.done = back

    def _is_complete(self, step: int) -> bool:
        """Whether the run can go on from a checkpoint: what its weights are too new to sample is in the journal."""
        needed = range(step, min(step + self.scenario.staleness, self.scenario.steps))
        # Before the first update all of these rollouts are sampled by the first weights.
        return step == 0 or all(rollout in self.journal for rollout in needed)

    def outcome(self, seconds: float) -> Outcome:
        scenario = self.scenario
        rollouts = self.rollouts
        tokens = sum(int(rollouts.tokens[step % len(rollouts.tokens)]) for step in range(scenario.steps))
        # By its first tokens, which are older where a group spans rollouts.
        ages: Counter[int] = Counter()
        for step in range(scenario.steps):
            for span, groups in rollouts.spans[step % len(rollouts.spans)].items():
                ages[step - self.version_of(max(0, step - span))] += groups
        sampling = float(rollouts.sample_s.sum())
        held = float((rollouts.busy_rows * rollouts.sample_s).sum())
        lost = self.down_s * scenario.devices + self.redone_device_s
        return Outcome(
            scenario=scenario,
            seconds=seconds,
            rollout_s=float(rollouts.seconds.mean()),
            update_s=self.update_s + self.hand_over_s,
            tokens_per_s=tokens / seconds,
            staleness={age: count / scenario.steps / scenario.groups for age, count in sorted(ages.items())},
            rollout_idle=self.waited["rollout"] / seconds,
            trainer_idle=self.waited["trainer"] / seconds,
            empty_rows=1 - held / (sampling * scenario.rows * scenario.hosts) if sampling else 0.0,
            failures=self.failures,
            lost=lost / (seconds * scenario.devices),
            writing=self.stalled_s / seconds,
        )


class _Attempt:
    """A run from a start or restart to its end or the next failure."""

    def __init__(self, history: _History, now: float):
        self.history = history
        self.env = environment(now)
        self.version = history.done
        self._changed = self.env.event()
        self._writer = None
        self._begun: dict[str, float] = {}

    def run(self, until: float | None) -> float:
        """Runs to the end of the run or to `until`; returns the time."""
        is_beside = self.history.scenario.is_beside
        sides = [self._roll_out(), self._train()] if is_beside else [self._alternate()]
        through = self.env.all_of([self.env.process(side) for side in sides])
        if until is not None:
            through = self.env.any_of([through, self.env.timeout(until - self.env.now)])
        self.env.run(through)
        return self.env.now

    def spent(self, side: str) -> float:
        """Seconds that a side has been at what it has not finished."""
        return self.env.now - self._begun.get(side, self.env.now)

    def _alternate(self) -> Iterator:
        for step in range(self.history.done, self.history.scenario.steps):
            if step not in self.history.journal:
                yield from self._make(step)
            yield from self._update(step)

    def _roll_out(self) -> Iterator:
        history = self.history
        for step in range(history.done, history.scenario.steps):
            if step in history.journal:
                continue
            yield from self._wait("rollout", step, self._has_weights)
            yield from self._make(step)

    def _train(self) -> Iterator:
        history = self.history
        for step in range(history.done, history.scenario.steps):
            yield from self._wait("trainer", step, history.journal.__contains__)
            yield from self._update(step)

    def _make(self, step: int) -> Iterator:
        history = self.history
        version = history.version_of(step)
        assert version <= self.version, (step, version, self.version)
        yield from self._work("rollout", history.seconds_of(step))
        history.journal[step] = version
        self._tell()

    def _update(self, step: int) -> Iterator:
        history = self.history
        # The copy that is handed over is made before the next update writes over the weights.
        yield from self._work("trainer", history.update_s + history.hand_over_s)
        history.done = step + 1
        self.version = history.done
        self._tell()

        every = history.scenario.checkpoint_every
        if every and history.done % every == 0:
            yield from self._save(history.done)

    def _save(self, step: int) -> Iterator:
        begin = self.env.now
        if self._writer is not None:
            yield self._writer
        yield self.env.timeout(self.history.scenario.checkpoint_stall_s)
        self.history.stalled_s += self.env.now - begin
        self._writer = self.env.process(self._write(step))

    def _write(self, step: int) -> Iterator:
        yield self.env.timeout(self.history.write_s)
        self.history.written.append(step)

    def _work(self, side: str, seconds: float) -> Iterator:
        self._begun[side] = self.env.now
        yield self.env.timeout(seconds)
        del self._begun[side]

    def _has_weights(self, rollout: int) -> bool:
        """Whether the weights that are to sample a rollout exist."""
        return self.version >= self.history.version_of(rollout)

    def _wait(self, side: str, step: int, ready: Callable[[int], bool]) -> Iterator:
        begin = self.env.now
        while not ready(step):
            yield self._changed
        self.history.waited[side] += self.env.now - begin

    def _tell(self) -> None:
        """Wakes whoever waits."""
        changed = self._changed
        self._changed = self.env.event()
        changed.succeed()
