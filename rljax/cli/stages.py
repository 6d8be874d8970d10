"""Makes rows in stages (sample, annotate, filter, mix), trains on them, and repeats: expert iteration.

    rljax stages --config=papers/expert_iteration --workdir=runs/expert
    rljax stages --config=papers/expert_iteration --workdir=runs/expert --config.stages.rounds=5

Stages, rounds, steps and optimizer are those of config.stages; supervised steps of config.warmup come first. Every
stage leaves a file of rows in round-01/rows. The same command again goes on. It runs on one process.
"""

from absl import flags

from rljax.cli.command_line import define_config, launch

_CONFIG = define_config("papers/expert_iteration")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder: rows by round and stage, a run folder a round, scores.")
_FRESH = flags.DEFINE_bool("fresh", False, "Take away what is there first instead of going on from it.")


def main() -> None:
    from rljax.experiment.rounds import run_rounds
    from rljax.parallel import require_one_process

    if _WORKDIR.value is None:
        raise ValueError("--workdir is missing; name a folder for the rounds, e.g. --workdir=runs/expert")
    require_one_process("rljax stages")
    run_rounds(_CONFIG.value, _WORKDIR.value, fresh=_FRESH.value)


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
