"""SkillClaw (2604.08377): users share a repository of skills, which evolves from their episodes behind a gate.

    rljax study skills --config=papers/skillclaw --workdir=runs/skills
    rljax study skills --config=papers/skillclaw:smoke --seeds=1 --workdir=runs/skills

The config's model is trained by its warm-up, once for each seed, and stays as it is from then on. Users, days, evolver
and gate are those of config.skills; a repository without a gate is the control. WORKDIR/seed-0/gated holds the skills,
every episode and every decision. It runs on one process.
"""

from absl import flags

from rljax.cli.command_line import define_config, launch

_CONFIG = define_config("papers/skillclaw")
_WORKDIR = flags.DEFINE_string("workdir", "runs/skills", "Folder for skills, episodes and figures; emptied first.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Warm starts.")


def main() -> None:
    from rljax.analysis.study_skills import study_skills
    from rljax.parallel import require_one_process

    require_one_process("rljax study skills")
    study_skills(_CONFIG.value, _WORKDIR.value, seeds=_SEEDS.value)


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
