"""Which sample runs in which row: the host's bookkeeping of the decoder's grid. No device work."""

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from rljax.sampling.generate import TOLD, DecodeRows
from rljax.sampling.logits import NO_TOKEN
from rljax.sampling.spec import SamplerSpec
from rljax.sampling.stopping import last_of
from rljax.types import INTERVENTION_NONE, INTERVENTION_SUPPRESS, NO_PARENT, Width

FinishReason = Literal["stop", "length", "stop_string"]
_FREE = -1
_NOWHERE = -1
ALL_ALLOWED = 0xFFFFFFFF
"""A word of a mask in which every token may be sampled."""


class Sample(NamedTuple):
    """One completion, of `T` tokens. A fork holds its whole path: the first `fork_index` tokens, and what belongs to
    them, are those of the sample `parent` of the same request."""

    tokens: np.ndarray
    """int32 [T]. A stop token, having been sampled, is the last; with 'stop_string' the last completed the string."""
    logprobs: np.ndarray
    """float32 [T], nats, of the distribution sampled from."""
    entropies: np.ndarray
    """float32 [T], nats, of the distribution sampled from."""
    finish_reason: FinishReason
    """Why it ended."""
    parent: int = NO_PARENT
    """Index of the sample that it forks from."""
    fork_index: int = 0
    """Tokens that it has from its parent."""
    fork_score: float = 0.0
    """What chose the fork."""
    forced: tuple[tuple[int, int], ...] = ()
    """Spans [start, stop) of tokens that were given, or drawn while others were suppressed, and so not sampled as the
    policy would; log-prob and entropy are 0 there."""
    shared: tuple[tuple[int, int], ...] = ()
    """Spans within those that the policy did sample, and that another sample of the group is trained on for."""
    spoken: tuple[tuple[int, int], ...] = ()
    """Spans [start, stop) of the turns of a conversation, without what lies between them; none where the whole
    completion is one."""
    intervention: int = INTERVENTION_NONE
    """What was done to it (see `rljax.types`)."""
    turns: np.ndarray | None = None
    """int32 [T], of a conversation: numbers its turns, each with the observation behind it."""
    versions: np.ndarray | None = None
    """int32 [T]: the version of the policy, where it changed on the way."""
    experts: np.ndarray | None = None
    """int16 [N + T - 1, L, k]: those that computed in each layer for the `N` tokens of the prompt and for those of the
    completion but its last, which was never fed; None without a record."""
    grammar: str = ""
    """Name of the grammar that it follows, each turn from its beginning; empty for none."""
    is_penalised: bool = False
    """Whether its distributions depend on which of the tokens before are its own."""
    top_tokens: np.ndarray | None = None
    """int32 [T, N]: the most probable tokens of the distribution sampled from, the best first; None if not asked."""
    top_logprobs: np.ndarray | None = None
    """float32 [T, N], nats: their log-probs; below -1e29 for one that truncation removed."""

    @property
    def sampled(self) -> np.ndarray:
        """bool [T]: False for the tokens that were given."""
        mask = np.ones(len(self.tokens), bool)
        for start, stop in self.forced:
            mask[start:stop] = False
        return mask

    @property
    def drawn(self) -> np.ndarray:
        """bool [T]: which tokens the policy has sampled, whichever sample is trained on them."""
        mask = self.sampled
        for start, stop in self.shared:
            mask[start:stop] = True
        return mask

    @property
    def turn_spans(self) -> tuple[tuple[int, int], ...]:
        """Spans [start, stop) of its turns; a completion is a single one."""
        return self.spoken or ((0, len(self.tokens)),)


@runtime_checkable
class Followed(Protocol):
    """Where a completion stands in its grammar, as `rljax.text` has it."""

    def allowed(self) -> np.ndarray:
        """uint32 [W]: a bit a token of the vocabulary, the first the lowest, whether it may come next."""
        ...

    def advance(self, tokens: Sequence[int]) -> None:
        """Goes on by these tokens."""
        ...


@runtime_checkable
class Grammar(Protocol):
    """What completions must follow."""

    name: str
    """What it is, in one text."""
    width: int
    """Words of a mask."""

    def begin(self) -> Followed:
        """The beginning of a completion."""
        ...


