"""Role-Agent, arXiv 2606.10917: an agent that foresees what its actions lead to, on tasks drawn by what failed.

    rljax train --config=agents/role_agent --workdir=runs/agent_role_agent

Look at rollout/component/prediction, and at copy_prediction beside it: what repeating the last observation would get.
Between two steps the policy reads its failures (rollout/curriculum/reflections); the smoke form's model has too few
letters for that, and goes by the words of the tasks.
"""

from search import search_config

from rljax.algorithms import RoleAgent
from rljax.experiment import Config, EnvironmentLimits, FailedTasks, MultiTurn, ReflectedTasks


def get_config(size: str = "full") -> Config:
    actor = MultiTurn(
        make="rljax.envs.library:Predicting",
        args={
            "make": "rljax.envs.library:MultiHop",
            "args": {"tool_format": "tags"},
            "instruction": "In every message, first write what you expect to read next: "
            "<predict_next>...</predict_next>",
        },
        tool_format="rljax.envs.library.multihop:TAGS",
        limits=EnvironmentLimits(turns=8),
    )
    config = search_config(RoleAgent(group_size=4 if size == "smoke" else 8), size, actor=actor)
    config.curriculum = FailedTasks() if size == "smoke" else ReflectedTasks(vocabulary="search", chars=3000)
    return config
