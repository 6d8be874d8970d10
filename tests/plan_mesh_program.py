"""Run by test_run_plan.py in a process with four virtual devices: plans of tiny runs, compiled, and of
updates of sequences that devices share, as a JSON object."""

import contextlib
import dataclasses
import io
import json

import jax
from test_run_environment import make_config

from rljax.algorithms import GRPO, DecoupledPPO
from rljax.experiment import RolloutConfig
from rljax.experiment.dry_run import phase_peak, print_plan
from rljax.experiment.memory import predict_update
from rljax.models import DecoderConfig
from rljax.parallel import MeshConfig, compiled_memory, make_mesh
from rljax.testing import full_minibatch, tiny_config
from rljax.training import Learner, OptimizerConfig, UpdateConfig

MODEL = DecoderConfig(
    vocab_size=256, num_layers=4, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128, dtype="float32"
)


def summary(config, **how):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        result = print_plan(config, **how)
    return {
        "phases": {phase.name: {"held": phase.held, "working": phase.working} for phase in result["phases"]},
        "peaks": {phase.name: phase_peak(phase, result["compiled"]) for phase in result["phases"]},
        "arguments": {program.name: program.memory.arguments for program in result["compiled"]},
        "kinds": {program.name: sorted({one.kind for one in program.collectives}) for program in result["compiled"]},
        "text": text.getvalue(),
    }


def shared(devices, remat):
    """What an update of one sequence adds on each of so many devices that share it: by part, and as compiled."""
    mesh = make_mesh(sequence=devices, devices=jax.devices()[:devices])
    update = UpdateConfig(pack_length=2048, microbatch_size=1, remat=remat)
    learner = Learner(MODEL, GRPO(kl_coef=0.0).build().loss, OptimizerConfig(), update, mesh=mesh)
    batch = full_minibatch(mesh, microbatches=1, rows=1, length=2048)
    compiled = learner.lower_update(batch).compile()
    return {"predicted": predict_update(learner, batch), "compiled": compiled_memory(compiled).temporaries}


def main():
    mesh = MeshConfig(fsdp=4)
    update = dataclasses.replace(tiny_config().update, microbatch_size=4, trajectory_buckets=(16,))
    config = tiny_config(algorithm=GRPO(group_size=4, kl_coef=0.1), mesh=mesh, update=update)
    agent = make_config(mesh=mesh)
    agent.update.microbatch_size = 4
    plans = {"rows": summary(config), "agent": summary(agent)}
    rollout = RolloutConfig(devices=2, staleness=3)
    halves = tiny_config(algorithm=DecoupledPPO(group_size=4), rollout=rollout, update=update)
    plan_of_halves = summary(halves, measure=False)
    sharing = {remat: [shared(devices, remat) for devices in (1, 4)] for remat in ("full", "none")}
    print(json.dumps({"plans": plans, "halves": plan_of_halves, "sharing": sharing}))


if __name__ == "__main__":
    main()
