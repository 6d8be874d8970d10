"""DPO, arXiv 2305.18290, behind supervised fine-tuning: right spellings are preferred to wrong ones.

    rljax prefer --config=papers/dpo --workdir=runs/dpo

Look at preference/accuracy and held-out avg@8, which is higher than that of the demonstrations that come first.
"""

import dataclasses
import random
from collections.abc import Callable

from spelling import spelling_config

from rljax.algorithms import DPO, GRPO
from rljax.experiment import CheckpointConfig, Config, OptimizerConfig, PreferenceConfig
from rljax.tasks import Example


def spelled_pairs(examples: list[Example]) -> list[Example]:
    """The right answer beside a wrong one: its letters shuffled, or two neighbours exchanged."""
    return beside_right(examples, _wrong)


def beside_right(examples: list[Example], wrong: Callable[[str, random.Random], str]) -> list[Example]:
    """Pairs of the right answer and what `wrong` makes of it, by a generator that is the example's own: every step
    draws the same."""

    def pair(example: Example) -> Example:
        right = example.columns["answer"]
        rejected = wrong(right, random.Random(example.id))
        return dataclasses.replace(example, columns={**example.columns, "chosen": right, "rejected": rejected})

    return [pair(example) for example in examples]


def _wrong(right: str, rng: random.Random) -> str:
    letters = list(right)
    if rng.random() < 0.5:
        rng.shuffle(letters)
    else:
        at = rng.randrange(len(letters) - 1)
        letters[at : at + 2] = reversed(letters[at : at + 2])
    wrong = "".join(letters)
    return wrong if wrong != right else right + right[-1]


def get_config(size: str = "full") -> Config:
    smoke = size == "smoke"
    config = spelling_config(GRPO(), size)
    return dataclasses.replace(
        config,
        name="dpo",
        checkpoint=CheckpointConfig(every=100),
        preferences=PreferenceConfig(
            method=DPO(beta=0.1),
            pairs=spelled_pairs,
            steps=2 if smoke else 100,
            batch_size=8 if smoke else 64,
            optimizer=OptimizerConfig(learning_rate=1e-4),
        ),
    )
