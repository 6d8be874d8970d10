"""Converts weights and tokenizer to a Hugging Face folder.

rljax convert --source=model.gguf --target=folder
rljax convert --source=smollm2 --target=folder --dtype=bfloat16
rljax convert --source=runs/x --target=folder             # the newest checkpoint of a run
rljax convert --source=runs/x --target=folder --step=20
rljax convert --source=runs/x --target=folder --adapter   # what config.lora has trained, for PEFT or vLLM
rljax convert --source=adapter --target=folder            # a PEFT folder, merged into its model
rljax convert --source=runs/x --target=folder --push=user/name   # and sent to the Hugging Face hub, with a model card

It runs on one process.
"""

from absl import flags

from rljax.cli.command_line import launch

_SOURCE = flags.DEFINE_string("source", None, "Hugging Face folder, GGUF file, run folder, or smollm2.")
_TARGET = flags.DEFINE_string("target", None, "Folder to write.")
_STEP = flags.DEFINE_integer("step", None, "Step of a run folder's checkpoint; none: the newest.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the written weights.")

_ADAPTER = flags.DEFINE_bool("adapter", False, "Write the adapters alone, in PEFT's format.")
_PUSH = flags.DEFINE_string("push", "", "Repository on the Hugging Face hub, user/name, that the folder is sent to.")


def main() -> None:
    from rljax.experiment.convert import convert
    from rljax.parallel import require_one_process

    require_one_process("rljax convert")
    if _SOURCE.value is None or _TARGET.value is None:
        raise ValueError("name both --source (what to convert) and --target (the folder to write)")
    convert(
        _SOURCE.value,
        _TARGET.value,
        step=_STEP.value,
        dtype=_DTYPE.value,
        adapter=_ADAPTER.value,
        push=_PUSH.value,
    )


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
