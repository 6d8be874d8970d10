"""What the stages of a run may use: its policy, its rewards, and tokens counted as it counts them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rljax.experiment.build import Run
from rljax.experiment.config import to_dict
from rljax.experiment.player import FIRST_ASKED_STEP
from rljax.experiment.sft import demonstration_row, dialogue_of
from rljax.rollouts.single_turn import PromptActor, completion_text
from rljax.sampling import Request, Sample
from rljax.tasks import Complete, Completion, Example, Prompt, Remembered, RewardInput, RewardResult, Row
from rljax.tasks.examples import digest
from rljax.text import Dialogue, encode_text, render_prompt


@dataclasses.dataclass(frozen=True)
class StageParts:
    """What `config.stages.make` is given.

    Attributes:
        run: the run, whose actor has the weights of the round before.
        weights: names these weights; empty where they are not there yet.
        number: of the round, from 1 on.
        folder: where the round's files go.
    """

    run: Run
    weights: str
    number: int
    folder: Path

    @property
    def seed(self) -> int:
        """The run's."""
        return self.run.config.seed

    @functools.cached_property
    def policy(self) -> Complete:
        """The policy with the weights of the round before, sampled as `config.sampling` says. ValueError where it does
        not answer prompts alone."""
        return self.remembered(PolicyCompletions(self.run, self.weights, self.number))

    @property
    def rewards(self) -> "RunRewards":
        """A `rljax.tasks.Score` by the run's rewards. ValueError where an environment judges."""
        return RunRewards(self.run)

    def remembered(self, complete: Complete) -> Complete:
        """`complete`, whose answers are kept in the folder of the round: for endpoints, which cost money or time."""
        return Remembered(complete, self.folder / "asked.jsonl")

    def learned_tokens(self, row: Row) -> float:
        """Tokens of a row's `completion` that are learned: a `length` for `rljax.tasks.mixed`."""
        return float(np.sum(demonstration_row(self._dialogue, row["prompt"], row["completion"], 0, 0).action_mask))

    @functools.cached_property
    def _dialogue(self) -> Dialogue:
        return dialogue_of(self.run)


class PolicyCompletions:
    """A `rljax.tasks.Complete` by the actor of `run`, with the weights that it has.

    An answer depends on (weights, seed, `number`, prompt, its place among the answers) alone. ValueError for an actor
    that does not answer prompts alone, and for settings of single rows, which a prompt does not have.
    """

    def __init__(self, run: Run, weights: str, number: int):
        self._actor = prompt_actor(run, "answers no prompts of stages")
        self._run = run
        self._weights = weights
        self._step = FIRST_ASKED_STEP + number
        for name in ("stop_column", "schema_column"):
            if value := getattr(run.config.sampling, name):
                raise ValueError(
                    f"config.sampling.{name}={value!r} is of rows, and stages ask prompts alone; leave it out"
                )

    @property
    def settings(self) -> Mapping[str, Any]:
        config = self._run.config
        sampling = to_dict(config.sampling)
        return {"weights": self._weights, "seed": config.seed, "step": self._step, "sampling": sampling}

    @property
    def at_once(self) -> int:
        return self._run.config.prompts_per_step

    def __call__(self, prompts: Sequence[Prompt], count: int) -> list[list[Completion]]:
        actor = self._actor
        settings = actor.settings
        # The id of an example is a hash of its content, here of the prompt alone.
        examples = [Example(prompt) for prompt in prompts]
        ids = [render_prompt(actor.tokenizer, prompt, settings.chat) for prompt in prompts]
        requests = [
            Request(tokens, example.id, tuple(range(count)), grammar=settings.grammar_of(example))
            for tokens, example in zip(ids, examples, strict=True)
        ]
        groups = actor.sampler.generate(requests, settings.sampling, seed=settings.seed, step=self._step)
        return [
            [self._completion(sample, tokens) for sample in samples]
            for samples, tokens in zip(groups, ids, strict=True)
        ]

    def _completion(self, sample: Sample, prompt: Sequence[int]) -> Completion:
        text = completion_text(self._actor.tokenizer, sample, self._actor.settings.stop_strings, prompt)
        logprob = float(np.mean(sample.logprobs, dtype=np.float64)) if len(sample.logprobs) else None
        return Completion(text, sample.finish_reason != "length", logprob)


class RunRewards:
    """A `rljax.tasks.Score` by the rewards of `run`, on texts: token ids are those of the text alone."""

    def __init__(self, run: Run):
        self._actor = prompt_actor(run, "has no rewards on texts")
        self._run = run

    @property
    def settings(self) -> Mapping[str, Any]:
        config = self._run.config
        # Data without rewards beside it is judged by verifiers of its own.
        rewards = to_dict(getattr(config.actor, "rewards", ()))
        return {"rewards": rewards or to_dict(config.data), "solved_by": config.evaluation.solved_by}

    def __call__(self, pairs: Sequence[tuple[Row, str]]) -> list[RewardResult]:
        return self._actor.rewards.score([self._input(row, text) for row, text in pairs])

    def _input(self, row: Row, text: str) -> RewardInput:
        columns = {name: value for name, value in row.items() if name != "prompt"}
        ids = encode_text(self._run.tokenizer, text, continues=True)
        return RewardInput(prompt=row["prompt"], completion=text, token_ids=ids, columns=columns)


def prompt_actor(run: Run, lacks: str) -> PromptActor:
    """The run's actor, which answers prompts and judges texts. ValueError for one that plays otherwise."""
    if not isinstance(run.actor, PromptActor):
        kind = type(run.config.actor).__name__
        raise ValueError(f"config.actor={kind}(...) {lacks}; use SingleTurn(...), or stages that need none")
    return run.actor


def weights_name(sums: Mapping[str, int]) -> str:
    """A short name of weights, by their checksums (`rljax.training.fingerprint`)."""
    return f"{digest(sums):032x}"
