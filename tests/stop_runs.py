"""Asks a run to end at random moments, starts it again, and compares it with one that was left alone.

    python tests/stop_runs.py --times=20 --processes=1
    python tests/stop_runs.py --times=20 --processes=2

Prints what was under way at each moment. Fails if more is lost than that, or if a number of the run that was stopped
differs from the other's in any bit.
"""

import argparse
import collections
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from stopped_program import STEPS, WARMUP

from rljax.experiment.stops import EXIT_STATUS
from rljax.testing import params_fingerprint, rollout_records, run_metrics

TESTS = Path(__file__).parent
STOPS_OF_RUN = 7
"""Stops until a run is left alone to its end, and the next one begun."""
PATIENCE = 300
"""Seconds until a process that does not end counts as hung."""


class Started:
    """The processes of one start, and what the main one has said."""

    def __init__(self, folder: Path, processes: int):
        environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}")
        several: list[list[str]] = [[]]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            several = [[str(index), address] for index in range(processes)]

        self.log = folder.with_suffix(".log").open("ab")
        self.lines: list[str] = []
        self.times: list[float] = []
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(TESTS / "stopped_program.py"), str(folder), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
            )
            for arguments in several
        ]
        # Pipes are read all the time, so that no process waits for one.
        self.readers = [threading.Thread(target=self._read, args=(p,), daemon=True) for p in self.processes]
        for reader in self.readers:
            reader.start()

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            if line.startswith(("begins ", "ends ")):
                self.times.append(time.monotonic())
                self.lines.append(line.strip())

    def wait(self) -> list[int]:
        """Exit statuses. Whatever still runs after `PATIENCE` is killed, and raises."""
        try:
            codes = [process.wait(timeout=PATIENCE) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
            for reader in self.readers:
                reader.join(timeout=10)
            self.log.close()
        return codes

    def wait_for(self, line: str, count: int) -> None:
        """Until it has been said `count` times, or a process has ended."""
        until = time.monotonic() + PATIENCE
        while self.lines.count(line) < count and all(p.poll() is None for p in self.processes):
            assert time.monotonic() < until, (line, count, self.lines)
            time.sleep(0.01)

    def longest(self) -> dict[str, float]:
        """Seconds that each phase took at most, in the order of their first ends."""
        seconds: dict[str, float] = {}
        begun: dict[str, float] = {}
        for line, at in zip(self.lines, self.times, strict=True):
            kind, _, name = line.partition(" ")
            if kind == "begins":
                begun[name] = at
            else:
                seconds[name] = max(seconds.get(name, 0), at - begun[name])
        return seconds

    @property
    def phase(self) -> str:
        """What is under way by the newest line."""
        if not self.lines:
            return "start"
        kind, _, name = self.lines[-1].partition(" ")
        return name if kind == "begins" else f"after {name}"


def newest(folder: Path) -> int:
    """The step of the newest finished checkpoint in a folder; -1 for none."""
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=-1) if folder.is_dir() else -1


def progress(folder: Path) -> int:
    """Warm-up steps and steps that a next start will find done."""
    steps = newest(folder / "checkpoints")
    return WARMUP + steps if steps >= 0 else max(newest(folder / "warmup_checkpoints"), 0)


def ahead(folder: Path, phases: list[str]) -> list[str]:
    """Those of the phases that a next start comes to."""
    done = progress(folder)
    over = {"warm-up step": done >= WARMUP, "step": done >= WARMUP + STEPS}
    return [phase for phase in phases if not over.get(phase)]


def stop_once(folder: Path, processes: int, rng: random.Random, aim: str, longest: float) -> tuple[str, bool]:
    """Starts the run and stops it within `longest` seconds after the first or second beginning of the phase `aim`.
    Returns (what was under way, whether the run has ended)."""
    before = progress(folder)
    started = Started(folder, processes)
    started.wait_for(f"begins {aim}", rng.choice([1, 1, 2]))
    time.sleep(rng.uniform(0, longest))

    # As a scheduler does it all processes are asked, or, as an operator does, one of them.
    asked = started.processes if rng.random() < 0.5 else [rng.choice(started.processes)]
    number = rng.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    phase = started.phase
    for process in asked:
        if process.poll() is None:
            process.send_signal(number)
    codes = started.wait()
    log = folder.with_suffix(".log").read_text()[-3000:]
    # A signal that finds the run at its end, or the interpreter on its way out, stops nothing.
    if not any(codes) or (folder / "summary.json").exists():
        return phase, True

    assert set(codes) == {EXIT_STATUS}, (phase, number, codes, log)
    done = before + sum(line in ("ends warm-up step", "ends step") for line in started.lines)
    assert progress(folder) == done, (phase, number, progress(folder), done, log)
    return phase, False


def assert_the_same(folder: Path, undisturbed: Path) -> None:
    """Metrics, rollouts, weights and evaluations, bit for bit."""
    assert run_metrics(folder) == run_metrics(undisturbed)
    assert rollout_records(folder) == rollout_records(undisturbed)
    assert params_fingerprint(folder) == params_fingerprint(undisturbed)
    files = {p.name: p.read_text() for p in (folder / "evaluations").iterdir()}
    assert files == {p.name: p.read_text() for p in (undisturbed / "evaluations").iterdir()}


def run(root: Path, times: int, processes: int, seed: int = 0) -> collections.Counter:
    """How often the run was stopped after the beginning of each of its phases, `times` times in all, over as many runs
    as it takes. Each stop aims at a phase that lies ahead and has been aimed at the least."""
    undisturbed = root / "undisturbed"
    started = Started(undisturbed, processes)
    assert set(started.wait()) == {0}, undisturbed.with_suffix(".log").read_text()[-3000:]
    assert len(run_metrics(undisturbed)) == STEPS
    longest = started.longest()

    rng = random.Random(seed)
    aims = collections.Counter(dict.fromkeys(longest, 0))
    index = 0
    while aims.total() < times:
        folder = root / f"run{index}"
        has_ended = False
        upto = min(times, aims.total() + STOPS_OF_RUN)
        while not has_ended and aims.total() < upto:
            aim = min(ahead(folder, list(longest)), key=aims.__getitem__)
            phase, has_ended = stop_once(folder, processes, rng, aim, longest[aim])
            if not has_ended:
                aims[aim] += 1
                print(f"stop {aims.total()}, after the beginning of a {aim}: {phase}", flush=True)
        if not has_ended:
            assert set(Started(folder, processes).wait()) == {0}, folder.with_suffix(".log").read_text()[-3000:]
        assert_the_same(folder, undisturbed)
        index += 1
    return aims


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), arguments.times, arguments.processes, arguments.seed)
    print(f"{arguments.times} stops, {arguments.processes} processes: {dict(found)}; the same numbers, bit for bit")
