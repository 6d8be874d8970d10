"""Evaluates a model on the held-out problems of a config: greedy, avg@k, pass@k, maj@k with 95% intervals.

rljax eval --config=quickstart                          # the config's initial model
rljax eval --config=quickstart --checkpoint=runs/x      # the newest checkpoint of a run
rljax eval --config=quickstart --checkpoint=runs/x --step=20 --json=result.json
rljax eval --config=quickstart --config.model.path=my/folder --config.evaluation.samples=64

On several hosts, run it once per host, as rljax train; process 0 prints and writes.
"""

from absl import flags

from rljax.cli.command_line import define_config, launch
from rljax.cli.processes import define_processes

_CONFIG = define_config("quickstart")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run folder whose checkpoint is evaluated; none: initial model.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; none: the newest.")
_JSON = flags.DEFINE_string("json", None, "Write the result, with every completion, to this file.")
_JOIN = define_processes()


def main() -> None:
    from rljax.experiment.evaluate import evaluate_model

    _JOIN()
    evaluate_model(_CONFIG.value, checkpoint=_CHECKPOINT.value, step=_STEP.value, json_file=_JSON.value)


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
