"""Supervised fine-tuning: next-token loss on the completions of a data set, prompts masked out.

    rljax sft --config=sft_tiny --workdir=runs/sft
    rljax sft --config=sft_tiny --workdir=runs/sft --config.warmup.optimizer.learning_rate=3e-4

Steps, batch size and optimizer are those of config.warmup. The same command again resumes.
"""

from absl import flags

from rljax.cli.command_line import define_config, launch

_CONFIG = define_config("sft_tiny")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder: config, metrics, checkpoints, curve, summary.")
_FRESH = flags.DEFINE_bool("fresh", False, "Empty the run folder first instead of resuming from it.")


def main() -> None:
    from rljax.experiment.fine_tune import fine_tune

    if _WORKDIR.value is None:
        raise ValueError("--workdir is missing; name a folder for the run, e.g. --workdir=runs/sft")
    fine_tune(_CONFIG.value, _WORKDIR.value, fresh=_FRESH.value)


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
