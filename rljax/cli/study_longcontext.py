"""PRELUDE (2508.09848) and CharToM-QA (2501.01705): what a model finds in a long text, on generated texts.

    rljax study longcontext --config=papers/longcontext --workdir=runs/longcontext
    rljax study longcontext --config=papers/longcontext:characters --workdir=runs/longcontext
    rljax study longcontext --config=papers/longcontext --checkpoint=runs/x --workdir=runs/longcontext
    rljax study longcontext --judge=http://localhost:8000/v1 --judge_model=name --workdir=runs/longcontext

The model is the config's own, after its warm-up if there is one, or that of a run. config.evaluation.problems says how
many chronicles and stories are asked about, each in all its windows. A judge is asked about answers in sentences; the
text of all of them, and of the references, goes to it. It runs on one process.
"""

from absl import flags

from rljax.cli.command_line import define_config, launch

_CONFIG = define_config("papers/longcontext")
_WORKDIR = flags.DEFINE_string("workdir", "runs/longcontext", "Folder for page, picture and figures; emptied first.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run folder of a trained policy; none: the config's own model.")
_JUDGE = flags.DEFINE_string(
    "judge", None, "Address of a chat endpoint that judges answers in sentences; none: nobody."
)
_JUDGE_MODEL = flags.DEFINE_string("judge_model", None, "Name of the model there; needed with --judge.")
_JUDGE_KEY = flags.DEFINE_string("judge_key_variable", "", "Environment variable that holds its key; empty: no key.")


def main() -> None:
    from rljax.analysis.study_longcontext import endpoint_judge, study_longcontext
    from rljax.parallel import require_one_process

    require_one_process("rljax study longcontext")
    address = _JUDGE.value
    model = _JUDGE_MODEL.value
    judge = None
    if address and model:
        judge = endpoint_judge(address, model, _JUDGE_KEY.value)
    elif address or model:
        raise ValueError(
            f"--judge={address} and --judge_model={model}: give both, the address of an endpoint and the name of a "
            "model there, or neither"
        )
    study_longcontext(_CONFIG.value, _WORKDIR.value, checkpoint=_CHECKPOINT.value, judge=judge)


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
