"""Stages from rows to rows: files that are gone on from, and what each stage promises."""

import json
import math

import pytest

from rljax.tasks import (
    ChatEndpoint,
    Completion,
    EndpointCompletions,
    NotRepetitive,
    Reaches,
    Remembered,
    RewardResult,
    StageResult,
    Withholds,
    Within,
    annotated,
    best_attempts,
    criticised,
    example_weights,
    guided,
    judged,
    kept,
    laid_out,
    longer_half,
    merged,
    mixed,
    pass_rate,
    run_stages,
    stage,
    with_attempts,
    with_modes,
)


class Told:
    """Answers by `answer(prompt, number)`, and keeps what it was asked."""

    at_once = 2

    def __init__(self, answer, **settings):
        self.answer = answer
        self.settings = settings
        self.asked = []

    def __call__(self, prompts, count):
        self.asked += [(prompt, count) for prompt in prompts]
        return [[Completion(self.answer(prompt, i)) for i in range(count)] for prompt in prompts]


def doubled(rows, *, factor=2):
    return [{**row, "n": row["n"] * factor} for row in rows]


def odd_only(rows):
    return StageResult(
        [r for r in rows if r["n"] % 2], [(r, "even") for r in rows if not r["n"] % 2], {"all": len(rows)}
    )


ROWS = [{"prompt": f"p{i}", "n": i} for i in range(5)]


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_stage_leaves_rows_that_can_be_looked_at_and_says_what_they_were_made_of(tmp_path):
    told = []
    stages = [stage("odd", odd_only), stage("more", doubled, factor=3)]
    made = run_stages(ROWS, stages, tmp_path, report=told.append)
    assert [row["n"] for row in made] == [3, 9]
    assert (tmp_path / "00-odd.jsonl").read_text() == '{"prompt": "p1", "n": 1}\n{"prompt": "p3", "n": 3}\n'
    dropped = [json.loads(line) for line in (tmp_path / "00-odd.dropped.jsonl").read_text().splitlines()]
    assert [(row["n"], row["dropped"]) for row in dropped] == [(0, "even"), (2, "even"), (4, "even")]
    note = json.loads((tmp_path / "01-more.json").read_text())
    assert note["settings"] == {"function": "test_tasks_stages:doubled", "factor": 3} and note["rows"] == 2
    assert told[0].describe().split() == ["00-odd.jsonl", "2", "rows,", "3", "dropped:", "even,", "all", "5"]
    assert ROWS[1] == {"prompt": "p1", "n": 1}


def test_a_pipeline_that_broke_off_goes_on_and_makes_the_same_bytes(tmp_path):
    def breaks(rows):
        raise OSError("gone")

    stages = [stage("odd", odd_only), stage("more", doubled)]
    run_stages(ROWS, stages, tmp_path / "straight")
    with pytest.raises(OSError, match="gone"):
        run_stages(ROWS, [stages[0], stage("more", breaks)], tmp_path / "broken")
    # What was being written when it broke off.
    (tmp_path / "broken" / "01-more.jsonl").write_text('{"prompt": "p')
    told = []
    run_stages(ROWS, stages, tmp_path / "broken", report=told.append)
    assert [report.is_new for report in told] == [False, True]
    assert files(tmp_path / "broken") == files(tmp_path / "straight")


def test_rows_are_the_same_whether_they_were_made_now_or_read(tmp_path):
    stages = [stage("odd", odd_only), stage("more", doubled)]
    rows = [{**row, "pair": (1, 2), "half": "\ud800 é"} for row in ROWS]
    made = run_stages(rows, stages, tmp_path)
    assert made[0]["pair"] == [1, 2] and made[0]["half"] == "\ud800 é"
    assert run_stages(rows, stages, tmp_path) == made


