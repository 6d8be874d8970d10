"""Data rows, their split and their order: nothing leaks, nothing repeats, and a bad row is named."""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from rljax.tasks import (
    Curriculum,
    Example,
    FileRows,
    UniformCurriculum,
    decontaminate,
    load_jsonl,
    load_parquet,
    split_by_hash,
    without_long_rows,
)

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 2 ="}]


def rows(count: int, start: int = 0) -> list[Example]:
    return [Example(prompt=f"question {i}", columns={"answer": str(i)}) for i in range(start, start + count)]


class TestExample:
    def test_the_id_is_the_same_in_every_process(self):
        code = (
            "from rljax.tasks import Example\nprint(Example(prompt='1 + 2 =', columns={'b': [1, 2.5], 'a': None}).id)"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        here = Example(prompt="1 + 2 =", columns={"a": None, "b": [1, 2.5]})  # the order of columns does not matter
        assert int(run.stdout) == here.id
        assert 0 <= here.id < 2**31

    def test_the_id_depends_on_all_of_the_content(self):
        variants = [
            Example(prompt="a"),
            Example(prompt="b"),
            Example(prompt="a", columns={"x": 1}),
            Example(prompt="a", columns={"x": "1"}),
            Example(prompt=MESSAGES),
            Example(prompt=MESSAGES[1:]),
        ]
        assert len({e.id for e in variants}) == len(variants)
        assert Example(prompt="a", id=7).id == 7


class TestSplit:
    def test_sides_are_disjoint_and_repeats_go(self):
        split = split_by_hash(rows(500) + rows(300), test_fraction=0.2)
        train, test = {e.prompt for e in split.train}, {e.prompt for e in split.test}
        assert not train & test
        assert len(train) == len(split.train) and len(test) == len(split.test)
        assert train | test == {e.prompt for e in rows(500)}
        assert (split.num_rows, split.num_distinct) == (800, 500)
        assert 60 < len(test) < 140
        assert f"500 distinct items: {len(train)} for training, {len(test)} held out" in split.describe()

    def test_an_item_is_on_the_same_side_in_every_data_set(self):
        one, other = split_by_hash(rows(300), test_fraction=0.3), split_by_hash(rows(300, 150), test_fraction=0.3)
        assert not {e.prompt for e in one.train} & {e.prompt for e in other.test}
        assert not {e.prompt for e in one.test} & {e.prompt for e in other.train}

    def test_a_prompt_counts_once_whatever_its_columns(self):
        twins = [Example(prompt="same", columns={"i": i}) for i in range(5)] + rows(20)
        split = split_by_hash(twins, num_test=5)
        assert split.num_distinct == 21
        assert len(split.test) == 5 and len(split.train) == 16

    def test_a_count_and_a_fraction_leave_the_rest_unused(self):
        split = split_by_hash(rows(500), test_fraction=0.2, num_test=10)
        assert len(split.test) == 10
        full = split_by_hash(rows(500), test_fraction=0.2)
        assert split.train == full.train
        assert {e.id for e in split.test} < {e.id for e in full.test}
        assert "unused" in split.describe()

    def test_items_can_be_held_out_by_id(self):
        chosen = {e.id for e in rows(3)}
        split = split_by_hash(rows(10), test_ids=chosen)
        assert [e.prompt for e in split.test] == ["question 0", "question 1", "question 2"]
        assert len(split.train) == 7

    def test_an_id_of_a_test_item_never_trains_even_by_collision(self):
        pair = [Example(prompt="a", id=5), Example(prompt="b", id=5), Example(prompt="c", id=6)]
        split = split_by_hash(pair, test_ids=[5])
        assert [e.prompt for e in split.train] == ["c"]
        for num_test in (1, 2):
            split = split_by_hash(pair, num_test=num_test) if num_test == 1 else split
            assert not {e.id for e in split.train} & {e.id for e in split.test}

    def test_a_given_test_set_is_taken_out_of_training_whatever_its_columns(self):
        test = [Example(prompt="question 3", columns={"other": 1}), Example(prompt="new"), Example(prompt="new")]
        split = decontaminate(rows(5) + rows(2), test)
        assert [e.prompt for e in split.train] == ["question 0", "question 1", "question 2", "question 4"]
        assert split.test == test[:2]
        assert (split.num_rows, split.num_distinct) == (10, 6)
        with pytest.raises(ValueError, match="no training item is left: all 5 distinct items"):
            decontaminate(rows(5), rows(6))

    def test_nothing_is_held_out_unless_asked(self):
        split = split_by_hash(rows(10))
        assert (len(split.train), len(split.test)) == (10, 0)


class TestFiles:
    def test_jsonl_gives_text_and_chat_prompts_with_all_columns(self, tmp_path):
        file = tmp_path / "data.jsonl"
        file.write_text(
            json.dumps({"prompt": "1 + 2 =", "answer": 3, "tags": ["a"]})
            + "\n\n"
            + json.dumps({"prompt": MESSAGES})
            + "\n"
        )
        first, second = load_jsonl(file)
        assert first.prompt == "1 + 2 =" and first.columns == {"answer": 3, "tags": ["a"]}
        assert second.prompt == MESSAGES and second.columns == {}
        assert load_jsonl(file) == [first, second]

    def test_a_mark_of_byte_order_is_no_part_of_the_data(self, tmp_path):
        file = tmp_path / "data.jsonl"
        file.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "é"}\r\n{"prompt": "b"}'.encode())
        assert [(e.prompt, e.place) for e in load_jsonl(file)] == [("é", f"{file}, line 1"), ("b", f"{file}, line 2")]

    def test_the_answer_at_the_end_of_a_conversation_is_no_part_of_the_prompt(self, tmp_path):
        file = tmp_path / "data.jsonl"
        answer = {"role": "assistant", "content": "4"}
        conversations = [
            {"messages": [*MESSAGES, answer]},
            {"messages": [*MESSAGES, answer, *MESSAGES, answer], "completion": "own"},
            {"messages": [*MESSAGES, answer, *MESSAGES]},
        ]
        file.write_text("\n".join(map(json.dumps, conversations)))
        first, second, third = load_jsonl(file, prompt_column="messages")
        assert (first.prompt, first.columns) == (MESSAGES, {"completion": "4"})
        assert (second.prompt, second.columns) == ([*MESSAGES, answer, *MESSAGES], {"completion": "own"})
        assert (third.prompt, third.columns) == (conversations[2]["messages"], {})

    def test_columns_can_be_named(self, tmp_path):
        file = tmp_path / "data.jsonl"
        file.write_text('{"question": "q", "prompt": "kept", "key": 12}\n')
        (example,) = load_jsonl(file, prompt_column="question", id_column="key")
        assert example.prompt == "q" and example.columns == {"prompt": "kept", "key": 12} and example.id == 12

    def test_parquet_equals_jsonl(self, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        content = [
            {"prompt": MESSAGES, "answer": "3", "weight": 0.5},
            {"prompt": MESSAGES[1:], "answer": "4", "weight": None},
        ]
        parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / "data.parquet")
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, content)))
        assert load_parquet(tmp_path / "data.parquet") == load_jsonl(tmp_path / "data.jsonl")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"prompt": "a"', r"line 2: not valid JSON \(.* at column \d+\): .*each line must be one JSON object"),
            ("[1, 2]", r"line 2: \[1, 2\] is not an object"),
            ('{"question": "a"}', r"line 2: no column 'prompt' among \['question'\].*prompt_column"),
            ('{"prompt": 3}', "line 2: 'prompt' is 3; it must be non-empty text, or a list of chat messages"),
            ('{"prompt": null}', "line 2: 'prompt' is None"),
            ('{"prompt": "  "}', "line 2: 'prompt' is '  '"),
            ('{"prompt": []}', r"line 2: 'prompt' is \[\]"),
            ('{"prompt": [{"role": "user"}]}', "line 2: message 0 of 'prompt' is .*a text role and a text content"),
            ('{"prompt": [{"role": "user", "content": 3}]}', "line 2: message 0"),
            ('{"prompt": ["hello"]}', "line 2: message 0 of 'prompt' is 'hello'"),
            ('{"prompt": "a\\ud800b"}', r"line 2: 'prompt' holds half of a character \('\\ud800', at character 1\)"),
            ('{"prompt": [{"role": "user", "content": "\\udc00"}]}', "line 2: 'prompt' holds half of a character"),
            ('{"prompt": ' + "[" * 10**5, r"line 2: not valid JSON \(maximum recursion"),
            ('{"prompt": 1' + "0" * 5000 + "}", r"line 2: not valid JSON \(Exceeds the limit"),
            ('{"prompt": [{"role": "assistant", "content": "a"}]}', "line 2: nothing is left to answer"),
            (
                '{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, '
                '{"role": "assistant", "content": "b"}]}',
                "line 2: nothing is left to answer",
            ),
        ],
    )
    def test_a_bad_line_is_named_with_its_value_and_a_remedy(self, tmp_path, line, message):
        file = tmp_path / "data.jsonl"
        file.write_text('{"prompt": "good"}\n' + line + "\n")
        with pytest.raises(ValueError, match=message) as caught:
            load_jsonl(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_bad_parquet_row_is_named(self, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        file = tmp_path / "data.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a"}, {"prompt": None}]), file)
        with pytest.raises(ValueError, match=r"data.parquet, row 2: 'prompt' is None"):
            load_parquet(file)
        file.write_bytes(b"no parquet at all")
        with pytest.raises(ValueError, match="cannot be read as Parquet"):
            load_parquet(file)

    @pytest.mark.parametrize(
        ("content", "options", "message"),
        [
            (None, {}, "no data file at"),
            (b"", {}, "holds no rows"),
            (b"\n \n", {}, "holds no rows"),
            (b'{"prompt": "\xff"}', {}, r"data\.jsonl, line 1: not UTF-8"),
            ('{"prompt": "a"}'.encode("utf-16"), {}, "line 1: not UTF-8"),
            (b'{"prompt": "a"}\n{"prompt": "b', {}, "line 2: not valid JSON .*the file is cut off here"),
            (b'{"prompt": "a", "i": -1}', {"id_column": "i"}, r"the id -1 in column 'i' must be an integer in"),
            (b'{"prompt": "a"}', {"id_column": "i"}, "the id None in column 'i'"),
        ],
    )
    def test_a_bad_file_is_named(self, tmp_path, content, options, message):
        file = tmp_path / "data.jsonl"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_jsonl(file, **options)

    def test_without_pyarrow_the_extra_is_named(self, tmp_path, monkeypatch):
        (tmp_path / "data.parquet").write_bytes(b"")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ImportError, match=r"pip install 'rljax-lm\[parquet\]'"):
            load_parquet(tmp_path / "data.parquet")


