"""Run by test_run_mesh.py: the whole loop on the devices of this process or of several; prints what it computed."""

import json
import os
import sys
from pathlib import Path

import jax
from absl import logging

import rljax.experiment.train
from rljax.experiment import FreshModel, MeshConfig, RewardConfig, SingleTurn, UpdateConfig
from rljax.experiment.train import train
from rljax.parallel import initialize_distributed, is_main_process
from rljax.testing import rollout_records, run_metrics, tiny_config
from rljax.training import OptimizerConfig, RunFolder


def config(mesh):
    update = UpdateConfig(
        pack_length=64,
        microbatch_size=8,
        length_buckets=(64,),
        score_buckets=(64,),
        row_buckets=(32,),
        microbatch_buckets=(1, 2),
        head_chunk=64,
    )
    # Adam's own eps amplifies the rounding of tiny gradients.
    optimizer = OptimizerConfig(learning_rate=1e-2, eps=1e-3)
    model = FreshModel(  # an even vocabulary, to split over `tensor`
        alphabet="abcdefghi=", num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
    )
    actor = SingleTurn(rewards=(RewardConfig("flaky_rewards:noted"),), prompt_buckets=(4,))
    return tiny_config(
        actor=actor,
        steps=3,
        prompts_per_step=8,
        model=model,
        mesh=MeshConfig(*mesh),
        update=update,
        optimizer=optimizer,
    )


def fails(run, step):
    raise RuntimeError("this process alone")


def read_again(given, workdir):
    """The summary of the run that is over, of which only the main process sees the evaluations."""
    if not is_main_process():
        RunFolder.evaluation_file = lambda self, step: self.path / "unseen" / f"{step}.json"
    return train(given, str(workdir))


def main(folder, shapes):
    logging.set_verbosity(logging.ERROR)
    found = {}
    for shape in shapes:
        workdir = Path(folder) / shape
        given = config([int(n) for n in shape.split("x")])
        summary = train(given, str(workdir))
        if jax.process_count() > 1:
            again = read_again(given, workdir)
            assert again["after"] == summary["after"]
        if is_main_process():
            found[shape] = {
                "metrics": run_metrics(workdir),
                "tokens": {name: [r["tokens"] for r in rows] for name, rows in rollout_records(workdir).items()},
                "after": summary["after"],
            }
    print(json.dumps(found))


if __name__ == "__main__":
    if len(sys.argv) > 3:
        os.environ |= {"RLJAX_NUM_PROCESSES": "2", "RLJAX_PROCESS_ID": sys.argv[3]}
        assert initialize_distributed(coordinator=sys.argv[4])
        if sys.argv[5:] == [sys.argv[3]]:
            rljax.experiment.train.train_step = fails
    main(sys.argv[1], sys.argv[2].split(","))
