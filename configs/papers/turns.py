"""What the configs of methods over turns share: the shop of configs/shop.py, with two kinds of questions.

    jam+pie:    what two goods cost together: two prices that only a tool knows, and their sum
    jam:        what one good costs

They are the two tasks of the data (its column `task`). Of the demonstrations one in five is right; a third of those of
two goods ask for the same price twice, which the shop counts as `redundancy`. The model and the sizes are those of
configs/agent_demo.py.

Every config takes a size: `--config=papers/agentrl:smoke` is two steps of a far smaller model.
"""

import dataclasses
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rljax.envs import Step
from rljax.experiment import Config, MultiTurn, Recipe
from rljax.tasks import Example, query_redundancy

# The shop and its demo stand a folder above, and a config's own folder alone is on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import agent_demo
import shop

KINDS = ("sum", "price")
WARMUP = 200
"""Steps of the smoke size's warm-up."""


class Shop(shop.Shop):
    """The shop, which counts at the end how alike the prices were that an episode asked for."""

    def reset(self, row: Mapping[str, Any]) -> str:
        self._queries: list[str] = []
        return super().reset(row)

    def step(self, action: str) -> Step:
        step = super().step(action)
        if action.startswith("?"):
            self._queries.append(action)
        redundancy = query_redundancy(self._queries) if step.done else 0.0
        return Step(step.observation, step.reward, step.done, {**step.counts, "redundancy": redundancy})


def rows(size: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows `first` to `first + size`, of both kinds in turn; each is a shop of its own."""
    made = []
    for i in range(first, first + size):
        goods = random.Random(i).sample(shop.GOODS, 2)
        kind = KINDS[i % 2]
        made.append({"prompt": "+".join(goods[: 2 if kind == "sum" else 1]), "shop": i, "task": kind})
    return made


def flawed_shopping(examples: Sequence[Example]) -> list[Example]:
    """Demonstrations of every training row, of which one in five is right. Those of two goods are the ones of
    `shop.flawed`; of one good, the others guess, or ask and answer another number."""
    sums = iter(shop.flawed([example for example in examples if example.columns["task"] == "sum"]))
    made = []
    for index, example in enumerate(examples):
        if example.columns["task"] == "sum":
            made.append(next(sums))
            continue

        rng = random.Random(index)
        good = str(example.prompt)
        price = shop.price(example.columns["shop"], good)
        ask = [f"?{good};", f" {price}\n"]
        guess = f"={rng.randint(10, 49)}"
        turns = ([*ask, f"={price}"], [*ask, guess], [guess], [guess], [guess])[index // 2 % 5]
        made.append(Example(f"{good}:", {"completion": turns}))
    return made


def turns_config(algorithm: Recipe, size: str = "full", **actor: Any) -> Config:
    """`algorithm` on the two tasks; `actor` are fields of `MultiTurn`. ValueError for an unknown `size`."""
    config = agent_demo.get_config(size)
    assert isinstance(config.actor, MultiTurn)
    config.name = "turns"
    config.steps = min(config.steps, 20)
    config.algorithm = algorithm
    config.data = dataclasses.replace(config.data, rows="turns:rows")
    config.actor = dataclasses.replace(config.actor, make="turns:Shop", **actor)
    config.warmup = dataclasses.replace(config.warmup, demonstrations=flawed_shopping)
    if size == "smoke":
        _learn_by_heart(config)

    # As many conversations as there are episodes under way, those of groups in flight too.
    rows_of_step = config.prompts_per_step * algorithm.build().plan.group_size
    config.actor = dataclasses.replace(config.actor, decode_rows=rows_of_step, conversations=0)
    config.update = dataclasses.replace(config.update, row_buckets=(rows_of_step,), microbatch_buckets=())
    return config


def _learn_by_heart(config: Config) -> None:
    """Few shops, whose right demonstrations a tiny model half learns by heart in seconds: some of its answers are
    right and some wrong, so that there is something to learn in two steps."""
    config.data = dataclasses.replace(config.data, args={"size": 8}, test_args={"size": 8, "first": 100_000})
    config.warmup = dataclasses.replace(
        config.warmup,
        steps=WARMUP,
        demonstrations=_right_shopping,
        optimizer=dataclasses.replace(config.warmup.optimizer, warmup_steps=20, total_steps=WARMUP),
    )


def _right_shopping(examples: Sequence[Example]) -> list[Example]:
    """The right ones of all demonstrations that `flawed_shopping` may give of each row, which repeat after twenty."""
    rows = [example for example in examples for _ in range(20)]
    made = flawed_shopping(rows)
    return [demonstration for row, demonstration in zip(rows, made, strict=True) if _is_right(row, demonstration)]


def _is_right(row: Example, demonstration: Example) -> bool:
    total = sum(shop.price(row.columns["shop"], good) for good in str(row.prompt).split("+"))
    return demonstration.columns["completion"][-1] == f"={total}"
