"""Converts weights and tokenizer to a Hugging Face folder.

python launch/convert.py --source=model.gguf --target=folder
python launch/convert.py --source=smollm2 --target=folder --dtype=bfloat16
python launch/convert.py --source=runs/x --target=folder             # the newest checkpoint of a run
python launch/convert.py --source=runs/x --target=folder --step=20
"""

from absl import flags
from cli import launch

_SOURCE = flags.DEFINE_string("source", None, "Hugging Face folder, GGUF file, run folder, or smollm2.", required=True)
_TARGET = flags.DEFINE_string("target", None, "Folder to write.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step of a run folder's checkpoint; none: the newest.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the written weights.")


def main() -> None:
    from rljax.experiment.convert import convert

    convert(_SOURCE.value, _TARGET.value, step=_STEP.value, dtype=_DTYPE.value)


if __name__ == "__main__":
    launch(main)
