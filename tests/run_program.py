"""Runs the tiny config in a process of its own: `run_program.py FOLDER [STEPS]`, for test_run_kill.py."""

import sys

from rljax.experiment.train import train
from rljax.testing import tiny_config

if __name__ == "__main__":
    train(tiny_config(steps=int(sys.argv[2])), sys.argv[1])
