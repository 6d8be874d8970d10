"""SkillClaw, arXiv 2604.08377: users share a repository of skills, which evolves from their episodes behind a gate.

    rljax study skills --config=papers/skillclaw --workdir=runs/skills

A model of characters does what a skill in its prompt says, and nothing else tells it what a topic asks for
(hidden_rules.py). Look at held-out success, which rises day by day, beside that of a repository without a gate, and at
the wrong skills that somebody hands in from the second day on: none of them may pass.
"""

from hidden_rules import FORM, harmful, hasty_reader, rules_config

from rljax.experiment import Config, SkillsConfig


def get_config(size: str = "full") -> Config:
    config = rules_config(size)
    config.name = "skillclaw"
    smoke = size == "smoke"
    config.skills = SkillsConfig(
        evolver=hasty_reader,
        handed_in=harmful,
        form=FORM,
        days=2 if smoke else 5,
        users=2 if smoke else 4,
        episodes=8,
        validation_tasks=2 if smoke else 12,
        repeats=2 if smoke else 4,
    )
    return config
