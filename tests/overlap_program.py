"""Run by test_run_overlap.py on 8 virtual devices: runs whose rollouts are made beside updates, or in turn.

    overlap_program.py FOLDER                              # all of them in one process; prints what they computed
    overlap_program.py FOLDER KIND STALENESS DEVICES [INDEX ADDRESS]
                                                           # one of them, to be killed and started again; as one of two

The learner has the first half of a process's devices. Where the actor has none of its own, the run has these alone.
"""

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
from absl import logging

import rljax.experiment.pipeline
import rljax.experiment.train
from rljax.algorithms import DecoupledPPO
from rljax.experiment import CheckpointConfig, EvaluationConfig, FreshModel, MultiTurn, RolloutConfig, RowsData
from rljax.experiment.build import build
from rljax.experiment.stops import Stopped
from rljax.experiment.train import train
from rljax.parallel import initialize_distributed
from rljax.testing import params_fingerprint, rollout_records, run_metrics, tiny_config

STEPS = 6

loop = rljax.experiment.train
pipeline = rljax.experiment.pipeline


def config(kind, staleness, devices, every=1):
    given = tiny_config(
        steps=STEPS,
        algorithm=DecoupledPPO(group_size=4),
        rollout=RolloutConfig(devices=devices, staleness=staleness),
        evaluation=EvaluationConfig(problems=4, samples=2, every=4),
        checkpoint=CheckpointConfig(every=every),
    )
    given.update.microbatch_size = half() * jax.process_count()
    if kind == "turns":
        given.model = FreshModel(
            alphabet="n0123456789:;?y<> \n",
            num_layers=1,
            embed_dim=32,
            num_heads=2,
            num_kv_heads=2,
            head_dim=16,
            mlp_dim=64,
            max_position=512,
        )
        given.data = RowsData(rows="agent_tasks:rows", args={"size": 40}, test_args={"size": 6, "first": 100})
        given.actor = MultiTurn(
            make="agent_tasks:Unsteady",
            tool_format="agent_tasks:FORMAT",
            context_length=64,
            prefill_chunks=(8, 64),
            workers=4,
            groups_in_flight=3,
            answers_after=1,
        )
    return given


def start(given, folder, devices):
    """`train` on the devices of both halves, or on those of one."""
    count = half() + devices
    chosen = [jax.local_devices(process)[:count] for process in range(jax.process_count())]
    loop.build = functools.partial(build, devices=[device for part in chosen for device in part])
    return train(given, str(folder))


def half():
    return jax.local_device_count() // 2


def computed(folder):
    """What must be equal in two runs."""
    return {
        "metrics": run_metrics(folder),
        "records": rollout_records(folder),
        "weights": params_fingerprint(folder),
        "evaluations": {file.name: file.read_text() for file in sorted((Path(folder) / "evaluations").iterdir())},
    }


def broken_off(given, folder, *, at, hangs_at=None, stop=False):
    """Starts a run that breaks off before the updates of step `at`, while the rollout of `hangs_at` does not end;
    returns the steps that were run and the rollouts that were made."""
    steps = []
    made = []
    step = loop.train_step
    collect = pipeline.collect

    def breaks(run, index):
        steps.append(index)
        if index != at:
            return step(run, index)
        run.pipeline.order(index, run.policy())
        if hangs_at is not None:
            while hangs_at - 1 not in made:
                time.sleep(0.01)
        if not stop:
            raise KeyboardInterrupt
        with run.stops.abandonable():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    def hangs(actor, plan, draw, n, index, version, **rules):
        while index == hangs_at:
            time.sleep(0.01)
        made.append(index)
        return collect(actor, plan, draw, n, index, version, **rules)

    loop.train_step = breaks
    pipeline.collect = hangs
    loop.SETTLE_S = 1.0
    try:
        start(given, folder, half())
    except (KeyboardInterrupt, Stopped):
        pass
    finally:
        loop.train_step = step
        pipeline.collect = collect
    return {"steps": steps, "made": made}


def everything(folder):
    found = {}
    for staleness in (1, 4):
        for devices in (0, half()):
            name = f"{staleness}/{devices}"
            start(config("single", staleness, devices), folder / name, devices)
            found[name] = computed(folder / name)

    given = config("single", 4, half())
    broken = folder / "broken"
    found["pieces"] = [
        broken_off(given, broken, at=3, hangs_at=5),
        broken_off(given, broken, at=4, stop=True),
        broken_off(given, broken, at=5),
        broken_off(given, broken, at=-1),
    ]
    found["broken"] = computed(broken)
    found["journal"] = sorted(file.name for file in (broken / "journal").iterdir())
    return found


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        kind, staleness, devices = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
        if len(sys.argv) > 5:
            os.environ |= {"RLJAX_NUM_PROCESSES": "2", "RLJAX_PROCESS_ID": sys.argv[5]}
            assert initialize_distributed(coordinator=sys.argv[6])
        start(config(kind, staleness, devices), folder, devices)
    else:
        print(json.dumps(everything(folder)))
