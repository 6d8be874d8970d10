"""Runs on two processes of two devices each, of which the second rolls out, or does nothing; for test_run_shared.py.

    shared_overlap_program.py FOLDER INDEX ADDRESS KIND DEVICES [DIES_AT]

With DIES_AT process 1 is killed while that step is trained.
"""

import functools
import os
import signal
import sys

import jax
from absl import logging
from overlap_program import config

import rljax.experiment.train
from rljax.experiment.build import build
from rljax.experiment.train import train
from rljax.parallel import initialize_distributed, is_main_process

loop = rljax.experiment.train


def dies_at(last):
    step = loop.train_step

    def dies(run, index):
        if index == last and not is_main_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return step(run, index)

    loop.train_step = dies


if __name__ == "__main__":
    folder, index, address, kind, devices, *last = sys.argv[1:]
    logging.set_verbosity(logging.ERROR)
    os.environ |= {"RLJAX_NUM_PROCESSES": "2", "RLJAX_PROCESS_ID": index}
    assert initialize_distributed(coordinator=address, heartbeat_s=10)
    # Where all devices train and roll out, it is the first of each process alone, so that training is the same.
    firsts = {}
    for device in jax.devices():
        firsts.setdefault(device.process_index, device)
    if not int(devices):
        loop.build = functools.partial(build, devices=list(firsts.values()))
    for given in last:
        dies_at(int(given))
    train(config(kind, 1, int(devices)), folder)
