"""AgentTuning, arXiv 2310.12823: an agent's episodes that earned a reward of 1, mixed with general data at eta = 0.2.

    rljax stages --config=papers/agenttuning --workdir=runs/agenttuning

Look at held-out avg@8 of either task, of the start, which has learned words alone, and behind the mixture.
`--config=papers/agenttuning:agent_only` is eta = 1, to see what becomes of the words without general data.
"""

import dataclasses

from shop_and_words import base_config, general_only

from rljax.experiment import CheckpointConfig, Config, MultiTurn, OptimizerConfig, RowsData, StagesConfig
from rljax.experiment.stage_parts import StageParts
from rljax.tasks import DataStage, Within, kept, mixed, stage

SIZES = ("full", "smoke", "agent_only")
ETA = 0.2
"""The paper's share of the agent's data, of rows."""


def mixture(parts: StageParts, eta: float) -> list[DataStage]:
    """Episodes of a reward below 1 are left out, then every row of an update is an agent's with probability `eta`."""
    own = parts.run.config.stages
    weights = {"agent": eta, "general": 1 - eta}
    return [
        stage("kept", kept, rules={"reward below 1": Within("reward", least=1.0)}),
        stage(
            "mixed",
            mixed,
            weights=weights,
            count=own.steps * own.batch_size,
            length=parts.learned_tokens,
            seed=parts.seed,
        ),
    ]


def published(parts: StageParts) -> list[DataStage]:
    return mixture(parts, ETA)


def agent_only(parts: StageParts) -> list[DataStage]:
    return mixture(parts, 1.0)


def get_config(size: str = "full") -> Config:
    if size not in SIZES:
        raise ValueError(f"--config=...:{size}: the size must be one of {', '.join(SIZES)}")

    smoke = size == "smoke"
    config = base_config("smoke" if smoke else "full")
    assert isinstance(config.actor, MultiTurn)
    config.name = "agenttuning"
    config.data = RowsData(
        rows="shop_and_words:rows",
        args={"size": 40 if smoke else 4000},
        test_args={"size": 4 if smoke else 64, "first": 100_000},
        # One pair of goods in many shops.
        repeated_prompts=True,
    )
    config.actor = dataclasses.replace(config.actor, make="shop_and_words:ShopOrWord")
    config.warmup = dataclasses.replace(config.warmup, demonstrations=general_only)
    config.evaluation = dataclasses.replace(config.evaluation, problems=8 if smoke else 128)
    config.checkpoint = CheckpointConfig(every=100, keep_last=1)
    config.stages = StagesConfig(
        make=agent_only if size == "agent_only" else published,
        steps=2 if smoke else 400,
        batch_size=4 if smoke else 64,
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=20, total_steps=400),
    )
    return config
