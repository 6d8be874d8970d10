"""Environments of `verifiers` from version 0.3 on, which drive a model behind an HTTP endpoint themselves: its tasks as
rows, and an agent for `config.actor = BlackBox(...)` that plays them."""

import asyncio
import itertools
import json
import math
import threading
from collections.abc import Mapping
from typing import Any

from rljax.envs.library.sharing import HeldOpen, made_once, on_event_loop

SERVED_EPISODES = 256
"""Episodes after which what serves them is opened anew: it keeps an HTTP client for every endpoint it has spoken to."""

TOKEN_VARIABLE = "RLJAX_ENDPOINT_TOKEN"
"""Where the endpoint of the policy keeps the key that it wants."""


def rows(
    taskset: str, *, args: Mapping[str, Any] | None = None, size: int | None = None, seed: int | None = None
) -> list[dict[str, Any]]:
    """Rows for `VerifiersAgent`: the tasks of a taskset, or `size` of them, shuffled if there is a `seed`.

    `taskset` and `args` are those of `VerifiersAgent`. Columns: `prompt` (text; "" where the user opens otherwise),
    `index` of the task, and `task`, its data. Raises as `VerifiersAgent` does, and ValueError for an endless taskset
    without `size`.
    """
    tasks = _environment(taskset, _as_json(args), _as_json(None)).taskset
    if size is None and not tasks.bounded:
        raise ValueError(f"taskset {taskset!r} of verifiers has no end; give a size")
    if seed is not None:
        tasks = (tasks if tasks.bounded else tasks.take(size)).shuffle(seed)
    if size is not None:
        tasks = tasks.take(size)
    return [
        {
            "prompt": task.data.prompt_text,
            "index": task.data.idx,
            "task": task.data.model_dump(mode="json", exclude_none=True),
        }
        for task in tasks
    ]


class VerifiersAgent:
    """Plays tasks of `verifiers` through an endpoint, as `config.actor.agent`. Called from many threads. Rows are those
    of `rows`.

    `taskset` is the name of an installed taskset, `args` its settings. `agent` holds settings of the environment's one
    agent as `verifiers` has them (`harness`, `runtime`, `max_turns`, ...); by default it is the chat loop `null` in a
    process of its own, for which `uv` must be on the path. `env` holds further settings of the environment.

    An episode's reward is that of its trace. Whatever fails in it, and in all of its `retries`, costs the sample: an
    error of the task, the harness, the runtime or the endpoint. Raises ImportError without the package, ValueError for
    names and settings that `verifiers` does not take, and for an environment of several agents: each would need rewards
    of its own.
    """

    def __init__(
        self,
        taskset: str,
        *,
        args: Mapping[str, Any] | None = None,
        agent: Mapping[str, Any] | None = None,
        env: Mapping[str, Any] | None = None,
    ):
        settings = {**(env or {}), "agent": dict(agent or {})}  # whatever the environment calls it
        self._served = _served(taskset, _as_json(args), _as_json(settings))

    def __call__(self, base_url: str, row: Mapping[str, Any]) -> float:
        """The reward of an episode on the row's task."""
        task = self._served.task(int(row["index"]))
        return on_event_loop(self._served.play(base_url, task), of="verifiers")


class _Served:
    """What plays the tasks of an environment, for as long as the process lives. Its making raises as `VerifiersAgent`
    does."""

    def __init__(self, *made_of: str):
        self._made_of = made_of
        self._taskset = _environment(*made_of).taskset
        self._tasks = iter(self._taskset)
        self._known: list[Any] = []
        self._reading = threading.Lock()
        self._opening = asyncio.Lock()
        self._serving: _Serving | None = None

    def task(self, index: int) -> Any:
        """A task, of those that are read as far as they are asked for; from any thread."""
        with self._reading:
            while 0 <= index >= len(self._known):
                try:
                    self._known.append(next(self._tasks))
                except StopIteration:
                    break
                except Exception:
                    # an iterator that has raised is at its end: the next to ask reads anew
                    self._tasks = itertools.islice(iter(self._taskset), len(self._known), None)
                    raise
            if not 0 <= index < len(self._known):
                raise ValueError(f"the taskset has {len(self._known)} tasks, and the row wants index {index}")
            return self._known[index]

    async def play(self, base_url: str, task: Any) -> float:
        """On the event loop."""
        vf = _verifiers()
        client = vf.EvalClientConfig(base_url=base_url, api_key_var=TOKEN_VARIABLE)
        context = vf.ModelContext(client=client, model="policy", sampling=vf.SamplingConfig())
        serving = await self._entered()
        try:
            [slot] = serving.environment.slots(task)
            return _reward_of(await serving.environment.run_slot(slot, context))
        finally:
            serving.leave()

    async def _entered(self) -> "_Serving":
        async with self._opening:
            if self._serving is None or self._serving.is_spent:
                opened = _Serving(_loaded(*self._made_of))
                await opened.held.enter(opened.environment.serving())
                self._serving = opened
            self._serving.enter()
            return self._serving


class _Serving:
    """An environment whose servers are up, for so many episodes. On the event loop alone."""

    def __init__(self, environment: Any):
        self.environment = environment
        self.held = HeldOpen()
        self._left = SERVED_EPISODES
        self._under_way = 0

    @property
    def is_spent(self) -> bool:
        return self._left <= 0

    def enter(self) -> None:
        self._left -= 1
        self._under_way += 1

    def leave(self) -> None:
        self._under_way -= 1
        if self.is_spent and self._under_way == 0:
            self.held.release()


def _reward_of(episode: Any) -> float:
    # errors of attempts that were made again stay beside a success
    if not (episode.ok and all(trace.ok for trace in episode.traces)):
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        told = f"{errors[-1].type}: {errors[-1].message}" if errors else "it says not why"
        raise RuntimeError(f"the episode of verifiers failed: {told}"[:500])
    if len(episode.traces) != 1:
        raise RuntimeError(f"the episode of verifiers has {len(episode.traces)} traces; only one can be rewarded")
    reward = float(episode.traces[0].reward)
    if not math.isfinite(reward):
        raise RuntimeError(f"the episode of verifiers has the reward {reward}; it must be finite")
    return reward


def _as_json(settings: Mapping[str, Any] | None) -> str:
    return json.dumps(dict(settings or {}), sort_keys=True)


def _loaded(taskset: str, args: str, env: str) -> Any:
    vf = _verifiers()
    env_settings = json.loads(env)
    agent = {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}, **env_settings.pop("agent", {})}
    settings = {**env_settings, "taskset": {"id": taskset, **json.loads(args)}}
    try:
        seats = [name for name, part in vf.resolve_env_config(settings) if isinstance(part, vf.AgentConfig)]
        if len(seats) != 1:
            raise ValueError(
                f"it has the agents {seats}, and only an environment of one can be trained: each would need rewards of "
                "its own"
            )
        return vf.load_environment(vf.resolve_env_config({**settings, seats[0]: agent}))
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(
            f"verifiers cannot make an environment of {settings} with the agent {agent} ({error})"
        ) from error


_environment = made_once(_loaded)
_served = made_once(_Served)


def _verifiers() -> Any:
    try:
        import verifiers.v1
    except ImportError as error:
        raise ImportError(
            f"tasks of verifiers 0.3 and later need that package ({error}): pip install 'rljax-lm[verifiers-v1]'"
        ) from error
    return verifiers.v1
