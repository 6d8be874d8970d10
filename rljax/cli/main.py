"""The command `rljax WORD [FLAGS]`: finds the module of the word and runs it."""

import importlib
import importlib.metadata
import importlib.util
import os
import select
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_FLAGS = ("absl", "ml_collections")
_PACKAGES = (
    *("jax", "flax", "optax", "orbax", "transformers", "sentencepiece", "numpy", "tensorstore", "chex", "jaxtyping"),
    *("etils", "safetensors", "huggingface_hub", "tokenizers", "jinja2", "tqdm", "matplotlib", "tensorboard"),
    *_FLAGS,
)
"""What an installed rljax brings with it."""


class Command(NamedTuple):
    """What a word of the command runs."""

    module: str
    """Of `rljax.cli`."""
    about: str
    flags: tuple[str, ...] = ()
    """Flags that the word stands for."""
    words: Mapping[str, str] = {}
    """Modules of words that may follow it, each with flags of its own."""
    packages: Sequence[str] = _PACKAGES
    """What cannot be missing where it runs."""


COMMANDS = {
    "train": Command("train", "train a model with reinforcement learning; the same command again resumes"),
    "plan": Command("train", "print what a run would take: shapes, mesh, memory by part", ("--dry_run",)),
    "eval": Command("eval", "evaluate a model or a checkpoint on held-out problems"),
    "sft": Command("sft", "fine-tune on completions"),
    "prefer": Command("prefer", "learn from preferences: DPO and its kin, or a reward model"),
    "stages": Command("stages", "make rows in stages (sample, annotate, filter, mix), train on them, and repeat"),
    "convert": Command("convert", "write weights and tokenizer as a Hugging Face folder"),
    "serve": Command("serve", "serve a model to runs elsewhere, token ids in and out, in vLLM's protocol"),
    "study": Command(
        "study",
        "compare a trained policy with its base, token by token; study surgery: edit weights along a probe; study "
        "stv: head outputs in place of demonstrations; study skills: evolve a shared repository of skills; study "
        "cogmath: word problems with nine follow-ups each; study longcontext: chronicles and stories in windows; study "
        "geosketch: geometry, with and without drawing; study curriculum: orders of a training set",
        words={
            "surgery": "study_surgery",
            "stv": "study_stv",
            "skills": "study_skills",
            "cogmath": "study_cogmath",
            "longcontext": "study_longcontext",
            "geosketch": "study_geosketch",
            "curriculum": "study_curriculum",
        },
    ),
    "arena": Command("arena", "methods beside each other on tasks that can tell, with predictions and exact tests"),
    "snr": Command("snr", "what forks and their credit should bring on a task like yours, simulated"),
    "view": Command("view", "show runs in a browser, also while they train", packages=_FLAGS),
    "agent-demo": Command("agent_demo", "a small model learns to use tools, by two methods"),
}


def main() -> None:
    """Runs `sys.argv`. An unknown word is one line and exit status 2."""
    word, *arguments = sys.argv[1:] or ["--help"]
    if word in ("--help", "-h", "help"):
        print(_usage())
        return
    if word == "--version":
        print(f"rljax {_version()}")
        return
    if word not in COMMANDS:
        print(f"error: rljax has no command {word!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)

    command = COMMANDS[word]
    if missing := [name for name in command.packages if importlib.util.find_spec(name) is None]:
        more = f" and {len(missing) - 4} more packages" if len(missing) > 4 else ""
        print(f"error: {sys.executable} lacks {', '.join(missing[:4])}{more}\n{_remedy()}", file=sys.stderr)
        sys.exit(2)
    module = command.module
    if command.words and arguments and not arguments[0].startswith("-"):
        second = arguments.pop(0)
        if second not in command.words:
            print(f"error: rljax {word} has no {second!r}; it has {', '.join(command.words)}", file=sys.stderr)
            sys.exit(2)
        word = f"{word} {second}"
        module = command.words[second]

    # absl and ml_collections read the flags from here.
    sys.argv = [f"rljax {word}", *command.flags, *arguments]
    try:
        importlib.import_module(f"rljax.cli.{module}").command()
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout.fileno()):
            raise
        # Who read its output has seen enough, such as `head`; what is still to be flushed at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _nobody_reads(descriptor: int) -> bool:
    """Whether this is a pipe of which the other end is closed."""
    poller = select.poll()
    poller.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poller.poll(0))


def _version() -> str:
    try:
        return importlib.metadata.version("rljax-lm")
    except importlib.metadata.PackageNotFoundError:
        return "of a clone that is not installed"


def _remedy() -> str:
    """How this Python, or another, gets what rljax needs."""
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    clone = Path(__file__).resolve().parents[2]
    if not (clone / "Makefile").is_file():
        return f'install rljax with what it needs: {pip} "rljax-lm[gguf,tasks]"'

    folder = shlex.quote(str(clone))
    own = clone / ".venv"
    if Path(sys.prefix) != own and (own / "bin" / "python").is_file():
        return f"start it with {folder}/.venv/bin/python, or install what it needs here: {pip} -e {folder}"
    return f"run `make -C {folder} setup` and start it with {folder}/.venv/bin/python, or: {pip} -e {folder}"


def _usage() -> str:
    width = max(len(word) for word in COMMANDS)
    lines = [f"  {word:<{width}}  {command.about}" for word, command in COMMANDS.items()]
    return "\n".join(
        [
            "Reinforcement learning of language models in JAX.",
            "",
            "usage: rljax COMMAND [FLAGS]",
            "",
            *lines,
            "",
            "rljax COMMAND --help lists the flags of a command and the fields of its config; rljax --version.",
        ]
    )
