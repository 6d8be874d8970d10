"""A character model with Gemma 3's layers learns to spell words backwards: supervised warm-up, then GRPO.

    rljax train --config=gemma3_tiny --workdir=runs/gemma3

Of six layers five see the last 8 tokens alone and rotate by a base of their own, and the last sees all, as in the
released models. `transformers` loads the export as a Gemma3ForCausalLM.
"""

import string

from rljax.algorithms import GRPO
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
        name="gemma3-tiny",
        steps=60,
        prompts_per_step=32,
        model=FreshModel(
            family="gemma3_text",
            alphabet=string.ascii_letters + " =",
            num_layers=6,
            embed_dim=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            mlp_dim=192,
            sliding_window=8,
        ),
        data=ReasoningGymData(
            task="spell_backward",
            args={"min_word_len": 3, "max_word_len": 4},
            size=8000,
            test_size=128,
            prompt="{word} =",
            chat=False,
        ),
        algorithm=GRPO(group_size=8, kl_coef=0.0),
        actor=SingleTurn(prompt_buckets=(8,)),
        sampling=SamplingConfig(max_new_tokens=6),
        update=UpdateConfig(
            pack_length=256,
            microbatch_size=4,
            length_buckets=(256,),
            score_buckets=(256,),
            row_buckets=(256,),
            head_chunk=1024,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        warmup=WarmupConfig(
            steps=120,
            batch_size=64,
            completion_column="answer",
            optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=20, total_steps=120),
        ),
        evaluation=EvaluationConfig(problems=128, samples=8, batch_prompts=64),
        checkpoint=CheckpointConfig(every=0),
    )
