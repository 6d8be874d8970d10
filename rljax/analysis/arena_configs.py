"""What the runs of the arena's tasks are like, but for their methods: data, model, warm start and training."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rljax.algorithms import GRPO
from rljax.analysis.arena import SEQUENCE_ROWS, Size
from rljax.analysis.arena_errands import ERRANDS_ALPHABET, errand_demonstrations
from rljax.analysis.arena_parts import (
    CERTAIN,
    LATE_ALPHABET,
    RELAY_ALPHABET,
    RESTART_ALPHABET,
    SPARSE_ALPHABET,
    SPARSE_LENGTH,
    TURNS,
    after_restart,
    late_demonstrations,
    miscounted,
    never_restarting,
    relay_demonstrations,
    restarting,
    sparse_demonstrations,
)
from rljax.experiment import (
    CheckpointConfig,
    Config,
    EnvironmentLimits,
    EvaluationConfig,
    FreshModel,
    MultiTurn,
    OptimizerConfig,
    ReasoningGymData,
    RewardConfig,
    RowsData,
    SamplingConfig,
    SingleTurn,
    UpdateConfig,
    WarmupConfig,
)
from rljax.tasks import DataSource, Example, final_number

ROWS = 8000
"""Training rows of a task."""


class Shape(NamedTuple):
    """What a task's texts and training are like."""

    length: int
    """Most tokens of a prompt and its completion, or of an episode."""
    new_tokens: int
    """Most tokens of a completion, or of a turn."""
    warmup: int
    """Supervised steps at full size."""
    learning_rate: float


def character_config(
    size: Size,
    alphabet: str,
    data: DataSource,
    actor: SingleTurn | MultiTurn,
    demonstrations: Callable[[Sequence[Example]], list[Example]],
    shape: Shape,
) -> Config:
    """A run of a character model of 0.35M parameters."""
    steps = max(1, round(shape.warmup * size.warmup))
    packed = SEQUENCE_ROWS * shape.length

    return Config(
        name="arena",
        steps=size.updates,
        prompts_per_step=size.prompts,
        model=FreshModel(
            alphabet=alphabet,
            num_layers=size.layers,
            embed_dim=96,
            num_heads=3,
            num_kv_heads=3,
            mlp_dim=288,
        ),
        data=data,
        actor=actor,
        algorithm=GRPO(group_size=8, kl_coef=0.0),
        sampling=SamplingConfig(max_new_tokens=shape.new_tokens),
        # One length, so that each program compiles once.
        update=UpdateConfig(
            pack_length=packed,
            microbatch_size=4,
            length_buckets=(packed,),
            score_buckets=(packed,),
            head_chunk=2048,
            # Early in training whole steps may have no signal, and they belong to the curve.
            max_empty=size.updates + 1,
        ),
        optimizer=OptimizerConfig(learning_rate=shape.learning_rate),
        warmup=WarmupConfig(
            steps=steps,
            batch_size=128,
            demonstrations=demonstrations,
            optimizer=OptimizerConfig(
                learning_rate=2e-3, schedule="cosine", warmup_steps=min(20, steps - 1), total_steps=steps
            ),
        ),
        # The curve is kept as a record; the run itself is not gone on with.
        evaluation=EvaluationConfig(problems=size.problems, samples=4, batch_prompts=min(32, size.problems)),
        checkpoint=CheckpointConfig(every=0),
    )


def _rows(rows: str, size: Size) -> RowsData:
    """What a function of `arena_parts` makes: training rows of one seed, held-out ones of another."""
    return RowsData(
        rows=f"rljax.analysis.arena_parts:{rows}",
        args={"size": ROWS, "seed": 0},
        test_args={"size": size.problems, "seed": 1},
    )


def _acting(module: str, make: str, tool_format: str, *, length: int, turns: int) -> MultiTurn:
    """An actor over so many turns of an episode of `length` tokens; environment and format by their names."""
    return MultiTurn(
        make=f"rljax.analysis.{module}:{make}",
        tool_format=f"rljax.analysis.{module}:{tool_format}",
        context_length=length,
        prefill_chunks=(8,),
        check_every=2,
        workers=4,
        limits=EnvironmentLimits(turns=turns),
    )


