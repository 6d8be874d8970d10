"""Thinking with Map, arXiv 2601.05432, for text: GRPO with tools of a map, where the reward falls with distance.

    rljax train --config=papers/map_agent --workdir=runs/map_agent

Look at rollout/component/within_25_km and rollout/component/within_2500_km: Acc@km of the episodes that are trained on.
`python benchmarks/maps.py` sets Acc@km before and after beside each other, over several samples and a verifier. The
task is in atlas.py.

The smoke size is two steps of a far smaller model.
"""

import dataclasses
import sys
from pathlib import Path

from atlas import ALPHABET, flawed

from rljax.experiment import Config, EnvironmentLimits, MultiTurn, RowsData, SamplingConfig

# The demo stands a folder above, and a config's own folder alone is on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import agent_demo


def get_config(size: str = "full") -> Config:
    config = agent_demo.get_config(size)
    smoke = size == "smoke"
    assert isinstance(config.actor, MultiTurn)
    config.name = "map_agent"
    config.model = dataclasses.replace(config.model, alphabet=ALPHABET)

    config.data = RowsData(
        rows="atlas:rows",
        args={"size": 40 if smoke else 20_000, "split": "train"},
        test_args={"size": 4 if smoke else 64, "split": "test"},
    )
    config.actor = dataclasses.replace(
        config.actor,
        make="atlas:Atlas",
        tool_format="atlas:FORMAT",
        context_length=192,
        limits=EnvironmentLimits(turns=6, observation_tokens=48),
    )
    config.sampling = SamplingConfig(max_new_tokens=20)

    # One size of rows, as in the demo, and longer.
    config.update = dataclasses.replace(
        config.update,
        pack_length=512,
        length_buckets=(512,),
        score_buckets=(512,),
        microbatch_buckets=(),
        trajectory_buckets=(192,),
    )

    # At the demo's rate the policy forgets what it copies within forty steps.
    config.optimizer = dataclasses.replace(config.optimizer, learning_rate=2e-4)

    # Behind 300 steps it cannot copy a name yet.
    steps = config.warmup.steps if smoke else 1200
    optimizer = dataclasses.replace(config.warmup.optimizer, total_steps=steps)
    config.warmup = dataclasses.replace(config.warmup, steps=steps, optimizer=optimizer, demonstrations=flawed)
    config.evaluation = dataclasses.replace(config.evaluation, solved_by="within_25_km")
    return config
