"""Decoding rules beside each other: all answer the same held-out examples with the same random numbers."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array

from rljax.analysis.two_models import ChooseFn, Level, Prompts, TwoModelSamples, TwoModelSpec, generate_with_two
from rljax.evaluation import Estimate, bootstrap_interval
from rljax.experiment.build import Run
from rljax.experiment.report import aligned
from rljax.rollouts import SingleTurnActor
from rljax.rollouts.config import stop_tokens_of
from rljax.rollouts.single_turn import completion_text
from rljax.sampling import Sample, SamplingParams, Stops, sampling_params
from rljax.sampling.slots import FinishReason
from rljax.sampling.stopping import StopStrings, last_of
from rljax.tasks import Example
from rljax.text import render_prompt
from rljax.types import Params

Rule = Callable[[Level], ChooseFn]
"""(a hyperparameter, traced) -> how the next token is chosen. One `Rule` compiles one program, whatever the value."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A policy beside the base that it was trained from."""

    run: Run
    """What both belong to; its actor is open."""
    base: Params
    """Weights of the base."""
    policy: Params
    """Weights of the policy."""
    step: int
    """Training step of the policy."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What one decoding rule came to."""

    name: str
    """The rule, in words."""
    accuracy: Estimate
    """Share of answers whose reward is at least 1, mean over examples, with its 95% interval."""
    reward_mean: float
    """Mean reward; one that failed counts as 0."""
    length_mean: float
    """Tokens of a completion."""
    interventions: float
    """Tokens of a completion that the second model gave, on average."""
    effective: float
    """Those of them that the first model would not have emitted, on average."""
    completions: list[list[str]]
    """Texts as the reward saw them, by example and sample."""
    rewards: list[list[float | None]]
    """Their rewards; None where a reward failed."""

    @property
    def share(self) -> float:
        """Share of all tokens that the second model gave."""
        return self.interventions / max(self.length_mean, 1e-9)

    @property
    def effective_share(self) -> float:
        """Share of all tokens that the second model changed."""
        return self.effective / max(self.length_mean, 1e-9)


