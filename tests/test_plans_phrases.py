"""Phrases are found in decoded text, and the tokens with which one can begin are known."""

import numpy as np
import pytest

from rljax.plans.phrases import FAMILIES, HESITATION, SUMMARY_PHRASES, PhraseFinder

PIECES = [
    "So",
    " x",
    " =",
    " 2",
    ".",
    " In",
    " summary",
    ",",
    "\n",
    "Let",
    " Let",
    " me",
    " recap",
    "IN",
    " SUM",
    "MARY",
]
PIECES += ["\n\n", " recapture", "I", " ", "", "inside", " In sum", "mary"]


def pieces(ids):
    """Tokens as those of byte-level BPE: a blank belongs to the word behind it."""
    return "".join(PIECES[i] for i in ids)


def utf8(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def ids_of(*texts):
    return np.array([PIECES.index(text) for text in texts])


def found(finder, tokens, given=()):
    sampled = np.ones(len(tokens), bool)
    sampled[list(given)] = False
    return finder(np.asarray(tokens), sampled)


FINDER = PhraseFinder(("in summary", "let me recap"), pieces)


def test_phrases_are_found_in_mid_sentence_whatever_their_case_tokens_and_white_space():
    assert found(FINDER, ids_of("So", " x", " =", " 2", ".", " In", " summary", ",")) == [5]
    assert found(FINDER, ids_of("So", " Let", " me", " recap")) == [1]
    assert found(FINDER, ids_of("IN", " SUM", "MARY", "\n\n", "Let", "\n", " me", " recap", ",")) == [0, 4]
    assert found(FINDER, ids_of(" ", " In sum", "mary")) == [1]


def test_a_phrase_within_a_word_or_partly_given_is_none():
    assert found(FINDER, ids_of("So", " Let", " me", " recapture")) == []
    tokens = ids_of(" In", " summary", ".", " Let", " me", " recap")
    assert found(FINDER, tokens) == [0, 3]
    assert found(FINDER, tokens, given=[0]) == [3]
    assert found(FINDER, tokens, given=[5]) == [0]
    assert found(FINDER, [], given=[]) == []


def test_characters_of_several_tokens_do_not_move_the_place():
    finder = PhraseFinder(("in summary",), utf8)
    text = "é→\U0001f600 In Summary"
    place = text.encode().index(b"In Summary")
    assert found(finder, list(text.encode())) == [place]
    twice = ("x" + text + ", ü. in  summary").encode()
    assert found(finder, list(twice)) == [place + 1, twice.index(b"in  ")]


def test_the_longest_phrase_at_a_place_counts_once():
    finder = PhraseFinder(("in sum", "in summary", "summary"), pieces)
    assert found(finder, ids_of(" In", " summary", " In sum")) == [0, 2]


def test_openers_are_blank_or_begin_a_phrase():
    openers = PhraseFinder(("in summary", "let me recap"), pieces).openers(len(PIECES))
    want = {" In", "\n", "Let", " Let", "IN", "\n\n", "I", " ", " In sum"}
    assert {PIECES[i] for i in openers} == want
    assert PIECES.index("") not in openers  # a token without text, such as the end of the completion, begins nothing


def test_an_apostrophe_may_be_curly_and_a_mark_needs_no_word_beside_it():
    finder = PhraseFinder(("let's recap", "wait,"), lambda ids: "".join(map(chr, ids)))
    assert found(finder, [*map(ord, "So Let\u2019s recap. Await, wait, no")]) == [3, 23]


def test_white_space_before_a_phrase_is_a_part_of_it():
    finder = PhraseFinder((" =",), lambda ids: "".join(map(chr, ids)))
    assert found(finder, [*map(ord, "dro =drow=dr  = d")]) == [3, 12]


def test_the_families_are_many_distinct_and_no_bare_connectives():
    assert len(FAMILIES) == 8 and len(SUMMARY_PHRASES) > 80
    assert len(set(SUMMARY_PHRASES)) == len(SUMMARY_PHRASES)
    assert not {"so", "thus", "therefore", "overall", "so far"} & set(SUMMARY_PHRASES)
    assert not set(HESITATION) & set(SUMMARY_PHRASES)


@pytest.mark.parametrize(("phrases", "message"), [((), "no phrases"), (("a", " \n"), "is blank")])
def test_no_phrase_and_a_blank_one_are_refused(phrases, message):
    with pytest.raises(ValueError, match=message):
        PhraseFinder(phrases)