def late_config(size: Size) -> Config:
    """`word=`, then certain text and six digits."""
    return character_config(
        size,
        LATE_ALPHABET,
        _rows("late_rows", size),
        SingleTurn(rewards=(RewardConfig("rljax.tasks.verifiers:ExactMatch"),), prompt_buckets=(7,)),
        late_demonstrations,
        Shape(length=7 + len(CERTAIN) + 6 + 1, new_tokens=len(CERTAIN) + 6 + 1, warmup=300, learning_rate=2e-4),
    )


def relay_config(size: Size) -> Config:
    """Eight turns of a letter."""
    return character_config(
        size,
        RELAY_ALPHABET,
        _rows("relay_rows", size),
        _acting("arena_parts", "Relay", "RELAY_FORMAT", length=5 * TURNS, turns=TURNS),
        relay_demonstrations,
        Shape(length=5 * TURNS, new_tokens=2, warmup=200, learning_rate=1e-4),
    )


def errands_config(size: Size) -> Config:
    """One or three digits that must be asked for, and an answer."""
    turns, length = 5, 40
    return character_config(
        size,
        ERRANDS_ALPHABET,
        RowsData(
            rows="rljax.analysis.arena_errands:errand_rows",
            args={"size": 4 * ROWS},
            test_args={"size": size.problems, "first": 100_000},
        ),
        _acting("arena_errands", "Errands", "ERRANDS_FORMAT", length=length, turns=turns),
        errand_demonstrations,
        # Digits that came back are repeated from some hundred steps on; before it, asking is of no use.
        Shape(length=length, new_tokens=6, warmup=1000, learning_rate=2e-4),
    )


def sums_config(size: Size) -> Config:
    """Four one-digit terms, `7 - 2 + 4 - 1 =` to `5;9;8`."""
    config = character_config(
        size,
        "0123456789+-=; ",
        ReasoningGymData(
            task="chain_sum",
            args={"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1},
            size=ROWS,
            test_size=size.problems,
            prompt="{expression} =",
            chat=False,
            extract=final_number,
        ),
        SingleTurn(prompt_buckets=(20,)),
        miscounted,
        # After 300 steps of 128 answers are guesses, 6% right, and GRPO does not get away from there; so 22% are right.
        Shape(length=34, new_tokens=14, warmup=1500, learning_rate=2e-4),
    )
    return dataclasses.replace(config, warmup=dataclasses.replace(config.warmup, batch_size=32))


def restart_config(size: Size) -> Config:
    """Six digits, which may be begun anew behind a mark that demonstrations have."""
    return _restart_config(size, restarting)


def no_restart_config(size: Size) -> Config:
    """The same from demonstrations without the mark."""
    return _restart_config(size, never_restarting)


def _restart_config(size: Size, demonstrations: Callable[[Sequence[Example]], list[Example]]) -> Config:
    config = character_config(
        size,
        RESTART_ALPHABET,
        _rows("restart_rows", size),
        SingleTurn(
            rewards=(RewardConfig("rljax.tasks.verifiers:ExactMatch", args={"extract": after_restart}),),
            prompt_buckets=(7,),
        ),
        demonstrations,
        Shape(length=7 + 16, new_tokens=16, warmup=200, learning_rate=2e-4),
    )
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, truncated_is_wrong=True))


def sparse_config(size: Size) -> Config:
    """Five digits, of which the warm start knows next to nothing without a plan."""
    config = character_config(
        size,
        SPARSE_ALPHABET,
        _rows("sparse_rows", size),
        SingleTurn(
            rewards=(RewardConfig("rljax.tasks.verifiers:ExactMatch"),),
            # Plain prompts, and those with a plan.
            prompt_buckets=(SPARSE_LENGTH + 1, 160),
        ),
        sparse_demonstrations,
        # A packed sequence holds a demonstration with its plan. Plans are followed from some 500 steps on, if the
        # rate is high then: until it happens the loss stays where it is, and a shown plan is of no use.
        Shape(length=21, new_tokens=SPARSE_LENGTH + 1, warmup=1000, learning_rate=2e-4),
    )
    return dataclasses.replace(config, warmup=dataclasses.replace(config.warmup, batch_size=64))
