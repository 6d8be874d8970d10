"""Random kills in a run on two processes: whether it ends, with the numbers of a run that is left alone.

    python benchmarks/chaos.py --json=chaos.json

Two cases, of 60 steps each. In `turns` episodes over turns have their environments behind Ray actors and are said by
engines that the run starts; in `answers` single turns are said by such engines and judged by worker processes. In the
course of each, 50 processes chosen at random are killed (SIGKILL, at random moments): one of the two trainers, an
engine, a Ray actor, the process of environments behind one, a process that judges. Behind the kill of a trainer both
are started again, as a cluster's scheduler does. Each case is run once more and left alone.

Reported are the kills by kind; whether metrics, rollouts and weights are those of the run that is left alone, bit for
bit, but for engines' log-probs, whose last bits depend on what is said beside, and which are not trained on; and how
many samples were judged more often than once, beside those that a kill takes with it while they are under way (a
rollout of a killed trainer, a sample of a killed judge), which are judged again and not lost.
"""

import argparse
import collections
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from _common import character_model, finish, machine, short_updates
from _probe import probe
from engines import free_port, serve_command

from rljax.algorithms import GRPO
from rljax.envs import RayConfig
from rljax.experiment import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    MeshConfig,
    Remote,
    RemoteMultiTurn,
    RewardConfig,
    RowsData,
    SamplingConfig,
)
from rljax.experiment.train import train
from rljax.parallel import initialize_distributed
from rljax.testing import params_fingerprint, rollout_records, run_metrics

SIZES = {
    "smoke": dict(steps=4, prompts=4, kills=4, cases=("answers",), layers=1, width=32),
    "small": dict(steps=60, prompts=8, kills=50, cases=("turns", "answers"), layers=1, width=32),
}
GROUP = 4
NEW_TOKENS = 8
PARTS = 2
HEARTBEAT_S = 10
PATIENCE_S = 600
"""Without a step, before the run counts as hanging."""
NOTES = "judged"
"""The file of a run's folder in which judges note what they are asked."""
ALPHABET = "".join(chr(i) for i in range(32, 127)) + "\n"

TRAINER, ENGINE, ACTOR, ENVIRONMENT, JUDGE = "trainer", "engine", "Ray actor", "environment", "judge"
KINDS = {"turns": (TRAINER, ENGINE, ACTOR, ENVIRONMENT), "answers": (TRAINER, ENGINE, JUDGE)}
MARKS = {
    ENGINE: "rljax\0serve\0",
    ACTOR: "ray::_Relay",
    ENVIRONMENT: "rljax.envs.host",
    JUDGE: "rljax.tasks.workers",
}
"""By what a process is known: a part of its command line."""

_OF_ENGINES = ("play/", "rollout/logprob_gap")
"""Metrics of how engines fared, and of the last bits of what they say."""


def config_of(case: str, size: dict[str, Any], engines: tuple[str, ...], weights: str) -> Config:
    context = 96
    command = serve_command(rows=16, context_length=context, new_tokens=NEW_TOKENS)

    # Weights have time to come to an engine that starts again beside others that do.
    over = dict(engines=engines, command=command, weights=weights, probes=1, wait_s=240.0)
    actors = {
        "turns": RemoteMultiTurn(
            make="_killed:Tool",
            tool_format="_killed:FORMAT",
            context_length=context,
            workers=4,
            hosts="ray",
            ray=RayConfig(cpus=0.5),
            **over,
        ),
        "answers": Remote(rewards=(RewardConfig("_killed:judged"),), longest_prompt=8, **over),
    }

    return Config(
        steps=size["steps"],
        prompts_per_step=size["prompts"],
        model=character_model(ALPHABET, size, max_position=context),
        data=RowsData(rows="_killed:questions", args={"size": 200}, test_args={"size": 2, "first": 900}),
        actor=actors[case],
        # Ratios are to what the trainer computes: the last bits of what an engine says depend on what it says beside.
        algorithm=GRPO(group_size=GROUP, kl_coef=0.0),
        sampling=SamplingConfig(max_new_tokens=NEW_TOKENS, truncated_is_wrong=False),
        update=short_updates(microbatch_size=PARTS),
        evaluation=EvaluationConfig(problems=2, samples=1, every=0),
        checkpoint=CheckpointConfig(every=1),
        mesh=MeshConfig(fsdp=-1),
    )