class TestLongRows:
    def of(self, lengths, test=()):
        train, held_out = ([Example("x" * n, place=f"a.jsonl, line {n}") for n in group] for group in (lengths, test))
        return FileRows(train, held_out)

    def fit(self, data, drop):
        return without_long_rows(
            data, lambda example: len(example.prompt), 4, drop=drop, remedy=lambda n: f"make room for {n}"
        )

    def test_they_are_refused_by_their_line_and_counted(self):
        says = "3 of 5 prompts have more than 4 tokens: a.jsonl, line 6 has 6, the longest 9; make room for 9"
        with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
            self.fit(self.of([4, 6, 1], [9, 5]), drop=False)

    def test_they_are_dropped_by_option_and_counted(self):
        kept = self.fit(self.of([4, 6, 1], [9, 2]), drop=True)
        assert ([len(e.prompt) for e in kept.train], [len(e.prompt) for e in kept.test]) == ([4, 1], [2])
        assert kept.describe() == (
            "2 training examples, 1 held out; dropped: 2 of 5 prompts have more than 4 tokens: a.jsonl, line 6 has 6, "
            "the longest 9"
        )
        with pytest.raises(ValueError, match="make room for 6"):
            self.fit(self.of([6, 5], [1]), drop=True)

    def test_what_fits_is_left_alone(self):
        data = self.of([4, 1], [2])
        assert self.fit(data, drop=True) is data


