"""A small model learns to use tools: GRPO and Tree-GRPO side by side, at equal measured tokens.

    rljax agent-demo --workdir=runs/agent-demo
    rljax agent-demo --config=agent_demo:smoke --tokens=500 --seeds=1 --workdir=runs/agent-smoke

Tree-GRPO forks at the beginning of turns, on the conversation as it stood; it has as many leaves as GRPO has samples.
"""

from absl import flags

from rljax.cli.command_line import define_config, launch

_CONFIG = define_config("agent_demo")
_WORKDIR = flags.DEFINE_string("workdir", "runs/agent-demo", "Folder for the figures and the picture; emptied first.")
_TOKENS = flags.DEFINE_integer("tokens", 90_000, "Tokens that each method samples in training.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Warm starts, and runs of each method.", lower_bound=1)


def main() -> None:
    from rljax.algorithms import TreeGRPO
    from rljax.analysis.agent_demo import agent_demo

    config = _CONFIG.value
    tree = TreeGRPO(chains=config.algorithm.group_size // 2, points=1, kl_coef=0.0)
    methods = {"GRPO": config.algorithm, "Tree-GRPO": tree}
    agent_demo(config, methods, _WORKDIR.value, tokens=_TOKENS.value, seeds=_SEEDS.value)


def command() -> None:
    """Runs it with the flags of `sys.argv`."""
    launch(main)
