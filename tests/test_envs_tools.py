"""Tools: schemas from plain functions, calls that are checked, a calculator, search over a corpus."""

import collections
import contextlib
import json
import math
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rljax.envs import Sandbox, ToolBox, ToolCall, answer, finish, named, python_tool, tool_schema
from rljax.envs.library import Corpus, Document, calculate, calculator, search_tool
from rljax.envs.tools import cut


def convert(amount: float, unit: Literal["m", "ft"], digits: int = 2, tags: list[str] | None = None) -> str:
    """Convert a length.

    Args:
        amount: How much.
        unit: The unit to convert to.
        digits: How many digits.
        tags: Labels.
    """
    return f"{round(amount, digits)} {unit} {tags}"


def broken(x: int) -> int:
    """Fail.

    Args:
        x: Anything.
    """
    raise KeyError("no luck")


def slow(seconds: float) -> str:
    """Wait.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return "done"


@pytest.fixture
def box():
    return ToolBox([convert, broken, slow, answer, finish, calculator], timeout_s=0.2, max_chars=100)


def test_schema_is_what_chat_templates_take():
    assert tool_schema(answer) == {
        "type": "function",
        "function": {
            "name": "answer",
            "description": "Give the final answer. Nothing can be done after it.",
            "parameters": {
                "type": "object",
                "properties": {"answer": {"type": "string", "description": "The answer, and nothing else."}},
                "required": ["answer"],
            },
            "return": {"type": "string"},
        },
    }
    assert tool_schema(finish)["function"]["parameters"]["properties"] == {}


def test_a_tool_without_hints_or_docstring_is_refused():
    def bare(x):
        return x

    with pytest.raises(ValueError, match="tool bare has no usable signature and docstring"):
        ToolBox([bare])
    with pytest.raises(ValueError, match="no \\*args"):
        ToolBox([lambda *args: 1])
    with pytest.raises(ValueError, match="different names"):
        ToolBox([answer, answer])
    with pytest.raises(ValueError, match="cannot load 'nowhere:tool'"):
        ToolBox(["nowhere:tool"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"amount": 1.256, "unit": "m"}, "1.26 m None"),
        ({"amount": 1, "unit": "ft", "digits": 0, "tags": ["a"]}, "1 ft ['a']"),
        ({"amount": 2.0, "unit": "m", "tags": None}, "2.0 m None"),
    ],
)
def test_a_good_call_runs(box, arguments, text):
    result = box.call(ToolCall("convert", arguments))
    assert (result.text, result.failure) == (text, None)


@pytest.mark.parametrize(
    ("call", "failure", "says"),
    [
        (ToolCall("convrt"), "unknown_tool", "There is no tool 'convrt'; the tools are convert, broken"),
        (ToolCall("convert", {"amount": 1.0}), "missing_argument", "needs the argument unit"),
        (ToolCall("convert", {"amount": 1.0, "unit": "m", "x": 1}), "extra_argument", "no argument x"),
        (ToolCall("convert", {"amount": "1", "unit": "m"}), "wrong_type", "amount of convert must be of type number"),
        (ToolCall("convert", {"amount": True, "unit": "m"}), "wrong_type", "not boolean"),
        (ToolCall("convert", {"amount": 1.0, "unit": "mile"}), "wrong_type", "one of m, ft"),
        (ToolCall("convert", {"amount": 1.0, "unit": "m", "digits": 1.5}), "wrong_type", "integer"),
        (ToolCall("convert", {"amount": 1.0, "unit": "m", "tags": [1]}), "wrong_type", "tags"),
        (ToolCall("broken", {"x": 1}), "tool_raised", "broken failed: KeyError: 'no luck'"),
        (ToolCall("slow", {"seconds": 5.0}), "tool_timeout", "longer than 0.2 s"),
        (ToolCall("calculator", {"expression": "1/0"}), "tool_raised", "division by zero"),
    ],
)
def test_a_bad_call_says_what_was_wrong_and_is_counted(box, call, failure, says):
    result = box.call(call)
    assert result.failure == failure
    assert says in result.text
    assert box.counts[failure] == 1


def test_a_final_tool_ends_with_its_value(box):
    result = box.call(ToolCall("answer", {"answer": "42"}))
    assert result.is_final and result.value == "42"
    assert box.call(ToolCall("finish")).is_final
    assert not box.call(ToolCall("calculator", {"expression": "1+1"})).is_final
    assert box.counts == {"calls/answer": 1, "calls/finish": 1, "calls/calculator": 1}


def test_calls_that_hang_are_bounded_and_the_tool_comes_back(monkeypatch):
    """Over boxes too: environments make one each."""
    monkeypatch.setattr("rljax.envs.tools.MOST_HUNG", 3)
    call = ToolCall("waits")
    texts = [ToolBox([waits], timeout_s=0.02).call(call).text for _ in range(5)]
    assert ["given up" in text for text in texts] == [True] * 3 + [False] * 2
    assert texts[4] == "waits is not available: 3 earlier calls of it still hang."

    GO.set()
    for thread in threading.enumerate():
        if thread.name == "tool waits":
            thread.join(5)
    assert ToolBox([waits], timeout_s=5.0).call(call).text == "done"


GO = threading.Event()


def waits() -> str:
    """Wait."""
    GO.wait(30)
    return "done"


def test_a_long_observation_loses_its_middle(box):
    assert cut("x" * 100, 100) == "x" * 100
    text = cut("a" * 500 + "b" * 500, 100)
    assert text.startswith("a" * 75 + "\n[900 characters left out]\n") and text.endswith("b" * 25)


def test_a_tool_may_have_another_name():
    box = ToolBox([named(calculator, "compute")])
    assert box.call(ToolCall("compute", {"expression": "2*3"})).text == "6"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["convert", "answer", "finish", "x"]), st.dictionaries(st.text(max_size=5), JSON, max_size=3), JSON
)
def test_no_call_raises(name, arguments, amount):
    box = ToolBox([convert, answer, finish])
    assert isinstance(box.call(ToolCall(name, {**arguments, "amount": amount, "unit": "m"})).text, str)
    assert isinstance(box.call(ToolCall(name, arguments)).text, str)


# calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("2 ^ 10", 1024),
        ("2 ** -1", 0.5),
        ("7 // 2 + 7 % 2", 4),
        ("sqrt(16) + abs(-3)", 7.0),
        ("round(pi, 2)", 3.14),
        ("max(1, 2, 3) - min(1, 2)", 2),
        ("factorial(20)", math.factorial(20)),
        ("6 \u00d7 7 \u00f7 2 \u2212 1", 20.0),
        ("1e3 + 1", 1001.0),
    ],
)
def test_calculator_calculates(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "2**5000",
        "10**400*10**400*10**400*10**400",
        "factorial(10**6)",
        "1/0",
        "(-8)**0.5",
        "1e999",
        "1.5**1e9",
        "__import__('os')",
        "().__class__",
        "x",
        "'a'*9",
        "[1]",
        "True",
        "1 if 1 else 2",
        "",
        "1 +",
        "(" * 300,
        "-" * 399,
        "sqrt(-1)",
        "sqrt()",
        "gcd(1.5, 2)",
        "lambda: 1",
        "1" * 401,
        "round(1, 2, 3)",
        "sqrt(x=1)",
        "log(0)",
        "1j",
        "\0",
    ],
)
def test_calculator_refuses(expression):
    begin = time.monotonic()
    with pytest.raises(ValueError):
        calculate(expression)
    assert time.monotonic() - begin < 1.0


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789+-*/^%().e, sqrtpi", max_size=40))
def test_calculator_gives_a_number_or_a_value_error(expression):
    with contextlib.suppress(ValueError):
        assert isinstance(calculate(expression), (int, float))


# python


def test_python_tool_says_what_stopped_a_program():
    isolated = Sandbox(workers=1)
    try:
        isolated.open()
    except ValueError as error:
        pytest.skip(str(error))
    with isolated as sandbox:
        box = ToolBox([python_tool(sandbox, timeout_s=1.5)], timeout_s=20.0)
        assert box.call(ToolCall("python", {"code": "x = 6\nx * 7"})).text == "42"
        assert box.call(ToolCall("python", {"code": "x = 6"})).text == "[no output]"
        late = box.call(ToolCall("python", {"code": "import time\nprint(1, flush=True)\ntime.sleep(9)"}))
        assert late.text == "1\n[stopped: it ran longer than 1.5 s]"
        assert "ZeroDivisionError" in box.call(ToolCall("python", {"code": "1/0"})).text
        assert (
            "crashed with signal 11"
            in box.call(ToolCall("python", {"code": "import ctypes\nctypes.string_at(0)"})).text
        )


# search

WORDS = ("river", "bridge", "tower", "stone", "north", "garden", "captain", "letter", "winter", "music", "engine")


def documents(n=60):
    rng = random.Random(0)
    return [Document(str(i), f"Page {i}", " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))) for i in range(n)]


def bm25(query, texts, k1=1.5, b=0.75):
    """Lucene's BM25, word by word."""
    texts = [text.lower().split() for text in texts]
    mean = sum(map(len, texts)) / len(texts)
    scores = []
    for text in texts:
        counts, score = collections.Counter(text), 0.0
        for word in query.lower().split():
            df = sum(word in other for other in texts)
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            tf = counts[word]
            score += idf * tf / (tf + k1 * (1 - b + b * len(text) / mean))
        scores.append(score)
    return scores


