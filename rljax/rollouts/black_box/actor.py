"""Agents that cannot be changed as rollouts: they run in threads and speak with the policy through an endpoint."""

import copy
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from rljax.plans import ForkPlan
from rljax.rollouts.black_box.endpoint import ChatEndpoint
from rljax.rollouts.black_box.recording import Reply, Session, common_prompt, sample_of
from rljax.rollouts.collect import Scored
from rljax.sampling import Sample, SamplingParams
from rljax.tasks import Example, RewardInput, RewardResult, RewardRunner, RewardSpec
from rljax.types import Params

Agent = Callable[[str, dict[str, Any]], float | str]
"""(base URL, data row) -> the reward, or an answer that is scored. The row holds `prompt` and the columns."""


@dataclass(eq=False)
class _Run:
    """One run of the agent."""

    example: Example
    session: Session
    deadline: float = math.inf
    answer: Any = None
    error: str = ""
    is_over: bool = False
    paths: list[list[Reply]] = field(default_factory=list)

    def fail(self, error: str) -> None:
        self.error, self.is_over = error, True


class BlackBoxPlayer:
    """Runs an agent for every sample; called as `rljax.rollouts.sample_and_score` is, and returns the same.

    `agent(base_url, row)` runs in one of `workers` threads and returns the episode's reward, or a text that `reward`
    scores as the completion. An agent that raises, that takes longer than `timeout_s` seconds or that never asked the
    policy anything costs its sample: it is not valid, and says why. One that hangs is left behind with its thread, and
    its session answers no more.

    A run becomes up to `most_conversations` trajectories, those with most sampled tokens, each with the reward of the
    run: an agent that rewrites its history, or has others work for it, holds several conversations. A group size counts
    trajectories, so that `group_size // most_conversations` runs are made of a prompt. What conversations share is
    trained on once, in the first of them. Of a group the prompt is what all of its conversations begin with.
    """

    def __init__(
        self,
        endpoint: ChatEndpoint,
        agent: Agent,
        reward: RewardRunner | RewardSpec | Callable[..., Any] | None = None,
        *,
        workers: int = 64,
        timeout_s: float = 600.0,
        most_conversations: int = 1,
    ):
        for name, value in (("workers", workers), ("most_conversations", most_conversations)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s={timeout_s} must be a positive number of seconds")
        self.endpoint, self.agent, self.workers, self.timeout_s = endpoint, agent, workers, timeout_s
        self.most_conversations, self._eos_id = most_conversations, endpoint.tokenizer.eos_id
        self._rewards = reward if reward is None or isinstance(reward, RewardRunner) else RewardRunner([reward])
        self.last_stats: dict[str, float] = {}

    def __enter__(self) -> "BlackBoxPlayer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the endpoint, and the reward's workers."""
        self.endpoint.close()
        if self._rewards is not None:
            self._rewards.close()

    def aside(self) -> "BlackBoxPlayer":
        """What plays an evaluation over the same endpoint: each sample is a run of the agent."""
        other = copy.copy(self)
        other.most_conversations = 1
        return other

    def cache_bytes(self) -> int:
        """Bytes of keys and values over all devices."""
        return self.endpoint.cache_bytes()

    def set_params(self, params: Params, *, version: int) -> None:
        """The weights to speak with from now on, those of step `version`."""
        self.endpoint.set_params(params, version=version)

    def missing(self, num_groups: int) -> int:
        """How many examples the next call needs to return `num_groups` groups: as many, none is under way between."""
        return num_groups

    def __call__(
        self,
        examples: Sequence[Example],
        samples_each: int,
        *,
        sampling: SamplingParams,
        seed: int,
        step: int,
        seen: dict[int, int] | None = None,
        forks: ForkPlan | None = None,
        phase: Callable[[str], AbstractContextManager] = nullcontext,
        num_groups: int | None = None,
        truncated_is_wrong: bool = False,
        **unused: Any,
    ) -> list[Scored]:
        """Runs the agent on every example; returns the groups in order. Raises ValueError for a plan with forks, which
        an agent that cannot be changed does not allow, and for a group size that is no multiple of
        `most_conversations`; RuntimeError if the decoder failed."""
        if forks is not None:
            raise ValueError("an agent that cannot be changed cannot be forked; choose an algorithm without forks")
        runs_each, rest = divmod(samples_each, self.most_conversations)
        if rest or not runs_each:
            raise ValueError(
                f"group size {samples_each} must be a multiple of most_conversations={self.most_conversations}: it "
                "counts trajectories, and a run of the agent may make so many"
            )
        seen = {} if seen is None else seen
        self.endpoint.begin(sampling, seed=seed, step=step)
        self.endpoint.failure = None
        begin = time.perf_counter()
        groups = []
        for example in examples:
            first = samples_each * seen.setdefault(example.id, 0)
            seen[example.id] += 1
            groups.append([_Run(example, self.endpoint.open_session(example.id, first + i)) for i in range(runs_each)])
        runs = [run for group in groups for run in group]
        with phase("sample"):
            self._run_all(runs)
        if self.endpoint.failure is not None:
            raise RuntimeError("the decoder failed while agents spoke with it") from self.endpoint.failure
        seconds = time.perf_counter() - begin
        for run in runs:
            run.paths = run.session.conversations()
            if not run.paths and not run.error:
                run.fail("the agent never asked the policy anything; its requests must go to the base URL it is given")
        with phase("reward"):
            results = self._judge(runs, truncated_is_wrong)
        self.last_stats = self._stats(runs, results, seconds)
        it = iter(results)
        return [self._scored(group, [next(it) for _ in group]) for group in groups]

    def _run_all(self, runs: Sequence[_Run]) -> None:
        """Runs the agent, at most `workers` at once, and gives up on those that hang."""
        waiting, running = deque(runs), set[_Run]()
        over: queue.SimpleQueue[_Run] = queue.SimpleQueue()
        while waiting or running:
            while waiting and len(running) < self.workers:
                run = waiting.popleft()
                run.deadline = time.monotonic() + self.timeout_s
                running.add(run)
                threading.Thread(target=self._run, args=(run, over), daemon=True, name="agent").start()
            try:
                ended = [over.get(timeout=max(0.0, min(run.deadline for run in running) - time.monotonic()))]
            except queue.Empty:
                now = time.monotonic()
                ended = [run for run in running if run.deadline <= now]
            for run in ended:
                self.endpoint.close_session(run.session)
                if run in running and not run.is_over:
                    run.fail(f"the agent took longer than {self.timeout_s:g} s")
                running.discard(run)

    def _run(self, run: _Run, over: "queue.SimpleQueue[_Run]") -> None:
        row = copy.deepcopy({"prompt": run.example.prompt, **run.example.columns})
        answer, error = None, ""
        try:
            answer = self.agent(self.endpoint.url(run.session), row)
        except BaseException as raised:
            error = f"the agent raised {type(raised).__name__}: {raised}"
        with run.session.lock:
            if not run.session.is_closed:  # else it had taken too long
                run.answer, run.error, run.is_over = answer, error, True
        over.put(run)

    def _judge(self, runs: Sequence[_Run], truncated_is_wrong: bool) -> list[RewardResult]:
        texts = [run for run in runs if not run.error and isinstance(run.answer, str)]
        scores: dict[int, RewardResult] = {}
        if self._rewards is not None:
            inputs = [
                RewardInput(
                    prompt=run.example.prompt,
                    completion=run.answer,
                    token_ids=run.paths[0][-1].tokens.tolist(),
                    columns=run.example.columns,
                )
                for run in texts
            ]
            scores = {id(run): result for run, result in zip(texts, self._rewards.score(inputs), strict=True)}
        results = []
        for run in runs:
            result = scores.get(id(run)) or _own_reward(run)
            if truncated_is_wrong and result.is_valid and any(path[-1].is_cut for path in run.paths):
                result = RewardResult(min(result.value, 0.0), result.components)
            counts = {
                "turns": float(len(run.session.replies)),
                "conversations": float(len(run.paths)),
                "tool_calls": float(run.session.counts["tool_calls"]),
                "malformed_calls": float(run.session.counts["malformed_calls"]),
            }
            results.append(RewardResult(result.value, counts | result.components, result.is_valid, result.error))
        return results

    def _scored(self, runs: Sequence[_Run], results: Sequence[RewardResult]) -> Scored:
        chosen = [run.paths[: self.most_conversations] for run in runs]
        prompt = common_prompt([path for paths in chosen for path in paths]) if any(chosen) else [self._eos_id]
        samples: list[Sample] = []
        judged: list[RewardResult] = []
        fields: list[Mapping[str, Any]] = []
        for paths, result in zip(chosen, results, strict=True):
            taken: set[int] = set()
            episode = len(samples)
            for path in paths or [[]]:
                samples.append(sample_of(path, len(prompt), taken))
                judged.append(result)
                fields.append({"episode": episode})
        return Scored(
            runs[0].example,
            prompt,
            samples,
            [self.endpoint.renderer.decode(sample.tokens.tolist()) for sample in samples],
            judged,
            [sample.turns for sample in samples if sample.turns is not None],
            fields,
        )

    def _stats(self, runs: Sequence[_Run], results: Sequence[RewardResult], seconds: float) -> dict[str, float]:
        """What a call cost, under the names of `multi_turn.Player`; `conversations` is the mean number of a run."""
        decoder = self.endpoint.stats()
        paths = sum(len(run.paths) for run in runs)
        return {
            "busy_share": decoder["seconds"] / max(seconds, 1e-9),
            "row_occupancy": decoder["busy_rows"] / max(decoder["decode_steps"] * decoder["rows"], 1),
            "reused_share": 1 - decoder["prefill_tokens"] / max(decoder["conversation_tokens"], 1),
            "prefill_tokens": float(decoder["prefill_tokens"]),
            "turns": float(decoder["turns"]),
            "finished_share": sum(not run.error for run in runs) / max(len(runs), 1),
            "failed": float(sum(not result.is_valid for result in results)),
            "conversations": paths / max(len(runs), 1),
            "unused_conversations": float(sum(max(len(run.paths) - self.most_conversations, 0) for run in runs)),
        }


def _own_reward(run: _Run) -> RewardResult:
    """The reward that the agent returned."""
    value, error = run.answer, run.error
    if not error and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a scalar of numpy or jax
    if not error and isinstance(value, str):
        error = "the agent returned text, which needs a reward to score it; give the player one"
    elif not error and (not isinstance(value, (bool, int, float)) or not math.isfinite(value)):
        error = f"the agent returned {value!r:.100}; it must return a finite number, or a text to be scored"
    return RewardResult(0.0, {}, False, error) if error else RewardResult(float(value), {})
