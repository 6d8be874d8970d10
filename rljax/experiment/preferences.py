"""Learning from preferences: rows of pairs and of labelled completions, and the updates on them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rljax.algorithms import PreferenceMethod
from rljax.batching import layout, loss_mask, sort_rows
from rljax.envs import get_format
from rljax.experiment.build import Run, stack_rows
from rljax.experiment.sft import demonstration_row
from rljax.experiment.stage import Stage
from rljax.losses import PAIR, SIDE
from rljax.models import value_config
from rljax.parallel import batch_parts
from rljax.settings import placed
from rljax.tasks import Example, UniformCurriculum
from rljax.text import Dialogue
from rljax.training import Critic, Learner, LossNeeds, RunFolder, trained_of
from rljax.types import ROW_WEIGHT, Params, RolloutBatch, TrainState, Trajectory

_KEPT = ("grad_norm", "learning_rate", "skipped", "total")


def preferring(run: Run, first_params: Callable[[RunFolder], Params]) -> Stage:
    """The updates of `config.preferences`, from a language model with the weights `first_params`. ValueError for
    settings that cannot work."""
    own = run.config.preferences
    method = method_of(run)
    if run.config.update.share_prefixes is False:
        raise ValueError(
            "config.update.share_prefixes=False may pack the rows of a pair apart, which are compared; leave it out"
        )
    if method.has_other_rows and own.batch_size < 2:
        raise ValueError(
            f"config.preferences.batch_size={own.batch_size} leaves no other prompt whose completion "
            f"{type(own.method).__name__} compares with; set it to at least 2"
        )

    # Rows are one update a step, and no sampler has log-probs of them. A pair that shares its prompt stays together.
    update = dataclasses.replace(
        run.config.update, minibatches=1, epochs=1, use_sampler_logprobs=False, share_prefixes=True
    )
    shared: dict[str, Any] = {"mesh": run.mesh, "seed": run.config.seed, "subtree": trained_of(run.decoder)}
    curriculum = UniformCurriculum(examples_of(run, run.dataset.train), seed=run.config.seed)

    if method.scores_values:
        # The scores of two completions are compared, so a bias of the head would cancel.
        scorer = value_config(run.decoder, bias=False)
        critic = Critic(scorer, method.loss, own.optimizer, _no_returns, update, **shared)
        learner = critic.learner
        start = critic.init_state
        base_of = critic.base_of
    else:
        needs = LossNeeds(reference=method.needs_ref)
        learner = Learner(run.decoder, method.loss, own.optimizer, update, needs=needs, **shared)
        start = learner.init_state
        base_of = learner.base_of

    def measure(state: TrainState, done: int) -> dict[str, float]:
        is_due = done == own.steps or (own.evaluate_every > 0 and done % own.evaluate_every == 0)
        return held_out_accuracy(run, learner, state) if is_due else {}

    return Stage(
        name="update on preferences",
        learner=learner,
        curriculum=curriculum,
        steps=own.steps,
        steps_field="config.preferences.steps",
        initial=lambda folder: start(first_params(folder)),
        base=lambda: base_of(run.initial_params()),
        update=lambda state, step: preference_step(run, learner, curriculum, state, step),
        measure=measure,
    )


def method_of(run: Run) -> PreferenceMethod:
    """What `config.preferences.method` builds. ValueError for hyperparameters that cannot work."""
    with placed("config.preferences.method"):
        return run.config.preferences.method.build()


def preference_step(
    run: Run, learner: Learner, curriculum: UniformCurriculum, state: TrainState, step: int
) -> tuple[TrainState, dict[str, Any]]:
    """One update on `config.preferences.batch_size` rows of the data."""
    batch = preference_batch(run, curriculum.sample(step, run.config.preferences.batch_size))

    # Advantages are for what a loss tells its rows; nothing is known before.
    (minibatch,) = learner.prepare(state, batch, np.zeros(batch.tokens.shape, np.float32))
    state, stats = learner.update(state, minibatch)
    named = {f"loss/{name}": stats[f"loss/{name}"] for name in _KEPT if f"loss/{name}" in stats}
    return state, named | {name: value for name, value in stats.items() if name.startswith(("preference/", "pack/"))}


def preference_batch(run: Run, examples: Sequence[Example]) -> RolloutBatch:
    """The rows of examples as a minibatch. Those of one pair come out in one packed sequence."""
    method = method_of(run)
    rows = labelled_rows(run, examples) if method.has_other_rows else paired_rows(run, examples)
    batch = stack_rows(run.config, [_scored_row(run, row) if method.scores_values else row for row in rows])
    return batch if method.has_other_rows else _kept_together(batch)


def _kept_together(batch: RolloutBatch) -> RolloutBatch:
    """The batch with pairs that stand together when its rows are sorted: what is packed together are neighbours. Where
    prompts repeat, or one begins another, pairs get tokens of their own, which share nothing with other pairs'."""
    rows = np.flatnonzero(batch.is_valid)
    order = sort_rows(np.asarray(batch.tokens)[rows], np.asarray(batch.lengths)[rows]).order
    pairs = np.asarray(batch.group_id)[rows][order]
    if np.sum(pairs[1:] != pairs[:-1]) == len(set(pairs.tolist())) - 1:
        return batch
    tokens = np.asarray(batch.tokens, np.uint32)
    of_pair = np.broadcast_to(np.asarray(batch.group_id, np.uint32)[:, None], tokens.shape)
    return dataclasses.replace(batch, token_keys=np.stack([of_pair, tokens], axis=-1))


