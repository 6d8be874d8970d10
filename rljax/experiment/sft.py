"""Supervised training on given completions: the warm-up before a run, and `rljax sft`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rljax.envs import get_format
from rljax.experiment.build import Run, stack_rows
from rljax.experiment.stage import Stage, run_stage
from rljax.tasks import Curriculum, Example, UniformCurriculum
from rljax.text import Dialogue, Message, encode_text
from rljax.training import Checkpointer, Learner, RunFolder, sft_loss, trained_of
from rljax.types import Params, TrainState, Trajectory


def warm_up(run: Run, folder: RunFolder, checkpoints: Checkpointer | None = None) -> Params:
    """The params that the first rollout starts from: the model's own, after `config.warmup.steps` supervised steps.

    `folder` shows how far it is. With `checkpoints`, which must be of this run's warm-up alone, it goes on from the
    newest of them; without, nothing is saved.
    """
    steps = run.config.warmup.steps
    if not steps:
        return run.initial_params()

    stage = supervised(run)
    state = run_stage(
        run,
        stage,
        folder,
        checkpoints,
        report=lambda done, metrics: folder.progress("warm-up", done, steps, metrics),
    )
    return stage.learner.policy_params(state)


def supervised(run: Run) -> Stage:
    """The updates of `config.warmup` on its demonstrations."""
    learner = supervised_learner(run)
    curriculum = UniformCurriculum(demonstrations(run), seed=run.config.seed)
    return Stage(
        name="supervised update",
        learner=learner,
        curriculum=curriculum,
        steps=run.config.warmup.steps,
        steps_field="config.warmup.steps",
        initial=lambda folder: learner.init_state(run.initial_params()),
        base=lambda: learner.base_of(run.initial_params()),
        update=lambda state, step: supervised_step(run, learner, curriculum, state, step),
    )


def supervised_learner(run: Run) -> Learner:
    """What makes the updates of `config.warmup`: one a step, whatever rollouts are split into."""
    # No sampler has log-probs of demonstrations.
    update = dataclasses.replace(run.config.update, minibatches=1, epochs=1, use_sampler_logprobs=False)
    return Learner(
        run.decoder, sft_loss(), run.config.warmup.optimizer, update, mesh=run.mesh, subtree=trained_of(run.decoder)
    )


def demonstrations(run: Run) -> list[Example]:
    """The examples with what is to be said. ValueError for one without."""
    config = run.config.warmup
    make = config.demonstrations or (lambda examples: examples)
    examples = make(run.dataset.train)
    if not examples:
        raise ValueError("config.warmup.demonstrations returns no example; return at least one")

    missing = next((e for e in examples if config.completion_column not in e.columns), None)
    if missing is not None:
        raise ValueError(
            f"supervised examples need the column {config.completion_column!r}; one has {sorted(missing.columns)}. "
            "Name it with config.warmup.completion_column, or make it with config.warmup.demonstrations"
        )
    return list(examples)


def check_demonstrations(run: Run) -> None:
    """ValueError that names the row for a demonstration that cannot be trained on; else that is found in the middle of
    the run. Does nothing without a warm-up."""
    if not run.config.warmup.steps:
        return
    length = run.config.update.pack_length
    for example in demonstrations(run):
        try:
            (row,) = _rows(run, [example])
        except (ValueError, TypeError) as error:  # tokenizers raise the latter for half characters
            raise ValueError(f"the demonstration of {example.name}: {error}") from error
        if len(row.tokens) > length:
            raise ValueError(
                f"the demonstration of {example.name} has {len(row.tokens)} tokens, but config.update.pack_length="
                f"{length}; raise it to at least {len(row.tokens)}, or leave the row out (config.warmup.demonstrations)"
            )


def supervised_step(
    run: Run, learner: Learner, curriculum: Curriculum, state: TrainState, step: int
) -> tuple[TrainState, dict[str, Any]]:
    """One update on `config.warmup.batch_size` demonstrations (`demonstration_row`)."""
    batch = stack_rows(run.config, _rows(run, curriculum.sample(step, run.config.warmup.batch_size)))

    # The supervised loss does not look at advantages.
    (minibatch,) = learner.prepare(state, batch, np.zeros(batch.tokens.shape, np.float32))
    return learner.update(state, minibatch)


def longest_demonstrations(run: Run) -> list[Trajectory]:
    """The rows of the largest minibatch that the warm-up can draw."""
    rows = _rows(run, demonstrations(run))
    return sorted(rows, key=lambda row: len(row.tokens))[-run.config.warmup.batch_size :]


def _rows(run: Run, examples: Sequence[Example]) -> list[Trajectory]:
    column = run.config.warmup.completion_column
    dialogue = dialogue_of(run)
    return [
        demonstration_row(dialogue, example.prompt, example.columns[column], example.id, index)
        for index, example in enumerate(examples)
    ]


def dialogue_of(run: Run) -> Dialogue:
    """How demonstrations are laid out as tokens: as the conversations of the run's actor are."""
    style = get_format(getattr(run.config.actor, "tool_format", "hermes"))
    return Dialogue(run.tokenizer, role=style.role, chat=run.config.data.chat)


