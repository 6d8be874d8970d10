"""Supervised fine-tuning of a character model on words spelled backwards.

    rljax sft --config=sft_tiny --workdir=runs/sft

The loss falls below 0.2 nats per character within 300 steps.
"""

import string

from rljax.experiment import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    FreshModel,
    OptimizerConfig,
    ReasoningGymData,
    SamplingConfig,
    SingleTurn,
    UpdateConfig,
    WarmupConfig,
)


def get_config() -> Config:
    return Config(
        name="sft-tiny",
        model=FreshModel(alphabet=string.ascii_letters + " ="),
        data=ReasoningGymData(
            task="spell_backward",
            args={"min_word_len": 3, "max_word_len": 6},
            size=8000,
            test_size=256,
            prompt="{word} =",
            chat=False,
        ),
        actor=SingleTurn(prompt_buckets=(8,), prompt_slots=64, sample_slots=8),
        sampling=SamplingConfig(max_new_tokens=8),
        update=UpdateConfig(
            pack_length=256, microbatch_size=8, length_buckets=(256,), score_buckets=(256,), head_chunk=2048
        ),
        warmup=WarmupConfig(
            steps=300,
            batch_size=128,
            completion_column="answer",
            optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=20, total_steps=300),
        ),
        evaluation=EvaluationConfig(problems=256, samples=8, batch_prompts=64),
        checkpoint=CheckpointConfig(every=100),
    )