class Fork(NamedTuple):
    """A sample to be: it begins with tokens of an earlier one."""

    parent: int
    """Index of the earlier sample in the request."""
    fork_index: int
    """How many completion tokens of the parent it begins with."""
    sample_id: int
    """Names its random numbers."""
    inject: Sequence[int] = ()
    """Tokens that are given behind these, before the policy goes on."""
    score: float = 0.0
    """What chose it."""
    intervention: int = INTERVENTION_NONE
    """What is done to it (see `rljax.types`)."""


Rounds = Callable[[Sequence[Sample]], Sequence[Fork]]
"""Told all samples of a request so far, in order, says how to go on; nothing ends the request."""


class Request(NamedTuple):
    """A prompt to sample, once for each of `sample_ids`, and then whatever `rounds` asks for each time all are done."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    prompt_id: int
    """Names the random numbers, with the sample id: the same ids give the same samples. Non-negative, 31 bits."""
    sample_ids: Sequence[int]
    """One for each sample. Non-negative, 31 bits."""
    max_new_tokens: int | None = None
    """Most tokens of a completion, inherited and given ones included; None is the sampler's limit."""
    rounds: Rounds | None = None
    """Which forks follow; None is no forks."""
    begun: int = 0
    """The last `begun` tokens of the prompt belong to the text of the completion: a stop string may begin in them."""
    adapter: int = 0
    """Which of the model's adapters samples it, where several stand side by side (`rljax.models.Lora.count`)."""
    grammar: Grammar | None = None
    """What the completion must follow: of tokens that lead out of it none is sampled."""
    stop: tuple[str, ...] = ()
    """Texts that end it, beside those of the sampler."""


class Load(NamedTuple):
    """A prompt to put into a slot."""

    request: int
    """Index of the request whose prompt it is."""
    slot: int
    """Prompt slot."""
    source: int | None
    """Slot from which it is copied; None where it is prefilled."""


class Path(NamedTuple):
    """Columns of a row of the grid that are kept as a path of its slot, or laid into the row from there."""

    slot: int
    """Prompt slot."""
    row: int
    """Row of the slot."""
    path: int
    """Path of the slot: the index of the sample in its request."""
    steps: int
    """How many columns the row has."""


