"""Studies of a trained policy beside the base that it came from, on the held-out examples of a config.

    rljax study --config=quickstart --checkpoint=runs/x --study=shifts
    rljax study --config=quickstart --checkpoint=runs/x --study=cross --threshold=0.1 --budget=20
    rljax study --config=quickstart --checkpoint=runs/x --study=extrapolate --tau=-0.3 --gamma=0.1

shifts       How far the next-token distribution has moved, and where (2603.22446).
cross        Accuracy when single tokens come from the other model where the two diverge (2603.22446).
extrapolate  Accuracy when tokens from which the policy has turned away are redrawn beyond it (2603.22117).

The base is the config's initial model, or the checkpoint of the run folder --base. config.evaluation says how examples
are answered: samples, temperature, top_p (2603.22446 and 2603.22117 take 0.7), batch_prompts. Nothing is cached in
cross and extrapolate: they are for small models, or few examples and short answers.
It runs on one process.
"""

from absl import flags

from rljax.cli.command_line import define_config, launch

_CONFIG = define_config("quickstart")
_STUDY = flags.DEFINE_enum("study", "shifts", ["shifts", "cross", "extrapolate"], "What is measured.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run folder of the policy.")
_STEP = flags.DEFINE_integer("step", None, "Step of the policy's checkpoint; none: the newest.")
_BASE = flags.DEFINE_string("base", None, "Run folder of the base; none: the config's initial model.")
_BASE_STEP = flags.DEFINE_integer("base_step", None, "Step of the base's checkpoint; none: the newest.")
_JSON = flags.DEFINE_string("json", None, "Write the result, with every completion, to this file.")

_PROBLEMS = flags.DEFINE_integer("problems", None, "Held-out examples; none: config.evaluation.problems. 0 is all.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "Tokens of an answer; none: config.sampling.max_new_tokens.")
_THRESHOLD = flags.DEFINE_float("threshold", 0.1, "shifts, cross: divergence (nats) at which the models differ.")
_BUDGET = flags.DEFINE_integer("budget", None, "cross: most interventions of an answer; none: no limit.")
_ENTROPY = flags.DEFINE_float("entropy", None, "cross: adds a control that intervenes above this entropy (nats).")
_TAU = flags.DEFINE_float("tau", -0.3, "extrapolate: redraw tokens whose log-prob has fallen by this much (nats).")
_GAMMA = flags.DEFINE_float("gamma", 0.1, "extrapolate: how far beyond the policy; 0 is the policy itself.")


def main() -> None:
    from rljax.analysis.study import StudyOptions, study
    from rljax.parallel import require_one_process

    require_one_process("rljax study")
    if _CHECKPOINT.value is None:
        raise ValueError("--checkpoint is missing; name the run folder of the policy, e.g. --checkpoint=runs/x")
    if _BASE.value is None and _BASE_STEP.value is not None:
        raise ValueError(f"--base_step={_BASE_STEP.value} is a step of a run folder; name it with --base=FOLDER")
    config = _CONFIG.value
    if _PROBLEMS.value is not None:
        config.evaluation.problems = _PROBLEMS.value
    if _MAX_TOKENS.value is not None:
        config.sampling.max_new_tokens = _MAX_TOKENS.value
    options = StudyOptions(
        threshold=_THRESHOLD.value,
        budget=_BUDGET.value,
        entropy=_ENTROPY.value,
        tau=_TAU.value,
        gamma=_GAMMA.value,
    )
    study(
        config,
        _STUDY.value,
        checkpoint=_CHECKPOINT.value,
        step=_STEP.value,
        base=_BASE.value,
        base_step=_BASE_STEP.value,
        options=options,
        json_file=_JSON.value,
    )


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
