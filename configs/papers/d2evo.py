"""D2Evo, arXiv 2605.17037: one policy asks for tasks of medium difficulty and solves them, in rounds.

    rljax train --config=papers/d2evo --workdir=runs/d2evo

Look at rollout/curriculum/questions_in_band, which rises as the questioner learns, and at rollout/curriculum/accepted.
The numbers of a round are small, like the 24 words to train on: an answer costs as many tokens as a question.
"""

from evolving import evolving_config

from rljax.algorithms import GRPO
from rljax.experiment import Config, D2EvoTasks


def get_config(size: str = "full") -> Config:
    config = evolving_config(GRPO(group_size=8, kl_coef=0.0, clip_high=0.28), size)
    smoke = size == "smoke"
    config.curriculum = D2EvoTasks(
        maker="evolving:WordMaker",
        questioner_steps=1 if smoke else 2,
        solver_steps=1 if smoke else 10,
        attempts=2 if smoke else 16,
        least_anchors=8,
        votes=2 if smoke else 6,
        question_band=(0.3, 0.7),
        proposals=2 if smoke else 12,
        per_anchor=6.0,
        second_votes=0,
    )
    return config