class Decoding:
    """Answers the held-out examples of a run with two models; `evaluation` of its config says how many and how often.

    Rows have the same random numbers in every arm, so two arms that choose alike give the same completions.
    """

    def __init__(self, run: Run):
        actor = run.actor
        assert isinstance(actor, SingleTurnActor), "checked by rljax.analysis.study before anything loads"
        evaluation = run.config.evaluation
        self.run = run
        self.actor = actor
        self.examples = held_out_examples(run)
        self.sampling = evaluation_sampling(run)
        self.spec = TwoModelSpec(
            config=run.decoder,
            max_new_tokens=run.config.sampling.max_new_tokens,
            stop_tokens=(*run.tokenizer.stop_ids, *stop_tokens_of(run.tokenizer, actor.settings.stop_strings)),
            vocab_size=run.tokenizer.vocab_size,
        )
        self._batch_rows = min(evaluation.batch_prompts, len(self.examples)) * evaluation.samples
        self._prompts = self._make_prompts()
        stops = Stops(strings=actor.settings.stop_strings, decode_text=run.tokenizer.decode)
        self._stop_strings = StopStrings(stops)
        self._generate = jax.jit(self._generate_batch, static_argnums=0)

    def answer(self, name: str, rule: Rule, level: float, first: Params, second: Params) -> Arm:
        """Completions of `rule(level)` with these two models, and what they are worth."""
        drawn = self._decode(rule, level, first, second)
        samples = []
        prompts = []
        interventions = 0
        effective = 0
        for row in range(len(drawn.tokens)):
            prompt = self._prompts.tokens[row, : self._prompts.lengths[row]].tolist()
            sample = self._sample(np.asarray(drawn.tokens[row, : drawn.lengths[row]]), prompt)
            samples.append(sample)
            prompts.append(prompt)
            # What lies behind a stop string was decoded, but is no part of the answer.
            interventions += int(drawn.intervened[row, : len(sample.tokens)].sum())
            effective += int(drawn.changed[row, : len(sample.tokens)].sum())

        count = self.run.config.evaluation.samples
        grouped = [samples[start : start + count] for start in range(0, len(samples), count)]
        tokenizer = self.run.tokenizer
        strings = self.actor.settings.stop_strings
        flat = [completion_text(tokenizer, x, strings, prompt) for x, prompt in zip(samples, prompts, strict=True)]
        texts = [flat[start : start + count] for start in range(0, len(flat), count)]
        results = self.actor.judge(self.examples, grouped, texts)

        solved = np.array([result.is_solved for result in results], float).reshape(-1, count).mean(axis=1)
        values = [result.value if result.is_valid else None for result in results]
        return Arm(
            name=name,
            accuracy=Estimate(float(solved.mean()), *bootstrap_interval(solved)),
            reward_mean=float(np.mean([value or 0.0 for value in values])),
            length_mean=float(np.mean([len(sample.tokens) for sample in samples])),
            interventions=interventions / len(samples),
            effective=effective / len(samples),
            completions=texts,
            rewards=[values[start : start + count] for start in range(0, len(values), count)],
        )

    def _make_prompts(self) -> Prompts:
        """A row for each sample, those of an example side by side. The id of a row is its place."""
        run = self.run
        prompts = [render_prompt(run.tokenizer, example.prompt, run.config.data.chat) for example in self.examples]
        tokens = np.full((len(prompts), max(map(len, prompts))), run.tokenizer.pad_id, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt

        samples = run.config.evaluation.samples
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        return Prompts(
            tokens=np.repeat(tokens, samples, axis=0),
            lengths=np.repeat(lengths, samples),
            ids=np.arange(len(prompts) * samples, dtype=np.int32),
        )

    def _decode(self, rule: Rule, level: float, first: Params, second: Params) -> TwoModelSamples:
        """All rows, in batches of one shape."""
        count = len(self._prompts.ids)
        batches = []
        for start in range(0, count, self._batch_rows):
            # The last batch repeats the last row to be full, so that nothing compiles twice.
            rows = np.minimum(np.arange(start, start + self._batch_rows), count - 1)
            prompts = jax.tree.map(lambda x, rows=rows: x[rows], self._prompts)
            batches.append(jax.device_get(self._generate(rule, np.float32(level), first, second, prompts)))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *batches)

    def _generate_batch(
        self, rule: Rule, level: Array, first: Params, second: Params, prompts: Prompts
    ) -> TwoModelSamples:
        key = jax.random.key(self.run.config.seed)
        return generate_with_two(self.spec, first, second, prompts, rule(level), key)

    def _sample(self, tokens: np.ndarray, prompt: list[int]) -> Sample:
        """A completion as an actor would hand it to rewards: cut at the first stop string."""
        reason: FinishReason = "stop" if tokens[-1] in self.spec.stop_tokens else "length"
        end = self._stop_strings.end(functools.partial(last_of, prompt, [tokens]), len(tokens), len(tokens))
        if end is not None:
            tokens = tokens[:end]
            reason = "stop_string"

        unknown = np.full(len(tokens), np.nan, np.float32)  # of two models there is no one distribution
        return Sample(tokens=tokens, logprobs=unknown, entropies=unknown, finish_reason=reason)


def held_out_examples(run: Run) -> Sequence[Example]:
    """The examples that a study answers. ValueError when there are none."""
    examples = run.dataset.test[: run.config.evaluation.problems or None]
    if not examples:
        raise ValueError("the data has no held-out examples, and a study answers these; give it a test set")
    return examples


def evaluation_sampling(run: Run) -> SamplingParams:
    """The distribution that a study samples from, and whose divergence it measures."""
    evaluation = run.config.evaluation
    return sampling_params(temperature=evaluation.temperature, top_p=evaluation.top_p)


def describe_answers(run: Run) -> str:
    """How the examples are answered, in one line."""
    evaluation = run.config.evaluation
    return (
        f"{len(held_out_examples(run))} held-out examples, {evaluation.samples} answers to each, at temperature "
        f"{evaluation.temperature:g} and top-p {evaluation.top_p:g}"
    )


def arms_table(title: str, arms: Sequence[Arm]) -> str:
    """A line for each rule; beside the counts of a completion their share of its tokens."""
    rows = [(title, "accuracy", "reward", "tokens", "interventions", "effective")]
    for arm in arms:
        rows.append(
            (
                f"  {arm.name}",
                str(arm.accuracy),
                f"{arm.reward_mean:.3f}",
                f"{arm.length_mean:.1f}",
                f"{arm.interventions:.2f} ({arm.share:4.0%})",
                f"{arm.effective:.2f} ({arm.effective_share:4.0%})",
            )
        )
    return aligned(rows)
