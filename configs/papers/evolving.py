"""What the configs that make tasks share: words backwards, with a training set that is poor by design.

The model and the task are those of `spelling.py`, but only some short words are there to train on, while held-out words
have up to six letters. A second prompt, the word and a question mark, asks for another word; the warm-up shows both.

Every config takes a size: `--config=papers/coevolve:smoke` is two steps of a far smaller model, to see it run.
"""

import dataclasses
import functools
import random
from collections.abc import Sequence

from spelling import spelling_config

from rljax.experiment import Config, Recipe, RewardConfig, RowsData, SingleTurn
from rljax.tasks import Example, reasoning_gym_task

WORDS = 24
"""Words to train on."""
ASK = "{word} ?"
"""The prompt for a new word."""


@functools.cache
def words(size: int, seed: int = 0, *, letters: tuple[int, int] = (3, 6)) -> tuple[str, ...]:
    """Distinct words of so many `letters`, in the order in which reasoning-gym gives them."""
    least, most = letters
    args = {"min_word_len": least, "max_word_len": most}
    items = reasoning_gym_task("spell_backward", size=size, seed=seed, config=args).train
    return tuple(dict.fromkeys(item.columns["metadata"]["word"] for item in items))


def row_of(word: str) -> dict[str, str]:
    return {"prompt": f"{word} =", "answer": word[::-1]}


def rows(part: str, size: int, count: int) -> list[dict[str, str]]:
    """Of `size` words: `count` of the short ones (`part="train"`), or `count` of all lengths (`part="test"`)."""
    known = words(size)
    held_out = known[:count] if part == "test" else ()
    short = [word for word in known[len(known) // 2 :] if len(word) <= 4]
    return [row_of(word) for word in held_out or short[:count]]


def both_prompts(examples: Sequence[Example]) -> list[Example]:
    """Demonstrations of words that are neither trained on nor held out: half of them spelled backwards, every second
    one with scrambled letters, and half followed by another word."""
    rng = random.Random(0)
    taken = {str(example.prompt) for example in examples}
    known = words(4000)
    made = []
    # The first are the held-out ones.
    for index, word in enumerate(known[256:]):
        if f"{word} =" in taken:
            continue
        letters = list(word[::-1])
        if index % 2:
            rng.shuffle(letters)
        made.append(Example(f"{word} =", {"completion": "".join(letters)}))
        made.append(Example(ASK.format(word=word), {"completion": rng.choice(known[256:])}))
    return made


class WordMaker:
    """Asks for a word like one that is there, and reads it; what is no word of three to six letters is no task, since
    only of those is the answer known."""

    def prompt_of(self, source: Example, why: str, texts: Sequence[str]) -> str:
        return ASK.format(word=str(source.prompt).removesuffix(" ="))

    def task_of(self, text: str, source: Example) -> Example | None:
        word = text.strip()
        if not 3 <= len(word) <= 6 or not word.isascii() or not word.isalpha():
            return None
        return Example(f"{word} =", {"answer": word[::-1]})

    def labelled(self, task: Example, label: str) -> Example | None:
        # In place of a stronger model: of a word the right answer is known.
        word = str(task.prompt).removesuffix(" =")
        return Example(task.prompt, {"answer": label}) if label == word[::-1] else None


def evolving_config(algorithm: Recipe, size: str = "full") -> Config:
    """`algorithm` on words that are few and short. ValueError for an unknown `size`."""
    config = spelling_config(algorithm, size, demonstrations=both_prompts)
    smoke = size == "smoke"
    config.name = "evolving"
    config.model = dataclasses.replace(config.model, alphabet=config.model.alphabet + "?")
    config.prompts_per_step = 4 if smoke else 16
    config.update.microbatch_size = 8
    config.update.row_buckets = (32,) if smoke else (config.warmup.batch_size,)
    known = 400 if smoke else 4000
    config.data = RowsData(
        "evolving:rows",
        args={"part": "train", "size": known, "count": 8 if smoke else WORDS},
        test_args={"part": "test", "size": known, "count": 4 if smoke else 256},
        chat=False,
    )
    config.actor = SingleTurn(rewards=(RewardConfig("rljax.tasks.verifiers:ExactMatch"),), prompt_buckets=(8,))
    return config
