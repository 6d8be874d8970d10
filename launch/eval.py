"""Evaluates a model on the held-out problems of a config: greedy, avg@k, pass@k, maj@k with 95% intervals.

python launch/eval.py --config=configs/quickstart.py                          # the config's initial model
python launch/eval.py --config=configs/quickstart.py --checkpoint=runs/x      # the newest checkpoint of a run
python launch/eval.py --config=configs/quickstart.py --checkpoint=runs/x --step=20 --json=result.json
python launch/eval.py --config=configs/quickstart.py --config.model.path=my/folder --config.evaluation.samples=64
"""

from absl import flags
from cli import define_config, launch

_CONFIG = define_config("configs/quickstart.py")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run folder whose checkpoint is evaluated; none: initial model.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; none: the newest.")
_JSON = flags.DEFINE_string("json", None, "Write the result, with every completion, to this file.")


def main() -> None:
    from rljax.experiment.evaluate import evaluate_model

    evaluate_model(_CONFIG.value, checkpoint=_CHECKPOINT.value, step=_STEP.value, json_file=_JSON.value)


if __name__ == "__main__":
    launch(main)
