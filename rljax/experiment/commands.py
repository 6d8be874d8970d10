"""What the launch scripts do beside training: evaluate, fine-tune, convert."""

import contextlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rljax.evaluation import Evaluation
from rljax.experiment.build import load_params, plan
from rljax.experiment.config import Config, model_path, to_dict
from rljax.experiment.report import evaluation_table
from rljax.experiment.sft import supervised, supervised_step
from rljax.experiment.train import evaluate_run, open_checkpoints
from rljax.models import abstract_params, config_from_hf, load_model, param_shardings, save_hf
from rljax.parallel import is_main_process, use_mesh
from rljax.text import load_tokenizer
from rljax.training import PhaseTimer, RunFolder, add_metrics, restore_params


def evaluate_model(
    config: Config, *, checkpoint: str | None = None, step: int | None = None, json_file: str | None = None
) -> Evaluation:
    """Evaluates the config's initial model, or the checkpoint of a run folder, and prints the table.

    `step` None is the newest checkpoint. ValueError when there is none.
    """
    run = plan(config)
    with run.rewards, use_mesh(run.mesh):
        if checkpoint is None:
            params = load_params(run)
        else:
            target = jax.tree.map(
                lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                abstract_params(run.decoder),
                param_shardings(run.decoder, run.mesh),
            )
            params, step = restore_params(run_checkpoints(checkpoint), target, step)
        evaluation = evaluate_run(run, params, step or 0)
    if is_main_process():
        print(evaluation_table(evaluation))
        if json_file:
            Path(json_file).write_text(json.dumps(evaluation.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return evaluation


def run_checkpoints(folder: str) -> Path:
    """The checkpoints of a run folder. ValueError when there are none."""
    path = Path(folder) / "checkpoints"
    if not path.is_dir() or not any(child.name.isdigit() for child in path.iterdir()):
        raise ValueError(
            f"{folder} holds no checkpoint; give the --workdir of a run with config.checkpoint.every above 0"
        )
    return path


def fine_tune(config: Config, workdir: str, *, fresh: bool = False) -> dict[str, float]:
    """`config.warmup.steps` supervised steps in a run folder, resuming from its newest checkpoint."""
    if config.warmup.steps < 1:
        raise ValueError(f"config.warmup.steps={config.warmup.steps} must be at least 1 for supervised fine-tuning")
    run = plan(config)
    learner, curriculum = supervised(run)
    folder = RunFolder(workdir, config=to_dict(config), fresh=fresh, total_steps=config.warmup.steps)
    checkpoints, metrics = open_checkpoints(config, folder), {}
    with run.rewards, folder, contextlib.closing(checkpoints), use_mesh(run.mesh):
        restored = checkpoints.restore(learner.abstract_state())
        first = 0 if restored is None else restored[2]
        folder.start(first)
        if restored is None:
            state = learner.init_state(load_params(run))
        else:
            state = restored[0]
            curriculum.load_state_dict(restored[1]["curriculum"])
        for step in range(first, config.warmup.steps):
            timer = PhaseTimer()
            with timer("update"):
                state, stats = supervised_step(run, learner, curriculum, state, step)
                metrics = add_metrics([stats])
            done = step + 1
            folder.log_step(done, metrics | timer.metrics())
            every = config.checkpoint.every
            if every and (done % every == 0 or done == config.warmup.steps):
                checkpoints.save(done, state, {"curriculum": curriculum.state_dict()}, metrics)
        checkpoints.wait()
        if config.evaluation.problems >= 0 and is_main_process():
            print(evaluation_table(evaluate_run(run, learner.policy_params(state), config.warmup.steps)))
    print(f"run folder      {folder.path}")
    return metrics


def convert(source: str, target: str, *, step: int | None = None, dtype: str = "float32") -> Path:
    """Writes weights and tokenizer as a Hugging Face folder.

    `source` is a Hugging Face folder, a GGUF file, a run folder or `smollm2`; `step` picks a checkpoint of a run
    folder. ValueError for anything else, and for a target that is not empty.
    """
    goal = Path(target)
    if goal.exists() and any(goal.iterdir()):
        raise ValueError(f"{target} exists and is not empty; name a new folder")
    if (Path(source) / "model" / "config.json").is_file():
        model = Path(source) / "model"
        decoder = config_from_hf(json.loads((model / "config.json").read_text()))
        params, _ = restore_params(run_checkpoints(source), abstract_params(decoder), step)
        tokenizer = load_tokenizer(model)
    else:
        path = model_path(source)
        decoder, params = load_model(path)
        tokenizer = load_tokenizer(path)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    save_hf(goal, decoder, params, tokenizer=tokenizer)
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    print(f"{count / 1e6:.1f}M parameters as {dtype} in {goal}")
    return goal
