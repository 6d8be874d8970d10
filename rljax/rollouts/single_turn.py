"""Prompts answered in one turn, and scored by rewards on the text."""

import abc
import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from rljax.parallel import is_main_process, num_processes, on_main
from rljax.plans import ForkPlan, RolloutPlan
from rljax.rollouts.actor import Actor, Decoder, GroupRequest, RolloutSettings, ScoredGroup
from rljax.rollouts.config import ActorParts, chains_of, make_rewards, stops_of
from rljax.rollouts.forks import ForkRounds
from rljax.rollouts.lagged import LaggedChains
from rljax.rollouts.orders import Order, QueuedActor
from rljax.sampling import Request, Sample, Sampler, SamplerSpec, SamplingConfig, SamplingParams
from rljax.sampling.stopping import find_stop
from rljax.tasks import (
    Dataset,
    Example,
    RewardConfig,
    RewardInput,
    RewardResult,
    RewardRunner,
    without_long_rows,
)
from rljax.text import StepSplitter, Tokenizer, decode_behind, render_prompt
from rljax.types import Params


@dataclasses.dataclass
class SingleTurn:
    """Prompts are answered in one turn; rewards score the text."""

    rewards: tuple[RewardConfig, ...] = ()
    """What a completion is worth; several add up by weight. Empty takes the verifier that comes with the data."""
    prompt_buckets: tuple[int, ...] = (64, 128, 256, 512)
    """Prompt lengths in tokens that programs are compiled for. The last must hold the longest prompt."""
    drop_long_prompts: bool = False
    """Whether rows whose prompt is longer are left out of training and evaluation, with a line that says how many. Else
    they end the start, and the first of them is named."""
    prompt_slots: int = 0
    """Prompts that decode at once; 0 is all of a step. Lower it when keys and values do not fit. A mesh rounds it up to
    a multiple of the devices that split the batch. Several processes share them."""
    sample_slots: int = 0
    """Samples of a prompt that decode at once; 0 is the whole group."""
    record_experts: bool = False
    """Whether a mixture's experts are recorded token by token, and training computes with those of the record: so the
    ratio is about probabilities alone, also after several updates and in bfloat16. Two bytes a token, layer and expert
    that computes for it."""

    @property
    def off_policy(self) -> str:
        return ""

    def check(self, plan: RolloutPlan, sampling: SamplingConfig, pack_length: int) -> None:
        buckets = self.prompt_buckets
        if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
            raise ValueError(
                f"config.actor.prompt_buckets={buckets} must be increasing positive lengths, e.g. (64, 128)"
            )
        if self.record_experts and plan.forks is not None and plan.forks.lagged_chains:
            raise ValueError(
                "config.actor.record_experts=True does not go with forks of chains of older weights; set it to False, "
                "or the algorithm's lagged to False"
            )
        for name in ("prompt_slots", "sample_slots"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"config.actor.{name}={getattr(self, name)} must be at least 0, and 0 is all of a step"
                )

    def build(self, parts: ActorParts) -> Actor:
        plan = parts.plan
        if self.record_experts and parts.decoder.experts is None:
            raise ValueError(
                "config.actor.record_experts=True needs a model with experts, and this one has an MLP in every layer; "
                "set it to False"
            )
        rewards = make_rewards(self.rewards, parts)
        if rewards is None:
            raise ValueError(
                "config.actor.rewards is empty and the data has no verifier of its own; add e.g. "
                "rewards=(RewardConfig('my_rewards:correct'),)"
            )

        # With forks the decode rows are those of the chains: forks follow when chains have ended.
        spec = SamplerSpec(
            prompt_buckets=self.prompt_buckets,
            max_new_tokens=parts.sampling.max_new_tokens,
            prompt_slots=parts.share(self.prompt_slots or parts.groups),
            sample_slots=self.sample_slots or chains_of(plan),
            path_slots=plan.forks.parents if plan.forks else 0,
            max_injected=plan.forks.max_injected if plan.forks else 0,
            suppressed=plan.forks.suppressed if plan.forks else (),
            record_experts=self.record_experts,
            top_logprobs=parts.sampling.top_logprobs,
        )
        stops = stops_of(parts)
        judge = OnMain(rewards) if num_processes(parts.mesh) > 1 else rewards
        if plan.forks is None or not plan.forks.lagged_chains:
            sampler = Sampler(parts.decoder, spec, stops, mesh=parts.mesh)
            return parts.shared(SingleTurnActor(sampler, parts.tokenizer, judge, parts.settings))

        # Forks are requests of their own: no path is kept, and nothing is given behind one.
        sampler = Sampler(parts.decoder, replace(spec, path_slots=0, max_injected=0), stops, mesh=parts.mesh)
        lagged = LaggedChains(sampler, stops)
        return parts.shared(SingleTurnActor(sampler, parts.tokenizer, judge, parts.settings, lagged))

    def check_prompts(self, parts: ActorParts, pack_length: int) -> Dataset:
        """Renders every prompt once. A log line says where prompts of text name control tokens."""

        def raised(longest: int) -> str:
            buckets = f"config.actor.prompt_buckets={self.prompt_buckets}"
            return f"add a bucket of at least {longest} to {buckets}"

        return playable_rows(parts, pack_length, self.prompt_buckets[-1], raised, drop=self.drop_long_prompts)


