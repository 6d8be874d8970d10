"""What all episodes of a process share: made once, however many threads ask for it at the same time."""

import asyncio
import functools
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def made_once(function: Callable[P, R]) -> Callable[P, R]:
    """`functools.cache` that calls the function once for each choice of arguments, which must be hashable, even when
    threads ask at the same time; a call that raised is made again. The results live as long as the process."""
    cached = functools.cache(function)
    lock = threading.RLock()  # what is made may itself ask for something that is made once

    @functools.wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with lock:
            return cached(*args, **kwargs)  # type: ignore[arg-type]

    return locked


def on_event_loop(work: Coroutine[Any, Any, R], timeout_s: float | None = None, *, of: str = "environments") -> R:
    """What asynchronous work gives, from any thread: it runs on an event loop of the process, which has a thread of its
    own, one for each name in `of`. Work that takes longer than `timeout_s` seconds is cancelled, and TimeoutError
    raised."""
    if timeout_s is not None:
        work = asyncio.wait_for(work, timeout_s)
    return asyncio.run_coroutine_threadsafe(work, _event_loop(of)).result()


@made_once
def _event_loop(of: str) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name=f"event loop of {of}").start()
    return loop


class HeldOpen:
    """An asynchronous context that stays open until it is released: packages built on anyio want it to be left by the
    task that entered it, so it has one of its own. On one event loop alone."""

    def __init__(self) -> None:
        self._over = asyncio.Event()
        self.failure: BaseException | None = None
        """What ended it before it was released."""

    async def enter(self, context: AbstractAsyncContextManager[R]) -> R:
        """What the context gives. Raises what entering it raises, and RuntimeError in the place of what is no
        Exception."""
        ready: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(context, ready))
        try:
            return await ready
        except BaseException:
            self._task.cancel()
            raise

    def release(self) -> None:
        """Let the task leave the context, whenever it gets to that."""
        self._over.set()

    async def leave(self, timeout_s: float) -> None:
        """Leave the context, or give it up if that takes longer than `timeout_s` seconds."""
        self.release()
        done, _ = await asyncio.wait([self._task], timeout=timeout_s)
        if not done:
            self._task.cancel()

    async def _hold(self, context: AbstractAsyncContextManager[R], ready: "asyncio.Future[R]") -> None:
        try:
            async with context as value:
                ready.set_result(value)
                await self._over.wait()
        except BaseException as error:
            self.failure = error
            if not ready.done():
                ready.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            if isinstance(error, asyncio.CancelledError):
                raise


def bearer(token_variable: str | None, server: str) -> dict[str, str]:
    """Headers for a server that wants the bearer token which the environment variable `token_variable` holds; none
    without a name. Raises ValueError where the variable is empty."""
    if token_variable is None:
        return {}
    token = os.environ.get(token_variable)
    if not token:
        raise ValueError(f"the environment variable {token_variable}, the token of {server}, is empty")
    return {"Authorization": f"Bearer {token}"}
