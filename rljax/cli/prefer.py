"""Learns from preferences: pairs of completions of which one is better, for a policy or a reward model.

    rljax prefer --config=papers/dpo --workdir=runs/dpo
    rljax prefer --config=papers/dpo --workdir=runs/dpo --config.preferences.method.beta=0.3

Steps, batch size, method and optimizer are those of config.preferences; supervised steps of config.warmup
come first. The same command again resumes. On several hosts, run it once per host, as rljax train.
"""

from absl import flags

from rljax.cli.command_line import define_config, launch
from rljax.cli.processes import define_processes

_CONFIG = define_config("papers/dpo")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder: config, metrics, checkpoints, curve, summary.")
_FRESH = flags.DEFINE_bool("fresh", False, "Empty the run folder first instead of resuming from it.")
_JOIN = define_processes()


def main() -> None:
    from rljax.experiment.prefer import prefer

    if _WORKDIR.value is None:
        raise ValueError("--workdir is missing; name a folder for the run, e.g. --workdir=runs/dpo")
    _JOIN()
    prefer(_CONFIG.value, _WORKDIR.value, fresh=_FRESH.value)


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