def test_search_ranks_by_bm25():
    pytest.importorskip("bm25s")
    docs = [Document(d.id, "", d.text) for d in documents()]
    corpus = Corpus(docs)
    for query in ("river", "stone bridge", "captain winter music captain"):
        expected = bm25(query, [d.text for d in docs])
        order = sorted(range(len(docs)), key=lambda i: (-expected[i], i))[:5]
        hits = corpus.search(query, 5)
        assert [hit.score for hit in hits] == pytest.approx([expected[i] for i in order], rel=1e-5)
        assert {hit.document.id for hit in hits} == {str(i) for i in order}
    assert corpus.search("zebra") == [] and corpus.search("") == [] and corpus.search("the of") == []
    assert len(corpus.search("river", 10**6)) == sum("river" in d.text.split() for d in docs)


def test_corpus_files_are_read_and_their_index_is_kept(tmp_path):
    pytest.importorskip("bm25s")
    rows = [{"id": d.id, "title": d.title, "text": d.text} for d in documents()]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second = Corpus.load(path), Corpus.load(path)
    assert (first.was_cached, second.was_cached) == (False, True)
    assert first.search("river stone", 5) == second.search("river stone", 5) != []
    path.write_text("\n".join(map(json.dumps, rows[:-1])))
    assert not Corpus.load(path).was_cached  # another file, another index
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "docs.parquet")
    other = Corpus.load(tmp_path / "docs.parquet", cache=tmp_path / "index")
    assert other.search("river stone", 5) == second.search("river stone", 5)
    assert (tmp_path / "index").is_dir()


