"""What a simulation says of runs that are made here, over what they took: 1 is right.

    python benchmarks/simulate.py --preset=full --json=simulate.json

`grown_over_measured`: from the steps of a small run, a run of four times the groups on as many decode rows.
`overlapped_over_measured`: rollouts beside updates on two devices, from the seconds of each phase of the same run.
`processes_over_measured`: the same of two processes that take turns. `engine_over_measured`: of rollouts by an engine
in another process, beside updates. `in_flight_over_measured`: of turns with tools between them and groups in flight.
CPU devices and processes share their cores, so that a phase takes another time beside others than alone; what all but
the first check is the schedule.

`small` is a character model, `full` a larger one for more steps.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import character_model, finish, machine, parse_arguments, short_updates
from _probe import probe
from engines import free_port, serve_command

SIZES = {
    "smoke": dict(steps=3, groups=4, width=32, layers=1, tokens=8),
    "small": dict(steps=16, groups=16, width=64, layers=2, tokens=16),
    "full": dict(steps=30, groups=32, width=128, layers=4, tokens=32),
}
GROWN = 4
GROUP = 4
TURNS = 3
TOOL_S = 0.1
ROWS = 16
"""Decode rows of an engine and of turns."""
ENGINE = "SIMULATE_ENGINE"
"""The variable with the address of the engine."""
LETTERS = "abcdefghijklmnopqrstuvwx"
TRAIN = """
import sys
sys.path.insert(0, {folder!r})
from rljax.experiment.train import train
from rljax.parallel import initialize_distributed
from simulate import config_of
initialize_distributed()
train(config_of({size!r}, {form!r}), {workdir!r})
"""


class Tool:
    """Three turns, before each of which but the first a tool takes its time."""

    def reset(self, row):
        self._turns = 0
        return row["prompt"]

    def step(self, action):
        from rljax.envs import Step

        self._turns += 1
        if self._turns < TURNS:
            time.sleep(TOOL_S)
        return Step("=", float(len(set(action))), self._turns == TURNS)


def tool_format() -> Any:
    """Turns end at one of three letters, or at the limit."""
    from rljax.envs import Parsed, ToolFormat

    return ToolFormat("plain", lambda text: Parsed(), stop_strings=tuple("abc"), wrap=("", ""))


def actor_of(size: dict[str, Any], form: str, plain: Any) -> Any:
    """Who rolls out."""
    from rljax.experiment import MultiTurn, Remote, RewardConfig

    context = 32 + TURNS * (size["tokens"] + 4)
    if form == "engine":
        command = serve_command(rows=ROWS, context_length=context, new_tokens=size["tokens"])
        rewards = (RewardConfig("rljax.testing:echo_reward"),)
        engines = (os.environ[ENGINE],)
        return Remote(rewards=rewards, longest_prompt=8, engines=engines, command=command, probes=1, wait_s=120.0)
    if form == "in_flight":
        return MultiTurn(
            make="simulate:Tool",
            tool_format="simulate:tool_format",
            context_length=context,
            prefill_chunks=(8, 32),
            decode_rows=ROWS,
            workers=2 * size["groups"] * GROUP,
            groups_in_flight=4,
        )
    # As many decode rows for every number of groups.
    return dataclasses.replace(plain.actor, prompt_slots=4, sample_slots=4, prompt_buckets=(8,))


def rollout_of(form: str) -> Any:
    from rljax.experiment import RolloutConfig

    if form == "overlapped":
        return RolloutConfig(devices=1, staleness=1)
    return RolloutConfig(staleness=1) if form == "engine" else RolloutConfig()


def config_of(size: dict[str, Any], form: str) -> Any:
    """The config of a run: `small`, `grown`, `overlapped`, `processes`, `engine` or `in_flight`."""
    from rljax.algorithms import DecoupledPPO
    from rljax.experiment import CheckpointConfig, EvaluationConfig, SamplingConfig
    from rljax.testing import tiny_config

    plain = tiny_config()
    return tiny_config(
        steps=size["steps"],
        prompts_per_step=size["groups"] * (GROWN if form == "grown" else 1),
        model=character_model(f"{LETTERS}=", size),
        # Pairs of these letters are enough for the groups of a step.
        data=dataclasses.replace(plain.data, letters=LETTERS),
        algorithm=DecoupledPPO(group_size=GROUP),
        actor=actor_of(size, form, plain),
        sampling=SamplingConfig(max_new_tokens=size["tokens"], truncated_is_wrong=False),
        update=short_updates(microbatch_size=2),
        rollout=rollout_of(form),
        # Neither belongs to the steps that are simulated.
        evaluation=EvaluationConfig(every=0, problems=4, samples=1),
        checkpoint=CheckpointConfig(every=0),
    )


def run(size: dict[str, Any], form: str, folder: Path) -> Path:
    """Trains in processes of their own; gives the run folder."""
    workdir = folder / form
    count = 2 if form == "processes" else 1
    address = f"127.0.0.1:{free_port()}"
    here = str(Path(__file__).parent)
    program = TRAIN.format(folder=here, size=size, form=form, workdir=str(workdir))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices_of(form)}"
    processes = []
    for index in range(count):
        places = {"RLJAX_COORDINATOR": address, "RLJAX_NUM_PROCESSES": str(count), "RLJAX_PROCESS_ID": str(index)}
        environment = {**os.environ, **(places if count > 1 else {}), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        processes.append(subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.DEVNULL))
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise RuntimeError(f"the run {form!r} ended with {statuses}")
    return workdir


def devices_of(form: str) -> int:
    """Virtual devices of each process."""
    return 2 if form == "overlapped" else 1


def simulated(size: dict[str, Any], form: str, measured: Any, devices: int) -> float:
    """Seconds of a step of the run `form`, by the costs of a measured run."""
    from rljax.experiment.build import build
    from rljax.experiment.simulate import scenario_of
    from rljax.simulation import simulate

    config = config_of(size, form)
    # The mesh of the run is not here: numbers that depend on it are given.
    built = build(dataclasses.replace(config, rollout=type(config.rollout)()))
    given = {
        "devices": devices,
        "devices_per_host": devices_of(form),
        "rollout_devices": config.rollout.devices,
        "staleness": config.rollout.staleness,
        "steps": 200,
    }
    # What a run's own folder does not tell.
    if form == "in_flight":
        given["tool_s"] = TOOL_S
    if form == "engine":
        given["rows"] = ROWS
    scenario = scenario_of(built, [], measured, {name: str(value) for name, value in given.items()}).scenario
    return simulate(scenario).step_s


def main() -> None:
    arguments = parse_arguments(__doc__.splitlines()[0], rivals=(), presets=tuple(SIZES))
    size = SIZES[arguments.preset]
    probes = [probe("float32", arguments.preset == "smoke")]

    from rljax.simulation import read_run

    # Each form is a process or two that compile all of their programs.
    sources = {"grown": "small"} | {form: form for form in ("overlapped", "processes", "engine", "in_flight")}
    os.environ[ENGINE] = f"http://127.0.0.1:{free_port()}"
    if arguments.preset == "smoke":
        sources = {"overlapped": "overlapped"}
    forms = dict.fromkeys([*sources.values(), *sources])

    results = []
    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        found = {form: read_run(run(size, form, Path(folder)), GROUP) for form in forms}
    for form, source in sources.items():
        said = simulated(size, form, found[source], found[form].devices)
        took = found[form].step_s
        results.append({"name": f"{form}, simulated", "seconds": said, "value": said})
        results.append({"name": f"{form}, measured", "seconds": took, "value": took})
        ratios[f"{form}_over_measured"] = said / took

    probes.append(probe("float32", arguments.preset == "smoke"))
    finish("simulate", arguments, machine(probes), size, results, ratios)


if __name__ == "__main__":
    main()
