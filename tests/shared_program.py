"""Rollouts of every kind of actor, on one process or as one of several; for test_run_shared.py.

shared_program.py FOLDER ENGINE [INDEX ADDRESS]
"""

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path

import jax
from absl import logging
from agent_tasks import Ask, chat

from rljax.algorithms import GRPO, ActGuideRL, DecoupledPPO, TreeGRPO
from rljax.envs import Parsed, ToolFormat
from rljax.experiment import (
    BlackBox,
    CheckpointConfig,
    Config,
    EvaluationConfig,
    FreshModel,
    Guided,
    MeshConfig,
    MultiTurn,
    PretrainedModel,
    Remote,
    RemoteMultiTurn,
    RewardConfig,
    RolloutConfig,
    RowsData,
    SamplingConfig,
    SingleTurn,
    UpdateConfig,
)
from rljax.experiment.build import build
from rljax.experiment.train import evaluate_run
from rljax.parallel import initialize_distributed, use_mesh
from rljax.rollouts import collect
from rljax.sampling import token_count

ALPHABET = "".join(chr(i) for i in range(32, 127)) + "\n"

FORMAT = ToolFormat("plain", lambda text: Parsed(), stop_strings=tuple(";abcdefghijklmnop"), wrap=(" ", "\n"))
"""Turns end often."""

_lock = threading.Lock()
asked: list[str] = []
"""What environments and agents of this process have been asked."""


class Noted(Ask):
    """Notes every step that it takes."""

    def step(self, action):
        with _lock:
            asked.append(f"{self._number} {self._turns} {action}")
        return super().step(action)


def noted_chat(base_url, row):
    with _lock:
        asked.append(str(row["prompt"]))
    return chat(base_url, row)


def questions(size: int, first: int = 0) -> list[dict]:
    return [{"prompt": f"n{i}", "answer": str(i % 10)} for i in range(first, first + size)]


def cases(folder: Path, engine: str) -> dict[str, Config]:
    turns = MultiTurn(
        make="shared_program:Noted",
        tool_format="shared_program:FORMAT",
        context_length=128,
        prefill_chunks=(8, 64),
        workers=4,
    )
    agent = BlackBox(agent="shared_program:noted_chat", context_length=128, prefill_chunks=(16, 64), workers=8)
    base = Config(
        steps=1,
        prompts_per_step=4,
        model=FreshModel(
            alphabet=ALPHABET, num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64
        ),
        data=RowsData(rows="agent_tasks:rows", args={"size": 40}, test_args={"size": 2, "first": 100}),
        actor=turns,
        algorithm=GRPO(group_size=2, kl_coef=0.0),
        sampling=SamplingConfig(max_new_tokens=6, truncated_is_wrong=False),
        update=UpdateConfig(pack_length=256, microbatch_size=2, head_chunk=256),
        evaluation=EvaluationConfig(problems=2, samples=1, batch_prompts=2),
        checkpoint=CheckpointConfig(every=0),
        mesh=MeshConfig(fsdp=-1),
    )
    model = PretrainedModel(path=str(folder / "model"))
    over_engines = {"engines": (engine,), "probes": 1, "wait_s": 60.0}
    guided = Guided(turns, column="actions", probes=1)
    return {
        "forks": dataclasses.replace(base, algorithm=TreeGRPO(chains=2, points=1, rounds=1)),
        "guided": dataclasses.replace(base, algorithm=ActGuideRL(group_size=2), actor=guided),
        # All decode one batch where they are several, and process 0 judges.
        "in_step": dataclasses.replace(
            base,
            actor=SingleTurn(rewards=(RewardConfig("flaky_rewards:noted"),), prompt_buckets=(8,)),
            data=RowsData(rows="shared_program:questions", args={"size": 12}, test_args={"size": 2, "first": 100}),
            rollout=RolloutConfig(in_step=jax.process_count() > 1),
        ),
        "agents": dataclasses.replace(base, actor=agent, model=model),
        "engines": dataclasses.replace(
            base,
            actor=Remote(rewards=(RewardConfig("flaky_rewards:noted"),), longest_prompt=8, **over_engines),
            data=RowsData(rows="shared_program:questions", args={"size": 12}, test_args={"size": 2, "first": 100}),
            model=model,
        ),
        "turns_of_engines": dataclasses.replace(
            base,
            actor=RemoteMultiTurn(
                make="shared_program:Noted",
                tool_format="shared_program:FORMAT",
                context_length=128,
                workers=4,
                **over_engines,
            ),
            model=model,
        ),
    }


def rolled_out(config: Config) -> dict:
    """A rollout and an evaluation, and what this process did for them."""
    asked.clear()
    noted = Path(os.environ["NOTES"]) / os.environ.get("RLJAX_PROCESS_ID", "alone")
    noted.unlink(missing_ok=True)
    tokens = token_count()
    run = build(config)
    with run.actor, use_mesh(run.mesh):
        params = run.initial_params()
        run.actor.set_params(params, 0)
        rollout = collect(run.actor, run.algorithm.plan, lambda n: run.curriculum.sample(0, n), 4, 0)
        evaluation = evaluate_run(run, params, 0)
    # Log-probs are left to run_mesh: they round otherwise where as many rows do not lie side by side.
    return {
        "tokens": [one.tokens.tolist() for one in rollout.trajectories],
        "rewards": rollout.rewards.tolist(),
        "texts": [record["completion"] for record in rollout.records],
        "components": [record["components"] for record in rollout.records],
        "evaluation": evaluation.problems,
        "asked": sorted(asked) if not noted.exists() else sorted(noted.read_text().splitlines()),
        "decoded": token_count() - tokens,
    }


def gone_on_with(config: Config) -> dict:
    """Ids of the groups of two steps, between which all is built anew from what a checkpoint would hold."""
    run = build(config)
    plan = run.algorithm.plan
    examples = {example.id: example for example in run.dataset.train}
    params = run.initial_params()
    ids = []
    state = {}

    for step in range(2):
        actor = build(config).actor
        with actor, use_mesh(run.mesh):
            actor.set_params(params, step)
            actor.load_state_dict(state, plan, examples)
            rollout = collect(actor, plan, lambda n, step=step: run.curriculum.sample(step, n), 4, step)
            state = json.loads(json.dumps(actor.state_dict()))
        ids.append([example.id for example in rollout.examples])
    return {"ids": ids, "drawn": run.curriculum.state_dict(), "state": state}


def main(folder: Path, engine: str) -> dict:
    given = cases(folder, engine)
    found = {name: rolled_out(config) for name, config in given.items()}

    config = dataclasses.replace(given["forks"], algorithm=DecoupledPPO(group_size=2))
    config.actor = dataclasses.replace(config.actor, groups_in_flight=2)
    return found | {"in_flight": gone_on_with(config)}


if __name__ == "__main__":
    os.environ |= {"RLJAX_NUM_PROCESSES": "2", "RLJAX_PROCESS_ID": sys.argv[3]}
    assert initialize_distributed(coordinator=sys.argv[4])
    logging.set_verbosity(logging.ERROR)
    # The classes that configs name are those of the module, not of the program.
    import shared_program

    print(json.dumps(shared_program.main(Path(sys.argv[1]), sys.argv[2])))
