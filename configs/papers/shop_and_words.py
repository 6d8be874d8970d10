"""What agenttuning.py mixes: episodes in the shop of configs/shop.py, and words spelled backwards.

    jam+pie:    an agent's task (`agent`): prices that only a tool knows, and their sum
    tac =       a task without tools (`general`): the word backwards

Of the recorded episodes one in five or so ends with the right sum; each says what it earned (`reward`).
"""

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rljax.envs import Step
from rljax.experiment import Config
from rljax.tasks import Example, reasoning_gym_task

# The shop stands a folder above, and a config's own folder alone is on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import agent_demo
import shop


def base_config(size: str) -> Config:
    """That of configs/agent_demo.py, whose model and sizes these are."""
    return agent_demo.get_config(size)


class ShopOrWord(shop.Shop):
    """The shop for rows of `agent`; for others one turn, which pays 1 for the column `answer`."""

    def reset(self, row: Mapping[str, Any]) -> str:
        self._answer = row.get("answer")
        if self._answer is not None:
            return row["prompt"]
        return super().reset({**row, "prompt": row["prompt"].removesuffix(":")})

    def step(self, action: str) -> Step:
        if self._answer is None:
            return super().step(action)
        is_right = action.strip() == self._answer
        return Step("", float(is_right), True, {"tool_calls": 0.0, "malformed_calls": 0.0})


def rows(size: int, first: int = 0) -> list[dict[str, Any]]:
    """`size` recorded episodes, of the shops from `first` on, and as many words, in turn."""
    made = []
    for episode, word in zip(episodes(size, first), words(size, first), strict=True):
        made.append(episode)
        made.append({"prompt": f"{word} =", "task": "general", "answer": word[::-1], "completion": word[::-1]})
    return made


def episodes(size: int, first: int) -> list[dict[str, Any]]:
    """Recorded episodes with what each earned."""
    given = [Example(row["prompt"], {"shop": row["shop"]}) for row in shop.rows(size, first)]
    made = []
    for example, recorded in zip(given, shop.flawed(given), strict=True):
        number = example.columns["shop"]
        total = sum(shop.price(number, good) for good in str(example.prompt).split("+"))
        turns = recorded.columns["completion"]
        earned = float(turns[-1] == f"={total}")
        made.append({"prompt": recorded.prompt, "task": "agent", "shop": number, "completion": turns, "reward": earned})
    return made


def words(size: int, first: int) -> list[str]:
    """`size` words of three to six small letters; others for another `first`."""
    items = reasoning_gym_task(
        "spell_backward", size=2 * size, seed=first, config={"min_word_len": 3, "max_word_len": 6}
    ).train
    known = [item.columns["metadata"]["word"].lower() for item in items]
    return random.Random(first).choices(known, k=size)


def general_only(examples: Sequence[Example]) -> list[Example]:
    """What the start learns from."""
    return [example for example in examples if example.columns["task"] == "general"]
