"""A toy run that takes seconds: a tiny model on a toy task."""

import dataclasses
from typing import Any

from rljax.algorithms import GRPO
from rljax.experiment import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    FreshModel,
    OptimizerConfig,
    RewardConfig,
    SamplingConfig,
    SingleTurn,
    UpdateConfig,
)
from rljax.tasks.echo import EchoData


def tiny_config(**changes: Any) -> Config:
    """A complete config whose run takes seconds; `changes` replace its fields."""
    config = Config(
        name="tiny",
        steps=4,
        prompts_per_step=4,
        model=FreshModel(
            alphabet="abcdefgh=", num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
        ),
        data=EchoData(),
        actor=SingleTurn(rewards=(RewardConfig("rljax.testing:echo_reward"),), prompt_buckets=(4,)),
        algorithm=GRPO(group_size=4, kl_coef=0.0),
        sampling=SamplingConfig(max_new_tokens=4, truncated_is_wrong=False),
        # One bucket wherever one will do, so that a run compiles few programs.
        update=UpdateConfig(
            pack_length=64,
            microbatch_size=1,
            length_buckets=(64,),
            score_buckets=(64,),
            row_buckets=(8, 16, 64),
            microbatch_buckets=(2, 8),
            head_chunk=64,
            compile_ahead=1,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        evaluation=EvaluationConfig(problems=8, samples=2),
        checkpoint=CheckpointConfig(every=1),
    )
    return dataclasses.replace(config, **changes)
