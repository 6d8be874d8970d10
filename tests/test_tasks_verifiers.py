"""Built-in rewards score what they say, and reasoning-gym's holes are closed."""

import contextlib
import subprocess
import sys
from fractions import Fraction

import pytest

from rljax.tasks import (
    AfterMarker,
    ExactMatch,
    InTag,
    LengthReward,
    MathVerify,
    NumberMatch,
    ReasoningGymVerifier,
    RegexMatch,
    RewardInput,
    RewardResult,
    RewardRunner,
    RewardSpec,
    UnlessDegenerate,
    in_box,
    last_number,
    reasoning_gym_names,
    reasoning_gym_task,
    whole_number,
)
from rljax.tasks.reasoning_gym import _items
from rljax.tasks.workers import DONE, Job, WorkerPool

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
HOLES = {
    "coin_flip": ["0", "0.", "-1e9"],
    "complex_arithmetic": ["nan", "nan + nanj"],
    "gsm_symbolic": ["-{answer}", "{question}", "{answer} or 1"],
    "puzzle24": ["4*6*1*1", "24", "({answer}) + 0.9", "__import__('os').getpid()"],
    "countdown": ["print(1)", "{answer} + exit()"],
    "polynomial_multiplication": ["exit()", "[].append(1)"],
    "n_queens": ["exit()", "[0]*9**9"],
    "simple_integration": ["Integral({integrand}, x)", "exit()", "'a'"],
}
"""Wrong answers, by data set; {answer}, {question} and {integrand} stand for those of an item."""


@pytest.mark.parametrize(
    ("text", "last", "whole"),
    [
        ("42", 42, 42),
        (" -7 ", -7, -7),
        ("it is 3.50.", Fraction(7, 2), None),
        ("5-3", 3, None),
        ("5 - 3 = 2", 2, None),
        ("x = -3", -3, None),
        ("(-3)", -3, None),
        ("1,234,567.5", Fraction("1234567.5"), Fraction("1234567.5")),
        ("1,2", 2, None),
        ("1, 2, 3", 3, None),
        ("3/4", 4, Fraction(3, 4)),
        ("3/0", 0, None),
        ("1e3", 1000, 1000),
        ("1e999999999", 999999999, None),
        (".5", Fraction(1, 2), Fraction(1, 2)),
        ("\u22125", -5, -5),
        ("none here", None, None),
        ("", None, None),
        ("9" * 10_000, None, None),
    ],
)
def test_numbers_are_read_exactly(text, last, whole):
    assert last_number(text) == last
    assert whole_number(text) == whole


