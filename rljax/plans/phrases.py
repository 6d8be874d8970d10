"""Phrases in what a policy wrote, found in decoded text: the ways in which a solution sums itself up. Host, no jax."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

FAMILIES = {
    "summarise": (
        "in summary",
        "in sum",
        "to summarize",
        "to summarise",
        "to sum up",
        "summing up",
        "summarizing",
        "summarising",
        "let me summarize",
        "let me summarise",
        "let us summarize",
        "let us summarise",
        "let's summarize",
        "let's summarise",
        "i will summarize",
        "i will summarise",
        "a quick summary",
        "here is a summary",
        "here's a summary",
        "summary so far",
        "summary:",
    ),
    "recap": (
        "to recap",
        "recapping",
        "let me recap",
        "let us recap",
        "let's recap",
        "a quick recap",
        "quick recap",
        "recap:",
        "let me restate",
        "let me recapitulate",
        "to recapitulate",
    ),
    "review": (
        "let me review",
        "let us review",
        "let's review",
        "to review",
        "reviewing what",
        "reviewing the steps",
        "let me look back",
        "looking back",
        "let me go over",
        "let's go over",
        "going over what",
    ),
    "re-check": (
        "let me double check",
        "let me double-check",
        "let's double check",
        "let's double-check",
        "let me check again",
        "let me re-check",
        "let me recheck",
        "let me verify",
        "let's verify",
        "to double-check",
        "checking my work",
    ),
    "progress": (
        "what i have done so far",
        "what we have done so far",
        "what i have so far",
        "what we have so far",
        "so far we have",
        "so far i have",
        "my progress so far",
        "our progress so far",
        "progress so far",
        "what we know so far",
        "up to this point",
        "where we are now",
    ),
    "conclude": (
        "in conclusion",
        "to conclude",
        "concluding",
        "we can conclude",
        "i conclude",
        "putting it all together",
        "putting everything together",
        "bringing it all together",
    ),
    "reflect": (
        "let me reflect",
        "let's reflect",
        "reflecting on",
        "let me step back",
        "let's step back",
        "stepping back",
        "taking a step back",
        "let me take stock",
        "taking stock",
        "let me pause",
    ),
    "start over": (
        "let me start over",
        "let's start over",
        "starting over",
        "let me start again",
        "let me begin again",
        "let me try again",
        "let me rethink",
        "let me reconsider",
        "back to the beginning",
    ),
}
"""Phrases by what they do, in the families of ReSum's release (2606.13316); bare connectives ("so", "thus", "overall")
stand in nearly every solution, and are none."""

HESITATION = ("wait,", "wait.", "hold on", "hmm,", "actually,")
"""The release counts these too. They say that the policy doubts, not that it sums up, so that they are no default."""

SUMMARY_PHRASES = tuple(phrase for family in FAMILIES.values() for phrase in family)
"""All of `FAMILIES`."""


def no_text(ids: Sequence[int]) -> str:
    """Decodes to nothing: stands in where no tokenizer is known yet."""
    return ""


@dataclasses.dataclass(frozen=True)
class PhraseFinder:
    """Finds `phrases` in the text of tokens, whatever their case and white space, as words of their own. White space
    at the beginning of a phrase is a part of it.

    ValueError for no phrases, and for a blank one.
    """

    phrases: tuple[str, ...]
    decode: Callable[[Sequence[int]], str] = no_text
    """Token ids to text, special tokens left out."""

    def __post_init__(self) -> None:
        if not self.phrases:
            raise ValueError("detect has no phrases; give at least one")
        if blank := [phrase for phrase in self.phrases if not phrase.strip()]:
            raise ValueError(f"detect: the phrase {blank[0]!r} is blank and occurs everywhere; remove it")

    def __call__(self, tokens: Sequence[int] | np.ndarray, sampled: np.ndarray) -> list[int]:
        """Places of the tokens with which a phrase begins, in order. All of it was `sampled` (bool [T]): what a prompt,
        a tool or an injection says does not count."""
        found: list[int] = []
        edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(sampled, np.int8), [0]])))
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            ids = np.asarray(tokens[start:stop]).tolist()
            matches = self._pattern.finditer(self.decode(ids))
            found += [start + self._token_of(ids, match.start()) for match in matches]
        return found

    def openers(self, vocab_size: int) -> tuple[int, ...]:
        """Tokens with which a phrase can begin: blank ones, and those whose text begins one or begins with one."""
        whole = tuple(map(_folded, self.phrases))
        beginnings = {phrase[:end] for phrase in whole for end in range(1, len(phrase) + 1)}
        openers = []
        for token in range(vocab_size):
            text = self.decode([token])
            own = _folded(text)
            if text and (not own or own in beginnings or own.startswith(whole)):
                openers.append(token)
        return tuple(openers)

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        # Longest first: of phrases that begin at one place the whole one is taken.
        return re.compile("|".join(map(_as_pattern, sorted(self.phrases, key=len, reverse=True))), re.IGNORECASE)

    def _token_of(self, ids: Sequence[int], place: int) -> int:
        """The token whose text holds character `place` of the text of all."""
        low = 0
        high = len(ids)
        # The text grows with the count of tokens, so the first count that holds the place is found by halving. Half a
        # character at the end of the text is no text yet.
        while high - low > 1:
            middle = (low + high) // 2
            if len(self.decode(ids[:middle]).rstrip("\ufffd")) > place:
                high = middle
            else:
                low = middle
        return low


def _folded(text: str) -> str:
    """In lower case, white space before it left out and each stretch of it within as one blank."""
    return re.sub(r"\s+", " ", text.lstrip()).lower()


def _as_pattern(phrase: str) -> str:
    words = phrase.split()
    body = r"\s+".join(re.escape(word).replace("'", "['\u2019]") for word in words)
    before = r"\s+" if phrase[0].isspace() else r"(?<!\w)" if re.match(r"\w", words[0]) else ""
    after = r"(?!\w)" if re.search(r"\w$", words[-1]) else ""
    return before + body + after
