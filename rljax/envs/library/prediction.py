"""An environment whose policy also says what it expects to see next (Role-Agent, 2606.10917, world-in-agent)."""

import re
from collections.abc import Mapping
from typing import Any

from rljax.envs.base import Environment, Prompt, Snapshots, Step
from rljax.envs.formats import load
from rljax.tasks.examples import with_paragraph
from rljax.tasks.similarity import SIMILARITIES, TextSimilarity

PREDICTED = "predicted"
"""Count of a step: 1 if there was a prediction."""
PREDICTION = "prediction"
"""Count of a step: how like it was to what came, in [0, 1]."""
COPY_PREDICTION = "copy_prediction"
"""Count of a step: how like it was to what had been there before."""


class Predicting:
    """Another environment, `make(**args)`, whose actions may hold `<tag>what comes next</tag>`.

    The block is taken out of the action and compared with the observation that really came. A step counts `predicted`
    1, `prediction` the similarity in [0, 1], and `copy_prediction` that with the observation that was there before: a
    policy that only repeats what it sees scores high in both. A step without a block counts 0 in all three; of several
    blocks the last counts. Reward and observation are those of the environment inside.

    `instruction` is added to the prompt as a last paragraph, such as "Before each action, write what you expect to see
    next between <predict_next> and </predict_next>."; without one the policy must know from its training.

    `make` is a callable, or the path `module:callable` of one; `similarity` one of `dice` (of words), `of_longer`,
    `gestalt`, or a function of two texts. An empty observation, as often at the end, is like nothing. Attributes are
    those of the environment inside, and so are its snapshots. Raises ValueError for a tag that is no name and for an
    unknown similarity.
    """

    def __init__(
        self,
        make: Any,
        args: Mapping[str, Any] | None = None,
        tag: str = "predict_next",
        similarity: str | TextSimilarity = "dice",
        instruction: str = "",
    ):
        if not re.fullmatch(r"[A-Za-z]\w*", tag):
            raise ValueError(f"prediction tag {tag!r} must be a name, such as 'predict_next'")
        if isinstance(similarity, str) and similarity not in SIMILARITIES:
            raise ValueError(f"similarity {similarity!r} must be one of {', '.join(SIMILARITIES)}, or a function")
        self.inner: Environment = (load(make) if isinstance(make, str) else make)(**(args or {}))
        self.similarity = SIMILARITIES[similarity] if isinstance(similarity, str) else similarity
        self.instruction = instruction
        self.current = ""  # the latest observation
        self._block = re.compile(rf"<{tag}>(.*?)</{tag}>", re.DOTALL)
        if isinstance(self.inner, Snapshots):
            # only then: an environment with these methods is never replayed
            self.snapshot = self._snapshot
            self.restore = self._restore

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        prompt = self.inner.reset(row)
        last = prompt if isinstance(prompt, str) or not prompt else prompt[-1].get("content")
        self.current = last if isinstance(last, str) else ""
        return with_paragraph(prompt, self.instruction)

    def step(self, action: str) -> Step:
        predictions = self._block.findall(action)
        step = self.inner.step(self._block.sub("", action))
        counts = dict(step.counts) | dict.fromkeys((PREDICTED, PREDICTION, COPY_PREDICTION), 0.0)
        if predictions:
            counts[PREDICTED] = 1.0
            counts[PREDICTION] = self.similarity(predictions[-1], step.observation)
            counts[COPY_PREDICTION] = self.similarity(predictions[-1], self.current)
        self.current = step.observation
        return Step(step.observation, step.reward, step.done, counts)

    def _snapshot(self) -> Any:
        return self.current, self.inner.snapshot()  # type: ignore[attr-defined]

    def _restore(self, state: Any) -> None:
        self.current, inner = state
        self.inner.restore(inner)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)
