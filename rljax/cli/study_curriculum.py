"""Orders of a training set (2510.19099): easy first, hard first or shuffled, by five dimensions of difficulty.

    rljax study curriculum --config=papers/curriculum_study --workdir=runs/curriculum
    rljax study curriculum --config=papers/curriculum_study --trained_by=rollouts --workdir=runs/curriculum
    rljax study curriculum --config=papers/curriculum_study --orders= --seeds=1 --workdir=runs/measured

The config's model is trained by its warm-up, once for each seed, and answers every training task --samples times, which
says how hard it is. The same weights are then trained once for each measure and order: config.stages.steps updates on
the tasks' completions, or config.steps of the recipe. With --orders= tasks are measured alone; all measures of each are
in WORKDIR/seed-0/tasks.jsonl, by which config.curriculum=OrderedTasks(...) can order them. It runs on one process.
"""

from typing import cast

from absl import flags

from rljax.cli.command_line import define_config, launch

_CONFIG = define_config("papers/curriculum_study")
_WORKDIR = flags.DEFINE_string("workdir", "runs/curriculum", "Folder for tasks, page and figures; emptied first.")
_MEASURES = flags.DEFINE_list(
    "measures",
    "accuracy,sequence_perplexity,margin,token_entropy,token_nll_variance",
    "What tasks are ordered by: names of rljax.tasks.MEASURES, or columns of the data that hold numbers.",
)
_ORDERS = flags.DEFINE_list(
    "orders",
    "forward,reverse",
    "Some of forward, reverse, grouped_forward, grouped_reverse, low, middle, high; none: measure alone.",
)
_TRAINED_BY = flags.DEFINE_enum(
    "trained_by", "demonstrations", ["demonstrations", "rollouts"], "Supervised updates, or steps of the recipe."
)
_SAMPLES = flags.DEFINE_integer("samples", 20, "Answers to each training task that it is measured by.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Warm starts.")


def main() -> None:
    from rljax.analysis.study_curriculum import CurriculumOptions, TrainedBy, study_curriculum
    from rljax.parallel import require_one_process

    require_one_process("rljax study curriculum")
    options = CurriculumOptions(
        measures=tuple(_MEASURES.value),
        orders=tuple(_ORDERS.value),
        trained_by=cast(TrainedBy, _TRAINED_BY.value),
        samples=_SAMPLES.value,
        seeds=_SEEDS.value,
    )
    study_curriculum(_CONFIG.value, _WORKDIR.value, options)


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
