"""What `rljax eval` does."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from rljax.evaluation import Evaluation
from rljax.experiment.build import Run, build, held_out_examples
from rljax.experiment.commits import source_of
from rljax.experiment.config import Config, to_dict
from rljax.experiment.model import run_checkpoints
from rljax.experiment.report import evaluation_table
from rljax.experiment.train import evaluate_run
from rljax.models import abstract_params, param_shardings
from rljax.parallel import check_equal, end_together, is_main_process, on_main, use_mesh
from rljax.settings import check_config
from rljax.training import as_path, restore_params, writable_file
from rljax.types import Params


def evaluate_model(
    config: Config, *, checkpoint: str | None = None, step: int | None = None, json_file: str | None = None
) -> Evaluation:
    """Evaluates the config's initial model, or the checkpoint of a run folder, and prints the table.

    `step` None is the newest checkpoint. ValueError when there is none, for data without held-out examples and for a
    file in no folder.
    """
    with end_together():
        return _evaluate_model(config, checkpoint, step, json_file)


def _evaluate_model(config: Config, checkpoint: str | None, step: int | None, json_file: str | None) -> Evaluation:
    check_config(config)
    # The rows that training has left out, where a run is looked at.
    held_in = [] if checkpoint is None else [as_path(checkpoint)]
    run = build(of_answers(config, config.evaluation.samples), source=source_of(config, held_in)[0])
    examples = held_out_examples(run)
    check_equal(config=to_dict(config), data=[example.id for example in examples])
    # Before an evaluation that may take long, and would be lost. Process 0 writes it, and may alone see the folder.
    if json_file:
        on_main(lambda: writable_file(json_file, "json"))

    with run.actor, use_mesh(run.mesh), end_together():
        if checkpoint is None:
            params = run.initial_params()
        else:
            params, step = checkpoint_params(run, checkpoint, step)
        with tqdm(total=2 * len(examples), desc="answers", dynamic_ncols=True, disable=not is_main_process()) as bar:
            evaluation = evaluate_run(run, params, step or 0, report=lambda count: bar.update(count - bar.n))

    if is_main_process():
        print(evaluation_table(evaluation))
        if json_file:
            text = json.dumps(evaluation.to_dict(), indent=2, ensure_ascii=False) + "\n"
            Path(json_file).write_bytes(text.encode("utf-8", "backslashreplace"))
    return evaluation


def of_answers(config: Config, samples: int) -> Config:
    """`config` with a decoder of as many rows as an evaluation asks for at once, `config.evaluation.batch_prompts`
    times `samples`, where it has those of a training step, and of no more than these. For what trains nothing: rows
    that have nothing to say cost as much as others. Actors within others, and those of methods with forks, stay as they
    are."""
    plan = config.algorithm.build().plan
    if plan.forks is not None:
        return config

    # Conversations are not among them: idle ones cost no time, and an agent may hold several.
    asked = config.evaluation.batch_prompts
    sizes = {
        "prompt_slots": min(asked, config.prompts_per_step),
        "sample_slots": min(samples, plan.group_size),
        "decode_rows": min(asked * samples, config.prompts_per_step * plan.group_size),
    }
    # A size of 0 stands for what a step needs.
    actor: Any = config.actor
    own = {name: size for name, size in sizes.items() if getattr(actor, name, None) == 0}
    return dataclasses.replace(config, actor=dataclasses.replace(actor, **own)) if own else config


def checkpoint_params(run: Run, folder: str, step: int | None = None) -> tuple[Params, int]:
    """(weights on the mesh of `run`, their step) of a checkpoint of the run folder `folder`; `step` None is the newest.
    ValueError when there is none."""
    # Trained weights are float32 whatever the model's own were loaded as; frozen ones stay as they are.
    is_frozen = run.decoder.lora is not None
    target = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype if is_frozen else np.float32, sharding=where),
        abstract_params(run.decoder),
        param_shardings(run.decoder, run.mesh),
    )
    learner = run.learner
    base = learner.base_of(run.initial_params()) if is_frozen else None
    return restore_params(run_checkpoints(folder), target, step, subtree=learner.subtree, base=base)