@pytest.mark.parametrize(
    ("rows", "stages", "says"),
    [
        (
            ROWS,
            [stage("odd", odd_only), stage("more", doubled, factor=4)],
            "made with factor=3, and the stage now has 4",
        ),
        (ROWS[1:], [stage("odd", odd_only), stage("more", doubled, factor=3)], "00-odd.jsonl was made of other rows"),
        (ROWS, [stage("odd", odd_only)], "holds 01-more.json of another pipeline, whose stages now are odd"),
        (ROWS, [stage("odd", odd_only), stage("odd", odd_only)], "must differ"),
        (ROWS, [], "at least one stage"),
    ],
)
def test_what_was_made_otherwise_is_refused(rows, stages, says, tmp_path):
    run_stages(ROWS, [stage("odd", odd_only), stage("more", doubled, factor=3)], tmp_path)
    with pytest.raises(ValueError, match=says):
        run_stages(rows, stages, tmp_path)


def test_a_file_that_was_changed_by_hand_is_refused_and_so_is_one_that_is_gone(tmp_path):
    stages = [stage("odd", odd_only)]
    run_stages(ROWS, stages, tmp_path)
    file = tmp_path / "00-odd.jsonl"
    file.write_text(file.read_text().replace("p1", "p9"))
    with pytest.raises(ValueError, match="has changed since it was written"):
        run_stages(ROWS, stages, tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"is missing, and 00-odd\.json says that it was there"):
        run_stages(ROWS, stages, tmp_path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: stage("Odd one", odd_only), "small letters"),
        (lambda: stage("odd", odd_only, least=1), "odd_only got an unexpected keyword argument 'least'"),
        (lambda: stage("odd", doubled, factor=object()), "cannot be a setting of a stage"),
        (lambda: run_stages([{"x": math.nan}], [stage("odd", odd_only)], "x"), "the data, row 1: Out of range float"),
        (lambda: run_stages([{"n": 2}], [stage("odd", odd_only)], "x"), r"leaves none of 1 rows \(1 dropped: even\)"),
        (lambda: mixed([], weights={"a": 0.5}, count=1), "must be probabilities"),
        (lambda: mixed([], weights={"a": 1.0}, count=1), "no row is of the kind 'a'"),
        (lambda: mixed([{"task": "b"}], weights={"a": 1.0}, count=1), "a row has task='b'"),
        (lambda: mixed([], weights={"a": 1.0}, count=1, by_length=True), "by_length=True needs a length"),
        (lambda: laid_out([], fields={}, dropout=2.0), "dropout=2.0 must be at least 0"),
        (lambda: with_modes([], direct_share=-1.0), "direct_share=-1.0 must be"),
        (
            lambda: annotated([{"prompt": "p"}], complete=Told(str), questions={"a": "{b}"}),
            "names 'b', which a row lacks",
        ),
    ],
)
def test_what_cannot_work_is_named(make, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says):
        make()


def test_answers_are_kept_as_they_come_and_asked_for_once(tmp_path):
    file = tmp_path / "asked.jsonl"

    def answer(prompt, i):
        if prompt == "d":
            raise OSError("no line")
        return f"{prompt}{i}"

    told = Told(answer, model="m")
    with pytest.raises(OSError, match="no line"):
        Remembered(told, file)(["a", "b", "a", "d"], 2)
    # A line that a kill has cut off is none.
    with file.open("ab") as opened:
        opened.write(b'{"key": "12')

    again = Told(lambda prompt, i: f"{prompt}{i}", model="m")
    found = Remembered(again, file)(["a", "b", "a", "d"], 2)
    assert again.asked == [("d", 2)]
    assert [[one.text for one in answers] for answers in found] == [
        ["a0", "a1"],
        ["b0", "b1"],
        ["a0", "a1"],
        ["d0", "d1"],
    ]
    other = Told(lambda prompt, i: "other", model="n")
    assert Remembered(other, file)(["a"], 2)[0][0].text == "other"
    assert len(file.read_text().splitlines()) == 4


def solved_by(text):
    return RewardResult(float(text), {"right": float(text)}, decided_by="right")


