"""Task vectors (STV, 2511.08246): demonstrations replaced by a few attention-head outputs, beside their controls.

    rljax study stv --config=papers/stv --workdir=runs/stv
    rljax study stv --config=papers/stv:smoke --seeds=1 --steps=10 --workdir=runs/stv

The config's model is trained by its warm-up, once for each seed, and its weights are not touched again. Rows of the
data have a prompt with demonstrations, the query without them in the column `alone`, the right `answer`, of which the
first token counts, and a `task`; each task gets a vector of its own. It runs on one process.
"""

from absl import flags

from rljax.cli.command_line import define_config, launch

_CONFIG = define_config("papers/stv")
_WORKDIR = flags.DEFINE_string("workdir", "runs/stv", "Folder for the figures; emptied first.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Warm starts.")
_HEADS = flags.DEFINE_integer("heads", 4, "Heads that are overwritten, of all layers.")
_CENTROIDS = flags.DEFINE_integer("centroids", 8, "Outputs that a head may be given, of which one is chosen.")
_PROBES = flags.DEFINE_integer("probes", 64, "Training rows by which heads are found.")
_CONTEXTS = flags.DEFINE_integer("contexts", 256, "Training rows whose outputs are clustered.")
_STEPS = flags.DEFINE_integer("steps", 200, "Updates of the choice among centroids.")
_DRAWS = flags.DEFINE_integer("draws", 16, "Choices that are tried for a row in an update.")


def main() -> None:
    from rljax.analysis.study_stv import VectorOptions, study_stv
    from rljax.parallel import require_one_process

    require_one_process("rljax study stv")
    options = VectorOptions(
        heads=_HEADS.value,
        centroids=_CENTROIDS.value,
        probes=_PROBES.value,
        contexts=_CONTEXTS.value,
        steps=_STEPS.value,
        draws=_DRAWS.value,
        seeds=_SEEDS.value,
    )
    study_stv(_CONFIG.value, _WORKDIR.value, options)


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
