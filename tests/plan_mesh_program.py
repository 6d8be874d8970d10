"""Run by test_run_plan.py in a process with four virtual devices: plans of tiny runs, compiled, as a JSON object."""

import contextlib
import dataclasses
import io
import json

from test_run_environment import make_config

from rljax.algorithms import GRPO
from rljax.experiment.dry_run import phase_peak, print_plan
from rljax.parallel import MeshConfig
from rljax.testing import tiny_config


def summary(config):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        result = print_plan(config)
    return {
        "phases": {phase.name: {"held": phase.held, "working": phase.working} for phase in result["phases"]},
        "peaks": {phase.name: phase_peak(phase, result["compiled"]) for phase in result["phases"]},
        "arguments": {program.name: program.memory.arguments for program in result["compiled"]},
        "kinds": {program.name: sorted({one.kind for one in program.collectives}) for program in result["compiled"]},
        "text": text.getvalue(),
    }


def main():
    mesh = MeshConfig(fsdp=4)
    update = dataclasses.replace(tiny_config().update, microbatch_size=4, trajectory_buckets=(16,))
    config = tiny_config(algorithm=GRPO(group_size=4, kl_coef=0.1), mesh=mesh, update=update)
    agent = make_config(mesh=mesh)
    agent.update.microbatch_size = 4
    print(json.dumps({"rows": summary(config), "agent": summary(agent)}))


if __name__ == "__main__":
    main()
