"""What `launch/sft.py` does."""

import contextlib

from rljax.experiment.build import build
from rljax.experiment.config import Config, to_dict
from rljax.experiment.report import describe_run, evaluation_table, say
from rljax.experiment.sft import supervised, supervised_step
from rljax.experiment.train import evaluate_run, open_checkpoints, save_description
from rljax.parallel import is_main_process, use_mesh
from rljax.training import PhaseTimer, RunFolder, add_metrics


def fine_tune(config: Config, workdir: str, *, fresh: bool = False) -> dict[str, float]:
    """`config.warmup.steps` supervised steps in a run folder, resuming from its newest checkpoint."""
    if config.warmup.steps < 1:
        raise ValueError(f"config.warmup.steps={config.warmup.steps} must be at least 1 for supervised fine-tuning")

    run = build(config)
    say(describe_run(run))
    learner, curriculum = supervised(run)
    folder = RunFolder(workdir, config=to_dict(config), fresh=fresh, total_steps=config.warmup.steps)
    checkpoints = open_checkpoints(config, folder)
    metrics: dict[str, float] = {}

    with run.actor, folder, contextlib.closing(checkpoints), use_mesh(run.mesh):
        restored = checkpoints.restore(learner.abstract_state())
        first = 0 if restored is None else restored[2]
        folder.start(first)
        save_description(run, folder)
        if restored is None:
            state = learner.init_state(run.initial_params())
        else:
            state = restored[0]
            curriculum.load_state_dict(restored[1]["curriculum"])

        for step in range(first, config.warmup.steps):
            timer = PhaseTimer()
            with timer("update"):
                state, stats = supervised_step(run, learner, curriculum, state, step)
                metrics = add_metrics([stats])

            # As in training, the log comes before the checkpoint that it is resumed from.
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
