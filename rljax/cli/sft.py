"""Supervised fine-tuning: next-token loss on the completions of a data set, prompts masked out.

    rljax sft --config=sft_tiny --workdir=runs/sft
    rljax sft --config=sft_tiny --workdir=runs/sft --config.warmup.optimizer.learning_rate=3e-4

Steps, batch size and optimizer are those of config.warmup. The same command again resumes. On several
hosts, run it once per host, as rljax train.
"""

from absl import flags

from rljax.cli.command_line import define_config, launch
from rljax.cli.processes import define_processes

_CONFIG = define_config("sft_tiny")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder: config, metrics, checkpoints, curve, summary.")
_FRESH = flags.DEFINE_bool("fresh", False, "Empty the run folder first instead of resuming from it.")
_JOIN = define_processes()


def main() -> None:
    from rljax.experiment.fine_tune import fine_tune

    if _WORKDIR.value is None:
        raise ValueError("--workdir is missing; name a folder for the run, e.g. --workdir=runs/sft")
    _JOIN()
    fine_tune(_CONFIG.value, _WORKDIR.value, fresh=_FRESH.value)


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
