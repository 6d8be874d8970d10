"""A completion that follows a grammar is one of its texts, and every one of its texts may be said."""

import json
import re

import numpy as np
import pytest

from rljax.text import ByteTokenizer, CharTokenizer, Grammars
from rljax.text.grammar import GrammarError

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def bits(mask, count):
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:count]).tolist()


def said(grammars, name, seed, most=120):
    """A text drawn evenly among the tokens that may come next, up to a stop token."""
    rng = np.random.default_rng(seed)
    tokenizer = grammars.tokenizer
    followed = grammars(name).begin()
    tokens = []
    while len(tokens) < most:
        tokens.append(int(rng.choice(bits(followed.allowed(), grammars.num_ids))))
        followed.advance(tokens[-1:])
        if tokens[-1] in tokenizer.stop_ids:
            return tokenizer.decode(tokens)
    return None


def test_the_tokens_that_may_come_next_are_those_that_some_text_of_the_expression_goes_on_with():
    tokenizer = CharTokenizer("abcdefgh=")
    grammars = Grammars(tokenizer, 40)  # a model's vocabulary is padded
    followed = grammars("regex (ab|cd)?[e-h]{1,2}").begin()
    seen = []
    for token in tokenizer.encode("abe"):
        seen.append(tokenizer.decode(bits(followed.allowed(), 40)))
        followed.advance([token])
    assert seen == ["acefgh", "b", "efgh"]
    assert bits(followed.allowed(), 40) == [tokenizer.eos_id, *tokenizer.encode("efgh")]
    followed.advance([tokenizer.eos_id])
    assert len(bits(followed.allowed(), 40)) == 40  # behind its end nothing is bound
    texts = {said(grammars, "regex (ab|cd)?[e-h]{1,2}", seed) for seed in range(30)}
    assert len(texts) > 10 and all(re.fullmatch("(ab|cd)?[e-h]{1,2}", text) for text in texts)


def test_a_completion_by_a_schema_is_json_of_it():
    grammars = Grammars(ByteTokenizer(), ByteTokenizer.vocab_size)
    found = [said(grammars, f"json_schema {json.dumps(PERSON)}", seed) for seed in range(10)]
    texts = [json.loads(text) for text in found if text]
    assert len(texts) >= 5
    for text in texts:
        assert set(text) == {"name", "age"} and len(text["name"]) <= 4 and type(text["age"]) is int


def test_where_no_token_leads_on_a_completion_ends():
    tokenizer = CharTokenizer("acd")
    followed = Grammars(tokenizer, 5)("regex ab|cd").begin()
    followed.advance(tokenizer.encode("a"))
    assert bits(followed.allowed(), 5) == [tokenizer.eos_id]
    assert bits(followed.allowed(), 5) == [tokenizer.eos_id]


def test_banned_tokens_lead_nowhere():
    tokenizer = CharTokenizer("abcd")
    ids = dict(zip("abcd", tokenizer.encode("abcd"), strict=True))
    followed = Grammars(tokenizer, 40, banned=[ids["b"], ids["c"]])("regex ab|cd|ad").begin()
    assert bits(followed.allowed(), 40) == [ids["a"]]
    followed.advance([ids["a"]])
    assert bits(followed.allowed(), 40) == [ids["d"]]

    # Where a banned token is all that could follow, nothing does.
    followed = Grammars(tokenizer, 40, banned=[ids["b"]])("regex ab").begin()
    followed.advance([ids["a"]])
    assert bits(followed.allowed(), 40) == [tokenizer.eos_id]
    with pytest.raises(ValueError, match="every token that ends a completion is banned"):
        Grammars(tokenizer, 40, banned=tokenizer.stop_ids)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("regex [a", r"^regex '\[a': .*unclosed character class"),
        ('json_schema {"type": "thing"}', r"^json_schema .*thing"),
        ("json_schema {", r"^json_schema '\{' is no JSON"),
        ("json_schema 3", r"must be a JSON object"),
        ("words yes", r"^'words yes' is no grammar; it begins with json_schema, regex, lark"),
    ],
)
def test_a_grammar_that_cannot_be_read_is_refused(name, message):
    with pytest.raises(GrammarError, match=message):
        Grammars(ByteTokenizer(), 258)(name)
