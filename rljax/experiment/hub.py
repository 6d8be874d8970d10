"""Models sent to the Hugging Face hub, and the card that says where their weights come from."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rljax.training import AnyPath

CARD = "README.md"
"""What the hub shows of a model."""

_SHOWN = re.compile(r"(pass|avg|maj)@\d+|greedy")
"""The metrics of an evaluation that a card shows."""


def open_repository(name: str) -> None:
    """Makes the model repository `name` on the hub, private, unless it is there; so a model that cannot be sent is not
    converted first. Raises ValueError for another form than user/name, and where the hub refuses."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"--push={name} must have the form user/name, a model's repository on the hub")
    with _refusals(name) as api:
        api.create_repo(name, private=True, exist_ok=True)


def send(folder: Path, name: str) -> str:
    """Sends the files of `folder` to the model repository `name`; returns the address of the commit. Files that lie
    there under other names stay. Raises ValueError where the hub refuses."""
    with _refusals(name) as api:
        commit = api.upload_folder(folder_path=folder, repo_id=name, commit_message="Weights by rljax convert")
    return str(commit.commit_url)


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[Any]:
    """The hub's client, whose errors become one line."""
    import huggingface_hub

    try:
        yield huggingface_hub.HfApi(library_name="rljax")
    except Exception as error:
        # Whatever the client raises: an answer of the hub, none, or a name that it does not take.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--push={name}: the hub refuses or cannot be reached ({reason:.300}); log in with `hf auth login`, or set "
            "HF_TOKEN to a token that may write there"
        ) from error


def model_card(
    name: str, source: AnyPath, *, dtype: str, adapter: bool, base: str = "", step: int | None = None
) -> str:
    """The card, in Markdown, of the model `name`, whose weights were converted from `source`: with what a run folder
    says of itself, if it is one. `base` is the model that adapters stand beside; `step` is the checkpoint, None the
    newest.

    Paths of the machine are left out; a base is linked where it is named like a model of the hub.
    """
    config = _read(source / "config.json")
    is_run = "algorithm" in config and "sampling" in config
    method = config["algorithm"]["class"] if is_run else ""
    began = (base or str(config.get("model", {}).get("path", ""))) if is_run or adapter else ""
    on_hub = began if re.fullmatch(r"[\w-]+/[\w.-]+", began) and not Path(began).exists() else ""

    head = [
        "---",
        f"library_name: {'peft' if adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        *([f"base_model: {on_hub}"] if on_hub else []),
        "tags:",
        "- rljax",
        *([f"- {method.lower()}"] if method else []),
        "---",
    ]
    what = "Adapters" if adapter else "Weights"
    lines = [*head, "", f"# {name.split('/')[-1]}", ""]
    if is_run:
        lines += _run_lines(config, _read(source / "summary.json"), method, on_hub, step)
    else:
        lines += [f"{what} as {dtype}, converted from another format; nothing was trained."]
    lines += ["", "## Use", "", "```python", *_use(name, adapter), "```", ""]
    return "\n".join(lines)


def _run_lines(config: dict[str, Any], summary: dict[str, Any], method: str, base: str, step: int | None) -> list[str]:
    data = config["data"]
    named = data.get("path") or data.get("task") or data.get("rows") or ""
    # A path of this machine says nothing to others.
    shown = f" (`{named}`)" if named and not Path(named).is_absolute() else ""
    lines = [
        f"Trained by reinforcement learning with {method} in [rljax](https://pypi.org/project/rljax-lm).",
        "",
        "| | |",
        "|---|---|",
        *([f"| base model | [{base}](https://huggingface.co/{base}) |"] if base else []),
        f"| data | `{data['class']}`{shown} |",
        f"| steps of the run | {config['steps']} |",
        *([f"| checkpoint | step {step} |"] if step is not None else []),
        f"| prompts a step | {config['prompts_per_step']} |",
        f"| learning rate | {config['optimizer']['learning_rate']} |",
        f"| seed | {config['seed']} |",
    ]
    # The numbers of a summary belong to the run's end, not to an earlier checkpoint.
    if summary and step is None:
        names = [name for name in summary["after"] if _SHOWN.fullmatch(name)]
        lines += ["", "On held-out prompts:", "", "| metric | before | after |", "|---|---|---|"]
        lines += [
            f"| {name} | {_number(summary['before'], name)} | {_number(summary['after'], name)} |" for name in names
        ]
    return lines


def _number(metrics: dict[str, Any], name: str) -> str:
    return f"{metrics[name]:.3f}" if name in metrics else ""


def _use(name: str, adapter: bool) -> list[str]:
    if adapter:
        return [
            "from peft import AutoPeftModelForCausalLM",
            "",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")',
        ]
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]


def _read(file: AnyPath) -> dict[str, Any]:
    """The object in a JSON file; empty without one."""
    return json.loads(file.read_text()) if file.exists() else {}
