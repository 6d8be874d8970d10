"""Prompts answered in one turn, and scored by rewards on the text."""

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rljax.plans import ForkPlan, RolloutPlan
from rljax.rollouts.actor import GroupRequest, RolloutSettings, ScoredGroup
from rljax.rollouts.config import ActorParts, chains_of, make_rewards, stops_of
from rljax.rollouts.forks import ForkRounds
from rljax.rollouts.orders import Order, QueuedActor
from rljax.sampling import Request, Sample, Sampler, SamplerSpec, SamplingConfig, SamplingParams
from rljax.sampling.stopping import find_stop
from rljax.tasks import Example, RewardConfig, RewardInput, RewardResult, RewardRunner
from rljax.text import StepSplitter, Tokenizer, decode_behind, render_prompt
from rljax.types import Params


@dataclasses.dataclass
class SingleTurn:
    """Prompts are answered in one turn; rewards score the text."""

    rewards: tuple[RewardConfig, ...] = ()
    """What a completion is worth; several add up by weight. Empty takes the verifier that comes with the data."""
    prompt_buckets: tuple[int, ...] = (64, 128, 256, 512)
    """Prompt lengths in tokens that programs are compiled for. The last must hold the longest prompt."""
    prompt_slots: int = 0
    """Prompts that decode at once; 0 is all of a step. Lower it when keys and values do not fit."""
    sample_slots: int = 0
    """Samples of a prompt that decode at once; 0 is the whole group."""

    def check(self, plan: RolloutPlan, sampling: SamplingConfig, pack_length: int) -> None:
        buckets = self.prompt_buckets
        if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
            raise ValueError(
                f"config.actor.prompt_buckets={buckets} must be increasing positive lengths, e.g. (64, 128)"
            )
        for name in ("prompt_slots", "sample_slots"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"config.actor.{name}={getattr(self, name)} must be at least 0, and 0 is all of a step"
                )

    def build(self, parts: ActorParts) -> "SingleTurnActor":
        plan = parts.plan
        rewards = make_rewards(self.rewards, parts.dataset)
        if rewards is None:
            raise ValueError(
                "config.actor.rewards is empty and the data has no verifier of its own; add e.g. "
                "rewards=(RewardConfig('my_rewards:correct'),)"
            )

        # With forks the decode rows are those of the chains: forks follow when chains have ended.
        spec = SamplerSpec(
            prompt_buckets=self.prompt_buckets,
            max_new_tokens=parts.sampling.max_new_tokens,
            prompt_slots=self.prompt_slots or parts.groups,
            sample_slots=self.sample_slots or chains_of(plan),
            path_slots=plan.forks.parents if plan.forks else 0,
            max_injected=plan.forks.max_injected if plan.forks else 0,
        )
        sampler = Sampler(parts.decoder, spec, stops_of(parts), mesh=parts.mesh)
        return SingleTurnActor(sampler, parts.tokenizer, rewards, parts.settings)

    def check_prompts(self, parts: ActorParts, pack_length: int) -> None:
        """Renders every prompt once. A log line says where prompts of text name control tokens."""
        # Test prompts too: an evaluation in the middle of a run would find a long one hours later.
        examples = [*parts.dataset.train, *parts.dataset.test]
        _warn_of_control_tokens(parts, examples)
        length, example_id = max(
            (len(render_prompt(parts.tokenizer, example.prompt, parts.settings.chat)), example.id)
            for example in examples
        )
        if length > self.prompt_buckets[-1]:
            raise ValueError(
                f"the longest prompt has {length} tokens (id {example_id}), more than the largest of "
                f"config.actor.prompt_buckets={self.prompt_buckets}; add a bucket or drop the row"
            )

        # A row is never split between packed sequences.
        total = length + parts.sampling.max_new_tokens
        if total > pack_length:
            raise ValueError(
                f"config.update.pack_length={pack_length} cannot hold the longest prompt "
                f"({length} tokens) and config.sampling.max_new_tokens={parts.sampling.max_new_tokens}; "
                f"raise it to at least {total}"
            )


def _warn_of_control_tokens(parts: ActorParts, examples: Sequence[Example]) -> None:
    """Logs how many prompts of text hold names of control tokens: whoever wrote a chat template's marks by hand would
    not find out that they are read as text."""
    names = getattr(parts.tokenizer, "special_tokens", {})
    texts = [example.prompt for example in examples if isinstance(example.prompt, str)]
    found = {name for text in texts for name in names if name in text}
    if found and not parts.settings.chat:
        count = sum(any(name in text for name in found) for text in texts)
        logging.getLogger(__name__).warning(
            "%d prompts are text and name control tokens (%s), which are read as plain text; give messages of a chat "
            "where these should open and close turns",
            count,
            ", ".join(sorted(found)),
        )


