"""A row of data, and the split that keeps test items out of training."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Prompt = str | Sequence[Mapping[str, Any]]


def digest(content: Any) -> int:
    """A 128-bit hash of JSON-like content, the same in every process and on every machine.

    BLAKE2b of the content as JSON with sorted keys; values that JSON lacks count by their `repr`.
    """
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=repr)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), "big")


def prompt_digest(example: "Example") -> int:
    """Hash of the prompt alone: two rows with one prompt are one item, whatever their other columns say."""
    return digest(example.prompt)


def whole_text(text: str) -> str:
    """`text` with U+FFFD for lone surrogates, which JSON may escape and no tokenizer or file takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def split_answer(prompt: Prompt, columns: Mapping[str, Any]) -> tuple[Prompt, dict[str, Any]]:
    """A prompt without the assistant's turn that it ends with, which becomes the column `completion` unless the row has
    one: data of conversations holds the answer, and the policy must not read it. Raises ValueError if no turn is left
    for it to answer."""
    if isinstance(prompt, str) or not prompt or prompt[-1].get("role") != "assistant":
        return prompt, dict(columns)
    rest = list(prompt[:-1])
    if not any(message.get("role") == "user" for message in rest) or rest[-1].get("role") == "assistant":
        raise ValueError("nothing is left to answer once the assistant's last turn is taken as the answer")
    return rest, {"completion": prompt[-1].get("content"), **columns}


def with_paragraph(prompt: Prompt, text: str) -> Prompt:
    """`prompt` with `text` as a last paragraph, of its last user message where it is messages; the very prompt for
    empty text. Raises ValueError for messages without a user message of text."""
    if not text:
        return prompt
    if isinstance(prompt, str):
        return f"{prompt}\n\n{text}"
    messages = [dict(message) for message in prompt]
    users = [m for m in messages if m.get("role") == "user" and isinstance(m.get("content"), str)]
    if not users:
        raise ValueError(f"the prompt {prompt!r:.100} has no user message of text that a paragraph could be added to")
    users[-1]["content"] += f"\n\n{text}"
    return messages


@dataclass(frozen=True)
class Example:
    """One data row: a `prompt` (text, or a list of `{role, content}` messages) and the `columns` that rewards read.

    `id` is a 31-bit hash of the content unless given; it names the prompt in sampling keys and logs. `place` is where
    the row came from, such as a file and a line, for messages to a person.
    """

    prompt: Prompt
    columns: Mapping[str, Any] = field(default_factory=dict)
    id: int = -1
    place: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.id == -1:
            object.__setattr__(self, "id", digest([self.prompt, dict(self.columns)]) >> 97)
        elif not 0 <= self.id < 2**31:
            raise ValueError(f"example id {self.id} must be in [0, 2**31), or left out to be a hash of the content")

    @property
    def name(self) -> str:
        """Where the row came from, or its id."""
        return self.place or f"the row of id {self.id}"

    @property
    def task_id(self) -> int:
        """A 31-bit hash of the column `task`, by which the rows of a mixture tell tasks apart; 0 without one."""
        return digest(self.columns["task"]) >> 97 if "task" in self.columns else 0


@dataclass(frozen=True)
class Split:
    """Training and test examples without an item in common, and the counts worth printing."""

    train: list[Example]
    test: list[Example]
    num_rows: int
    num_distinct: int

    def describe(self) -> str:
        """One line for a person."""
        unused = self.num_distinct - len(self.train) - len(self.test)
        return (
            f"{self.num_rows} rows, {self.num_distinct} distinct items: "
            f"{len(self.train)} for training, {len(self.test)} held out" + (f", {unused} unused" if unused else "")
        )


def split_by_hash(
    examples: Sequence[Example],
    *,
    test_fraction: float | None = None,
    num_test: int | None = None,
    test_ids: Collection[int] | None = None,
    key: Callable[[Example], int] = prompt_digest,
) -> Split:
    """Drop repeated items and take the test items out of training, by a hash of the item.

    `key` gives a 128-bit hash of what makes an item (default: its prompt). With `test_fraction` an item is a test item
    if its hash lies in the lowest fraction: the same item falls on the same side in every data set and for every seed.
    With `num_test` alone, the items of lowest hash are taken; with both, at most `num_test` of those below the
    fraction, and the others are left unused. With `test_ids` the items of these example ids are taken instead.
    The order of the first occurrences is kept. Raises ValueError if a side would be empty, or for an argument out of
    range.
    """
    if test_ids is not None and (test_fraction is not None or num_test is not None):
        raise ValueError("give test_ids, or test_fraction / num_test, not both")
    if test_fraction is not None and not 0.0 <= test_fraction < 1.0:
        raise ValueError(f"test_fraction {test_fraction} must be in [0, 1)")
    if num_test is not None and num_test < 0:
        raise ValueError(f"num_test {num_test} must not be negative")

    items: dict[int, Example] = {}
    for example in examples:
        items.setdefault(key(example), example)

    if test_ids is not None:
        held_out = {k for k, e in items.items() if e.id in set(test_ids)}
    elif test_fraction is not None:
        held_out = {k for k in items if k < test_fraction * 2.0**128}
    else:
        held_out = set(sorted(items)[: num_test or 0])

    # what is held out and not chosen is left unused: it may be a test item of another data set
    chosen = set(sorted(held_out)[:num_test])
    test = [e for k, e in items.items() if k in chosen]
    # by id as well, since it names a prompt in sampling keys and logs
    ids = {e.id for e in test}
    train = [e for k, e in items.items() if k not in held_out and e.id not in ids]
    _check_sides(len(items), len(train), len(test), test_ids, test_fraction, num_test)
    return Split(train, test, len(examples), len(items))


def decontaminate(
    train: Sequence[Example], test: Sequence[Example], *, key: Callable[[Example], int] = prompt_digest
) -> Split:
    """Take the items of a given test set out of a training set, and repeated items out of both.

    `key` is as in `split_by_hash`. Raises ValueError if no training item is left.
    """
    held_out = {key(example): example for example in reversed(test)}  # of repeats the first one stays
    test_ids = {e.id for e in held_out.values()}
    items: dict[int, Example] = {}
    for example in train:
        items.setdefault(key(example), example)

    kept = [e for k, e in items.items() if k not in held_out and e.id not in test_ids]
    if not kept:
        raise ValueError(
            f"no training item is left: all {len(items)} distinct items are also among the {len(held_out)} of the test "
            "set; give other training data"
        )
    return Split(kept, list(reversed(held_out.values())), len(train) + len(test), len(items.keys() | held_out.keys()))


def _check_sides(
    distinct: int,
    train: int,
    test: int,
    test_ids: Collection[int] | None,
    test_fraction: float | None,
    num_test: int | None,
) -> None:
    if not train:
        raise ValueError(
            f"no training item is left: {distinct} distinct items, {test} of them held out "
            f"(test_fraction={test_fraction}, num_test={num_test}); hold out fewer, or generate more"
        )
    wants_test = bool(test_ids) or bool(num_test) or (bool(test_fraction) and num_test is None)
    if (wants_test and not test) or (num_test is not None and test < num_test):
        raise ValueError(
            f"only {test} of {distinct} distinct items can be held out, and {num_test or 'some'} were asked for "
            f"(test_fraction={test_fraction}, test_ids={'given' if test_ids is not None else None}); "
            "generate more items, raise test_fraction or lower num_test"
        )
