"""The command `rljax WORD [FLAGS]`: finds the module of the word and runs it."""

import importlib
import importlib.metadata
import sys
from collections.abc import Mapping
from typing import NamedTuple


class Command(NamedTuple):
    """What a word of the command runs."""

    module: str
    """Of `rljax.cli`."""
    about: str
    flags: tuple[str, ...] = ()
    """Flags that the word stands for."""
    words: Mapping[str, str] = {}
    """Modules of words that may follow it, each with flags of its own."""


COMMANDS = {
    "train": Command("train", "train a model with reinforcement learning; the same command again resumes"),
    "plan": Command("train", "print what a run would take: shapes, mesh, memory by part", ("--dry_run",)),
    "eval": Command("eval", "evaluate a model or a checkpoint on held-out problems"),
    "sft": Command("sft", "fine-tune on completions"),
    "prefer": Command("prefer", "learn from preferences: DPO and its kin, or a reward model"),
    "convert": Command("convert", "write weights and tokenizer as a Hugging Face folder"),
    "serve": Command("serve", "serve a model to runs elsewhere, token ids in and out, in vLLM's protocol"),
    "study": Command(
        "study",
        "compare a trained policy with its base, token by token; study surgery: edit weights along a probe",
        words={"surgery": "study_surgery"},
    ),
    "arena": Command("arena", "methods beside each other on tasks that can tell, with predictions and exact tests"),
    "snr": Command("snr", "what forks and their credit should bring on a task like yours, simulated"),
    "view": Command("view", "show runs in a browser, also while they train"),
    "agent-demo": Command("agent_demo", "a small model learns to use tools, by two methods"),
}


def main() -> None:
    """Runs `sys.argv`. An unknown word is one line and exit status 2."""
    word, *arguments = sys.argv[1:] or ["--help"]
    if word in ("--help", "-h", "help"):
        print(_usage())
        return
    if word == "--version":
        print(f"rljax {importlib.metadata.version('rljax-lm')}")
        return
    if word not in COMMANDS:
        print(f"error: rljax has no command {word!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)

    command = COMMANDS[word]
    module = command.module
    if arguments and arguments[0] in command.words:
        word = f"{word} {arguments[0]}"
        module = command.words[arguments.pop(0)]

    # absl and ml_collections read the flags from here.
    sys.argv = [f"rljax {word}", *command.flags, *arguments]
    importlib.import_module(f"rljax.cli.{module}").command()


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
