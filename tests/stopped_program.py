"""Run by stop_runs.py: a run with a warm-up, evaluations and checkpoints; says where it stands, line by line."""

import os
import sys

from absl import logging

import rljax.experiment.sft
import rljax.experiment.train
from rljax.experiment import CheckpointConfig, EvaluationConfig, WarmupConfig
from rljax.experiment.train import train
from rljax.parallel import initialize_distributed, is_main_process
from rljax.tasks import Example
from rljax.testing import tiny_config
from rljax.training import OptimizerConfig

STEPS = 6
WARMUP = 12


def repeated(examples):
    """Demonstrations that say the first letter four times."""
    return [Example(e.prompt, {**e.columns, "completion": e.columns["answer"] * 4}) for e in examples]


def config(processes):
    few = tiny_config()
    update = few.update
    if processes > 1:
        update.microbatch_size = processes
    return tiny_config(
        steps=STEPS,
        update=update,
        warmup=WarmupConfig(
            steps=WARMUP, batch_size=8, demonstrations=repeated, optimizer=OptimizerConfig(learning_rate=1e-3)
        ),
        evaluation=EvaluationConfig(problems=8, samples=2, every=2, batch_prompts=4),
        checkpoint=CheckpointConfig(every=4),
    )


def said(name, function):
    """The function, which says that it begins and that it is done."""

    def wrapped(*args, **kwargs):
        print(f"begins {name}", flush=True)
        result = function(*args, **kwargs)
        print(f"ends {name}", flush=True)
        return result

    return wrapped


def main(folder, *process):
    logging.set_verbosity(logging.ERROR)
    if process:
        os.environ |= {"RLJAX_NUM_PROCESSES": "2", "RLJAX_PROCESS_ID": process[0]}
        assert initialize_distributed(coordinator=process[1])
    if is_main_process():
        loop = rljax.experiment.train
        rljax.experiment.sft.supervised_step = said("warm-up step", rljax.experiment.sft.supervised_step)
        loop.train_step = said("step", loop.train_step)
        loop.evaluate_run = said("evaluation", loop.evaluate_run)
        loop.Loop.save_place = said("save", loop.Loop.save_place)
    train(config(2 if process else 1), folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
