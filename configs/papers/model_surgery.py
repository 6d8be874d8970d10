"""Model Surgery, arXiv 2407.08770: a probe's direction added to a few rows of the MLPs' gates.

    rljax study surgery --config=papers/model_surgery --workdir=runs/surgery

A model of characters learns texts of which half shout; the edit is to make it shout less, or more, behind prompts that
shout. Each text has the column `unwanted`; the rewards `unwanted` and `real_words` count capitals and real words.
"""

import string

from rljax.experiment import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    FreshModel,
    OptimizerConfig,
    RewardConfig,
    RowsData,
    SamplingConfig,
    SingleTurn,
    UpdateConfig,
    WarmupConfig,
)


def get_config(size: str = "full") -> Config:
    if size not in ("full", "smoke"):
        raise ValueError(f"--config=papers/model_surgery:{size}: the size must be one of full, smoke")

    smoke = size == "smoke"
    tiny = {"num_layers": 1, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 64}
    full = {"num_layers": 2, "embed_dim": 64, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "mlp_dim": 192}
    batch = 16 if smoke else 64
    return Config(
        name="model_surgery",
        model=FreshModel(alphabet=string.ascii_letters + " ", **tiny if smoke else full),
        data=RowsData(
            "shouted_words:text_rows",
            args={"size": 200 if smoke else 2000},
            test_args={"size": 24 if smoke else 256, "seed": 1},
            chat=False,
        ),
        actor=SingleTurn(
            rewards=(
                RewardConfig("shouted_words:unwanted"),
                RewardConfig("shouted_words:real_words"),
            ),
            prompt_buckets=(16,),
        ),
        sampling=SamplingConfig(max_new_tokens=32, truncated_is_wrong=False),
        update=UpdateConfig(
            pack_length=64,
            microbatch_size=16,
            length_buckets=(64,),
            score_buckets=(64,),
            row_buckets=(batch,),
            head_chunk=2048,
        ),
        warmup=WarmupConfig(
            steps=20 if smoke else 600,
            batch_size=batch,
            optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=20, total_steps=600),
        ),
        evaluation=EvaluationConfig(problems=8 if smoke else 128, samples=2 if smoke else 4, batch_prompts=64),
        checkpoint=CheckpointConfig(every=0),
    )