def test_rejection_sampling_keeps_whole_right_answers_as_they_came():
    rows = [{"prompt": "p", "answer": 1}, {"prompt": "q", "answer": 2}]
    texts = {"p": ["0", "1", "1.0", "1"], "q": ["0", "0", "0.5", "0"]}
    asked = with_attempts(rows, complete=Told(lambda prompt, i: texts[prompt][i]), count=4).rows
    # Of the first prompt, one more right answer was cut off.
    asked[0]["attempts"][2]["is_whole"] = False
    found = judged(asked, score=lambda pairs: [solved_by(text) for _, text in pairs])
    assert [pass_rate(row) for row in found.rows] == [0.5, 0]
    assert found.figures == {"pass rate": 0.25, "solved": 0.5, "reward failed": 0}
    result = best_attempts(found.rows, at_most=2)
    assert result.rows == [{"prompt": "p", "answer": 1, "completion": "1", "pass_rate": 0.5}]
    assert [(row["prompt"], why) for row, why in result.dropped] == [("q", "no right answer")]
    # Judged once.
    assert judged(found.rows, score=lambda pairs: []).rows == found.rows


def test_a_reward_that_failed_says_nothing_about_a_prompt():
    row = {"prompt": "p", "attempts": [{"text": t, "is_whole": True, "logprob": None} for t in "ab"]}
    results = [RewardResult(0.0, {}, is_valid=False), solved_by(1)]
    (found,) = judged([row], score=lambda pairs: results).rows
    assert found["attempts"][0]["reward"] is None and pass_rate(found) == 1


def test_a_hint_is_for_those_that_failed_and_is_not_learned():
    right = {"text": "1", "is_whole": True, "logprob": None, "reward": 1.0, "is_right": True}
    rows = [
        {"prompt": "p", "hint": "h", "attempts": [right]},
        {"prompt": "q", "hint": "h", "attempts": [{**right, "is_right": False}]},
        {"prompt": "r", "attempts": [{**right, "is_right": False}]},
    ]
    made = guided(rows, column="hint").rows
    assert made[0] == rows[0] and made[2] == rows[2]
    told = Told(lambda prompt, i: "2")
    again = with_attempts(made, complete=told, count=1).rows
    assert told.asked == [("q\n\nHint: h", 1)]
    again = judged(again, score=lambda pairs: [solved_by(1) for _ in pairs]).rows
    assert [(row["prompt"], row["completion"]) for row in best_attempts(again).rows] == [("p", "1"), ("q", "2")]
    assert "asked" not in best_attempts(again).rows[1]


def attempt(text, is_right, logprob, **changes):
    return {
        "text": text,
        "is_right": is_right,
        "logprob": logprob,
        "is_whole": True,
        "reward": float(is_right),
        "critique": f"c{text[1:]}",
    } | changes


def test_t1_goes_from_the_surest_wrong_attempts_to_a_right_one_and_learns_no_wrong_one():
    attempts = [
        attempt("y1", False, -3.0),
        attempt("y2", True, -2.0),
        attempt("y3", False, -1.0),
        attempt("y4", False, -2.0),
        attempt("y5", False, -0.1, is_whole=False),
        attempt("y6", True, -1.5),
    ]
    (row,) = merged([{"prompt": "p", "attempts": attempts}], joint=" ").rows
    pieces = row["completion"]
    assert "".join(piece["text"] for piece in pieces) == "y3 c3 y4 c4 y6 c6"
    assert "".join(piece["text"] for piece in pieces if piece["learned"]) == "c3 c4 y6 c6"

    for left, says in (([0, 2], "no right attempt"), ([1, 5], "no wrong attempt")):
        result = merged([{"prompt": "p", "attempts": [attempts[i] for i in left]}])
        assert not result.rows and result.dropped[0][1] == says
    result = merged([{"prompt": "p", "attempts": attempts}], joint=" ", longest=16)
    assert result.dropped[0][1] == "longer than 16 characters"


def test_a_critic_is_told_what_is_right_of_a_wrong_attempt_alone():
    told = Told(lambda prompt, i: "so")
    attempts = [attempt("y1", False, None), attempt("y2", True, None)]
    (row,) = criticised([{"prompt": "1 + 1?", "answer": "two", "attempts": attempts}], complete=told).rows
    assert [one["critique"] for one in row["attempts"]] == ["so", "so"]
    (wrong, _), (right, _) = told.asked
    assert "Right result: two" in wrong and "Answer: y1" in wrong
    assert "two" not in right and "Answer: y2" in right and "1 + 1?" in right