def paired_rows(run: Run, examples: Sequence[Example]) -> list[Trajectory]:
    """Two rows of each example: what is preferred, and what is not. ValueError for an example that is no pair."""
    rows = []
    for index, example in enumerate(examples):
        for side, completion in _sides(run, example):
            rows.append(_row(run, example, completion, index, side))
    return rows


def labelled_rows(run: Run, examples: Sequence[Example]) -> list[Trajectory]:
    """Of each example the rows with its labels, and as many in which its prompt is followed by a completion of the
    next example, of side 0 and without weight. ValueError for an example that is neither a pair nor labelled."""
    of_examples = [_sides(run, example) for example in examples]
    rows = []
    for index, example in enumerate(examples):
        others = of_examples[(index + 1) % len(examples)]
        for number, (side, completion) in enumerate(of_examples[index]):
            rows.append(_row(run, example, completion, index, side))
            rows.append(_row(run, example, others[number % len(others)][1], index, 0))
    return rows


def _sides(run: Run, example: Example) -> list[tuple[int, Any]]:
    """(side, completion) of each of an example's completions."""
    own = run.config.preferences
    columns = example.columns
    if own.chosen_column in columns and own.rejected_column in columns:
        return [(1, columns[own.chosen_column]), (-1, columns[own.rejected_column])]
    label = columns[own.label_column]
    if not isinstance(label, (bool, np.bool_)) and label not in (0, 1):
        raise ValueError(f"{own.label_column}={label!r:.80} of {example.name} must be true or false")
    return [(1 if label else -1, columns[own.completion_column])]


def _row(run: Run, example: Example, completion: Any, index: int, side: int) -> Trajectory:
    style = get_format(getattr(run.config.actor, "tool_format", "hermes"))
    dialogue = Dialogue(run.tokenizer, role=style.role, chat=run.config.data.chat)
    row = demonstration_row(dialogue, example.prompt, _text_of(completion), example.id, index)
    columns = {SIDE: float(side), PAIR: float(index), ROW_WEIGHT: float(side != 0)}
    return dataclasses.replace(row, columns=columns)


def _text_of(completion: Any) -> Any:
    """The text of an assistant's message that stands alone in a list; anything else as it is."""
    is_message = isinstance(completion, (list, tuple)) and len(completion) == 1 and isinstance(completion[0], dict)
    return completion[0].get("content") if is_message else completion


def _scored_row(run: Run, row: Trajectory) -> Trajectory:
    """The row with one token more, on which alone the reward model's number for all before it stands."""
    return with_score_token(row, run.tokenizer.eos_id)


def with_score_token(row: Trajectory, token: int) -> Trajectory:
    """The row with one token more, in which alone its loss mask is True: a value belongs to the state before a token,
    so that of the last token is the value of the whole row. Which token it is changes nothing."""
    count = len(row.tokens)

    def longer(values: Any) -> Any:
        return np.append(values, np.zeros(1, values.dtype))

    names = ("behavior_logprobs", "entropies", "turn_ids", "policy_version")
    fields = {name: longer(getattr(row, name)) for name in names}
    tokens = np.append(row.tokens, np.int32(token))
    return dataclasses.replace(row, tokens=tokens, action_mask=np.arange(count + 1) == count, **fields)


