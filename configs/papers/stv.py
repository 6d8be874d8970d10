"""STV, arXiv 2511.08246: demonstrations replaced by a few attention-head outputs that are overwritten.

    rljax study stv --config=papers/stv --workdir=runs/stv

A model of characters learns six tables from demonstrations in its prompt (tables.py); without them it does not know
which table is meant. The study puts head outputs in their place, for each table.
"""

import string

import tables

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
        raise ValueError(f"--config=papers/stv:{size}: the size must be one of full, smoke")

    smoke = size == "smoke"
    tiny = {"num_layers": 1, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 64}
    full = {"num_layers": 3, "embed_dim": 64, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "mlp_dim": 192}
    batch, steps = (16, 40) if smoke else (128, 800)

    # One size of everything, so that the update compiles once.
    update = UpdateConfig(
        pack_length=128,
        microbatch_size=16,
        length_buckets=(128,),
        score_buckets=(128,),
        row_buckets=(batch,),
        head_chunk=2048,
    )

    return Config(
        name="stv",
        model=FreshModel(alphabet=tables.LETTERS + string.digits + ">;", **tiny if smoke else full),
        data=RowsData(
            "tables:rows",
            args={"size": 240 if smoke else 6000},
            test_args={"size": 48 if smoke else 600, "seed": 1, "part": "test"},
            chat=False,
        ),
        actor=SingleTurn(rewards=(RewardConfig("rljax.tasks.verifiers:ExactMatch"),), prompt_buckets=(24,)),
        sampling=SamplingConfig(max_new_tokens=2),
        update=update,
        # All the training there is: the study leaves the weights as they are.
        warmup=WarmupConfig(
            steps=steps,
            batch_size=batch,
            demonstrations=tables.of_all_letters,
            optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=20, total_steps=steps),
        ),
        evaluation=EvaluationConfig(problems=8 if smoke else 128, samples=2 if smoke else 4, batch_prompts=64),
        checkpoint=CheckpointConfig(every=0),
    )