def train_as(index: int, address: str, folder: str, config: Config) -> None:
    """One of the two trainers."""
    os.environ |= {"RLJAX_NUM_PROCESSES": str(PARTS), "RLJAX_PROCESS_ID": str(index)}
    assert initialize_distributed(coordinator=address, heartbeat_s=HEARTBEAT_S)
    train(config, folder)


class Trainers:
    """Both processes of a run, which can be started again."""

    def __init__(self, case: str, preset: str, folder: Path):
        self.starts = 0
        self.log = folder / "trainers.log"
        self._case = case
        self._preset = preset
        self._folder = folder
        self._engines = ",".join(f"http://127.0.0.1:{free_port()}" for _ in range(PARTS))
        self._processes: list[subprocess.Popen] = []

    def start(self) -> None:
        self.starts += 1
        self._was_killed = False
        address = f"127.0.0.1:{free_port()}"
        environment = dict(
            os.environ,
            CHAOS_NOTES=str(self._folder / NOTES),
            XLA_FLAGS="--xla_force_host_platform_device_count=1",
        )
        arguments = [f"--preset={self._preset}", f"--case={self._case}", f"--folder={self._folder}"]
        arguments += [f"--address={address}", f"--engines={self._engines}"]
        with self.log.open("ab") as log:
            self._processes = [
                subprocess.Popen(
                    [sys.executable, __file__, *arguments, f"--index={index}"], stdout=log, stderr=log, env=environment
                )
                for index in range(PARTS)
            ]

    @property
    def pids(self) -> list[int]:
        """Of those that run; of none once one was killed."""
        if self._was_killed:
            return []
        return [process.pid for process in self._processes if process.poll() is None]

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self._was_killed = True

    def have_ended(self) -> bool:
        """Whether the run is done; starts both again behind a kill. Raises RuntimeError if one fails by itself."""
        if self._was_killed:
            # What one misses of the other ends it too. Before they have met that takes minutes, for which no scheduler
            # waits either.
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=3 * HEARTBEAT_S)
            self.end()
            self.start()
        statuses = [process.poll() for process in self._processes]
        if any(status not in (None, 0) for status in statuses):
            raise RuntimeError(f"a trainer ended with {statuses}; {self.log.read_text()[-3000:]}")
        return statuses == [0] * PARTS

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def cluster(case: str) -> Iterator[None]:
    """A Ray cluster of this machine, where a case needs one, that bears the end of those who use it."""
    if case != "turns":
        yield
        return
    import ray

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        ray.shutdown()


def processes_of(kind: str) -> list[int]:
    """Descendants of this process of that kind."""
    parents = {}
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_text(errors="replace")
        except OSError:  # it has ended in between
            continue
        parents[int(path.name)] = int(stat[1])
        if stat[0] != "Z" and MARKS[kind] in command and "keeper.py" not in command:
            found.append(int(path.name))

    def is_ours(pid: int) -> bool:
        while pid > 1:
            pid = parents.get(pid, 0)
            if pid == os.getpid():
                return True
        return False

    return sorted(filter(is_ours, found))


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def steps_of(folder: Path) -> int:
    """Steps that the run has logged."""
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


class Kill(NamedTuple):
    """One that is due `wait_s` seconds after the run has first logged `step` steps."""

    step: int
    wait_s: float
    kind: str


def planned(case: str, steps: int, count: int) -> list[Kill]:
    """So many kills over the steps of a run, the kinds of the case as often as each other."""
    rng = random.Random(f"{case} {count}")
    kinds = [KINDS[case][i % len(KINDS[case])] for i in range(count)]
    rng.shuffle(kinds)
    moments = sorted((rng.randrange(steps), rng.uniform(0.0, 2.0)) for _ in range(count))
    return [Kill(*moment, kind) for moment, kind in zip(moments, kinds, strict=True)]