class Slots:
    """A grid of `prompt_slots x sample_slots` rows that works through requests.

    A finished row takes the next waiting sample of its prompt; a slot whose rows are all idle and whose prompt has
    none takes the next prompt, or else waiting samples of another slot's prompt. A request with `rounds` stays in its
    slot, where the paths of its first `path_slots` samples are kept. `chooses_adapter` says whether requests name one
    of several adapters, `recorded` how many experts of a token are recorded in each layer.

    Of the slots each of `parts` of the devices has a stretch; work goes to them in turn, so that prompts that are fewer
    than slots keep all of them busy.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        spec: SamplerSpec,
        parts: int = 1,
        *,
        chooses_adapter: bool = False,
        recorded: int = 0,
    ):
        self.requests = requests
        self._chooses_adapter = chooses_adapter
        self.max_new_tokens = spec.max_new_tokens
        self.path_slots = spec.path_slots
        self.max_injected = spec.max_injected
        self._suppressed = np.array(spec.suppressed, np.int32)

        # Per request: the samples asked for so far, and what has become of them.
        self._work = [[Fork(NO_PARENT, 0, i) for i in request.sample_ids] for request in requests]
        self.waiting = [deque(range(len(work))) for work in self._work]
        self.results: list[list[Sample | None]] = [[None] * len(work) for work in self._work]
        self._unfinished = [len(work) for work in self._work]
        self._unloaded = deque(i for i, request in enumerate(requests) if len(request.sample_ids))
        # (request, sample) -> what its row has emitted
        self.parts: dict[tuple[int, int], list[Mapping[str, np.ndarray]]] = {}
        # Of the experts of all tokens of a request's prompt but the last, and how many each layer has for a token.
        self._recorded = Width(recorded)
        self._prompt_experts: dict[int, np.ndarray] = {}

        # Per prompt slot.
        self._order = np.arange(spec.prompt_slots).reshape(parts, -1).T.ravel().tolist()
        self._request = np.full(spec.prompt_slots, _FREE)
        self._prompt_id = np.zeros(spec.prompt_slots, np.int32)
        self._prefix_length = np.zeros(spec.prompt_slots, np.int32)
        self._adapter = np.zeros(spec.prompt_slots, np.int32)

        # Per row.
        shape = (spec.prompt_slots, spec.sample_slots)
        self._sample = np.full(shape, _FREE)
        self._sample_id = np.zeros(shape, np.int32)
        self._token = np.zeros(shape, np.int32)
        # Tokens of its sample so far, inherited and given ones too.
        self.steps = np.zeros(shape, np.int32)
        self._limit = np.ones(shape, np.int32)
        self._forced = np.zeros((*shape, spec.max_injected), np.int32)
        self._forced_start = np.zeros(shape, np.int32)
        self._forced_length = np.zeros(shape, np.int32)
        self._suppress_at = np.full(shape, _NOWHERE)
        # Where rows stand in their grammars, and what may come next in them; None where no request has one.
        widths = {request.grammar.width for request in requests if request.grammar is not None}
        self.is_guided = bool(widths)
        self.has_stops = any(request.stop for request in requests)
        self._followed: dict[tuple[int, int], Followed] = {}
        self._allowed = np.full((*shape, max(widths)), ALL_ALLOWED, np.uint32) if widths else None

    @property
    def active(self) -> np.ndarray:
        """bool [P, G]: rows that hold an unfinished sample."""
        return self._sample != _FREE

    def assign(self) -> tuple[list[Load], list[Path]]:
        """Fills idle rows; returns the prompts to load first, in this order, and then the paths to lay."""
        loads: list[Load] = []
        paths: list[Path] = []
        for slot in self._order:
            if not self.active[slot].any() and not self._waiting_in(slot) and (load := self._next_prompt(slot)):
                loads.append(load)
            paths += self._fill(slot)
        return loads, paths

    def rows(self) -> DecodeRows:
        """The grid as the device wants it."""
        return DecodeRows(
            prompt_id=self._prompt_id,
            prefix_length=self._prefix_length,
            sample_id=self._sample_id,
            token=self._token,
            steps=self.steps,
            max_new_tokens=self._limit,
            active=self.active,
            waiting=np.array([self._waiting_in(slot) for slot in range(len(self._request))], np.int32),
            forced=self._forced,
            forced_start=self._forced_start,
            forced_length=self._forced_length,
            suppressed=self._suppressed if len(self._suppressed) else None,
            suppress_at=self._suppress_at if len(self._suppressed) else None,
            allowed=self._allowed,
            adapter=self._adapter if self._chooses_adapter else None,
            recorded=self._recorded,
        )

    def with_history(self, rows: DecodeRows, longest_prompt: int) -> DecodeRows:
        """The grid with the tokens of its prompts and completions, for penalties."""
        shape = (*self.active.shape, self.max_new_tokens)
        prompt = np.full((shape[0], longest_prompt), NO_TOKEN, np.int32)
        said = np.full(shape, NO_TOKEN, np.int32)
        sampled = np.zeros(shape, bool)
        for row, owner in self.owners():
            request, sample = owner
            prompt[row[0], : len(self.requests[request].prompt)] = self.requests[request].prompt
            tokens = [token for part in self.parts.get(owner, ()) for token in part["tokens"].tolist()]
            said[row][: len(tokens)] = tokens
            sampled[row][: len(tokens)] = True
            for start, stop in self._forced_spans(request, self._work[request][sample]):
                sampled[row][start:stop] = False
        return dataclasses.replace(rows, prompt=prompt, said=said, said_sampled=sampled)

    def oldest(self) -> int:
        """Columns of the ring that the oldest active row has."""
        return int(self.steps[self.active].max(initial=0))

    def steps_within(self, columns: int) -> int:
        """How many steps all active rows can go before one is older than a ring of `columns`, which a row whose limit
        it holds never is."""
        can_outgrow = self.active & (self._limit > columns)
        return columns - int(self.steps[can_outgrow].max(initial=0))

    def other_work(self) -> np.ndarray:
        """bool [P]: whether a slot that runs dry may find work: in another prompt, or in a further round of its own."""
        others = bool(self._unloaded) or bool(self._lenders())
        rounds = np.array([i != _FREE and self.requests[i].rounds is not None for i in self._request])
        return others | (rounds & self.active.any(axis=1))

    def owners(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """(row, (request, sample)) of every occupied row."""
        return [
            ((p, g), (int(self._request[p]), int(self._sample[p, g]))) for p, g in np.argwhere(self.active).tolist()
        ]

    def record_prompt(self, request: int, experts: Int[np.ndarray, "N L k"]) -> None:
        """Keeps the experts of all tokens of a prompt but the last, which is fed with the completion."""
        self._prompt_experts[request] = experts

    def advance(self, row: tuple[int, int], told: Mapping[str, np.ndarray]) -> None:
        """Adds what a row emitted, as `Emitted.of_row` has it."""
        owner = (int(self._request[row[0]]), int(self._sample[row]))
        self.parts.setdefault(owner, []).append(told)
        tokens = told["tokens"]
        self.steps[row] += len(tokens)
        if len(tokens):
            self._token[row] = tokens[-1]
        self._follow(row, tokens)

    def fed_before(self, path: Path) -> list[int]:
        """What a row that begins on a path has been fed before its next token: the prompt's last, and `path.steps`
        tokens of the path but the last."""
        request = int(self._request[path.slot])
        said = self._result(request, path.path).tokens[: path.steps - 1]
        return [int(self.requests[request].prompt[-1]), *said.tolist()]

    def last_tokens(self, owner: tuple[int, int], count: int) -> list[int]:
        """The last `count` tokens of an unfinished sample and the prompt before it, or all there are."""
        return last_of(self.requests[owner[0]].prompt, (part["tokens"] for part in reversed(self.parts[owner])), count)

    def first_sampled(self, owner: tuple[int, int]) -> int:
        """How many tokens of a sample were there before it: inherited or given."""
        work = self._work[owner[0]][owner[1]]
        return work.fork_index + len(work.inject)

    def finish(self, row: tuple[int, int], reason: FinishReason, length: int | None = None) -> Path | None:
        """Frees a row; its sample keeps the first `length` tokens. Returns the path to keep, if later samples may
        start from it. When it was the last of a round, the next one is asked for."""
        request = int(self._request[row[0]])
        sample = int(self._sample[row])
        parts = self.parts.pop((request, sample))
        told: dict[str, Any] = {name: np.concatenate([part[name] for part in parts])[:length] for name in parts[0]}
        # A record begins with the prompt's.
        if "experts" in told:
            told["experts"] = np.concatenate([self._prompt_experts[request], told["experts"]])

        work = self._work[request][sample]
        forced = self._forced_spans(request, work)
        self.results[request][sample] = Sample(
            finish_reason=reason,
            parent=work.parent,
            fork_index=work.fork_index,
            fork_score=work.score,
            forced=forced,
            intervention=work.intervention,
            grammar=grammar.name if (grammar := self.requests[request].grammar) else "",
            **told,
        )
        self._sample[row] = _FREE
        self._followed.pop(row, None)
        self._unfinished[request] -= 1

        rounds = self.requests[request].rounds
        if rounds is None:
            return None
        if not self._unfinished[request]:
            samples = [self._result(request, i) for i in range(len(self.results[request]))]
            self._extend(request, rounds(samples))
        # All columns of the row are kept, also those behind `length`: a fork never begins there.
        return Path(*row, sample, int(self.steps[row])) if sample < self.path_slots else None

    def _extend(self, request: int, forks: Sequence[Fork]) -> None:
        """Queues the forks of a new round. ValueError for one that cannot be decoded."""
        limit = self.requests[request].max_new_tokens or self.max_new_tokens
        done = len(self.results[request])
        for fork in forks:
            where = f"request {request} (prompt_id {self.requests[request].prompt_id}): {fork}"
            if not 0 <= fork.parent < min(done, self.path_slots):
                raise ValueError(
                    f"{where}: parent must be below {min(done, self.path_slots)}: the request has {done} samples and "
                    f"the sampler keeps the first path_slots={self.path_slots}; raise path_slots"
                )

            # An index equal to the length goes on behind the parent's last token.
            length = len(self._result(request, fork.parent).tokens)
            if not 0 <= fork.fork_index <= length:
                raise ValueError(f"{where}: fork_index must lie between 0 and the parent's {length} tokens")
            if len(fork.inject) > self.max_injected:
                raise ValueError(f"{where}: more than max_injected={self.max_injected} tokens; raise max_injected")
            if fork.fork_index + len(fork.inject) >= limit:
                raise ValueError(f"{where}: no room for a token within max_new_tokens={limit}; fork earlier")

        self._work[request] += forks
        self.waiting[request] += range(done, done + len(forks))
        self.results[request] += [None] * len(forks)
        self._unfinished[request] += len(forks)

    def _is_suppressed(self, work: Fork) -> bool:
        """Whether its first own token is drawn while others are suppressed."""
        return work.intervention == INTERVENTION_SUPPRESS and len(self._suppressed) > 0

    def _forced_spans(self, request: int, work: Fork) -> tuple[tuple[int, int], ...]:
        """Spans of a sample that the policy did not sample as it would."""
        forced: tuple[tuple[int, int], ...] = ()
        if work.parent != NO_PARENT:
            forced = spans_before(self._result(request, work.parent).forced, work.fork_index)
        given = len(work.inject) + self._is_suppressed(work)
        return (*forced, (work.fork_index, work.fork_index + given)) if given else forced

    def _result(self, request: int, sample: int) -> Sample:
        result = self.results[request][sample]
        assert result is not None
        return result

    def _waiting_in(self, slot: int) -> int:
        return len(self.waiting[self._request[slot]]) if self._request[slot] != _FREE else 0

    def _next_prompt(self, slot: int) -> Load | None:
        if self._unloaded:
            load = Load(self._unloaded.popleft(), slot, None)
        else:
            lenders = self._lenders()
            if not lenders:
                return None
            source = max(lenders, key=self._waiting_in)
            load = Load(int(self._request[source]), slot, source)

        request = self.requests[load.request]
        self._request[slot] = load.request
        self._prompt_id[slot] = request.prompt_id
        self._prefix_length[slot] = len(request.prompt) - 1
        self._adapter[slot] = request.adapter
        return load

    def _lenders(self) -> list[int]:
        """Slots whose waiting samples another slot may take: not those that fork, whose paths lie in the slot."""
        slots = range(len(self._request))
        return [i for i in slots if self._waiting_in(i) and self.requests[self._request[i]].rounds is None]

    def _fill(self, slot: int) -> list[Path]:
        """Gives waiting samples of the slot's prompt to its idle rows; returns the paths that forks start from."""
        paths = []
        for sample_slot in np.flatnonzero(~self.active[slot]).tolist():
            if not self._waiting_in(slot):
                break

            row = (slot, sample_slot)
            index = int(self._request[slot])
            request = self.requests[index]
            sample = self.waiting[index].popleft()
            work = self._work[index][sample]
            self._sample[row] = sample
            self._sample_id[row] = work.sample_id
            self._token[row] = request.prompt[-1]
            self.steps[row] = work.fork_index
            self._limit[row] = request.max_new_tokens or self.max_new_tokens
            self._forced[row][: len(work.inject)] = work.inject
            self._forced_start[row] = work.fork_index
            self._forced_length[row] = len(work.inject)
            place = work.fork_index + len(work.inject)
            self._suppress_at[row] = place if self._is_suppressed(work) else _NOWHERE

            # A fork of the prompt itself inherits nothing, and has no path to be laid.
            if work.fork_index:
                parent = self._result(index, work.parent)
                end = work.fork_index
                told = {name: value for name in TOLD if (value := getattr(parent, name)) is not None}
                if "experts" in told:
                    told["experts"] = told["experts"][len(request.prompt) - 1 :]
                self.parts[index, sample] = [{name: value[:end] for name, value in told.items()}]
                self._token[row] = parent.tokens[end - 1]
                paths.append(Path(*row, work.parent, end))

            if request.grammar is not None:
                self._followed[row] = request.grammar.begin()
            self._follow(row, self.parts[index, sample][0]["tokens"] if work.fork_index else ())
        return paths

    def _follow(self, row: tuple[int, int], tokens: Sequence[int] | np.ndarray) -> None:
        """Takes the row's grammar on by these tokens, and notes what may come behind them."""
        if self._allowed is None:
            return
        followed = self._followed.get(row)
        if followed is not None:
            followed.advance(np.asarray(tokens).tolist())
        self._allowed[row] = ALL_ALLOWED if followed is None else followed.allowed()


def spans_before(spans: Sequence[tuple[int, int]], end: int) -> tuple[tuple[int, int], ...]:
    """What of spans [start, stop) a fork inherits with the first `end` tokens."""
    return tuple((start, min(stop, end)) for start, stop in spans if start < end)
