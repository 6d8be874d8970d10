"""What teacherlm.py is about: words to be spelled backwards, and a model that can say things about a word.

    tac f      fundamentals: its letters                          t.a.c
    tac c      chain of thought: the letters from the last one on  c.a.t
    tac m      a common mistake                                    atc
    c.a.t k    a checker: what such a chain comes to               cat
    tac =      the question, which nobody has shown it

The letters of some of what it learns to say are scrambled, so that there is something to filter.
"""

import random
from collections.abc import Sequence

from rljax.tasks import Example, reasoning_gym_task

ALPHABET = "abcdefghijklmnopqrstuvwxyz =.|!"
QUESTIONS = {"fundamentals": "{word} f", "chain_of_thought": "{word} c", "common_mistakes": "{word} m"}
CHECK = "{chain_of_thought} k"
SCRAMBLED = 0.2
"""Share of the demonstrations that are wrong."""


HELD_OUT = {"size": 300, "seed": 1_000_000}
"""Which words are held out. Seeds that are near each other give the same words."""


def words(size: int, seed: int) -> list[str]:
    """Distinct words of three to six small letters, in the order in which reasoning-gym gives them."""
    items = reasoning_gym_task(
        "spell_backward", size=size, seed=seed, config={"min_word_len": 3, "max_word_len": 6}
    ).train
    return list(dict.fromkeys(item.columns["metadata"]["word"].lower() for item in items))


def rows(size: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions with their answers."""
    return [{"prompt": f"{word} =", "word": word, "answer": word[::-1]} for word in words(size, seed)]


def about_words(examples: Sequence[Example]) -> list[Example]:
    """Demonstrations of what can be said about a word, one of each kind for every word that is neither among the
    examples nor held out."""
    rng = random.Random(0)
    taken = {example.columns["word"] for example in examples} | set(words(**HELD_OUT))
    made = []
    for word in words(8000, seed=1):
        if word in taken:
            continue
        made.append(Example(f"{word} f", {"completion": ".".join(word)}))
        chain = ".".join(_scrambled(word[::-1], rng) if rng.random() < SCRAMBLED else word[::-1])
        made.append(Example(f"{word} c", {"completion": chain}))
        made.append(Example(f"{word} m", {"completion": _scrambled(word, rng)}))
        # Of a chain that came out wrong the checker has to say what it comes to, whatever was meant.
        made.append(Example(f"{chain} k", {"completion": chain.replace(".", "")}))
    return made


def by_heart(examples: Sequence[Example]) -> list[Example]:
    """The right things to say about the examples themselves, which a tiny model can learn by heart."""
    made = []
    for word in (example.columns["word"] for example in examples):
        chain = ".".join(word[::-1])
        said = {f"{word} f": ".".join(word), f"{word} c": chain, f"{word} m": word, f"{chain} k": word[::-1]}
        made += [Example(prompt, {"completion": text}) for prompt, text in said.items()]
    return made


def right_word(completion: str, answer: str) -> float:
    """1 if what stands behind the last `=` is the answer."""
    return float(completion.rpartition("=")[2].strip() == answer)


def _scrambled(word: str, rng: random.Random) -> str:
    return "".join(rng.sample(word, len(word)))
