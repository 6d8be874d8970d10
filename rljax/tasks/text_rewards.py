"""Rewards on how a text is written: repetition, degenerate text, redundant searches, and published composites of them.

Pure functions of strings first, then rewards made of them. A reward that takes another (`verify`) calls it as the
`RewardRunner` would; what that one raises costs the sample.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rljax.tasks.callables import RewardInput, Wants, inspect_reward
from rljax.tasks.examples import Prompt

_STOP_WORDS = """a an and are as at be by for from has how in is it its of on or that the this to was were what when
where which who why will with"""
STOP_WORDS = frozenset(_STOP_WORDS.split())

FactCheck = Callable[[str, Sequence[str]], Sequence[float]]
"""(completion, facts) -> for each fact 1 if the completion states it, else 0."""


def repeated_share(items: Sequence[Hashable], *, ngram: int) -> float:
    """`1 - U / N` of the N n-grams, U of them distinct; 0 for a sequence too short to hold one."""
    total = len(items) - ngram + 1
    if total <= 0:
        return 0.0
    return 1 - len({tuple(items[i : i + ngram]) for i in range(total)}) / total


def most_frequent_window(items: Sequence[Hashable], *, window: int) -> int:
    """How often the most frequent stretch of `window` items occurs, overlaps counted; 0 for a shorter sequence."""
    stretches = (items[i : i + window] for i in range(len(items) - window + 1))
    counts = Counter(s if isinstance(s, str) else tuple(s) for s in stretches)
    return max(counts.values(), default=0)


def foreign_share(text: str, prompt: str, *, always: Sequence[str] = ("LATIN", "GREEK")) -> float:
    """The share of characters that are letters of scripts neither in `prompt` nor in `always`, or no text at all
    (control characters, U+FFFD, unassigned). Digits, signs and white space are of no script."""
    if not text:
        return 0.0
    known = {_script(c) for c in prompt} | set(always)
    return sum(_script(c) not in known for c in text if _is_telling(c)) / len(text)


def query_redundancy(queries: Sequence[str], *, stop_words: frozenset[str] = STOP_WORDS) -> float:
    """`S = sum_{i != j} |q_i & q_j| / |q_i | q_j| / (n (n - 1))` over sets of keywords, in [0, 1] (DeepDive,
    2509.10446): the mean similarity of two different queries. 0 for fewer than two.

    Keywords are lower-cased words without stop words, which the paper does not state. Queries without any are similar
    to nothing.
    """
    words = [{w for w in re.findall(r"\w+", q.lower())} - stop_words for q in queries]
    pairs = [(a, b) for i, a in enumerate(words) for b in words[:i]]
    return sum(len(a & b) / len(a | b) for a, b in pairs if a | b) / len(pairs) if pairs else 0.0


@dataclass(frozen=True)
class ToolQueries:
    """Finds the queries in `<tag>{"name": ..., "arguments": {argument: text or list of texts}}</tag>` blocks that call
    the tool `name`. Blocks that are no such JSON are passed over."""

    tag: str = "tool_call"
    name: str = "search"
    argument: str = "query"

    def __call__(self, completion: str) -> list[str]:
        queries: list[str] = []
        for block in re.findall(rf"<{re.escape(self.tag)}>(.*?)</{re.escape(self.tag)}>", completion, re.DOTALL):
            try:
                call = json.loads(block)
            except (ValueError, RecursionError):
                continue
            if not isinstance(call, dict) or call.get("name") != self.name:
                continue
            arguments = call.get("arguments")
            found = arguments.get(self.argument) if isinstance(arguments, dict) else None
            queries += [q for q in (found if isinstance(found, list) else [found]) if isinstance(q, str)]
        return queries


@dataclass(frozen=True, kw_only=True)
class RedundantQueries:
    """`query_redundancy` of the searches in a completion: a penalty with a weight of -0.1 beside the reward for the
    answer (DeepDive, 2509.10446).

    A group in which every answer is wrong differs by its penalties alone; advantages divided by the group's std would
    blow these up to full size. Take centred advantages, or drop groups without signal by their raw rewards.
    """

    find: Callable[[str], Sequence[str]] = ToolQueries()
    stop_words: frozenset[str] = STOP_WORDS
    is_cheap: ClassVar[bool] = True

    def __call__(self, completion: str) -> float:
        return query_redundancy(self.find(completion), stop_words=self.stop_words)


@dataclass(frozen=True, kw_only=True)
class RepetitionPenalty:
    """`penalty * repeated_share` of the words: 0 for text that never repeats itself, towards `penalty` for a loop
    (Perception-R1, 2506.07218)."""

    ngram: int = 20
    penalty: float = -2.0
    is_cheap: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_positive(ngram=self.ngram)

    def __call__(self, completion: str) -> float:
        return self.penalty * repeated_share(completion.split(), ngram=self.ngram)


class _Wrapping:
    """What a reward around another one passes on: columns it wants, and where it may run."""

    verify: Callable[..., Any]

    @property
    def required_columns(self) -> tuple[str, ...]:
        return self._wants().columns

    @property
    def is_cheap(self) -> bool:
        return bool(getattr(self.verify, "is_cheap", False))

    @property
    def needs_process(self) -> bool:
        return bool(getattr(self.verify, "needs_process", False))

    def warm_up(self) -> None:
        getattr(self.verify, "warm_up", lambda: None)()

    def _wants(self) -> Wants:
        name = f"{type(self).__name__}.verify"
        wants = inspect_reward(self.verify, name)
        if wants.is_batch:
            raise ValueError(f"{name} is a batch reward; give one that scores a single sample")
        return wants

    def _verify(self, prompt: Prompt, completion: str, token_ids: Sequence[int], columns: Mapping[str, Any]) -> float:
        return float(self.verify(**self._wants().keywords([RewardInput(prompt, completion, token_ids, columns)])))


@dataclass(frozen=True, kw_only=True)
class UnlessDegenerate(_Wrapping):
    """The reward `verify`, or `penalty` for degenerate text, whatever the answer (T1, 2501.11651). Degenerate is text

    - overlong: `max_tokens` tokens without one of `stop_ids` at the end,
    - repetitive: some stretch of `window` characters, or of `ngram` tokens, occurs `repeats` times,
    - garbled: a `foreign` share of characters from scripts that the prompt does not have.

    None switches a rule off. The paper has the rules without their thresholds; these hardly ever meet sound text. The
    penalty lifts the advantage of the rest of the group, wrong answers too.
    """

    verify: Callable[..., Any]
    penalty: float = -1.0
    max_tokens: int | None = None
    stop_ids: tuple[int, ...] = ()
    window: int | None = 80
    ngram: int | None = 20
    repeats: int = 20
    foreign: float | None = 0.05

    def __post_init__(self) -> None:
        _check_positive(max_tokens=self.max_tokens, window=self.window, ngram=self.ngram, repeats=self.repeats)
        self._wants()

    def __call__(self, prompt: Prompt, completion: str, token_ids: Sequence[int], **columns: Any) -> float:
        if self.is_degenerate(prompt, completion, token_ids):
            return self.penalty
        return self._verify(prompt, completion, token_ids, columns)

    def is_degenerate(self, prompt: Prompt, completion: str, token_ids: Sequence[int]) -> bool:
        """Whether any rule applies."""
        overlong = (
            self.max_tokens is not None
            and len(token_ids) >= self.max_tokens
            and not (token_ids and token_ids[-1] in self.stop_ids)
        )
        return (
            overlong
            or (self.window is not None and most_frequent_window(completion, window=self.window) >= self.repeats)
            or (self.ngram is not None and most_frequent_window(token_ids, window=self.ngram) >= self.repeats)
            or (self.foreign is not None and foreign_share(completion, _text(prompt)) >= self.foreign)
        )


def states_facts(completion: str, facts: Sequence[str]) -> list[float]:
    """1 for each fact that stands in the completion word for word; case, white space and a final stop do not count."""
    text = _folded(completion)
    return [float(bool(f) and f in text) for f in (_folded(fact).rstrip(".") for fact in facts)]


@dataclass(frozen=True, kw_only=True)
class GroundedAnswer(_Wrapping):
    r"""`0.1 r_f + 0.9 r_a + 0.7 r_v + r_rep`, Perception-R1 (2506.07218), for text.

    `r_f` is 1 where the completion matches `pattern` (default: a think block, then an answer block with a boxed value),
    `r_a` the reward `verify`, `r_v` the share of the facts in column `facts` that `stated` finds, wherever the answer
    is right or wrong, and `r_rep` the `RepetitionPenalty`. `stated` may ask a judge (`rljax.tasks.judge.FactJudge`).

    Without facts `r_v` is 0. Deviation: a judge that fails costs the sample; in the paper it makes `r_v` 0.
    """

    verify: Callable[..., Any]
    stated: FactCheck = states_facts
    facts: str = "facts"
    pattern: str = r"\s*<think>.*</think>\s*<answer>.*\\boxed\{.+\}.*</answer>\s*"
    weights: tuple[float, float, float] = (0.1, 0.9, 0.7)
    ngram: int = 20
    penalty: float = -2.0

    def __post_init__(self) -> None:
        _check_positive(ngram=self.ngram)
        self._wants()

    @property
    def required_columns(self) -> tuple[str, ...]:
        return (*super().required_columns, self.facts)

    @property
    def is_cheap(self) -> bool:
        return self.stated is states_facts and super().is_cheap

    def __call__(self, prompt: Prompt, completion: str, token_ids: Sequence[int], **columns: Any) -> float:
        facts = columns[self.facts]
        if isinstance(facts, str) or not isinstance(facts, Sequence):
            raise ValueError(f"column {self.facts!r} holds {facts!r:.80}; it must be a list of texts")
        formatted = float(re.fullmatch(self.pattern, completion, re.DOTALL) is not None)
        right = self._verify(prompt, completion, token_ids, columns)
        judged = self.stated(completion, facts) if facts else ()
        grounded = min(max(sum(judged) / (len(facts) + 1e-6), 0.0), 1.0)
        repetition = self.penalty * repeated_share(completion.split(), ngram=self.ngram)
        return sum(w * r for w, r in zip(self.weights, (formatted, right, grounded), strict=True)) + repetition


@dataclass(frozen=True, kw_only=True)
class LabelWithReasoning:
    """`1 fmt + 2 ans + 1 len`, SoundMind-RL (2506.12935), for text.

    `fmt` is 1 where reasoning is followed by a last line `answer: LABEL`, `ans` is 1 where LABEL also equals the column
    `answer`, `len = min(1, tokens / reference_tokens)`, with the column `reference_tokens`. Labels are compared whole,
    without case and hyphens: "entailed" is part of "not-entailed", and a search for it accepts every negative.

    Deviation: `len` is paid only with `fmt`. The released code pays it for any text, which makes padding worthwhile;
    `pay_unformatted` restores that.
    """

    column: str = "answer"
    reference: str = "reference_tokens"
    weights: tuple[float, float, float] = (1.0, 2.0, 1.0)
    pay_unformatted: bool = False
    is_cheap: ClassVar[bool] = True

    @property
    def required_columns(self) -> tuple[str, ...]:
        return (self.column, self.reference)

    def __call__(self, completion: str, token_ids: Sequence[int], **columns: Any) -> float:
        reference = columns[self.reference]
        if isinstance(reference, bool) or not isinstance(reference, (int, float)) or not reference > 0:
            raise ValueError(
                f"column {self.reference!r} holds {reference!r:.80}; it must be a positive number of tokens"
            )
        reasoning, _, last = completion.rstrip().rpartition("\n")
        marker, colon, label = last.partition(":")
        formatted = bool(reasoning.strip() and colon and marker.strip().lower() == "answer" and label.strip())
        right = formatted and _label(label) == _label(str(columns[self.column]))
        length = min(1.0, len(token_ids) / reference) * (formatted or self.pay_unformatted)
        return sum(w * r for w, r in zip(self.weights, (formatted, right, length), strict=True))


def _label(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _script(character: str) -> str:
    """The first word of the character's name, which is its script for letters; mathematical ones count as plain."""
    return unicodedata.name(unicodedata.normalize("NFKC", character)[0], "?").split()[0]


def _is_telling(character: str) -> bool:
    """Letters, and what belongs in no text."""
    category = unicodedata.category(character)
    return category[0] == "L" or character == "\ufffd" or (category[0] == "C" and character not in "\n\r\t\u200d")


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(message.get("content", "")) for message in prompt)


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