def playable_rows(
    parts: ActorParts, pack_length: int, longest_prompt: int, raised: Callable[[int], str], *, drop: bool
) -> Dataset:
    """The rows whose prompt has at most `longest_prompt` tokens, and leaves room for a completion. ValueError for
    others, unless they are to be dropped; `raised(n)` says how to allow prompts of `n` tokens."""
    _warn_of_control_tokens(parts, [*parts.dataset.train, *parts.dataset.test])

    def length_of(example: Example) -> int:
        try:
            return len(render_prompt(parts.tokenizer, example.prompt, parts.settings.chat))
        except (ValueError, TypeError) as error:  # tokenizers raise the latter for half characters
            raise ValueError(f"{example.name}: {error}") from error

    # a row is never split between packed sequences, nor longer than the positions of the model
    new_tokens = parts.sampling.max_new_tokens
    positions = parts.decoder.longest_sequence
    longest_row = min(pack_length, positions)
    limit = min(longest_prompt, longest_row - new_tokens)

    def remedy(longest: int) -> str:
        both = f"must hold a prompt and config.sampling.max_new_tokens={new_tokens}"
        if limit < longest_row - new_tokens:
            way = raised(longest)
        elif pack_length <= positions:
            way = f"config.update.pack_length={pack_length} {both}, so raise it to at least {longest + new_tokens}"
        else:
            way = f"the model's {positions} positions {both}, so lower that or shorten the prompts"
        return way if drop else f"{way}, or set config.actor.drop_long_prompts=True"

    return without_long_rows(parts.dataset, length_of, limit, drop=drop, remedy=remedy)


def _warn_of_control_tokens(parts: ActorParts, examples: Sequence[Example]) -> None:
    """Logs how many prompts of text hold names of control tokens: whoever wrote a chat template's marks by hand would
    not find out that they are read as text."""
    # Under a chat template a prompt of text is a user's message, whose names of tokens are meant as text.
    if parts.settings.chat:
        return
    names = getattr(parts.tokenizer, "special_tokens", {})
    texts = [example.prompt for example in examples if isinstance(example.prompt, str)]
    found = {name for text in texts for name in names if name in text}
    if found:
        count = sum(any(name in text for name in found) for text in texts)
        logging.getLogger(__name__).warning(
            "%d prompts are text and name control tokens (%s), which are read as plain text; give messages of a chat "
            "where these should open and close turns",
            count,
            ", ".join(sorted(found)),
        )


OwnActor = TypeVar("OwnActor", bound="PromptActor")


@runtime_checkable
class PromptSampler(Protocol):
    """What samples completions of prompts: a `Sampler`, or what stands for one elsewhere."""

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, *, seed: int, step: int
    ) -> list[list[Sample]]:
        """As `Sampler.generate`."""
        ...


class OnMain:
    """Rewards for processes that decode in step: process 0 judges, and tells the others. A judge may answer otherwise
    the second time, and all processes must train on one rollout."""

    def __init__(self, rewards: RewardRunner):
        self.rewards = rewards

    def __enter__(self) -> "OnMain":
        if is_main_process():
            self.rewards.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if is_main_process():
            self.rewards.__exit__(*error)

    def score(self, inputs: Sequence[RewardInput]) -> list[RewardResult]:
        return on_main(lambda: self.rewards.score(inputs))

    @property
    def finds_answers(self) -> bool:
        return self.rewards.finds_answers

    def answer(self, completion: str, result: RewardResult) -> str | None:
        return self.rewards.answer(completion, result)


