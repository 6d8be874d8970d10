"""Agents that cannot be changed as rollouts: they run in threads and speak with the policy through an endpoint."""

import contextlib
import copy
import dataclasses
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rljax.envs import check_chat_template, get_format
from rljax.plans import RolloutPlan
from rljax.rollouts.actor import Actor, Decoder, GroupRequest, RolloutSettings, ScoredGroup
from rljax.rollouts.black_box.address import EndpointConfig
from rljax.rollouts.black_box.endpoint import ChatEndpoint
from rljax.rollouts.black_box.recording import Reply, Session, common_prompt, sample_of
from rljax.rollouts.config import ActorParts, TurnsConfig, make_rewards
from rljax.rollouts.orders import Order, QueuedActor
from rljax.sampling import Sample, SamplingConfig, SamplingParams
from rljax.tasks import Example, RewardConfig, RewardInput, RewardResult, RewardRunner, load_callable
from rljax.tasks.workers import end_if_forked
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
        self.error = error
        self.is_over = True


@dataclasses.dataclass
class BlackBox(TurnsConfig):
    """An agent that cannot be changed speaks with the policy through an endpoint (`rljax.rollouts.black_box`)."""

    agent: str = ""
    """`module:callable`, called with the base URL of the endpoint and a row (prompt and columns). It returns the
    reward, or a text for `rewards`."""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What `agent` is called with once, where it is a class whose objects are agents, such as
    `rljax.rollouts.black_box:FoldingAgent`."""
    rewards: tuple[RewardConfig, ...] = ()
    """What a text that the agent returns is worth. Empty takes the data's verifier, if there is one."""
    endpoint: EndpointConfig = dataclasses.field(default_factory=EndpointConfig)
    """Where the agent reaches the policy: on this machine alone, or from others."""
    timeout_s: float = 600.0
    """Seconds that a run of the agent may take."""
    trained_conversations: int = 1
    """Conversations of a run that are trained on, those with most sampled tokens. It divides the group size."""

    def check(self, plan: RolloutPlan, sampling: SamplingConfig, pack_length: int) -> None:
        if not self.agent:
            raise ValueError("config.actor.agent is empty; name a callable, e.g. agent='my_agents:agent'")
        self.check_own()
        super().check(plan, sampling, pack_length)
        check_group(plan, self)

    def check_own(self) -> None:
        """Raises ValueError for values that can never work."""
        for name in ("workers", "trained_conversations"):
            if getattr(self, name) < 1:
                raise ValueError(f"config.actor.{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"config.actor.timeout_s={self.timeout_s} must be a positive number of seconds")

    def build(self, parts: ActorParts) -> Actor:
        parts.refuse_in_step("agents")
        check_chat_template(parts.tokenizer, role=get_format(self.tool_format).role)
        decoder = self.turn_decoder(parts, groups_in_flight=0, stop_strings=())
        endpoint = ChatEndpoint(
            decoder,
            parts.tokenizer,
            tool_format=self.tool_format,
            stop_strings=parts.sampling.stop_strings,
            address=self.endpoint,
        )
        rewards = make_rewards(self.rewards, parts)
        return parts.shared(self.actor_of(endpoint, self.load_agent(), rewards, parts.settings))

    def load_agent(self) -> Agent:
        """The agent itself. ValueError for a name that leads nowhere, and for `args` that do not fit."""
        agent = load_callable(self.agent)
        if isinstance(agent, type):
            try:
                return agent(**self.args)
            except TypeError as error:
                raise ValueError(f"config.actor.agent={self.agent}: args {self.args} do not fit: {error}") from None
        if self.args:
            raise ValueError(
                f"config.actor.args={self.args} are for a class, and agent={self.agent} is a function; leave them empty"
            )
        return agent

    def actor_of(
        self, endpoint: ChatEndpoint, agent: Agent, rewards: RewardRunner | None, settings: RolloutSettings
    ) -> "BlackBoxActor":
        """The actor of this process."""
        return BlackBoxActor(endpoint, agent, rewards, settings, self)


class BlackBoxActor(QueuedActor):
    """Runs an agent that cannot be changed for every sample. The `Actor` protocol says most of it.

    `agent(base_url, row)` runs in a thread, one of `config.workers`, and returns the reward, or a text that `rewards`
    score as the completion. An agent that raises, that takes longer than `config.timeout_s` seconds or that never asked
    the policy anything costs its sample: it is not valid, and says why. One that hangs is left behind with its thread,
    and its session answers no more.

    A run becomes up to `config.trained_conversations` trajectories, those with most sampled tokens, each with the
    reward of the run: an agent that rewrites its history, or has others work for it, holds several conversations. A
    group size counts trajectories, so that `group_size // trained_conversations` runs are made of a prompt. What
    conversations share is trained on once, in the first of them. A group's prompt is what all of its conversations
    begin with.
    """

    def __init__(
        self,
        endpoint: ChatEndpoint,
        agent: Agent,
        rewards: RewardRunner | None,
        settings: RolloutSettings,
        config: BlackBox,
    ):
        config.check_own()
        super().__init__()
        self.endpoint = endpoint
        self._opened = contextlib.ExitStack()
        self.agent = agent
        self.rewards = rewards
        self.settings = settings
        self.config = config

    def __enter__(self) -> "BlackBoxActor":
        # If the second cannot be opened, the first is closed again.
        with contextlib.ExitStack() as opening:
            try:
                opening.enter_context(self.endpoint)
            except OSError as error:
                address = self.endpoint.address
                raise ValueError(
                    f"config.actor.endpoint.host={address.host!r} and port={address.port} cannot be listened on "
                    f"({error.strerror or error}); choose an address of this machine, and a port that is free or 0"
                ) from None
            if self.rewards is not None:
                opening.enter_context(self.rewards)
            self._opened = opening.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def set_params(self, params: Params, version: int) -> None:
        self.endpoint.set_params(params, version)

    def for_evaluation(self, sampling: SamplingParams) -> "BlackBoxActor":
        """Each sample of an evaluation is a run of the agent."""
        settings = self.settings.sampled_by(sampling)
        config = replace(self.config, trained_conversations=1)
        return BlackBoxActor(self.endpoint, self.agent, self.rewards, settings, config)

    @property
    def decoders(self) -> Sequence[Decoder]:
        decoder = self.endpoint.decoder
        return (decoder,) if isinstance(decoder, Decoder) else ()

    def cache_bytes(self) -> int:
        return self.endpoint.cache_bytes()

    def longest_row(self, prompt_length: int) -> int:
        return self.endpoint.context_length

    def submit(self, requests: Sequence[GroupRequest], plan: RolloutPlan, step: int) -> None:
        """Raises ValueError for a plan with forks, and for a group size that is no multiple of
        `trained_conversations`."""
        check_group(plan, self.config)
        super().submit(requests, plan, step)

    def ready(self, n: int) -> list[ScoredGroup]:
        """Raises RuntimeError if the decoder failed."""
        self.seconds = {"sample": 0.0, "reward": 0.0}
        return [group for order in self._orders.take(n) for group in self._play(order)]

    def _play(self, order: Order) -> list[ScoredGroup]:
        runs_each = order.plan.group_size // self.config.trained_conversations

        # The endpoint is told first, since sessions may ask as soon as they are open.
        self.endpoint.begin(self.settings.sampling, seed=self.settings.seed, step=order.step)
        self.endpoint.failure = None

        begin = time.perf_counter()
        groups = [
            [
                _Run(
                    request.example,
                    self.endpoint.open_session(
                        request.example.id, request.first_sample + i, self.settings.grammar_of(request.example)
                    ),
                )
                for i in range(runs_each)
            ]
            for request in order.requests
        ]
        runs = [run for group in groups for run in group]
        self._run_all(runs)
        # A failed decoder answers every agent with an error; taken for theirs, a broken run would go on without data.
        if self.endpoint.failure is not None:
            raise RuntimeError("the decoder failed while agents spoke with it") from self.endpoint.failure
        sampled = time.perf_counter()

        for run in runs:
            run.paths = run.session.conversations()
            if not run.paths and not run.error:
                run.fail("the agent never asked the policy anything; its requests must go to the base URL it is given")
        results = self._judge(runs)

        self.seconds["sample"] += sampled - begin
        self.seconds["reward"] += time.perf_counter() - sampled
        self.stats = self._stats(runs, results, sampled - begin)

        # `runs` are those of `groups` one after the other, and so are their results.
        in_order = iter(results)
        return [self._scored(group, [next(in_order) for _ in group]) for group in groups]

    def _run_all(self, runs: Sequence[_Run]) -> None:
        """Runs the agent, at most `workers` at once, and gives up on those that hang."""
        waiting = deque(runs)
        running: set[_Run] = set()
        over: queue.SimpleQueue[_Run] = queue.SimpleQueue()

        while waiting or running:
            # The time of a run counts from its own start. Threads are daemons, or one that hangs would keep the
            # process from ending.
            while waiting and len(running) < self.config.workers:
                run = waiting.popleft()
                run.deadline = time.monotonic() + self.config.timeout_s
                running.add(run)
                threading.Thread(target=self._run, args=(run, over), daemon=True, name="agent").start()

            first_deadline = min(run.deadline for run in running)
            try:
                ended = [over.get(timeout=max(0.0, first_deadline - time.monotonic()))]
            except queue.Empty:
                now = time.monotonic()
                ended = [run for run in running if run.deadline <= now]

            for run in ended:
                # Closed first: from then on the agent's thread changes nothing of the run.
                self.endpoint.close_session(run.session)
                # A run that was given up may come back later; it is in `running` no more.
                if run in running and not run.is_over:
                    run.fail(f"the agent took longer than {self.config.timeout_s:g} s")
                running.discard(run)

    def _run(self, run: _Run, over: "queue.SimpleQueue[_Run]") -> None:
        """Runs the agent once. Its own thread."""
        # A copy: what the agent does to its row must not reach the data, or the other runs of the prompt.
        row = copy.deepcopy({"prompt": run.example.prompt, **run.example.columns})
        answer = None
        error = ""
        process = os.getpid()
        try:
            answer = self.agent(self.endpoint.url(run.session), row)
        except BaseException as raised:
            error = f"the agent raised {type(raised).__name__}: {raised}"
        end_if_forked(process)

        with run.session.lock:
            if not run.session.is_closed:  # else it had taken too long
                run.answer = answer
                run.error = error
                run.is_over = True
        over.put(run)

    def _judge(self, runs: Sequence[_Run]) -> list[RewardResult]:
        """Results of all runs, in order: the agent's own reward, or that of `rewards` for a text."""
        texts = [run for run in runs if not run.error and isinstance(run.answer, str)]
        scores: dict[int, RewardResult] = {}
        if self.rewards is not None:
            inputs = [
                RewardInput(
                    prompt=run.example.prompt,
                    completion=run.answer,
                    # The text is the agent's own; nearest to it are the ids of the longest conversation's last reply.
                    token_ids=run.paths[0][-1].tokens.tolist(),
                    columns=run.example.columns,
                )
                for run in texts
            ]
            scores = {id(run): result for run, result in zip(texts, self.rewards.score(inputs), strict=True)}

        results = []
        for run in runs:
            result = scores.get(id(run)) or _own_reward(run)
            # One conversation that was cut off makes the whole run wrong: which of them earned the reward is unknown.
            if self.settings.truncated_is_wrong and result.is_valid and any(path[-1].is_cut for path in run.paths):
                result = result.voided()

            counts = {
                "turns": float(len(run.session.replies)),
                "conversations": float(len(run.paths)),
                "tool_calls": float(run.session.counts["tool_calls"]),
                "malformed_calls": float(run.session.counts["malformed_calls"]),
            }
            # A component of the same name is the user's, and wins.
            decided_by = self.settings.solved_by or result.decided_by
            results.append(replace(result, components=counts | result.components, decided_by=decided_by))
        return results

    def _scored(self, runs: Sequence[_Run], results: Sequence[RewardResult]) -> ScoredGroup:
        """The runs of a prompt as a group: up to `trained_conversations` samples of each."""
        chosen = [run.paths[: self.config.trained_conversations] for run in runs]
        grammar = self.settings.grammar_of(runs[0].example)
        name = "" if grammar is None else grammar.name
        is_penalised = self.settings.sampling.penalises

        # A row needs a token before the first sampled one, also where no run asked anything.
        prompt = [self.endpoint.tokenizer.eos_id]
        if any(chosen):
            prompt = common_prompt([path for paths in chosen for path in paths])

        samples: list[Sample] = []
        judged: list[RewardResult] = []
        episodes: list[int] = []
        for paths, result in zip(chosen, results, strict=True):
            # A reply that two conversations share is trained on in the first of them.
            taken: set[int] = set()
            # Conversations of one run share an episode, named by its first sample.
            episode = len(samples)
            # A run without any is a sample without tokens, so that it still counts as one that failed.
            for path in paths or [[]]:
                samples.append(sample_of(path, len(prompt), taken, grammar=name, is_penalised=is_penalised))
                judged.append(result)
                episodes.append(episode)

        return ScoredGroup(
            example=runs[0].example,
            prompt=prompt,
            samples=samples,
            texts=[self.endpoint.renderer.decode(sample.tokens.tolist(), prompt) for sample in samples],
            results=judged,
            steps=[sample.turns for sample in samples if sample.turns is not None],
            episodes=episodes,
        )

    def _stats(self, runs: Sequence[_Run], results: Sequence[RewardResult], seconds: float) -> dict[str, float]:
        """What a call cost, under the names of `MultiTurnActor`; `conversations` is the mean number of a run."""
        decoder = self.endpoint.stats()
        paths = sum(len(run.paths) for run in runs)
        unused = sum(max(len(run.paths) - self.config.trained_conversations, 0) for run in runs)
        here: dict[str, float] = {}
        if self.decoders:
            here = {
                "busy_share": decoder["seconds"] / max(seconds, 1e-9),
                "row_occupancy": decoder["busy_rows"] / max(decoder["decode_steps"] * decoder["rows"], 1),
                "reused_share": 1 - decoder["prefill_tokens"] / max(decoder["conversation_tokens"], 1),
                "prefill_tokens": float(decoder["prefill_tokens"]),
            }
        return here | {
            "turns": float(decoder["turns"]),
            "finished_share": sum(not run.error for run in runs) / max(len(runs), 1),
            "failed": float(sum(not result.is_valid for result in results)),
            "conversations": paths / max(len(runs), 1),
            "unused_conversations": float(unused),
        }


def check_group(plan: RolloutPlan, config: BlackBox) -> None:
    """Raises ValueError for a plan whose groups an agent cannot make."""
    if plan.forks is not None:
        raise ValueError("an agent that cannot be changed cannot be forked; choose an algorithm without forks")
    if plan.group_size % config.trained_conversations:
        raise ValueError(
            f"group size {plan.group_size} must be a multiple of config.actor.trained_conversations="
            f"{config.trained_conversations}: it counts trajectories, and a run of the agent may make so many"
        )


def _own_reward(run: _Run) -> RewardResult:
    """The reward that the agent returned."""
    value = run.answer
    error = run.error
    if not error and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a scalar of numpy or jax
    if not error and isinstance(value, str):
        error = "the agent returned text, which needs a reward to score it; give config.actor.rewards"
    elif not error and (not isinstance(value, (bool, int, float)) or not math.isfinite(value)):
        error = f"the agent returned {value!r:.100}; it must return a finite number, or a text to be scored"
    return RewardResult(0.0, {}, False, error) if error else RewardResult(float(value), {})
