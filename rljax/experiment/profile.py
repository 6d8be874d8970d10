"""Traces of a few steps for xprof: what host and devices did, with the phases of the run by name."""

import contextlib
from collections.abc import Iterator, Sequence

import jax

from rljax.experiment.report import say
from rljax.parallel import is_main_process
from rljax.training import AnyPath, local_folder


class Profile:
    """Traces the steps `steps[0]` to `steps[1]`, counted from 1, into `folder`; none where `steps` is empty. The main
    process traces itself and its devices, since it alone writes into a run folder.

    A context manager: a run that ends within these steps leaves the trace up to there.
    """

    def __init__(self, folder: AnyPath, steps: Sequence[int]):
        self._folder = folder
        self._steps = tuple(steps) if is_main_process() else ()
        self._under_way = contextlib.ExitStack()
        self._is_tracing = False

    @contextlib.contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Names the step that is done inside, and traces it if it is one to trace."""
        # A run that is resumed among them traces what is left.
        if self._steps and self._steps[0] <= step <= self._steps[-1] and not self._is_tracing:
            self._under_way.enter_context(_traced(self._folder))
            self._is_tracing = True
        with jax.profiler.StepTraceAnnotation("step", step_num=step):
            yield
        if self._steps and step >= self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Ends and writes the trace, if one is under way."""
        self._under_way.close()
        self._is_tracing = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _traced(folder: AnyPath) -> Iterator[None]:
    options = jax.profiler.ProfileOptions()
    # Every call of a Python function would be an event, and the trace would be of the tracer.
    options.python_tracer_level = 0
    with local_folder(folder) as local:
        jax.profiler.start_trace(str(local), profiler_options=options)
        try:
            yield
        finally:
            jax.profiler.stop_trace()
    say(f"wrote the trace {folder}; look at it with: xprof --logdir {folder} (pip install xprof)")