class PromptActor(QueuedActor, abc.ABC):
    """Samples each prompt of a group independently, or in rounds of forks, and runs `rewards` on the texts.

    All groups of a call are decoded together. What samples, and how it gets weights, is for actors to say that derive
    from this; the `Actor` protocol says the rest.
    """

    def __init__(
        self,
        sampler: PromptSampler,
        tokenizer: Tokenizer,
        rewards: RewardRunner | OnMain,
        settings: RolloutSettings,
        lagged: LaggedChains | None = None,
    ):
        super().__init__()
        self.lagged = lagged
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.rewards = rewards
        self.settings = settings

    def __enter__(self: OwnActor) -> OwnActor:
        self.rewards.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.rewards.__exit__(*error)

    def for_evaluation(self: OwnActor, sampling: SamplingParams) -> OwnActor:
        settings = self.settings.sampled_by(sampling)
        return type(self)(self.sampler, self.tokenizer, self.rewards, settings)

    @abc.abstractmethod
    def set_params(self, params: Params, version: int) -> None: ...

    @property
    @abc.abstractmethod
    def decoders(self) -> Sequence[Decoder]: ...

    @abc.abstractmethod
    def cache_bytes(self) -> int: ...

    @abc.abstractmethod
    def longest_row(self, prompt_length: int) -> int: ...

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
        sampler = self.lagged if self.lagged is not None and plan.forks else self.sampler
        sampled = sampler.generate(requests, self.settings.sampling, seed=self.settings.seed, step=step)
        texts = [
            [
                completion_text(self.tokenizer, sample, (*self.settings.stop_strings, *request.stop), prompt)
                for sample in samples
            ]
            for samples, prompt, request in zip(sampled, prompts, requests, strict=True)
        ]
        self.seconds["sample"] += time.perf_counter() - begin

        # One call for all groups, so that a slow reward runs beside all others.
        begin = time.perf_counter()
        judged = iter(self.judge(examples, sampled, texts))
        results = [list(itertools.islice(judged, len(samples))) for samples in sampled]
        self.seconds["reward"] += time.perf_counter() - begin

        return [
            ScoredGroup(
                example=example,
                prompt=prompts[i],
                samples=sampled[i],
                texts=texts[i],
                results=results[i],
                steps=[splitter(sample.tokens) for sample in sampled[i]],
                answers=self._answers(texts[i], results[i]),
            )
            for i, example in enumerate(examples)
        ]

    def _answers(self, texts: Sequence[str], results: Sequence[RewardResult]) -> list[str | None]:
        if not self.rewards.finds_answers:
            return []
        return [self.rewards.answer(text, result) for text, result in zip(texts, results, strict=True)]

    def _request(
        self, group: GroupRequest, prompt: list[int], plan: RolloutPlan, splitter: StepSplitter, step: int
    ) -> Request:
        """The request to the sampler: all samples at once, or the chains and the rounds of forks that follow them."""
        forks: ForkPlan | None = plan.forks
        first = group.first_sample
        count = forks.chains if forks else plan.group_size

        # Sample ids name the random numbers. A prompt drawn again in one step goes on counting from `first_sample`.
        request = Request(
            prompt,
            group.example.id,
            tuple(range(first, first + count)),
            grammar=self.settings.grammar_of(group.example),
            stop=self.settings.stops_of(group.example),
        )
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
            limit=self.longest_row(0),
            score=None if self.lagged is None else functools.partial(self._score, self.lagged, prompt),
        )
        return request._replace(rounds=rounds)

    def _score(self, lagged: LaggedChains, prompt: list[int], samples: Sequence[Sample]) -> list[np.ndarray]:
        return lagged.scorer(prompt, [sample.tokens for sample in samples], self.settings.sampling)

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
            result.voided() if sample.finish_reason == "length" else result
            for result, sample in zip(results, flat, strict=True)
        ]


class SingleTurnActor(PromptActor):
    """A `PromptActor` over a decoder of its own."""

    sampler: Sampler

    def set_params(self, params: Params, version: int) -> None:
        """All tokens of a completion are of one version, that of the step which trains on them; without a plan of
        lagged chains."""
        if self.lagged is None:
            self.sampler.set_params(params)
        else:
            self.lagged.set_params(params, version)

    def older(self, version: int) -> int:
        return version if self.lagged is None else max(0, version - 1)

    @property
    def decoders(self) -> Sequence[Decoder]:
        return (self.sampler,) if self.lagged is None else (self.lagged.chains, self.lagged.forks)

    @property
    def resting(self) -> Sequence[Decoder]:
        # The newest weights of lagged chains are the next version's older ones.
        return (self.sampler,) if self.lagged is None else ()

    def cache_bytes(self) -> int:
        return self.sampler.cache_bytes() if self.lagged is None else self.lagged.cache_bytes()

    def longest_row(self, prompt_length: int) -> int:
        return prompt_length + self.sampler.spec.max_new_tokens


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
