"""A character model under 2M parameters learns to spell words backwards: supervised warm-up, then GRPO.

    make quickstart-tiny
    rljax train --config=quickstart_tiny --workdir=runs/tiny

Half of the demonstrations are scrambled, so that the warm-up teaches the form of an answer and only some of the skill;
the rest is left to the reward. Test words are never trained on.

Expected curve: the warm-up ends near 0.6 nats per character; reward from 0.2 at step 1 to 0.7 at step 45 and 0.9 at
step 150. Unseen words: greedy 0.68 -> 0.94, avg@8 0.19 -> 0.88, in 121 s.
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
        name="quickstart-tiny",
        steps=180,
        prompts_per_step=64,
        model=FreshModel(alphabet=string.ascii_letters + " =", num_layers=4, embed_dim=128, mlp_dim=384),
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
