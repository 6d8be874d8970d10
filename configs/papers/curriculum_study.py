"""What makes a good curriculum, arXiv 2510.19099: one training set, ordered by five dimensions of difficulty.

    rljax study curriculum --config=papers/curriculum_study --workdir=runs/curriculum

A character model has learned to spell short words backwards, every second one wrongly. Then it learns from words of
three to eight letters, easy or hard ones first. The column `letters` is how long a word is, which may be a measure too.
The smoke size is a far smaller model and a few words.
"""

from collections.abc import Sequence

from evolving import words
from spelling import SIZES, half_scrambled, spelling_config

from rljax.algorithms import GRPO
from rljax.experiment import (
    Config,
    OptimizerConfig,
    RewardConfig,
    RowsData,
    SamplingConfig,
    SingleTurn,
    StagesConfig,
)
from rljax.tasks import Example

LETTERS = (3, 8)
"""Letters of a word, at least and at most."""


def rows(part: str, size: int, count: int) -> list[dict[str, object]]:
    """`count` of `size` words, those of `part` "test" before those of "train"."""
    known = words(size, letters=LETTERS)
    chosen = known[:count] if part == "test" else known[-count:]
    return [
        {"prompt": f"{word} =", "answer": word[::-1], "completion": word[::-1], "letters": len(word)} for word in chosen
    ]


def short_words(examples: Sequence[Example]) -> list[Example]:
    """Demonstrations of short words that are no tasks, the letters of every second answer shuffled."""
    tasks = {str(example.prompt) for example in examples}
    known = [word for word in words(6000, seed=1, letters=(3, 6)) if f"{word} =" not in tasks]
    return half_scrambled([Example(f"{word} =", {"answer": word[::-1]}) for word in known])


def get_config(size: str = "full") -> Config:
    if size not in SIZES:
        raise ValueError(f"--config=papers/curriculum_study:{size}: the size must be one of {', '.join(SIZES)}")

    smoke = size == "smoke"
    config = spelling_config(GRPO(), size, demonstrations=short_words, max_new_tokens=10)
    config.name = "curriculum_study"
    known = 400 if smoke else 6000
    config.data = RowsData(
        "curriculum_study:rows",
        args={"part": "train", "size": known, "count": 24 if smoke else 1920},
        test_args={"part": "test", "size": known, "count": 4 if smoke else 256},
        chat=False,
    )
    config.actor = SingleTurn(rewards=(RewardConfig("rljax.tasks.verifiers:ExactMatch"),), prompt_buckets=(16,))
    config.sampling = SamplingConfig(max_new_tokens=10, truncated_is_wrong=not smoke, top_logprobs=5)
    # Every task twice by demonstrations, and as many prompts by rollouts.
    config.stages = StagesConfig(
        steps=2 if smoke else 60,
        batch_size=4 if smoke else 64,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=6, total_steps=60),
    )
    return config
