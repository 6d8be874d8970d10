"""Supervised training on given completions: the warm-up before a run, and `launch/sft.py`."""

import dataclasses
from typing import Any

import numpy as np

from rljax.experiment.build import Run, stack_rows
from rljax.tasks import UniformCurriculum
from rljax.text import Tokenizer, render_prompt
from rljax.training import Learner, RunFolder, sft_loss
from rljax.types import TrainState, Trajectory


def warm_up(run: Run, params: Any, folder: RunFolder) -> Any:
    """Supervised steps before the first rollout; returns the params, which it consumes."""
    config = run.config.warmup
    if not config.steps:
        return params

    learner, curriculum = supervised(run)
    state = learner.init_state(params)
    for step in range(config.steps):
        state, metrics = supervised_step(run, learner, curriculum, state, step)
        folder.progress("warm-up", step + 1, config.steps, metrics)
    return learner.policy_params(state)


def supervised(run: Run) -> tuple[Learner, UniformCurriculum]:
    """The learner and the demonstrations of `config.warmup`."""
    config = run.config.warmup
    make = config.demonstrations or (lambda examples: examples)
    examples = make(run.dataset.train)

    missing = next((e for e in examples if config.completion_column not in e.columns), None)
    if missing is not None:
        raise ValueError(
            f"supervised examples need the column {config.completion_column!r}; one has {sorted(missing.columns)}. "
            "Name it with config.warmup.completion_column, or make it with config.warmup.demonstrations"
        )

    # Demonstrations are one update a step, whatever rollouts are split into, and no sampler has log-probs of them.
    update = dataclasses.replace(run.config.update, minibatches=1, epochs=1, use_sampler_logprobs=False)
    learner = Learner(run.decoder, sft_loss(), config.optimizer, update, mesh=run.mesh)
    return learner, UniformCurriculum(examples, seed=run.config.seed)


def supervised_step(
    run: Run, learner: Learner, curriculum: UniformCurriculum, state: TrainState, step: int
) -> tuple[TrainState, dict[str, Any]]:
    """One update on `config.warmup.batch_size` demonstrations; each ends with the end-of-sequence token.

    A completion is a text, or, for episodes, a list of texts: what the policy says and what comes back, in turn.
    """
    config = run.config.warmup
    tokenizer = run.tokenizer

    rows = []
    for index, example in enumerate(curriculum.sample(step, config.batch_size)):
        prompt = render_prompt(tokenizer, example.prompt, run.config.data.chat)
        rows.append(_row(tokenizer, prompt, example.columns[config.completion_column], example.id, index))
    batch = stack_rows(run.config, rows)

    # The supervised loss does not look at advantages.
    (minibatch,) = learner.prepare(state, batch, np.zeros(batch.tokens.shape, np.float32))
    return learner.update(state, minibatch)


def _row(tokenizer: Tokenizer, prompt: list[int], completion: Any, prompt_id: int, index: int) -> Trajectory:
    """A text, or a list of texts by turns: what the policy says and what comes back, the latter not learned."""
    parts = [completion] if isinstance(completion, str) else [str(part) for part in completion]
    ids = [tokenizer.encode(part) for part in parts]
    ids[-1] = [*ids[-1], tokenizer.eos_id]
    row = demonstration(prompt, [token for part in ids for token in part], prompt_id, index)
    is_said = np.repeat([i % 2 == 0 for i in range(len(ids))], [len(part) for part in ids])
    return dataclasses.replace(row, action_mask=np.concatenate([row.action_mask[: len(prompt)], is_said]))


def demonstration(prompt: list[int], completion: list[int], prompt_id: int, index: int) -> Trajectory:
    """A given completion as a row: its tokens count as sampled, with unknown behavior."""
    tokens = np.array([*prompt, *completion], np.int32)
    zeros = np.zeros(len(tokens), np.float32)
    return Trajectory(
        tokens=tokens,
        action_mask=np.arange(len(tokens)) >= len(prompt),
        behavior_logprobs=zeros,
        entropies=zeros,
        turn_ids=np.zeros(len(tokens), np.int32),
        policy_version=np.zeros(len(tokens), np.int32),
        prompt_id=prompt_id,
        group_id=index,
        episode_id=index,
    )