def examples_of(run: Run, examples: Sequence[Example]) -> list[Example]:
    """The examples that can be learned from. ValueError for columns that the data lacks."""
    own = run.config.preferences
    pair = (own.chosen_column, own.rejected_column)
    label = (own.completion_column, own.label_column)
    takes_labels = method_of(run).has_other_rows
    made = list(examples if own.pairs is None else own.pairs(list(examples)))
    for example in made:
        has = example.columns
        if all(name in has for name in pair) or (takes_labels and all(name in has for name in label)):
            continue
        wanted = f"{pair[0]!r} and {pair[1]!r}" + (f", or {label[0]!r} and {label[1]!r}" if takes_labels else "")
        raise ValueError(
            f"{type(own.method).__name__} needs the columns {wanted}; {example.name} has {sorted(has)}. Name them with "
            "config.preferences.chosen_column and rejected_column"
            + (", or completion_column and label_column" if takes_labels else "")
        )
    return made


def check_preferences(run: Run) -> None:
    """ValueError that names the row for a pair that cannot be learned from; else that is found in the middle of the
    run. And for a minibatch that the tables of `config.update` do not hold."""
    own = run.config.preferences
    length = run.config.update.pack_length
    is_paired = not method_of(run).has_other_rows
    sizes = []
    train = examples_of(run, run.dataset.train)
    if len(train) < own.batch_size:
        raise ValueError(
            f"config.preferences.batch_size={own.batch_size} is more than the {len(train)} rows of the data; lower it"
        )
    for example in [*train, *examples_of(run, run.dataset.test)]:
        try:
            rows = preference_batch(run, [example])
        except (ValueError, TypeError) as error:  # tokenizers raise the latter for half characters
            raise ValueError(f"the completions of {example.name}: {error}") from error
        lengths = np.asarray(rows.lengths)[np.asarray(rows.is_valid)]
        size = int(lengths.max())
        if is_paired:
            shared = sort_rows(np.asarray(rows.tokens)[: len(lengths)], lengths).shared
            size = int(lengths.sum() - shared.sum())
        if size > length:
            what = "the pair" if is_paired else "the completions"
            raise ValueError(
                f"{what} of {example.name} take {size} tokens, but config.update.pack_length={length}; raise it to at "
                f"least {size}, or leave the row out"
            )
        sizes.append(size)

    by_size = [train[i] for i in np.argsort(sizes[: len(train)], kind="stable")]
    largest = preference_batch(run, by_size[-own.batch_size :])
    update = dataclasses.replace(run.config.update, share_prefixes=True)
    layout(largest, loss_mask(largest), update, parts=batch_parts(run.mesh))


def held_out_accuracy(run: Run, learner: Learner, state: TrainState) -> dict[str, float]:
    """`eval/preference_accuracy`, the share of held-out rows of the data that the model gets right, and
    `eval/preference_pairs`, how many they are: all, or `config.evaluation.problems`. Empty where no row is held out.

    Right is a pair whose preferred side has the larger score, which is the reward model's number, or for a policy the
    log-prob, less the reference's where there is one, and per token where the method counts so. Of labelled
    completions it is not measured.
    """
    problems = run.config.evaluation.problems
    made = examples_of(run, run.dataset.test)
    examples = [e for e in made if run.config.preferences.chosen_column in e.columns]
    examples = examples[: problems if problems > 0 else None]
    margins: list[float] = []
    size = run.config.preferences.batch_size
    for start in range(0, len(examples), size):
        margins += _margins(run, learner, state, examples[start : start + size])
    if not margins:
        return {}
    return {
        "eval/preference_accuracy": float(np.mean(np.array(margins) > 0)),
        "eval/preference_pairs": float(len(margins)),
    }


def _margins(run: Run, learner: Learner, state: TrainState, examples: Sequence[Example]) -> list[float]:
    """How much the preferred side of each pair is ahead."""
    method = method_of(run)
    rows = paired_rows(run, examples)
    batch = stack_rows(run.config, [_scored_row(run, row) if method.scores_values else row for row in rows])
    mask = loss_mask(batch)
    scores = learner.score_rows(learner.policy_params(state), batch)
    if method.needs_ref:
        scores = scores - learner.score_rows(learner.reference_params(state), batch)
    totals = _row_scores(scores, mask, per_token=method.per_token)
    return [float(totals[i] - totals[i + 1]) for i in range(0, len(rows), 2)]


def _row_scores(scores: np.ndarray, mask: np.ndarray, *, per_token: bool) -> np.ndarray:
    totals = np.asarray(scores, np.float64).sum(axis=1)
    counts = np.maximum(mask.sum(axis=1), 1) if per_token else 1
    return np.asarray(totals / counts)


def _no_returns(batch: RolloutBatch) -> Any:
    """A reward model is told which row is better, and no returns."""
    return jnp.zeros(np.shape(batch.tokens), jnp.float32)
