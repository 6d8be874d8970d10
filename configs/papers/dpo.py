"""DPO, arXiv 2305.18290, behind supervised fine-tuning: right spellings are preferred to wrong ones.

    rljax prefer --config=papers/dpo --workdir=runs/dpo

Look at preference/accuracy and held-out avg@8, which is higher than that of the demonstrations that come first.
"""

import dataclasses

from spelling import spelling_config

from rljax.algorithms import DPO, GRPO
from rljax.experiment import Config, OptimizerConfig, PreferenceConfig
from rljax.tasks import Example


def spelled_pairs(examples: list[Example]) -> list[Example]:
    """The right answer beside one with two neighbouring letters exchanged."""
    return [dataclasses.replace(example, columns={**example.columns, **_pair(example)}) for example in examples]


def _pair(example: Example) -> dict[str, str]:
    right = example.columns["answer"]
    # Letters that differ, and a place that depends on the example alone.
    places = [i for i in range(len(right) - 1) if right[i] != right[i + 1]] or [0]
    at = places[example.id % len(places)]
    wrong = right[:at] + right[at + 1] + right[at] + right[at + 2 :]
    return {"chosen": right, "rejected": wrong if wrong != right else right + right[-1]}


def get_config(size: str = "full") -> Config:
    smoke = size == "smoke"
    config = spelling_config(GRPO(), size)
    return dataclasses.replace(
        config,
        name="dpo",
        preferences=PreferenceConfig(
            method=DPO(beta=0.1),
            pairs=spelled_pairs,
            steps=2 if smoke else 100,
            batch_size=8 if smoke else 64,
            optimizer=OptimizerConfig(learning_rate=1e-4),
        ),
    )
