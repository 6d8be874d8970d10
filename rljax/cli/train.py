"""Trains a language model with reinforcement learning.

    rljax train --config=quickstart --workdir=runs/x
    rljax train --config=quickstart --workdir=runs/x --config.optimizer.learning_rate=1e-5
    rljax train --config=quickstart --workdir=runs/x --dry_run
    rljax train --config=quickstart --workdir=runs/y --replay=runs/x
    rljax train --config=quickstart --dry_run --topology=v5e:4x4
    rljax plan --config=quickstart --simulate --measured=runs/x --assume=devices=64

Run the same command again after a stop and it goes on where the newest checkpoint left off. On several hosts, run it
once per host with --coordinator, --num_processes and --process_id (TPU pods and Slurm find these by themselves with
--distributed).
"""

from absl import flags

from rljax.cli.command_line import define_config, launch
from rljax.cli.processes import define_processes

_CONFIG = define_config("quickstart")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder: config, metrics, rollouts, checkpoints, curve, summary.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan (parameters, memory, tokens, shapes, mesh) and exit.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "With --dry_run: a machine to compile for that need not be here, such as v5e:16x16 or h100:64."
)
_SIMULATE = flags.DEFINE_bool(
    "simulate",
    False,
    "With --dry_run: simulate the run on a cluster for every split of its devices (extra `simulate`).",
)
_MEASURED = flags.DEFINE_string("measured", "", "With --simulate: a run folder, whose steps say what a step costs.")
_ASSUME = flags.DEFINE_multi_string(
    "assume", [], "With --simulate: field=value of `rljax.simulation.Scenario`, such as devices=512; repeat the flag."
)
_FRESH = flags.DEFINE_bool("fresh", False, "Empty the run folder first instead of resuming from it.")
_REPLAY = flags.DEFINE_string(
    "replay", "", "A run folder whose recorded rollouts (config.log.recordings) are trained on; nothing is sampled."
)
_JOIN = define_processes()


def main() -> None:
    from rljax.experiment.dry_run import print_plan
    from rljax.experiment.simulate import print_simulation
    from rljax.experiment.train import train

    if _TOPOLOGY.value and not _DRY_RUN.value:
        raise ValueError(f"--topology={_TOPOLOGY.value} names a machine to plan for; add --dry_run")
    if _SIMULATE.value and not _DRY_RUN.value:
        raise ValueError("--simulate belongs to a plan: rljax plan --simulate, or add --dry_run")
    if (_MEASURED.value or _ASSUME.value) and not _SIMULATE.value:
        raise ValueError("--measured and --assume say what is simulated; add --simulate")
    if _REPLAY.value and _DRY_RUN.value:
        raise ValueError(f"--replay={_REPLAY.value} trains; leave out --dry_run")
    if _WORKDIR.value is None and not _DRY_RUN.value:
        raise ValueError("--workdir is missing; name a folder for the run, e.g. --workdir=runs/first")
    _JOIN()
    if _SIMULATE.value:
        print_simulation(_CONFIG.value, topology=_TOPOLOGY.value, measured=_MEASURED.value, assumed=_ASSUME.value)
    elif _DRY_RUN.value or _WORKDIR.value is None:
        print_plan(_CONFIG.value, topology=_TOPOLOGY.value)
    else:
        train(_CONFIG.value, _WORKDIR.value, fresh=_FRESH.value, replay=_REPLAY.value)


def more_help() -> str:
    """The numbers of a simulation, as `--assume` takes them."""
    from rljax.experiment.describe import describe
    from rljax.simulation import Scenario

    return f"Numbers of a simulation:\n\n{describe(Scenario(), 'assume=')}"


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