def play(case: str, preset: str, folder: Path, kills: int) -> dict[str, Any]:
    """Runs a case to its end with so many kills; what was killed, and the seconds. RuntimeError if it hangs or fails by
    itself."""
    rng = random.Random(case)
    due = planned(case, SIZES[preset]["steps"], kills)
    done: collections.Counter[str] = collections.Counter()

    folder.mkdir()
    trainers = Trainers(case, preset, folder)
    trainers.start()
    begin = time.monotonic()
    moved = begin
    logged = {0: begin}
    try:
        while not trainers.have_ended():
            now = time.monotonic()
            # Behind a restart the run logs steps again: what counts is when it first had so many.
            if (steps := steps_of(folder)) > max(logged):
                logged |= dict.fromkeys(range(max(logged) + 1, steps + 1), now)
                moved = now
            if now - moved > PATIENCE_S:
                raise RuntimeError(f"no step for {PATIENCE_S} s; {trainers.log.read_text()[-3000:]}")

            next_one = due[done.total()] if done.total() < kills else None
            if next_one is not None and now > logged.get(next_one.step, math.inf) + next_one.wait_s:
                of_trainer = next_one.kind == TRAINER
                found = trainers.pids if of_trainer else processes_of(next_one.kind)
                # While something is being started again, the kill waits for it.
                if found:
                    (trainers.kill if of_trainer else kill)(rng.choice(found))
                    done[next_one.kind] += 1
                    moved = now
            time.sleep(0.05)
    finally:
        trainers.end()
    return {"kills": dict(done), "starts": trainers.starts, "seconds": time.monotonic() - begin}


def compared(folder: Path, wanted: Path) -> dict[str, bool]:
    """What of a run equals another, bit for bit, but for the last bits of the log-probs that engines say."""

    def metrics(path: Path) -> list[dict[str, Any]]:
        lines = run_metrics(path / "run")
        return [{k: v for k, v in line.items() if not k.startswith(_OF_ENGINES)} for line in lines]

    def rollouts(path: Path) -> dict[str, list[dict[str, Any]]]:
        files = rollout_records(path / "run")
        return {name: [{**line, "logprobs": None} for line in lines] for name, lines in files.items()}

    return {
        "metrics": metrics(folder) == metrics(wanted),
        "rollouts": rollouts(folder) == rollouts(wanted),
        "weights": params_fingerprint(folder / "run") == params_fingerprint(wanted / "run"),
    }


def judgements(folder: Path) -> int:
    """How often a judge was asked."""
    notes = folder / NOTES
    return notes.stat().st_size if notes.exists() else 0


def measure(case: str, preset: str, home: Path) -> dict[str, Any]:
    """A case with kills and left alone."""
    size = SIZES[preset]
    alone = home / f"{case}-alone"
    disturbed = home / f"{case}-disturbed"
    play(case, preset, alone, 0)
    found = play(case, preset, disturbed, size["kills"])

    found["equal"] = compared(disturbed, alone)
    found["judged"] = judgements(alone)
    found["judged_again"] = judgements(disturbed) - judgements(alone)
    found["under_way"] = found["kills"].get(TRAINER, 0) * size["prompts"] * GROUP + found["kills"].get(JUDGE, 0)
    return found


def told(case: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a case."""
    kills = {f"kills of the kind {kind}": count for kind, count in found["kills"].items()}
    counts = {name: found[name] for name in ("starts", "seconds", "judged", "judged_again", "under_way")}
    return [{"name": f"{case}: {name}", "value": value} for name, value in {**kills, **counts}.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(SIZES), default="small")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--cases", help=f"comma-separated, of {', '.join(KINDS)}; all of the preset's if not given")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the runs there")
    for name in ("case", "folder", "address", "engines"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.repeats = 1
    size = SIZES[arguments.preset]

    # This very script is started again as each of the trainers.
    if arguments.index is not None:
        folder = Path(arguments.folder)
        engines = tuple(arguments.engines.split(","))
        config = config_of(arguments.case, size, engines, str(folder / "weights"))
        train_as(arguments.index, arguments.address, str(folder / "run"), config)
        return

    cases = arguments.cases.split(",") if arguments.cases else size["cases"]
    if unknown := sorted(set(cases) - set(KINDS)):
        parser.error(f"--cases={arguments.cases}: {unknown[0]!r} is none of {', '.join(KINDS)}")

    with tempfile.TemporaryDirectory() as temporary:
        home = Path(arguments.keep or temporary)
        home.mkdir(parents=True, exist_ok=True)
        found = {}
        for case in cases:
            with cluster(case):
                found[case] = measure(case, arguments.preset, home)
            print(case, json.dumps(found[case]), flush=True)

    results: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for case, one in found.items():
        results += told(case, one)
        ratios |= {f"{case}_{part}_equal": float(same) for part, same in one["equal"].items()}
        if one["judged"]:
            ratios[f"{case}_judged_again_over_under_way"] = one["judged_again"] / max(1, one["under_way"])
    setting = {"parts": PARTS, **size, "cases": cases}
    finish("chaos", arguments, machine([probe("float32", arguments.preset == "smoke")]), setting, results, ratios)


if __name__ == "__main__":
    main()
