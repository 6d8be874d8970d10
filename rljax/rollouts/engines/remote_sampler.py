"""What a `Sampler` makes of requests, made by engines: each sample is a request of its own."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rljax.models import DecoderConfig
from rljax.rollouts.engines.api import Said, write_request
from rljax.rollouts.engines.client import assign
from rljax.rollouts.engines.config import EnginesConfig
from rljax.rollouts.engines.endings import Endings
from rljax.rollouts.engines.fleet import Fleet
from rljax.sampling import Fork, Request, RowScorer, Sample, SamplingParams, Stops
from rljax.sampling.logits import logit_biases
from rljax.sampling.slots import spans_before
from rljax.types import NO_PARENT, Params

MOST_PROBED = 16
"""Tokens of a probe."""


class RemoteSampler:
    """Samples with the engines of `fleet`. Tokens are those of a `Sampler` of the same weights, if engines draw the
    same random numbers (`engine` rljax), and depend on the same things.

    `stops` as for a `Sampler`; ids go out and come back as they are, and no text is ever tokenised.
    """

    def __init__(self, fleet: Fleet, config: DecoderConfig, stops: Stops, *, max_new_tokens: int):
        stops.check(config)
        self.fleet = fleet
        self.config = config
        self.max_new_tokens = max_new_tokens
        self._stops = stops
        self._endings = Endings(stops, config.num_ids)

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, *, seed: int, step: int
    ) -> list[list[Sample]]:
        """As `Sampler.generate`. Raises EngineFailed for an engine that the run cannot go on with, and ValueError for
        penalties and grammars."""
        refuse_penalties(sampling)
        for request in requests:
            if request.grammar is not None:
                raise ValueError(
                    f"prompt_id {request.prompt_id}: engines follow no grammar, and {request.grammar.name!r:.80} was "
                    "given; leave it out, or sample in this process"
                )
        config = self.fleet.config
        places = assign([request.prompt_id for request in requests], config.engines)
        groups: list[list[Sample | None]] = [[] for _ in requests]
        running: dict[Future[Said], tuple[int, int, Fork]] = {}

        # A pool an engine, so that one that is waited for keeps no request of another one waiting.
        pools = [
            ThreadPoolExecutor(config.connections, thread_name_prefix=f"engine-{i}") for i in range(len(config.engines))
        ]

        def submit(index: int, fork: Fork) -> None:
            request = requests[index]
            groups[index].append(None)
            body = self._body(request, groups[index], fork, sampling, seed, step)
            future = pools[places[index]].submit(self.fleet.ask, places[index], body)
            running[future] = (index, len(groups[index]) - 1, fork)

        try:
            for index, request in enumerate(requests):
                for sample_id in request.sample_ids:
                    submit(index, Fork(NO_PARENT, 0, sample_id))
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index, place, fork = running.pop(future)
                    groups[index][place] = self._sample(requests[index], groups[index], fork, future.result())
                    rounds = requests[index].rounds
                    whole = [sample for sample in groups[index] if sample is not None]
                    if rounds is not None and len(whole) == len(groups[index]):
                        for new in rounds(whole):
                            submit(index, new)
        except BaseException:
            # A run that is told to end does not wait for answers that nobody will read.
            for future in running:
                future.cancel()
            self.fleet.abandon()
            raise
        finally:
            for pool in pools:
                pool.shutdown(wait=False, cancel_futures=True)
        return [[sample for sample in group if sample is not None] for group in groups]

    def _body(
        self,
        request: Request,
        group: Sequence[Sample | None],
        fork: Fork,
        sampling: SamplingParams,
        seed: int,
        step: int,
    ) -> dict[str, Any]:
        # A fork is a prompt that reaches into the completion: the engine finds what of it is computed already.
        begun = self._begun(group, fork)
        own = {
            "seed": seed,
            "step": step,
            "prompt_id": request.prompt_id,
            "sample_id": fork.sample_id,
            "begun": len(begun) + request.begun,
            "drawn": len(begun),
        }
        told = written_sampling(sampling) | told_strings(self.fleet.config, self._stops, request.stop)
        return write_request(
            [*request.prompt, *begun],
            limit=self._limit(request) - len(begun),
            sampling=told,
            stop_tokens=self._stops.tokens,
            own=own,
            seed=seed_of(own),
        )

    def _limit(self, request: Request) -> int:
        return request.max_new_tokens or self.max_new_tokens

    @staticmethod
    def _begun(group: Sequence[Sample | None], fork: Fork) -> list[int]:
        """What a sample has from its parent, and is given."""
        if fork.parent == NO_PARENT:
            return []
        parent = group[fork.parent]
        assert parent is not None
        return [*parent.tokens[: fork.fork_index].tolist(), *fork.inject]

    def _sample(self, request: Request, group: Sequence[Sample | None], fork: Fork, said: Said) -> Sample:
        """The whole completion, with the tokens that it inherits."""
        begun = self._begun(group, fork)
        # `max_new_tokens` counts what is inherited, as our own sampler does.
        limit = self._limit(request) - len(begun)
        said, reason = self._endings.cut(
            request.prompt, begun, said, begun=request.begun, limit=limit, stop=request.stop
        )

        tokens = said.tokens
        logprobs = said.logprobs
        entropies = said.entropies
        forced: tuple[tuple[int, int], ...] = ()
        if fork.parent != NO_PARENT:
            parent = group[fork.parent]
            assert parent is not None
            end = fork.fork_index
            # The engine was given these tokens, and has said nothing of them.
            given = np.zeros(len(fork.inject), np.float32)
            tokens = np.concatenate([np.array(begun, np.int32), tokens])
            logprobs = np.concatenate([parent.logprobs[:end], given, logprobs])
            entropies = np.concatenate([parent.entropies[:end], given, entropies])
            forced = spans_before(parent.forced, end)
            if fork.inject:
                forced += ((end, end + len(fork.inject)),)

        return Sample(
            tokens=tokens,
            logprobs=logprobs,
            entropies=entropies,
            finish_reason=reason,
            parent=fork.parent,
            fork_index=fork.fork_index,
            fork_score=fork.score,
            forced=forced,
            intervention=fork.intervention,
        )


class SamplingProbe:
    """Has an engine continue fixed prompts with the run's own sampling, and scores what it said by the trainer's
    forward pass. Prompts are the same each time, so that keys and values of older weights would be found too."""

    def __init__(
        self,
        config: DecoderConfig,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        stops: Stops,
        *,
        limit: int,
        mesh: Mesh | None = None,
    ):
        self.prompts = [list(prompt) for prompt in prompts]
        self._sampling = sampling
        self._stop_tokens = stops.tokens
        self._limit = min(MOST_PROBED, limit)
        longest = max(map(len, self.prompts)) + self._limit
        self._scorer = RowScorer(config, mesh, rows=1, length=longest)

    def set_params(self, params: Params) -> None:
        """The weights that engines should speak with. Not copied."""
        self._scorer.set_params(params)

    def gap(self, ask: Callable[[dict[str, Any]], Said]) -> float:
        """Mean difference of log-probs over all tokens that were said, in nats."""
        gaps = []
        for index, prompt in enumerate(self.prompts):
            own = {"prompt_id": index}
            body = write_request(
                prompt,
                limit=self._limit,
                sampling=written_sampling(self._sampling),
                stop_tokens=self._stop_tokens,
                own=own,
                seed=seed_of(own),
            )
            said = ask(body)
            (scored,) = self._scorer(prompt, [said.tokens], self._sampling)
            gaps.append(np.abs(scored - said.logprobs))
        return float(np.concatenate(gaps).mean())


def refuse_penalties(sampling: SamplingParams) -> None:
    """ValueError for penalties: engines count otherwise what has been sampled, and of a turn they say no more than its
    tokens and their log-probs."""
    if sampling.penalises:
        raise ValueError(
            "engines sample without penalties: leave repetition, presence and frequency out, or sample in this process"
        )


def written_sampling(sampling: SamplingParams) -> dict[str, Any]:
    """As engines are told."""
    # Shortest decimals of float32, so that the engine reads the very value.
    floats = {name: float(str(np.float32(getattr(sampling, name)))) for name in ("temperature", "top_p", "min_p")}
    biases = {str(token): value for token, value in logit_biases(sampling).items()}
    return floats | {"top_k": int(sampling.top_k)} | ({"logit_bias": biases} if biases else {})


def told_strings(config: EnginesConfig, stops: Stops, own: Sequence[str]) -> dict[str, Any]:
    """Stop strings, with a request's own, for engines that find them where a decoder would; of others' text the run
    cuts what is behind."""
    return {"stop": [*stops.strings, *own]} if config.engine == "rljax" else {}


def seed_of(own: dict[str, int]) -> int:
    """One seed for all that names the random numbers of a sample, for engines that take no more: 31 bits."""
    text = " ".join(f"{name}={own[name]}" for name in sorted(own))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
