"""What the configs of this folder share: a character model learns to spell words backwards, by one method or another.

The task and the model are those of configs/quickstart_tiny.py: a warm-up on demonstrations of which every second one is
scrambled, then 60 steps of 64 prompts with 8 samples each. About a minute on two cores. Methods that need a start over
have demonstrations with it (`with_restarts`).

Every config takes a size: `--config=papers/fipo:smoke` is two steps of a far smaller model, to see it run.
"""

import dataclasses
import random
import string
from collections.abc import Callable, Sequence

from rljax.experiment import (
    CheckpointConfig,
    Config,
    CriticConfig,
    EvaluationConfig,
    FreshModel,
    ModelTeacher,
    OptimizerConfig,
    ReasoningGymData,
    Recipe,
    RewardConfig,
    RowsData,
    RunModel,
    SamplingConfig,
    SingleTurn,
    UpdateConfig,
    WarmupConfig,
)
from rljax.tasks import Example, Extractor, reasoning_gym_task, whole_completion

LETTERS = tuple(string.ascii_letters)
"""As `step_delimiters`: every letter ends a step."""
SIZES = ("full", "smoke")


def half_scrambled(examples: list[Example]) -> list[Example]:
    """Demonstrations of every training word; the letters of every second answer are shuffled."""
    rng = random.Random(0)
    made = []
    for index, example in enumerate(examples):
        letters = list(example.columns["answer"])
        if index % 2:
            rng.shuffle(letters)
        made.append(Example(prompt=example.prompt, columns={"completion": "".join(letters)}))
    return made


def with_restarts(examples: list[Example]) -> list[Example]:
    """Demonstrations of every training word, a quarter each: right, scrambled, and two that begin with some letters of
    a scrambled one and start over behind ` =`, rightly. So an answer that starts over is right more often."""
    rng = random.Random(0)
    made = []
    for index, example in enumerate(examples):
        right = example.columns["answer"]
        scrambled = "".join(rng.sample(right, len(right)))
        begun = scrambled[: rng.randint(1, len(right))]
        completion = (right, scrambled, f"{begun} ={right}", f"{begun} ={right}")[index % 4]
        made.append(Example(prompt=example.prompt, columns={"completion": completion}))
    return made


def after_equals(completion: str) -> str | None:
    """What the model wrote last. Not in a config file itself, which the processes that reward cannot import."""
    return completion.rpartition("=")[2].strip()


def spelling_config(
    algorithm: Recipe,
    size: str = "full",
    *,
    minibatches: int = 1,
    max_new_tokens: int = 8,
    extract: Extractor = whole_completion,
    optimizer: OptimizerConfig | None = None,
    critic_warmup: int = 0,
    demonstrations: Callable[[list[Example]], list[Example]] = half_scrambled,
) -> Config:
    """`algorithm` on the spelling task; `minibatches` are updates per rollout. ValueError for an unknown `size`."""
    if size not in SIZES:
        raise ValueError(f"--config=...:{size}: the size must be one of {', '.join(SIZES)}")

    smoke = size == "smoke"
    prompts = 4 if smoke else 64
    minibatches = min(minibatches, 2) if smoke else minibatches

    # Of one length and one count of rows, so that the update compiles once.
    length = 128 if smoke else 256
    demonstrated = 16 if smoke else 128
    rows = max(prompts * algorithm.build().plan.group_size // minibatches, demonstrated)

    tiny = {"num_layers": 1, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 64}
    return Config(
        name="spelling",
        steps=2 if smoke else 60,
        prompts_per_step=prompts,
        model=FreshModel(alphabet=string.ascii_letters + " =", **tiny if smoke else {}),
        data=ReasoningGymData(
            task="spell_backward",
            args={"min_word_len": 3, "max_word_len": 6},
            size=200 if smoke else 8000,
            test_size=4 if smoke else 256,
            prompt="{word} =",
            chat=False,
            full_score_only=not smoke,  # two steps teach no word, but some letters
            extract=extract,
        ),
        algorithm=algorithm,
        # Six letters and " =".
        actor=SingleTurn(prompt_buckets=(8,)),
        sampling=SamplingConfig(max_new_tokens=max_new_tokens, truncated_is_wrong=not smoke),
        update=UpdateConfig(
            minibatches=minibatches,
            pack_length=length,
            microbatch_size=8 // minibatches,
            length_buckets=(length,),
            score_buckets=(length,),
            row_buckets=(rows,),
            # A vocabulary of letters: the logits of a microbatch are small enough to be had at once.
            head_chunk=2048,
        ),
        optimizer=optimizer or OptimizerConfig(learning_rate=3e-4),
        critic=CriticConfig(
            warmup_steps=min(critic_warmup, 1) if smoke else critic_warmup,
            optimizer=OptimizerConfig(learning_rate=1e-3),
        ),
        warmup=WarmupConfig(
            steps=2 if smoke else 300,
            batch_size=demonstrated,
            demonstrations=demonstrations,
            optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=20, total_steps=300),
        ),
        evaluation=EvaluationConfig(
            problems=4 if smoke else 256, samples=2 if smoke else 8, batch_prompts=4 if smoke else 64
        ),
        # A run of about a minute needs none on the way.
        checkpoint=CheckpointConfig(every=0),
    )


def learn_by_heart(config: Config, steps: int = 100) -> None:
    """A warm-up of a few seconds, by which the smoke size's model knows its few words: stages that keep what is right
    find something."""
    config.warmup = dataclasses.replace(
        config.warmup,
        steps=steps,
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=10, total_steps=steps),
    )


def teacher(config: Config, size: str, path: str, tasks: tuple[str, ...] = ()) -> ModelTeacher:
    """The newest checkpoint of the run at `path`; in the smoke size, where there is none, fresh weights."""
    if size == "smoke":
        return ModelTeacher(dataclasses.replace(config.model, num_layers=2), tasks=tasks)
    return ModelTeacher(RunModel(path), tasks=tasks)


TASKS = {"backward": ("{word} =", lambda word: word[::-1]), "sorted": ("={word} =", lambda word: "".join(sorted(word)))}
"""By task: how it is asked, and what is right."""


def task_rows(tasks: Sequence[str], size: int) -> list[dict[str, str]]:
    """`size` words in every task, each with its column `task` and the `answer`."""
    args = {"min_word_len": 3, "max_word_len": 6}
    items = reasoning_gym_task("spell_backward", size=size, config=args).train
    words = [item.columns["metadata"]["word"] for item in items]
    made = []
    for word in words:
        for task in tasks:
            prompt, solve = TASKS[task]
            made.append({"prompt": prompt.format(word=word), "answer": solve(word), "task": task})
    return made


def two_tasks_config(algorithm: Recipe, size: str = "full", tasks: Sequence[str] = tuple(TASKS)) -> Config:
    """`algorithm` on words that are to be spelled backwards, and on words whose letters are to be sorted, or on one of
    both tasks."""
    config = spelling_config(algorithm, size)
    smoke = size == "smoke"
    config.data = RowsData(
        "spelling:task_rows",
        args={"tasks": list(tasks), "size": 200 if smoke else 8000},
        test_fraction=0.1,
        chat=False,
    )
    config.actor = SingleTurn(rewards=(RewardConfig("rljax.tasks.verifiers:ExactMatch"),), prompt_buckets=(16,))
    return config
