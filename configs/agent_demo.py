"""A character model under 1M parameters learns to use tools: two prices that only a tool knows, added by another.

    make agent-demo                                           # GRPO and Tree-GRPO, three seeds, one table
    rljax train --config=agent_demo --workdir=runs/agent      # GRPO alone

The task is in configs/shop.py. Of the demonstrations that the warm-up learns from one in five is right, so that the
policy can write calls, and makes little of them; the rest is left to the reward.

Expected: held-out success (avg@8) from 0.14 to 0.85, greedy from 0.3 to 0.9, tool calls per episode from 2 to 3, in 25
steps.

`--config=agent_demo:smoke` is a run of seconds, to see it run.
"""

from shop import ALPHABET, flawed

from rljax.algorithms import GRPO
from rljax.experiment import (
    CheckpointConfig,
    Config,
    EnvironmentLimits,
    EvaluationConfig,
    FreshModel,
    MultiTurn,
    OptimizerConfig,
    RowsData,
    SamplingConfig,
    UpdateConfig,
    WarmupConfig,
)

SIZES = ("full", "smoke")


def get_config(size: str = "full") -> Config:
    if size not in SIZES:
        raise ValueError(f"--config=...:{size}: the size must be one of {', '.join(SIZES)}")

    smoke = size == "smoke"
    prompts, group = (4, 4) if smoke else (24, 8)
    warmup, ramp = (2, 1) if smoke else (400, 20)

    # Every episode of a step is played at once, in a conversation of its own.
    rows = prompts * group

    tiny = {"num_layers": 1, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 64}
    model = {"num_layers": 2, "embed_dim": 128, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32, "mlp_dim": 384}
    return Config(
        name="agent-demo",
        steps=2 if smoke else 30,
        prompts_per_step=prompts,
        model=FreshModel(alphabet=ALPHABET, **tiny if smoke else model),
        data=RowsData(rows="shop:rows", args={"size": 4000}, test_args={"size": 64, "first": 100_000}),
        actor=MultiTurn(
            make="shop:Shop",
            tool_format="shop:FORMAT",
            context_length=48,
            decode_rows=rows,
            conversations=rows,
            prefill_chunks=(8,),
            check_every=4,
            workers=4,
            limits=EnvironmentLimits(turns=6),
        ),
        algorithm=GRPO(group_size=group, kl_coef=0.0),
        sampling=SamplingConfig(max_new_tokens=10),
        # One size of everything, so that the update compiles once.
        update=UpdateConfig(
            pack_length=256,
            microbatch_size=8,
            length_buckets=(256,),
            score_buckets=(256,),
            row_buckets=(rows,),
            microbatch_buckets=(6,),
            trajectory_buckets=(48,),
            head_chunk=2048,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        warmup=WarmupConfig(
            steps=warmup,
            batch_size=16 if smoke else 64,
            demonstrations=flawed,
            optimizer=OptimizerConfig(learning_rate=4e-3, schedule="cosine", warmup_steps=ramp, total_steps=warmup),
        ),
        evaluation=EvaluationConfig(problems=4 if smoke else 64, samples=2 if smoke else 8, batch_prompts=prompts),
        checkpoint=CheckpointConfig(every=0),
    )
