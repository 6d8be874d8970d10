"""A mixture of experts learns to spell words backwards: the task of quickstart_tiny with eight experts a layer, of
which two compute for a token, so that a token meets as many weights as there.

    rljax train --config=moe_tiny --workdir=runs/moe
    rljax train --config=moe_tiny --workdir=runs/moe --config.mesh.expert=4

With `--config.model.family=glm4_moe` it has DeepSeek-V3's router, whose experts `--config.optimizer.balance_rate=0.001`
balances (`loss/expert_load_max` in metrics.jsonl).

Greedy answers and samples are scored on words that are never trained on.
"""

import random
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
from rljax.tasks import Example


def half_scrambled(examples: list[Example]) -> list[Example]:
    """Demonstrations of every training word; the letters of every second answer are shuffled."""
    rng = random.Random(0)
    made = []
    for index, example in enumerate(examples):
        letters = list(example.columns["answer"])
        if index % 2:
            rng.shuffle(letters)
        made.append(Example(prompt=example.prompt, columns={"completion": "".join(letters)}))
    return made


def get_config() -> Config:
    return Config(
        name="moe-tiny",
        steps=180,
        prompts_per_step=64,
        model=FreshModel(
            family="qwen3_moe",
            alphabet=string.ascii_letters + " =",
            num_layers=4,
            embed_dim=128,
            # Of an expert: two of them are as wide as the MLP that they stand for.
            mlp_dim=192,
            experts=8,
            experts_per_token=2,
        ),
        data=ReasoningGymData(
            task="spell_backward",
            args={"min_word_len": 3, "max_word_len": 6},
            size=8000,
            test_size=256,
            prompt="{word} =",
            chat=False,
        ),
        algorithm=GRPO(group_size=8, kl_coef=0.0),
        actor=SingleTurn(prompt_buckets=(8,)),
        sampling=SamplingConfig(max_new_tokens=8),
        update=UpdateConfig(
            pack_length=256,
            microbatch_size=8,
            # One bucket each, so that a run compiles few programs.
            length_buckets=(256,),
            score_buckets=(256,),
            row_buckets=(512,),
            head_chunk=2048,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        warmup=WarmupConfig(
            steps=300,
            batch_size=128,
            demonstrations=half_scrambled,
            optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=20, total_steps=300),
        ),
        evaluation=EvaluationConfig(problems=256, samples=8, batch_prompts=64),
        checkpoint=CheckpointConfig(every=0),
    )
