"""A tiny run on the first rows of a data set of the hub, in a process of its own, for test_run_streamed.py.

`streamed_program.py FOLDER [DIES_AT]` kills itself by SIGKILL when it begins step DIES_AT, counted from 0.
"""

import os
import signal
import sys

import rljax.experiment.train
from rljax.experiment import HubData
from rljax.testing import tiny_config

STEPS = 5
ROWS = 10
"""Steps of 4 prompts end within an epoch, all but the last."""

if __name__ == "__main__":
    folder, *dies_at = sys.argv[1:]
    step_of_run = rljax.experiment.train.train_step

    def step_or_die(run, step):
        if str(step) in dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step_of_run(run, step)

    rljax.experiment.train.train_step = step_or_die
    data = HubData(path="user/echo", test_split="test", max_rows=ROWS)
    rljax.experiment.train.train(tiny_config(data=data, steps=STEPS), folder)
