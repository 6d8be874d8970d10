"""What `rljax convert` does."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rljax.experiment.model import model_path, run_checkpoints
from rljax.models import abstract_params, config_from_hf, load_model, read_metadata, save_hf
from rljax.text import load_tokenizer
from rljax.training import local_copy, reachable, restore_params


def convert(source: str, target: str, *, step: int | None = None, dtype: str = "float32") -> Path:
    """Writes weights, tokenizer and metadata (what ends a text, settings of sampling) as a Hugging Face folder.

    `source` is a Hugging Face folder, a GGUF file, `smollm2`, or a run folder, whose `step` picks a checkpoint; it may
    lie at an address. ValueError for anything else, and for a target that is not empty.
    """
    goal = Path(target)
    if goal.exists() and any(goal.iterdir()):
        raise ValueError(f"{target} exists and is not empty; name a new folder")

    # A run folder says in `model/` what its checkpoints are of.
    description = reachable(source) / "model"
    if (description / "config.json").exists():
        with local_copy(description) as model:
            decoder = config_from_hf(json.loads((model / "config.json").read_text()))
            tokenizer = load_tokenizer(model)
            said = read_metadata(model)
        # In float32 as they were trained; the target's dtype comes last, so that weights are rounded once.
        trained = abstract_params(dataclasses.replace(decoder, param_dtype="float32"))
        params, _ = restore_params(run_checkpoints(source), trained, step)
    else:
        path = model_path(source)
        decoder, params = load_model(path)
        tokenizer = load_tokenizer(path)
        said = read_metadata(path)

    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    save_hf(goal, decoder, params, tokenizer=tokenizer, hf_config=said.config, generation_config=said.generation)
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    print(f"{count / 1e6:.1f}M parameters as {dtype} in {goal}")
    return goal
