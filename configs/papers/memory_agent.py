"""Memory as tools (MemGAS 2505.19549, DrVideo 2406.12846, Align-GRAG 2505.16237): GRPO that pays for needed evidence.

    rljax train --config=papers/memory_agent --workdir=runs/memory_agent

Look at rollout/component/evidence_recall and rollout/component/is_right: how much of what an answer needs was opened,
and how often the answer is right. The task is in diary.py. The papers train no such policy: the tools are theirs, the
task and the reward are of rljax.

The smoke size is two steps of a far smaller model.
"""

import dataclasses
import sys
from pathlib import Path

from diary import ALPHABET, demonstrations

from rljax.experiment import Config, EnvironmentLimits, MultiTurn, RowsData, SamplingConfig

# The demo stands a folder above, and a config's own folder alone is on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import agent_demo


def get_config(size: str = "full") -> Config:
    config = agent_demo.get_config(size)
    smoke = size == "smoke"
    assert isinstance(config.actor, MultiTurn)
    config.name = "memory_agent"
    config.steps = 2 if smoke else 60
    config.model = dataclasses.replace(config.model, alphabet=ALPHABET, max_position=512)

    config.data = RowsData(
        rows="diary:rows",
        args={"size": 40 if smoke else 8000, "split": "train"},
        test_args={"size": 4 if smoke else 64, "split": "test"},
        # The same question is asked of many histories.
        repeated_prompts=True,
    )
    config.actor = dataclasses.replace(
        config.actor,
        make="diary:Diary",
        tool_format="diary:FORMAT",
        context_length=320,
        limits=EnvironmentLimits(turns=10, observation_tokens=64),
    )
    config.sampling = SamplingConfig(max_new_tokens=20)

    # One size of rows, as in the demo, and longer.
    config.update = dataclasses.replace(
        config.update,
        pack_length=512,
        length_buckets=(512,),
        score_buckets=(512,),
        microbatch_buckets=(),
        trajectory_buckets=(320,),
    )

    # Most of the warm-up goes into reading; at the agent demo's rates neither stage holds what it has learned.
    steps = config.warmup.steps if smoke else 1300
    optimizer = dataclasses.replace(config.warmup.optimizer, learning_rate=2e-3, total_steps=steps)
    config.warmup = dataclasses.replace(config.warmup, steps=steps, optimizer=optimizer, demonstrations=demonstrations)
    config.optimizer = dataclasses.replace(config.optimizer, learning_rate=3e-4)
    config.evaluation = dataclasses.replace(config.evaluation, solved_by="is_right")
    return config
