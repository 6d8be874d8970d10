"""TeacherLM, arXiv 2310.19019: rows with fundamentals, a chain of thought and common mistakes, which a student learns.

    rljax stages --config=papers/teacherlm --workdir=runs/teacherlm

The model of the warm-up is the annotator. Look at round-01/rows: what it says of each word, what is dropped and why,
and what is laid out of the rest; and at held-out avg@8 behind a start that nobody has shown the question.
`--config=papers/teacherlm:answers_only` learns the answers of the same words, and nothing beside them.
"""

import dataclasses

from annotated_words import ALPHABET, CHECK, HELD_OUT, QUESTIONS, about_words, by_heart
from spelling import learn_by_heart, spelling_config

from rljax.algorithms import GRPO
from rljax.experiment import (
    CheckpointConfig,
    Config,
    OptimizerConfig,
    RewardConfig,
    RowsData,
    SamplingConfig,
    SingleTurn,
    StagesConfig,
)
from rljax.experiment.stage_parts import StageParts
from rljax.tasks import DataStage, Reaches, Withholds, annotated, kept, laid_out, stage

SIZES = ("full", "smoke", "answers_only")


def annotations(parts: StageParts) -> list[DataStage]:
    """Three fields; a checker that sees the chain and not the answer must reach it, and no mistake may hold it."""
    return [
        stage("annotated", annotated, complete=parts.policy, questions=QUESTIONS),
        stage("checked", annotated, complete=parts.policy, questions={"checked": CHECK}),
        stage(
            "kept",
            kept,
            rules={
                "the chain leads elsewhere": Reaches("checked"),
                "the mistake is the answer": Withholds("common_mistakes"),
            },
        ),
        stage(
            "laid-out",
            laid_out,
            # Of a mistake it is said that it is one.
            fields={"fundamentals": "{}|", "common_mistakes": "!{}|", "chain_of_thought": "{}"},
            end="={answer}",
            dropout=0.3,
            seed=parts.seed,
        ),
    ]


def answers_only(parts: StageParts) -> list[DataStage]:
    """No field, and nothing to filter."""
    return [stage("laid-out", laid_out, fields={}, end="={answer}", seed=parts.seed)]


def get_config(size: str = "full") -> Config:
    if size not in SIZES:
        raise ValueError(f"--config=...:{size}: the size must be one of {', '.join(SIZES)}")

    smoke = size == "smoke"
    config = spelling_config(GRPO(), "smoke" if smoke else "full", demonstrations=by_heart if smoke else about_words)
    config.name = "teacherlm"
    config.model = dataclasses.replace(config.model, alphabet=ALPHABET)
    config.data = RowsData(
        "annotated_words:rows",
        args={"size": 6 if smoke else 2000},
        test_args=HELD_OUT,
        chat=False,
    )
    config.actor = SingleTurn(rewards=(RewardConfig("annotated_words:right_word"),), prompt_buckets=(16, 48))
    # Fields of eleven, six and eleven letters, their marks, and the answer. The checker reads what was said
    # for a chain, which may be as long.
    config.sampling = SamplingConfig(max_new_tokens=44)
    config.checkpoint = CheckpointConfig(every=100, keep_last=1)
    if smoke:
        learn_by_heart(config, steps=400)
    config.stages = StagesConfig(
        make=answers_only if size == "answers_only" else annotations,
        steps=2 if smoke else 300,
        batch_size=2 if smoke else 64,
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=20, total_steps=300),
    )
    return config
