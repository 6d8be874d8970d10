"""GeoSketch (2509.22460) as text: does drawing on a figure help to answer? Held-out problems with and without it.

    rljax study geosketch --config=papers/geosketch --workdir=runs/geosketch
    rljax study geosketch --config=papers/geosketch --checkpoint=runs/x --workdir=runs/geosketch

The model is the config's own, after its warm-up if there is one, or that of a run. config.evaluation.problems says how
many problems are asked, each three times: with an answer alone, with drawing without effect, and with the full loop. It
runs on one process.
"""

from absl import flags

from rljax.cli.command_line import define_config, launch

_CONFIG = define_config("papers/geosketch")
_WORKDIR = flags.DEFINE_string("workdir", "runs/geosketch", "Folder for page, picture and figures; emptied first.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run folder of a trained policy; none: the config's own model.")


def main() -> None:
    from rljax.analysis.study_geosketch import study_geosketch
    from rljax.parallel import require_one_process

    require_one_process("rljax study geosketch")
    study_geosketch(_CONFIG.value, _WORKDIR.value, checkpoint=_CHECKPOINT.value)


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
