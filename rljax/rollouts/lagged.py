"""Chains by the weights before the last update, forks by the newest: two policies in the rollout of one step. Host."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rljax.sampling import Fork, Request, RowScorer, Sample, Sampler, SamplingParams, Stops
from rljax.sampling.slots import spans_before
from rljax.types import Params


class LaggedChains:
    """Makes what `sampler` makes of requests with rounds of forks, but has the chains by the weights that `sampler` had
    before the last `set_params` of a new version. Until there is one, all have the same.

    Nothing that older weights have computed serves the newest: the prefix of a fork is computed anew, as a prompt.
    """

    def __init__(self, sampler: Sampler, stops: Stops):
        spec = sampler.spec
        longest = spec.prompt_buckets[-1] + spec.max_new_tokens
        rows = spec.prompt_slots * spec.sample_slots
        alone = dataclasses.replace(spec, prompt_buckets=(longest,), prompt_slots=rows, sample_slots=1)

        self.sampler = sampler
        self.chains = Sampler(sampler.config, spec, stops, mesh=sampler.mesh)
        self.forks = Sampler(sampler.config, alone, stops, mesh=sampler.mesh)
        self.scorer = RowScorer(sampler.config, sampler.mesh, rows=spec.sample_slots, length=longest)
        self.version = -1
        self.version_before = -1

    def set_params(self, params: Params, version: int) -> None:
        """The newest weights, for `sampler` too."""
        if self.version >= 0 and version != self.version:
            self.chains.adopt(self.sampler)
            self.version_before = self.version

        # Two copies at most: the one that the sampler gives up is held by nobody but the chains.
        if self.version >= 0:
            self.forks.adopt(self.chains)
        self.sampler.set_params(params)
        self.forks.adopt(self.sampler)
        self.scorer.set_params(params)
        self.version = version
        if self.version_before < 0:
            self.chains.adopt(self.sampler)

    def cache_bytes(self) -> int:
        """Of the chains or the forks, whichever is more: one after the other is there."""
        return max(self.chains.cache_bytes(), self.forks.cache_bytes())

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, *, seed: int, step: int
    ) -> list[list[Sample]]:
        """Samples of each request, chains first; as `Sampler.generate`."""
        # Without a version before, the chains are of the newest.
        before = self.version if self.version_before < 0 else self.version_before
        plain = [request._replace(rounds=None) for request in requests]
        groups = [
            [sample._replace(versions=np.full(len(sample.tokens), before, np.int32)) for sample in group]
            for group in self.chains.generate(plain, sampling, seed=seed, step=step)
        ]

        going = list(range(len(requests)))
        while going:
            asked: list[tuple[int, Fork]] = []
            for i in going:
                rounds = requests[i].rounds
                asked += [(i, fork) for fork in (rounds(groups[i]) if rounds else ())]

            wanted = [self._request(requests[i], groups[i], fork) for i, fork in asked]
            made = self.forks.generate(wanted, sampling, seed=seed, step=step)
            for (i, fork), (own,) in zip(asked, made, strict=True):
                groups[i].append(self._joined(groups[i][fork.parent], fork, own))
            going = sorted({i for i, _ in asked})
        return groups

    def _request(self, request: Request, samples: Sequence[Sample], fork: Fork) -> Request:
        """A fork as a request of its own: what it has from its parent and is given belongs to the prompt."""
        begun = [*samples[fork.parent].tokens[: fork.fork_index].tolist(), *fork.inject]
        limit = request.max_new_tokens or self.sampler.spec.max_new_tokens
        return Request(
            prompt=[*request.prompt, *begun],
            prompt_id=request.prompt_id,
            sample_ids=(fork.sample_id,),
            max_new_tokens=limit - len(begun),
            begun=len(begun),
        )

    def _joined(self, parent: Sample, fork: Fork, own: Sample) -> Sample:
        """The whole path of a fork."""
        end = fork.fork_index
        given = np.zeros(len(fork.inject), np.float32)
        forced = spans_before(parent.forced, end)
        if fork.inject:
            forced += ((end, end + len(fork.inject)),)

        assert parent.versions is not None
        newest = np.full(len(fork.inject) + len(own.tokens), self.version, np.int32)
        return Sample(
            tokens=np.concatenate([parent.tokens[:end], np.array(fork.inject, np.int32), own.tokens]),
            logprobs=np.concatenate([parent.logprobs[:end], given, own.logprobs]),
            entropies=np.concatenate([parent.entropies[:end], given, own.entropies]),
            finish_reason=own.finish_reason,
            parent=fork.parent,
            fork_index=end,
            fork_score=fork.score,
            forced=forced,
            intervention=fork.intervention,
            versions=np.concatenate([parent.versions[:end], newest]),
        )