def demonstration_row(
    dialogue: Dialogue, prompt: str | Sequence[Message], completion: Any, prompt_id: int, index: int
) -> Trajectory:
    """A demonstration as the trajectory that a rollout would have made of it.

    The completion is a text, or, for episodes, a list of texts: what the policy says and what comes back, in turn; the
    latter is not learned. A list of pieces, `{"text": ..., "learned": false}`, is one turn of which some is only read,
    such as a wrong attempt before the right one. The last turn ends with a stop token: the chat template's behind a
    prompt of messages, else the end of sequence. Behind such a prompt every turn of the policy ends with it, and the
    template stands around what comes back; behind plain text the texts follow each other as they are. ValueError for
    another kind of completion.
    """
    tokenizer = dialogue.tokenizer
    is_chat = dialogue.is_chat(prompt)
    end = dialogue.turn_end(is_chat=is_chat)
    turns = _turns(completion)

    ids = []
    said_mask = []
    for i, pieces in enumerate(turns):
        is_said = i % 2 == 0
        for text, is_learned in pieces:
            if is_said:
                # The demonstrator's own text may name control tokens.
                part = encode_text(tokenizer, "", wrap=(text, ""), continues=True)
            elif is_chat:
                part = dialogue.observation(text, is_chat=True, is_closed=True)
            else:
                part = encode_text(tokenizer, text, continues=True)
            ids += part
            said_mask += [is_said and is_learned] * len(part)

        if is_said and (is_chat or i == len(turns) - 1):
            ids.append(end)
            said_mask.append(pieces[-1].is_learned)

    opening = dialogue.opening(prompt)
    row = demonstration(opening, ids, prompt_id, index)
    return dataclasses.replace(row, action_mask=np.concatenate([row.action_mask[: len(opening)], np.array(said_mask)]))


class _Piece(NamedTuple):
    """A stretch of a turn."""

    text: str
    is_learned: bool = True


def _turns(completion: Any) -> list[list[_Piece]]:
    """What is said and what comes back, in turn. ValueError for what is no completion."""
    if isinstance(completion, str):
        return [[_Piece(completion)]]
    parts = list(completion) if isinstance(completion, (list, tuple)) else []
    if parts and all(isinstance(part, str) for part in parts):
        return [[_Piece(part)] for part in parts]
    if parts and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        if flags := [part for part in parts if not isinstance(part.get("learned", True), bool)]:
            raise ValueError(f"the piece {flags[0]!r:.100} says learned={flags[0]['learned']!r}; it is true or false")
        return [[_Piece(part["text"], part.get("learned", True)) for part in parts]]
    raise ValueError(
        f"the completion is {completion!r:.100}; it must be a text, or a list of texts by turns, or one of pieces "
        "{'text': ..., 'learned': true or false}"
    )


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
