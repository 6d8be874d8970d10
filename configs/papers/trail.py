"""A trail for a character model: it is told how to travel, and every place that it comes to tells where the ways lead.

    sea: snow lies on the roofs; road m, sea k      how to travel, the weather, and where the ways from here lead
    sea k                                           what it says: a way, and where it leads
    fog over the fields; sea g, road n              what comes back
    sea g                                           and so on, to the last place

Who takes another way than the opening says, or names a place to which none leads, is lost, which ends the episode. All
of it has eight times as many characters as the context of `context_folding:characters`.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from rljax.envs import Step
from rljax.rollouts.black_box import FoldingAgent
from rljax.tasks import Example

WAYS = ("road", "sea")
WEATHER = (
    "a cold wind from the hills",
    "fog over the fields",
    "rain since early morning",
    "a clear sky, and no clouds",
    "snow lies on the roofs",
    "it is hot, nobody is out",
)
NAMES = "bdfgklmnprst"
PLACES = 40
"""On a trail."""
CONTEXT = 224
FOLDING = {"keep": 1, "most": 2, "discard_beyond": 190, "turns": PLACES + 1}
"""What fits into `CONTEXT` tokens."""
WHOLE_CONTEXT = 2048
WHOLE = {"keep": PLACES, "turns": PLACES + 1}
"""Nothing is folded: a trail fits into `WHOLE_CONTEXT` tokens."""


class Trail:
    """Pays 1 at the last place."""

    def reset(self, row: dict[str, Any]) -> list[dict[str, str]]:
        self._way = row["way"]
        self._stages = row["stages"]
        self._at = 0
        return [{"role": "user", "content": row["prompt"]}]

    def step(self, action: str) -> Step:
        """To the next place, if it is named as it was told."""
        if action.strip() != f"{self._way} {self._stages[self._at][self._way]}":
            return Step("", done=True)
        self._at += 1
        if self._at == len(self._stages):
            return Step("", reward=1.0, done=True)
        return Step(_told(self._stages[self._at]))


def rows(size: int, split: str = "train", seed: int = 0) -> list[dict[str, Any]]:
    """`size` trails; those of the splits are drawn apart."""
    rng = random.Random(f"{split} {seed}")
    made = []
    for _ in range(size):
        way = rng.choice(WAYS)
        stages = [_stage(rng) for _ in range(PLACES)]
        made.append({"prompt": f"{way}: {_told(stages[0])}", "way": way, "stages": stages})
    return made


def _told(stage: Mapping[str, Any]) -> str:
    ways = ", ".join(f"{way} {stage[way]}" for way in stage["order"])
    return f"{stage['weather']}; {ways}"


def _stage(rng: random.Random) -> dict[str, Any]:
    # Of one letter: a small model learns to copy a second one far later.
    names = dict(zip(WAYS, rng.sample(NAMES, len(WAYS)), strict=True))
    return {**names, "weather": rng.choice(WEATHER), "order": rng.sample(WAYS, len(WAYS))}


def strayed(examples: Sequence[Example], *, share: float = 0.04) -> list[Example]:
    """What the warm-up learns from: every conversation of an episode that is folded as in the run, in which a `share`
    of turns takes the other way."""
    return _played(examples, FoldingAgent("trail:Trail", **FOLDING), share)


def strayed_in_one(examples: Sequence[Example], *, share: float = 0.04) -> list[Example]:
    """The same without folding, where an episode is one row."""
    return _played(examples, FoldingAgent("trail:Trail", **WHOLE), share)


def _played(examples: Sequence[Example], agent: FoldingAgent, share: float) -> list[Example]:
    return [
        row
        for index, example in enumerate(examples)
        for row in _conversations(agent, example, random.Random(index), share)
    ]


def _conversations(agent: FoldingAgent, example: Example, rng: random.Random, share: float) -> list[Example]:
    """Those of one episode, each with the messages that it begins with and what is said until it is folded. Behind a
    wrong turn it goes on as if nothing had happened."""
    environment = Trail()
    way = example.columns["way"]
    opening = messages = environment.reset({"prompt": example.prompt, **example.columns})

    made: list[Example] = []
    turns: list[str] = []
    for stage in example.columns["stages"]:
        taken = _other(way) if rng.random() < share else way
        turns.append(f"{taken} {stage[taken]}")
        step = environment.step(f"{way} {stage[way]}")
        if step.done:
            break

        tokens = _tokens(messages) + len(turns[-1]) + 1
        said = {"role": "assistant", "content": turns[-1]}
        messages = [*messages, said, {"role": "user", "content": step.observation}]
        shorter = agent.shortened(messages, tokens)
        if shorter == messages:
            turns.append(step.observation)
        else:
            made.append(Example(opening, {"completion": turns}))
            opening = messages = shorter
            turns = []
    return [*made, Example(opening, {"completion": turns})]


def _other(way: str) -> str:
    return next(name for name in WAYS if name != way)


def _tokens(messages: Sequence[Mapping[str, str]]) -> int:
    """Each has a token of its role and one of its end, and what is to be said one of its role."""
    return sum(len(message["content"]) + 2 for message in messages) + 1