class TestUniformCurriculum:
    def test_an_epoch_holds_every_example_once_in_its_own_order(self):
        curriculum = UniformCurriculum(rows(12), seed=1)
        assert isinstance(curriculum, Curriculum)
        epochs = [[e.prompt for _ in range(3) for e in curriculum.sample(0, 4)] for _ in range(3)]
        assert all(sorted(e) == sorted(x.prompt for x in rows(12)) for e in epochs)
        assert epochs[0] != epochs[1] != epochs[2]
        assert curriculum.epoch == 2

    def test_batches_over_the_end_of_an_epoch_hold_no_example_twice_and_counts_stay_even(self):
        curriculum = UniformCurriculum(rows(7), seed=3)
        drawn: list[str] = []
        for _ in range(7 * 5):
            batch = [e.prompt for e in curriculum.sample(0, 5)]
            assert len(set(batch)) == 5
            drawn += batch
            counts = Counter(drawn)
            assert max(counts.values()) - min(counts.get(e.prompt, 0) for e in rows(7)) <= 1
        assert set(Counter(drawn).values()) == {25}

    def test_the_order_depends_on_the_seed_alone(self):
        def order(seed):
            curriculum = UniformCurriculum(rows(20), seed=seed)
            return [e.id for step in range(6) for e in curriculum.sample(step, 9)]

        assert order(0) == order(0)
        assert order(0) != order(1)

    @pytest.mark.parametrize("stop", range(8))
    def test_a_restored_state_continues_exactly(self, stop):
        sizes = [3, 5, 4, 1, 5, 5, 2, 3, 4, 5]
        whole = UniformCurriculum(rows(6), seed=2)
        expected = [[e.id for e in whole.sample(i, n)] for i, n in enumerate(sizes)]
        first = UniformCurriculum(rows(6), seed=2)
        for i, n in enumerate(sizes[:stop]):
            first.observe(first.sample(i, n), [1.0] * n)
        second = UniformCurriculum(rows(6), seed=2)
        second.sample(0, 6)  # what it did before does not matter
        state = json.loads(json.dumps(first.state_dict()))
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert [[e.id for e in second.sample(i, n)] for i, n in enumerate(sizes[stop:])] == expected[stop:]

    def test_another_runs_state_is_refused(self):
        state = UniformCurriculum(rows(6), seed=2).state_dict()
        for other, message in [
            (UniformCurriculum(rows(6), seed=3), "seed 2, and the run has 3"),
            (UniformCurriculum(rows(7), seed=2), "has data"),
        ]:
            with pytest.raises(ValueError, match=message):
                other.load_state_dict(state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Example(prompt="a", id=2**31), r"must be in \[0, 2\*\*31\)"),
        (lambda: split_by_hash(rows(5), test_fraction=1.0), r"test_fraction 1.0 must be in \[0, 1\)"),
        (lambda: split_by_hash(rows(5), num_test=-1), "num_test -1"),
        (lambda: split_by_hash(rows(5), num_test=5), "no training item is left: 5 distinct items, 5 of them held out"),
        (lambda: split_by_hash(rows(5), num_test=6), "no training item is left"),
        (lambda: split_by_hash(rows(9), test_fraction=1e-9), "only 0 of 9 distinct items can be held out"),
        (lambda: split_by_hash(rows(99), test_fraction=0.1, num_test=50), "50 were asked for.*lower num_test"),
        (lambda: split_by_hash(rows(5), test_ids=[1], num_test=1), "not both"),
        (lambda: split_by_hash(rows(5), test_ids=[1]), "only 0 of 5"),
        (lambda: split_by_hash([]), "no training item is left: 0 distinct items"),
        (lambda: UniformCurriculum([]), "at least one example"),
        (lambda: UniformCurriculum(rows(3)).sample(0, 4), "cannot draw 4 distinct examples from 3"),
        (lambda: UniformCurriculum(rows(3)).sample(0, 0), "cannot draw 0"),
    ],
)
def test_wrong_use_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
