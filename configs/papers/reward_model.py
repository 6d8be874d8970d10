"""A reward model, arXiv 2203.02155: right spellings are preferred to wrong ones. Then it is the reward of a policy.

    rljax prefer --config=papers/reward_model --workdir=runs/reward_model
    rljax convert --source=runs/reward_model --target=runs/reward_model/export
    rljax train --config=papers/reward_model:ppo --workdir=runs/reward_model_ppo

Supervised fine-tuning, a reward model and PPO, in this order: the first and the last command begin with the supervised
steps of config.warmup, which give both the same model. `:grpo` in place of `:ppo` needs no critic. Look at
eval/preference_accuracy, on held-out pairs, and at held-out avg@8, which counts right spellings by the task's own
measure. Training sees nothing but the reward model.

Expected, seed 0: eval/preference_accuracy 0.98; by GRPO the held-out avg@8 rises from 0.19 to 0.67 in 60 steps.
"""

import dataclasses
import random

from dpo import beside_right
from spelling import LETTERS, spelling_config

from rljax.algorithms import GRPO, PPO, BradleyTerry
from rljax.experiment import CheckpointConfig, Config, OptimizerConfig, PreferenceConfig, Recipe, RewardConfig
from rljax.tasks import Example

FOLDER = "runs/reward_model/export"
"""Where the second command writes what the third reads."""


def misspelled_pairs(examples: list[Example]) -> list[Example]:
    """The right answer beside one with one to three mistakes of any kind: a policy finds the kinds that a reward model
    has not been shown."""
    return beside_right(examples, _misspelled)


def _misspelled(right: str, rng: random.Random) -> str:
    letters = list(right)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(letters))
        kind = rng.choice(("exchanged", "shuffled", "left out", "doubled", "replaced"))
        if kind == "exchanged":
            letters[at : at + 2] = reversed(letters[at : at + 2])
        elif kind == "shuffled":
            rng.shuffle(letters)
        elif kind == "left out" and len(letters) > 1:
            del letters[at]
        elif kind == "doubled":
            letters.insert(at, letters[at])
        else:
            letters[at] = rng.choice(LETTERS)

    # Mistakes may undo each other.
    wrong = "".join(letters)
    return wrong if wrong != right else right[:-1]


def get_config(size: str = "full") -> Config:
    if size in ("grpo", "ppo"):
        return rewarded(GRPO(kl_coef=0.02) if size == "grpo" else PPO(group_size=8, lam=0.95, kl_coef=0.02))
    smoke = size == "smoke"
    return dataclasses.replace(
        spelling_config(GRPO(), size),
        name="reward_model",
        checkpoint=CheckpointConfig(every=100),
        preferences=PreferenceConfig(
            method=BradleyTerry(center=0.01),
            pairs=misspelled_pairs,
            steps=2 if smoke else 400,
            batch_size=8 if smoke else 64,
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", total_steps=400),
        ),
    )


def rewarded(algorithm: Recipe, size: str = "full", folder: str = FOLDER) -> Config:
    """Reinforcement learning by the reward model in `folder`, judged by the task's own answer, which weighs nothing."""
    is_ppo = isinstance(algorithm, PPO)
    config = spelling_config(algorithm, size, minibatches=4 if is_ppo else 1, critic_warmup=5 if is_ppo else 0)
    rewards = (
        RewardConfig("rljax.experiment.reward_model:RewardModel", args={"path": folder, "chat": False}),
        RewardConfig("rljax.tasks.verifiers:ExactMatch", weight=0.0),
    )
    return dataclasses.replace(
        config,
        name=f"reward_model_{type(algorithm).__name__.lower()}",
        data=dataclasses.replace(config.data, full_score_only=True),
        actor=dataclasses.replace(config.actor, rewards=rewards),
        evaluation=dataclasses.replace(config.evaluation, solved_by="ExactMatch"),
    )