def test_annotations_that_are_missing_cost_the_row_and_a_checker_never_sees_the_answer():
    def says(prompt, i):
        if prompt.endswith("know?"):
            return "" if "q" in prompt else " sums "
        return "so 2" if prompt.startswith("check") else "1 + 1 is 2"

    told = Told(says)
    rows = [{"prompt": "p", "answer": 2}, {"prompt": "q", "answer": 3}]
    questions = {"fundamentals": "{question}: what to know?", "chain": "{question}: why {answer}?"}
    result = annotated(rows, complete=told, questions=questions)
    assert result.rows == [{"prompt": "p", "answer": 2, "fundamentals": "sums", "chain": "1 + 1 is 2"}]
    assert [why for _, why in result.dropped] == ["no fundamentals"]

    checked = annotated(result.rows, complete=told, questions={"checked": "check {chain}"}).rows
    assert told.asked[-1][0] == "check 1 + 1 is 2"
    rules = {"elsewhere": Reaches("checked", extract=lambda text: text.split()[-1]), "told": Withholds("fundamentals")}
    assert kept(checked, rules=rules).rows == checked


def test_filters_name_the_first_rule_that_is_broken_and_change_nothing_a_second_time():
    rows = [
        {"reward": 1.0, "completion": "fine", "pass_rate": 0.2},
        {"reward": 0.5, "completion": "fine", "pass_rate": 0.9},
        {"reward": 1.0, "completion": "abab" * 40, "pass_rate": 0.2},
        {"reward": 1.0, "completion": "fine", "pass_rate": 0.9},
        {"completion": "fine"},
    ]
    rules = {
        "reward": Within("reward", least=1.0),
        "repeats": NotRepetitive(window=4, most=20),
        "easy": Within("pass_rate", most=0.3),
    }
    result = kept(rows, rules=rules)
    assert result.rows == [rows[0], rows[4]]
    assert [why for _, why in result.dropped] == ["reward", "repeats", "easy"]
    again = kept(result.rows, rules=rules)
    assert again.rows == result.rows and not again.dropped


def test_prompts_with_the_shorter_half_of_answers_are_left_out():
    """The worked example: the median is 355."""
    rows = [{"completion": "x" * n, "n": i} for i, n in enumerate([120, 800, 300, 950, 60, 410])]
    assert [row["n"] for row in longer_half(rows).rows] == [1, 3, 5]


def test_fields_are_left_out_at_random_and_the_answer_never_is():
    rows = [{"prompt": f"p{i}", "a": "A", "b": "B", "answer": i} for i in range(2000)]
    fields = {"a": "{}|", "b": "!{}|"}
    made = laid_out(rows, fields=fields, end="={answer}", dropout=0.3).rows
    assert {row["completion"].partition("=")[0] for row in made} == {"", "A|", "!B|", "A|!B|"}
    assert all(row["completion"].endswith(f"={row['answer']}") for row in made)
    both = sum(row["fields"] == ["a", "b"] for row in made) / len(made)
    assert abs(both - 0.49) < 0.03
    # Of each row alone: neither order nor the other rows enter.
    assert laid_out(rows[::-1], fields=fields, end="={answer}", dropout=0.3).rows == made[::-1]
    assert laid_out(rows[:9], fields=fields, end="{answer}").rows[3]["completion"] == "A|!B|3"


def test_a_prompt_is_answered_in_one_mode_and_an_empty_thought_is_not_learned():
    rows = [{"prompt": f"p{i // 4}", "thought": f"t{i}", "answer": i} for i in range(4000)]
    result = with_modes(rows, direct_share=0.25, block="<{}>")
    assert abs(result.figures["direct"] - 0.25) < 0.05
    for i in range(0, 4000, 4):
        assert len({row["mode"] for row in result.rows[i : i + 4]}) == 1
    by_mode = {row["mode"]: row for row in result.rows[::-1]}
    thinking, direct = by_mode["thinking"], by_mode["direct"]
    assert thinking["prompt"].endswith("\n\n/think") and direct["prompt"].endswith("\n\n/no_think")
    assert [piece["learned"] for piece in thinking["completion"]] == [True, True]
    assert direct["completion"] == [
        {"text": "<>", "learned": False},
        {"text": str(direct["answer"]), "learned": True},
    ]


POOLS = {"agent": [-1.0, -2.0], "general": [-0.5, -1.5, -1.0]}
"""Log-probs of the worked example."""