class SingleTurnActor(QueuedActor):
    """Samples each prompt of a group independently, or in rounds of forks, and runs `rewards` on the texts.

    All groups of a call are decoded together. The `Actor` protocol says the rest.
    """

    def __init__(self, sampler: Sampler, tokenizer: Tokenizer, rewards: RewardRunner, settings: RolloutSettings):
        super().__init__()
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.rewards = rewards
        self.settings = settings

    def __enter__(self) -> "SingleTurnActor":
        self.rewards.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.rewards.__exit__(*error)

    def set_params(self, params: Params, version: int) -> None:
        """All tokens of a completion are of one version: that of the step which trains on them."""
        self.sampler.set_params(params)

    def for_evaluation(self, sampling: SamplingParams) -> "SingleTurnActor":
        settings = replace(self.settings, sampling=sampling)
        return SingleTurnActor(self.sampler, self.tokenizer, self.rewards, settings)

    def cache_bytes(self) -> int:
        return self.sampler.cache_bytes()

    def longest_row(self, prompt_length: int) -> int:
        return prompt_length + self.sampler.spec.max_new_tokens

    def ready(self, n: int) -> list[ScoredGroup]:
        self.seconds = {"sample": 0.0, "reward": 0.0}
        return [group for order in self._orders.take(n) for group in self._sample_and_score(order)]

    def _sample_and_score(self, order: Order) -> list[ScoredGroup]:
        """One call of the sampler, then one of the rewards."""
        plan = order.plan
        step = order.step
        examples = [request.example for request in order.requests]

        prompts = [render_prompt(self.tokenizer, example.prompt, self.settings.chat) for example in examples]
        splitter = StepSplitter(self.tokenizer, plan.forks.step_delimiters if plan.forks else ())
        requests = [
            self._request(request, prompt, plan, splitter, step)
            for request, prompt in zip(order.requests, prompts, strict=True)
        ]

        begin = time.perf_counter()
        sampled = self.sampler.generate(requests, self.settings.sampling, seed=self.settings.seed, step=step)
        texts = [
            [completion_text(self.tokenizer, sample, self.settings.stop_strings, prompt) for sample in samples]
            for samples, prompt in zip(sampled, prompts, strict=True)
        ]
        self.seconds["sample"] += time.perf_counter() - begin

        # One call for all groups, so that a slow reward runs beside all others.
        begin = time.perf_counter()
        results = iter(self.judge(examples, sampled, texts))
        self.seconds["reward"] += time.perf_counter() - begin

        return [
            ScoredGroup(
                example=example,
                prompt=prompts[i],
                samples=sampled[i],
                texts=texts[i],
                results=list(itertools.islice(results, len(sampled[i]))),
                steps=[splitter(sample.tokens) for sample in sampled[i]],
            )
            for i, example in enumerate(examples)
        ]

    def _request(
        self, group: GroupRequest, prompt: list[int], plan: RolloutPlan, splitter: StepSplitter, step: int
    ) -> Request:
        """The request to the sampler: all samples at once, or the chains and the rounds of forks that follow them."""
        forks: ForkPlan | None = plan.forks
        first = group.first_sample
        count = forks.chains if forks else plan.group_size

        # Sample ids name the random numbers. A prompt drawn again in one step goes on counting from `first_sample`.
        request = Request(prompt, group.example.id, tuple(range(first, first + count)))
        if forks is None:
            return request

        rounds = ForkRounds(
            plan=forks,
            decode=lambda ids: decode_behind(self.tokenizer, ids, prompt),
            steps_of=lambda sample: splitter(sample.tokens),
            seed=self.settings.seed,
            step=step,
            prompt_id=group.example.id,
            first_id=first,
            limit=self.sampler.spec.max_new_tokens,
        )
        return request._replace(rounds=rounds)

    def judge(
        self, examples: Sequence[Example], sampled: Sequence[list[Sample]], texts: Sequence[list[str]]
    ) -> list[RewardResult]:
        """Rewards of all samples, group by group in one list; `texts` are what `completion_text` makes of them."""
        inputs = [
            RewardInput(
                prompt=example.prompt,
                completion=text,
                token_ids=sample.tokens.tolist(),
                columns=example.columns,
            )
            for example, samples, group_texts in zip(examples, sampled, texts, strict=True)
            for sample, text in zip(samples, group_texts, strict=True)
        ]
        results = self.rewards.score(inputs)
        if not self.settings.truncated_is_wrong:
            return results

        # A completion that was cut off may not earn, but a penalty stays.
        flat: Iterable[Sample] = itertools.chain.from_iterable(sampled)
        return [
            replace(result, value=min(result.value, 0.0)) if sample.finish_reason == "length" else result
            for result, sample in zip(results, flat, strict=True)
        ]


def completion_text(
    tokenizer: Tokenizer, sample: Sample, stop_strings: Sequence[str] = (), prompt: Sequence[int] = ()
) -> str:
    """The completion as the reward sees it: special tokens left out, cut before the stop string that ended it. `prompt`
    are the tokens before it, of which the last one suffices."""
    ids = np.asarray(sample.tokens).tolist()
    text = decode_behind(tokenizer, ids, prompt)
    if sample.finish_reason != "stop_string":
        return text

    # The string that ended it was completed by the last token; another may stand in what a fork was given.
    start = find_stop(text, stop_strings, decode_behind(tokenizer, ids[:-1], prompt))
    return text[:start]
