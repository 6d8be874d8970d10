"""AgentRL, arXiv 2510.04206: a mixture of tasks, advantages normalised by task, some turns by an older policy.

    rljax train --config=agents/agentrl --workdir=runs/agent_agentrl

Searches and sums with a Python tool take turns. An episode that ends at a limit is worth -0.2. Up to a step's worth of
groups is under way while the policy is updated.
"""

from search import search_config

from rljax.algorithms import AgentRL
from rljax.experiment import Config, EnvironmentLimits, MultiTurn, RowsData


def get_config(size: str = "full") -> Config:
    smoke = size == "smoke"

    def parts(split: str, questions: int, sums: int, seed: int) -> dict:
        hops = {"size": questions, "num_pages": 240 if smoke else 1000, "split": split}
        return {
            "parts": {
                "search": {"rows": "rljax.envs.library.multihop:rows", "args": hops},
                "sums": {
                    "rows": "rljax.envs.library.reasoning:rows",
                    "args": {"dataset": "chain_sum", "size": sums, "seed": seed},
                },
            }
        }

    data = RowsData(
        rows="rljax.envs.library.mixture:mixed_rows",
        args=parts("train", 8 if smoke else 1000, 8 if smoke else 1000, 0),
        test_args=parts("test", 4 if smoke else 64, 4 if smoke else 64, 1),
        balance=True,
    )
    actor = MultiTurn(
        make="rljax.envs.library:MixedEnvironment",
        args={
            "environments": {
                "search": {"make": "rljax.envs.library:MultiHop", "args": {"tool_format": "tags"}},
                "sums": {"make": "rljax.envs.library:ReasoningEnvironment", "args": {"tool_format": "tags"}},
            }
        },
        tool_format="tags",
        limits=EnvironmentLimits(turns=8),
        unfinished_reward=-0.2,
        groups_in_flight=1 if smoke else 16,
        stale_share=0.25,
        stale_every=25,
    )
    return search_config(AgentRL(group_size=4 if smoke else 8), size, actor=actor, data=data)