def pooled(rows, weights, count, **options):
    return mixed(rows, weights=weights, count=count, column="kind", **options)


def test_the_mixture_has_the_objective_of_agenttuning_in_expectation():
    """0.2 x 1.5 + 0.8 x 1.0 = 1.1."""
    rows = [{"kind": kind, "logprob": value} for kind, values in POOLS.items() for value in values]
    drawn = pooled(rows, {"agent": 0.2, "general": 0.8}, 20_000).rows
    assert abs(-sum(row["logprob"] for row in drawn) / len(drawn) - 1.1) < 0.005
    # One more kind: GPT-4 and GPT-3.5 at 0.2 and 0.8 of what is general; a batch of 64 has 12.8, 10.24 and 40.96.
    rows += [{"kind": kind, "logprob": 0.0} for kind in ("gpt4", "gpt3.5")]
    figures = pooled(rows, {"agent": 0.2, "gpt4": 0.16, "gpt3.5": 0.64, "general": 0.0}, 20_000).figures
    for kind, expected in {"agent": 12.8, "gpt4": 10.24, "gpt3.5": 40.96, "general": 0}.items():
        assert abs(64 * figures[f"share of {kind}"] - expected) < 0.5


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_mixture_of_one_kind_is_every_row_of_it_equally_often(eta):
    rows = [{"kind": kind, "n": i} for kind in POOLS for i in range(6)]
    drawn = pooled(rows, {"agent": eta, "general": 1 - eta}, 60).rows
    assert {row["kind"] for row in drawn} == {"agent" if eta else "general"}
    assert [[row["n"] for row in drawn].count(n) for n in range(6)] == [10] * 6
    orders = {tuple(row["n"] for row in drawn[i : i + 6]) for i in range(0, 60, 6)}
    assert len(orders) > 5


def test_a_longer_mixture_only_adds_rows_and_another_seed_is_another_mixture():
    rows = [{"kind": kind, "n": i} for kind in POOLS for i in range(6)]
    weights = {"agent": 0.2, "general": 0.8}
    assert pooled(rows, weights, 50).rows == pooled(rows, weights, 80).rows[:50]
    assert pooled(rows, weights, 50).rows != pooled(rows, weights, 50, seed=1).rows


def test_shares_of_rows_are_not_shares_of_tokens():
    """The worked example: episodes of 2,000 tokens and dialogues of 400."""
    lengths = {"agent": 2000.0, "general": 400.0}
    weights = {"agent": 0.2, "general": 0.8}
    assert example_weights(weights, lengths)["agent"] == pytest.approx(0.047619, abs=1e-6)
    rows = [{"kind": kind, "tokens": tokens} for kind, tokens in lengths.items()]

    def tokens_of(row):
        return row["tokens"]

    figures = pooled(rows, weights, 20_000, length=tokens_of).figures
    assert figures["share of agent by length"] == pytest.approx(0.5556, abs=0.01)
    figures = pooled(rows, weights, 20_000, length=tokens_of, by_length=True).figures
    assert figures["share of agent by length"] == pytest.approx(0.2, abs=0.01)
    assert figures["share of agent"] == pytest.approx(0.0476, abs=0.005)


def test_a_row_is_measured_once_however_often_it_is_drawn():
    rows = [{"kind": kind, "n": i} for kind in POOLS for i in range(6)]
    measured = []

    def length(row):
        measured.append((row["kind"], row["n"]))
        return 1.0

    for by_length in (False, True):
        measured.clear()
        pooled(rows, {"agent": 0.5, "general": 0.5}, 500, length=length, by_length=by_length)
        assert sorted(measured) == sorted((row["kind"], row["n"]) for row in rows)


def test_several_answers_of_an_endpoint_need_a_temperature():
    endpoint = ChatEndpoint(base_url="http://localhost:1/v1", model="m")
    with pytest.raises(ValueError, match="2 answers at a temperature of 0 are all one"):
        EndpointCompletions(endpoint)(["p"], 2)
    with pytest.raises(ValueError, match="at_once=0"):
        EndpointCompletions(endpoint, at_once=0)
    assert EndpointCompletions(endpoint).settings == {"model": "m", "temperature": 0.0, "max_tokens": 512}
