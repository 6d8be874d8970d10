"""CogMath (2506.04481): word problems with nine follow-ups each, which tell solving from understanding.

    rljax study cogmath --config=papers/cogmath --workdir=runs/cogmath
    rljax study cogmath --config=papers/cogmath:characters --workdir=runs/cogmath
    rljax study cogmath --config=papers/cogmath --checkpoint=runs/x --workdir=runs/cogmath

The model is the config's own, after its warm-up if there is one, or that of a run. config.evaluation.problems says how
many problems are asked, each with its follow-ups. It runs on one process.
"""

from absl import flags

from rljax.cli.command_line import define_config, launch

_CONFIG = define_config("papers/cogmath")
_WORKDIR = flags.DEFINE_string("workdir", "runs/cogmath", "Folder for page, picture and figures; emptied first.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run folder of a trained policy; none: the config's own model.")


def main() -> None:
    from rljax.analysis.study_cogmath import study_cogmath
    from rljax.parallel import require_one_process

    require_one_process("rljax study cogmath")
    study_cogmath(_CONFIG.value, _WORKDIR.value, checkpoint=_CHECKPOINT.value)


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
