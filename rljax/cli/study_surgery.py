"""Model Surgery (2407.08770): behaviour edited by adding a probe's direction to a few gates, beside its controls.

    rljax study surgery --config=papers/model_surgery --workdir=runs/surgery
    rljax study surgery --config=papers/model_surgery:smoke --seeds=1 --alphas=-1,1 --workdir=runs/surgery

The config's model is trained by its warm-up, once for each seed, and never by reinforcement. Rows of the data have a
prompt, a completion and the column `unwanted` (0 or 1); a reward of that name measures the behaviour in an answer.
config.evaluation says how held-out prompts are answered. It runs on one process.
"""

from typing import cast

from absl import flags

from rljax.cli.command_line import define_config, launch

_CONFIG = define_config("papers/model_surgery")
_WORKDIR = flags.DEFINE_string("workdir", "runs/surgery", "Folder for the figures; emptied first.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Warm starts.")
_ALPHAS = flags.DEFINE_list("alphas", "-2,-1,-0.5,0.5,1,2", "Sizes of the edit, in median norms of a gate.")
_SHARE = flags.DEFINE_float("share", 16_384 / 352_256, "Share of all neurons that are edited; default: the paper's.")
_PROBE = flags.DEFINE_enum(
    "probe", "gates", ["gates", "final"], "Fit one probe a layer to what its gates read, or one to the final states."
)
_TEXTS = flags.DEFINE_integer("texts", 1000, "Training texts that the probe is fitted to.")


def main() -> None:
    from rljax.analysis.study_surgery import ProbedAt, SurgeryOptions, study_surgery
    from rljax.parallel import require_one_process

    require_one_process("rljax study surgery")
    try:
        alphas = tuple(float(alpha) for alpha in _ALPHAS.value)
    except ValueError:
        raise ValueError(f"--alphas={','.join(_ALPHAS.value)} must be numbers with commas between, e.g. -1,1") from None
    options = SurgeryOptions(
        alphas=alphas,
        share=_SHARE.value,
        texts=_TEXTS.value,
        probe=cast(ProbedAt, _PROBE.value),
        seeds=_SEEDS.value,
    )
    study_surgery(_CONFIG.value, _WORKDIR.value, options)


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
