"""What configs of shared skills share: words whose letters are to be put in an order that depends on a hidden rule.

A task is a topic and a word, `k cabd=`. Every topic has one of a few rules, which no prompt tells. A skill tells it:
in front of the task stands `k reverse`. The model of characters learns to do what such a line says, with topics and
rules that are drawn anew for every demonstration; without a line it guesses. So what a topic's rule is stands nowhere
but in skills, and these come from episodes alone.
"""

import random
import string
from collections.abc import Callable, Sequence
from typing import Any

from rljax.experiment import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    FreshModel,
    OptimizerConfig,
    RewardConfig,
    RowsData,
    SamplingConfig,
    SingleTurn,
    UpdateConfig,
    WarmupConfig,
)
from rljax.tasks import Episode, Example, Proposal, Skill

RULES: dict[str, tuple[int, ...]] = {
    "backward": (3, 2, 1, 0),
    "halves": (2, 3, 0, 1),
    "pairs": (1, 0, 3, 2),
    "turn": (1, 2, 3, 0),
    "first": (0, 0, 0, 0),
    "last": (3, 3, 3, 3),
}
"""By name: which letter of a word of four stands at each place of the answer."""
TOPICS = "klmnpqrs"
WORD_LETTERS = "abcdef"
FORM = "{text}\n"
"""How a skill stands in front of a task, here and in `config.skills`."""
LENGTH = 4


def solved(rule: str, word: str) -> str:
    """What a rule makes of a word."""
    return "".join(word[place] for place in RULES[rule])


def hidden_rules() -> dict[str, str]:
    """The rule of each topic, the same in every call."""
    rng = random.Random(7)
    return {topic: rng.choice(list(RULES)) for topic in TOPICS}


def rule_rows(size: int, seed: int = 0) -> list[dict[str, str]]:
    """`size` tasks, the topics in turn."""
    rng = random.Random(seed)
    hidden = hidden_rules()
    made = []
    for index in range(size):
        topic = TOPICS[index % len(TOPICS)]
        word = "".join(rng.choices(WORD_LETTERS, k=LENGTH))
        made.append({"prompt": f"{topic} {word}=", "answer": solved(hidden[topic], word), "topic": topic})
    return made


def told_and_guessed(examples: list[Example]) -> list[Example]:
    """Demonstrations of every training word by a rule that is drawn for it: three of four are told it, the fourth
    guesses. A topic means nothing."""
    rng = random.Random(0)
    made = []
    for index, example in enumerate(examples):
        word = _word_of(str(example.prompt))
        topic = rng.choice(TOPICS)
        rule = rng.choice(list(RULES))
        told = FORM.format(text=f"{topic} {rule}") if index % 4 else ""
        made.append(Example(f"{told}{topic} {word}=", {"completion": solved(rule, word)}))
    return made


def _word_of(prompt: str) -> str:
    return prompt.rstrip("=").rpartition(" ")[2]


def hasty_reader(parts: Any) -> Callable[[Skill | None, Sequence[Episode]], list[Skill]]:
    """An evolver that is no model, so that the same night always proposes the same: `read_rules`."""
    return read_rules


def read_rules(skill: Skill | None, episodes: Sequence[Episode]) -> list[Skill]:
    """For each topic of the episodes, the rule that explains most solved ones, of those that no failed one followed.

    It knows which rules there are and reads no right answer. It is hasty: with few episodes several rules are left, and
    it takes the first. Where all episodes of a skill are solved, it leaves the skill alone.
    """
    if skill is not None and all(episode.is_solved for episode in episodes):
        return []
    proposed = []
    for topic in sorted({str(episode.columns["topic"]) for episode in episodes}):
        own = [(_word_of(str(e.prompt)), e.text, e.is_solved) for e in episodes if e.columns["topic"] == topic]
        explained = {
            rule: sum(is_solved for word, text, is_solved in own if text == solved(rule, word))
            for rule in RULES
            if not any(not is_solved and text == solved(rule, word) for word, text, is_solved in own)
        }
        if explained:
            rule = max(explained, key=lambda name: explained[name])
            proposed.append(Skill(topic, f"{topic} {rule}", topic))
    return proposed


def harmful(day: int, deployed: Sequence[Skill]) -> list[Proposal]:
    """From the second day on, somebody hands in another rule for every skill that is deployed."""
    if day < 2:
        return []
    names = list(RULES)
    made = []
    for skill in deployed:
        rule = skill.text.rpartition(" ")[2]
        other = names[(names.index(rule) + 1) % len(names)]
        made.append(Proposal(Skill(skill.name, f"{skill.topic} {other}", skill.topic), skill.version, ()))
    return made


def rules_config(size: str = "full") -> Config:
    """The tasks, the model and its warm-up. ValueError for an unknown `size`."""
    if size not in ("full", "smoke"):
        raise ValueError(f"--config=...:{size}: the size must be one of full, smoke")

    smoke = size == "smoke"
    tiny = {"num_layers": 1, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 64}
    full = {"num_layers": 2, "embed_dim": 64, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "mlp_dim": 192}
    batch = 16 if smoke else 64
    steps = 20 if smoke else 500
    return Config(
        name="hidden_rules",
        prompts_per_step=16 if smoke else 64,
        model=FreshModel(alphabet=string.ascii_lowercase + " =\n", **tiny if smoke else full),
        data=RowsData(
            "hidden_rules:rule_rows",
            args={"size": 160 if smoke else 6000},
            test_fraction=0.1,
            chat=False,
        ),
        actor=SingleTurn(rewards=(RewardConfig("rljax.tasks.verifiers:ExactMatch"),), prompt_buckets=(24,)),
        # Four letters and the end.
        sampling=SamplingConfig(max_new_tokens=LENGTH + 2),
        update=UpdateConfig(
            # Some seven rows each, so that a batch is one microbatch.
            pack_length=128,
            microbatch_size=4 if smoke else 10,
            length_buckets=(128,),
            score_buckets=(128,),
            row_buckets=(batch,),
            head_chunk=2048,
        ),
        warmup=WarmupConfig(
            steps=steps,
            batch_size=batch,
            demonstrations=told_and_guessed,
            optimizer=OptimizerConfig(
                learning_rate=3e-3, schedule="cosine", warmup_steps=steps // 20, total_steps=steps
            ),
        ),
        evaluation=EvaluationConfig(problems=8 if smoke else 96, samples=2 if smoke else 4, batch_prompts=64),
        checkpoint=CheckpointConfig(every=0),
    )