def test_bad_corpora_are_refused(tmp_path):
    pytest.importorskip("bm25s")
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(ValueError, match="document 2: no text in the column 'text'"):
        Corpus.load(path)
    path.write_text("{\n")
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        Corpus.load(path)
    with pytest.raises(ValueError, match="there is no file"):
        Corpus.load(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="at least one document"):
        Corpus([])


def test_search_tool_shows_titles_and_texts():
    pytest.importorskip("bm25s")
    corpus = Corpus(
        [Document("1", "Bridge", "The stone bridge stands in the north. " * 30), Document("2", "", "A tower.")]
    )
    box = ToolBox([search_tool(corpus, max_chars=50)])
    text = box.call(ToolCall("search", {"query": "old stone bridge"})).text
    assert text.startswith("[1] Bridge\nThe stone bridge") and "characters left out" in text
    assert box.call(ToolCall("search", {"query": "tower"})).text == "[1] 2\nA tower."
    assert "No document matches" in box.call(ToolCall("search", {"query": "zebra"})).text


def test_neither_environments_nor_search_load_jax():
    code = (
        "import sys, rljax.envs.library as e; before = 'jax' in sys.modules\n"
        "try: e.Corpus([e.Document('1', '', 'a word')])\nexcept ImportError: pass\n"
        "print(before, 'jax' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False"]


def test_others_may_import_jax_while_the_first_corpus_is_made():
    """A trace in another thread does, and episodes begin in threads of their own."""
    pytest.importorskip("bm25s")
    code = """
import threading
import jax
from rljax.envs.library import Corpus, Document

failed, going = [], True

def imports():
    while going:
        try:
            import jax.lax
        except ImportError as error:
            failed.append(error)

def makes():
    Corpus([Document("1", "", "a word")])

threads = [threading.Thread(target=imports), *(threading.Thread(target=makes) for _ in range(3))]
for thread in threads:
    thread.start()
for thread in threads[1:]:
    thread.join()
going = False
threads[0].join()

from bm25s import selection
print(len(failed), selection.JAX_IS_AVAILABLE)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"], done.stderr


def test_the_search_example_of_the_docs_runs():
    pytest.importorskip("bm25s")
    page = (Path(__file__).parent.parent / "docs" / "environments.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "search_tool(" in block]
    exec(block, {})
