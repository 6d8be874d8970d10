"""Which sample runs in which row: the host's bookkeeping of the decoder's grid. No device work."""

from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from rljax.sampling.generate import Rows

FinishReason = Literal["stop", "length", "stop_string"]
_FREE = -1


class Request(NamedTuple):
    """A prompt to sample, once for each of `sample_ids`.

    `prompt_id` and the sample ids (non-negative, 31 bits) name the random numbers: the same ids give the same samples.
    `max_new_tokens` None takes the sampler's limit.
    """

    prompt: Sequence[int]
    prompt_id: int
    sample_ids: Sequence[int]
    max_new_tokens: int | None = None


class Sample(NamedTuple):
    """One completion. A stop token, having been sampled, is its last token; with 'stop_string' the last token is the
    one that completed the string. `logprobs` and `entropies` (nats) are of the distribution sampled from."""

    tokens: np.ndarray  # int32 [T]
    logprobs: np.ndarray  # float32 [T]
    entropies: np.ndarray  # float32 [T]
    finish_reason: FinishReason


class Load(NamedTuple):
    """A prompt to put into a slot: copied from the slot `source`, or prefilled when that is None."""

    request: int
    slot: int
    source: int | None


class Slots:
    """A grid of `prompt_slots x sample_slots` rows that works through requests.

    A finished row takes the next waiting sample of its prompt; a slot whose rows are all idle and whose prompt has
    none takes the next prompt, or else waiting samples of another slot's prompt.
    """

    def __init__(self, requests: Sequence[Request], prompt_slots: int, sample_slots: int, max_new_tokens: int):
        self.requests, self.max_new_tokens = requests, max_new_tokens
        self.waiting = [deque(range(len(request.sample_ids))) for request in requests]
        self.results: list[list[Sample | None]] = [[None] * len(request.sample_ids) for request in requests]
        self._unloaded = deque(i for i, request in enumerate(requests) if len(request.sample_ids))
        self._request = np.full(prompt_slots, _FREE)
        shape = (prompt_slots, sample_slots)
        self._sample = np.full(shape, _FREE)
        self.parts: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        self._prompt_id, self._prefix_length = np.zeros(prompt_slots, np.int32), np.zeros(prompt_slots, np.int32)
        self._sample_id, self._token = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        self._steps, self._limit = np.zeros(shape, np.int32), np.ones(shape, np.int32)

    @property
    def active(self) -> np.ndarray:
        return self._sample != _FREE

    def assign(self) -> list[Load]:
        """Fills idle rows; returns the prompts to load first, in this order."""
        loads = []
        for slot in range(len(self._request)):
            if not self.active[slot].any() and not self._waiting_in(slot) and (load := self._next_prompt(slot)):
                loads.append(load)
            self._fill(slot)
        return loads

    def rows(self) -> Rows:
        return Rows(
            prompt_id=self._prompt_id,
            prefix_length=self._prefix_length,
            sample_id=self._sample_id,
            token=self._token,
            steps=self._steps,
            max_new_tokens=self._limit,
            active=self.active,
            waiting=np.array([self._waiting_in(slot) for slot in range(len(self._request))], np.int32),
        )

    def has_other_work(self) -> bool:
        """Whether a slot that runs dry would find work in another prompt."""
        return bool(self._unloaded) or any(self.waiting)

    def owners(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """(row, (request, sample)) of every occupied row."""
        return [
            ((p, g), (int(self._request[p]), int(self._sample[p, g]))) for p, g in np.argwhere(self.active).tolist()
        ]

    def advance(self, row: tuple[int, int], tokens: np.ndarray, logprobs: np.ndarray, entropies: np.ndarray) -> None:
        """Adds what a row sampled."""
        owner = (int(self._request[row[0]]), int(self._sample[row]))
        self.parts.setdefault(owner, []).append((tokens, logprobs, entropies))
        self._steps[row] += len(tokens)
        if len(tokens):
            self._token[row] = tokens[-1]

    def tokens(self, owner: tuple[int, int]) -> np.ndarray:
        return np.concatenate([part[0] for part in self.parts[owner]])

    def finish(self, row: tuple[int, int], reason: FinishReason, length: int | None = None) -> None:
        """Frees a row; its sample keeps the first `length` tokens."""
        request, sample = int(self._request[row[0]]), int(self._sample[row])
        tokens, logprobs, entropies = (
            np.concatenate(arrays)[:length] for arrays in zip(*self.parts.pop((request, sample)), strict=True)
        )
        self.results[request][sample] = Sample(tokens, logprobs, entropies, reason)
        self._sample[row] = _FREE

    def _waiting_in(self, slot: int) -> int:
        return len(self.waiting[self._request[slot]]) if self._request[slot] != _FREE else 0

    def _next_prompt(self, slot: int) -> Load | None:
        if self._unloaded:
            load = Load(self._unloaded.popleft(), slot, None)
        else:
            others = [other for other in range(len(self._request)) if self._waiting_in(other)]
            if not others:
                return None
            source = max(others, key=self._waiting_in)
            load = Load(int(self._request[source]), slot, source)
        request = self.requests[load.request]
        self._request[slot] = load.request
        self._prompt_id[slot] = request.prompt_id
        self._prefix_length[slot] = len(request.prompt) - 1
        return load

    def _fill(self, slot: int) -> None:
        for sample_slot in np.flatnonzero(~self.active[slot]):
            if not self._waiting_in(slot):
                return
            request = self.requests[self._request[slot]]
            sample, row = self.waiting[self._request[slot]].popleft(), (slot, sample_slot)
            self._sample[row] = sample
            self._sample_id[row] = request.sample_ids[sample]
            self._token[row] = request.prompt[-1]
            self._steps[row] = 0
            self._limit[row] = request.max_new_tokens or self.max_new_tokens