def test_answers_are_found_where_they_stand():
    assert InTag()("a <answer>1</answer> <answer> 2 </answer>") == "2"
    assert InTag()("<answer>open") is None
    assert InTag("think")("<think>hm</think>") == "hm"
    assert AfterMarker()("6 * 7\n#### 42\nmore") == "42"
    assert AfterMarker()("42") is None
    assert in_box(r"\boxed{1} then \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert in_box(r"\boxed{1") is None
    assert in_box("1") is None


@pytest.mark.parametrize(
    ("reward", "completion", "columns", "value"),
    [
        (ExactMatch(), " Paris\n", {"answer": "Paris"}, 1.0),
        (ExactMatch(), "paris", {"answer": "Paris"}, 0.0),
        (ExactMatch(ignore_case=True), "paris", {"answer": ["Rome", "Paris"]}, 1.0),
        (ExactMatch(), "12", {"answer": 12}, 1.0),
        (ExactMatch(extract=InTag()), "Paris", {"answer": "Paris"}, 0.0),
        (ExactMatch(column="solution", extract=InTag()), "<answer>x</answer>", {"solution": "x"}, 1.0),
        (NumberMatch(), "The sum is 1,012.0", {"answer": "1012"}, 1.0),
        (NumberMatch(), "I do not know", {"answer": 3}, 0.0),
        (NumberMatch(), "0.1", {"answer": "0.10"}, 1.0),
        (NumberMatch(number=whole_number), "it is 3", {"answer": 3}, 0.0),
        (NumberMatch(tolerance=0.01), "3.149", {"answer": 3.14}, 1.0),
        (NumberMatch(tolerance=0.01), "3.16", {"answer": 3.14}, 0.0),
        (NumberMatch(), "#### 72", {"answer": "48/2 = 24\n#### 72"}, 1.0),
        (RegexMatch(pattern=r"<think>.*</think><answer>.*</answer>"), "<think>\n</think><answer>1</answer>", {}, 1.0),
        (RegexMatch(pattern=r"<answer>.*</answer>"), "so <answer>1</answer>", {}, 0.0),
        (RegexMatch(pattern=r"<answer>.*</answer>", anywhere=True), "so <answer>1</answer>", {}, 1.0),
    ],
)
def test_verifiers_score_as_documented(reward, completion, columns, value):
    with RewardRunner([RewardSpec(reward, in_process=True)]) as runner:
        (result,) = runner.score([RewardInput("p", completion, [1], columns)])
    assert (result.value, result.is_valid) == (value, True)


def test_the_length_reward_is_daposs_soft_overlong_punishment_plus_one():
    limit, cache = 20, 8
    for length in range(30):
        if length <= limit - cache:
            punishment = 0.0
        elif length <= limit:
            punishment = ((limit - cache) - length) / cache
        else:
            punishment = -1.0
        reward = LengthReward(max_tokens=limit - cache, margin=cache)
        assert reward(token_ids=[0] * length) - 1.0 == pytest.approx(punishment, abs=1e-12)
    assert LengthReward(min_tokens=4, max_tokens=8)(token_ids=[0] * 3) == 0.0
    assert LengthReward(min_tokens=4, max_tokens=8, margin=2)(token_ids=[0] * 3) == 0.5


def test_a_row_without_a_right_answer_is_an_error_of_the_row():
    with RewardRunner([RewardSpec(NumberMatch(), in_process=True)]) as runner:
        results = runner.score(
            [RewardInput("p", "1", [1], columns) for columns in ({}, {"answer": "none"}, {"answer": 1})]
        )
    assert [r.is_valid for r in results] == [False, False, True]
    assert "no 'answer'" in results[0].error
    assert "there is no number" in results[1].error


class TestReasoningGym:
    def test_training_and_test_share_no_question_and_repeats_are_counted(self):
        task = reasoning_gym_task("chain_sum", size=1500, seed=3, config=SUMS, num_test=56)
        train, test = ({e.columns["question"] for e in side} for side in (task.train, task.test))
        assert not train & test
        assert not {e.id for e in task.train} & {e.id for e in task.test}
        assert len(test) == 56
        assert task.num_distinct == len(train) + len(test) <= 200
        assert f"1500 rows, {task.num_distinct} distinct items" in task.describe()

    @pytest.mark.slow
    def test_with_a_fraction_another_seed_keeps_to_the_same_sides(self):
        one = reasoning_gym_task("chain_sum", size=300, seed=1, config=SUMS, test_fraction=0.3)
        two = reasoning_gym_task("chain_sum", size=300, seed=2, config=SUMS, test_fraction=0.3)
        assert {e.id for e in one.train} & {e.id for e in two.train}
        assert not {e.id for e in one.train} & {e.id for e in two.test}

    def test_the_prompt_can_be_formatted_and_the_answer_extracted(self):
        task = reasoning_gym_task(
            "chain_sum",
            size=10,
            config=SUMS,
            format_prompt=lambda item: [{"role": "user", "content": item["metadata"]["expression"] + " ="}],
        ).scored(extract=InTag(), full_score_only=True)
        example = task.train[0]
        assert example.prompt == [{"role": "user", "content": example.columns["metadata"]["expression"] + " ="}]
        right = example.columns["answer"]
        assert task.verifier(f"so <answer>{right}</answer>", **example.columns) == 1.0
        assert task.verifier(right, **example.columns) == 0.0

    def test_only_a_full_score_counts_by_default(self):
        task = reasoning_gym_task("spell_backward", size=1, seed=1)
        columns = task.train[0].columns
        partial = columns["answer"][:-1] + "?"
        assert 0.0 < ReasoningGymVerifier("spell_backward", full_score_only=False)(partial, **columns) < 1.0
        assert task.verifier(partial, **columns) == 0.0
        assert task.verifier(columns["answer"], **columns) == 1.0

    def test_an_exception_in_scoring_is_a_wrong_answer(self):
        task = reasoning_gym_task("prime_factorization", size=1, seed=1)
        assert task.verifier("two times three", **task.train[0].columns) == 0.0

    @pytest.mark.parametrize("name", HOLES)
    def test_known_holes_are_closed_while_right_answers_pass(self, tasks_with_holes, name):
        task = tasks_with_holes[name]
        for example in task.train:
            right = example.columns["answer"]
            assert task.verifier(right, **example.columns) == 1.0
            for text in HOLES[name]:
                text = text.replace("{answer}", right).replace("{question}", example.columns["question"])
                text = text.replace("{integrand}", str(example.columns["metadata"].get("integrand")))
                assert task.verifier(text, **example.columns) == 0.0, text

    def test_it_runs_in_worker_processes(self):
        task = reasoning_gym_task("chain_sum", size=20, config=SUMS)
        samples = [RewardInput(e.prompt, e.columns["answer"], [1], e.columns) for e in task.train]
        with RewardRunner([task.verifier], workers=1) as runner:
            assert runner.names == ["chain_sum"]
            assert [r.value for r in runner.score(samples)] == [1.0] * len(samples)

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("game_of_life_halting", {}, "is refused: its verifier compares bool.*junk scores 1.0"),
            ("composite", {}, "is refused: it only mixes other data sets"),
            ("chain_sums", {}, r"no data set 'chain_sums'; did you mean one of \['chain_sum'"),
            ("zzzzzz", {}, r"reasoning_gym_names\(\) lists all"),
            ("chain_sum", {"config": {"terms": 2}}, r"has no \['terms'\]; its fields are \['min_terms'"),
            ("chain_sum", {"config": {"min_terms": 5, "max_terms": 2}}, "refuses the config .* of 'chain_sum'"),
            ("chain_sum", {"config": SUMS, "num_test": 40}, "no training item is left"),
        ],
    )
    def test_wrong_tasks_are_refused_with_a_reason(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            reasoning_gym_task(name, size=20, **options)

    @pytest.mark.parametrize("name", ["list_functions", "ransom_note"])
    def test_items_depend_on_the_arguments_alone(self, name, monkeypatch):
        """One of these draws from the global generator, the other orders by hash."""
        ids = []
        for hash_seed in ("1", "2"):
            monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
            ids.append([e.id for e in reasoning_gym_task(name, size=30, seed=11).train])
        assert ids[0] == ids[1]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", reasoning_gym_names())
    def test_every_data_set_makes_the_same_items_again_and_scores_them(self, name, pool):
        first, again = pool.run([Job(0, (name, {"size": 5, "seed": 1}), 300.0)] * 2)
        assert first.kind == again.kind == DONE
        assert repr(first.value) == repr(again.value)
        (scored,) = pool.run([Job(1, (name, first.value), 300.0)])
        assert scored == (DONE, [])


@pytest.fixture(scope="module")
def tasks_with_holes():
    """The tasks of `HOLES`, made by one worker, which imports reasoning-gym once. All are made in one order, whichever
    tests are selected, since its generators go on from call to call. Other tests have a worker for each call."""
    with WorkerPool([_items], 1) as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr("rljax.tasks.reasoning_gym.WorkerPool", lambda functions, workers: contextlib.nullcontext(made))
        return {name: reasoning_gym_task(name, size=4, seed=2) for name in HOLES}


@pytest.fixture(scope="module")
def pool():
    with WorkerPool([_items, wrong_scores], 1) as made:
        yield made


def wrong_scores(arguments):
    """(item, answer, score) where a right answer does not score 1, or junk does not score 0."""
    name, items = arguments
    verifier = ReasoningGymVerifier(name)
    junk = ["zzz", "", "0", "nan", "inf", "-1", "[]", "{}", "None", "()", "<answer>", "1e9", "\u221e", "x" * 5000]
    wrong = []
    for i, item in enumerate(items):
        right = item["answer"]
        scores = {text: (verifier(text, **item), 0.0) for text in junk if text.strip("0.") != str(right).strip("0.")}
        if right is not None and "Integral(" not in right:  # sympy left some integrals as they were
            scores[right] = (verifier(right, **item), 1.0)
        wrong += [(i, text[:50], score) for text, (score, expected) in scores.items() if score != expected]
    return wrong


def test_without_the_packages_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    for call in (lambda: reasoning_gym_task("chain_sum", size=1), MathVerify):
        with pytest.raises(ImportError, match=r"pip install 'rljax-lm\[tasks\]'"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RegexMatch(pattern="("), "is no regular expression"),
        (lambda: NumberMatch(tolerance=-1.0), "tolerance -1.0"),
        (lambda: MathVerify(timeout_s=0), "timeout_s 0"),
        (lambda: LengthReward(max_tokens=3, min_tokens=4), "0 <= min_tokens <= max_tokens"),
        (lambda: reasoning_gym_task("chain_sum", size=0), "size 0"),
    ],
)
def test_wrong_use_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_jax_stays_out_even_when_tasks_are_used():
    code = (
        "import sys\nfrom rljax.tasks import *\nfrom rljax.text import *\n"
        "task = reasoning_gym_task('chain_sum', size=3)\ntask.verifier('1', **task.train[0].columns)\n"
        "MathVerify().warm_up()\nByteTokenizer().encode('a')\nprint('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_deciding_reward_says_what_the_answer_is():
    """In a form in which equal numbers are equal; the first reward decides unless another is named."""
    runner = RewardRunner([NumberMatch(), ExactMatch(ignore_case=True, extract=InTag())])
    result = runner.score([RewardInput("p", "so 17.0", [1], {"answer": "5"})])[0]
    assert runner.answer("so 17.0", result) == runner.answer("it is 34/2, 17", result) == "17"
    assert runner.answer("no number", result) is None and result.decided_by == "number_match"
    runner.decided_by = "exact_match"
    assert runner.answer("<answer> Yes </answer>", result) == "yes"
    assert runner.answer("yes", result) is None


def test_without_an_extractor_or_a_valid_score_there_is_no_answer():
    assert not RewardRunner([RewardSpec(RegexMatch(pattern="."), in_process=True)]).finds_answers
    wrapped = RewardRunner([UnlessDegenerate(verify=NumberMatch())])
    assert wrapped.answer("17", RewardResult(0.0, {})) == "17"
    assert wrapped.answer("17", RewardResult(0.0, {}, is_valid=False)) is None
