"""What `rljax convert` does."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from rljax.experiment.hub import CARD, model_card, open_repository, send
from rljax.experiment.model import base_of, model_path, run_weights
from rljax.models import (
    ADAPTER_FILE,
    DecoderConfig,
    Metadata,
    adapters_of,
    base_config,
    cast_params,
    is_peft,
    load_model,
    load_peft,
    merged_params,
    read_json,
    read_lora,
    read_metadata,
    save_hf,
    save_peft,
    with_adapters,
)
from rljax.text import Tokenizer, load_tokenizer
from rljax.training import is_remote, local_copy, reachable, writable
from rljax.types import Params


class _Model(NamedTuple):
    """What is converted."""

    decoder: DecoderConfig
    params: Params
    tokenizer: Tokenizer
    said: Metadata
    base: str = ""
    """Where the weights lie that its adapters stand beside."""


def convert(
    source: str,
    target: str,
    *,
    step: int | None = None,
    dtype: str = "float32",
    adapter: bool = False,
    push: str = "",
) -> Path:
    """Writes weights, tokenizer and metadata (what ends a text, settings of sampling) as a Hugging Face folder; those
    of a model with adapters with these merged into them, or, with `adapter`, the adapters alone in PEFT's format.

    `source` is a Hugging Face folder, a GGUF file, `smollm2`, a folder in PEFT's format over one of these, or a run
    folder, whose `step` picks a checkpoint; it may lie at an address. `push` is a model's repository on the hub,
    user/name, to which the folder is sent with a card; it is made, private, unless it is there. ValueError for anything
    else, for a target that is an address or not empty, for adapters asked of a model that has none, and where the hub
    refuses.
    """
    if is_remote(target):
        raise ValueError(f"--target={target} is an address; name a local folder, and copy it there")
    goal = Path(str(writable(target)))
    if goal.exists() and any(goal.iterdir()):
        raise ValueError(f"{target} exists and is not empty; name a new folder")
    if push:
        open_repository(push)

    # A run folder says in `model/` what its checkpoints are of.
    description = reachable(source) / "model"
    if (description / "config.json").exists():
        with local_copy(description) as folder:
            found = _of_run(source, folder, step)
    elif is_peft(source):
        found = _of_peft(Path(source))
    else:
        path = model_path(source)
        found = _Model(*load_model(path), load_tokenizer(path), read_metadata(path))

    if adapter:
        if found.decoder.lora is None:
            raise ValueError(f"--adapter: {source} has no adapters; leave it out to write all weights")
        written = cast_params(found.params, dtype)
        save_peft(goal, found.decoder, written, base=found.base)
        written = adapters_of(written)
    else:
        # In float32, and rounded once: what adapters add may be less than what a narrower weight can show.
        merged = merged_params(found.decoder, cast_params(found.params, "float32"))
        written = cast_params(merged, dtype)
        said = found.said
        save_hf(
            goal,
            base_config(found.decoder),
            written,
            tokenizer=found.tokenizer,
            hf_config=said.config,
            generation_config=said.generation,
        )
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(written))
    print(f"{count / 1e6:.1f}M parameters as {dtype} in {goal}")

    if push:
        base = found.base if adapter else ""
        card = model_card(push, reachable(source), dtype=dtype, adapter=adapter, base=base, step=step)
        (goal / CARD).write_text(card)
        print(f"sent to {send(goal, push)}")
    return goal


def _of_peft(folder: Path) -> _Model:
    base = base_of(read_json(folder / ADAPTER_FILE), folder)
    path = model_path(base)
    decoder, params = load_model(path)
    decoder = dataclasses.replace(decoder, lora=read_lora(folder, decoder))
    params = with_adapters(params, load_peft(folder, decoder))
    return _Model(decoder, params, load_tokenizer(path), read_metadata(path), base)


def _of_run(source: str, folder: Path, step: int | None) -> _Model:
    """A checkpoint of the run `source`, whose description lies in `folder`."""
    found = run_weights(source, folder, step)
    return _Model(found.decoder, found.params, load_tokenizer(folder), read_metadata(folder), found.base)
