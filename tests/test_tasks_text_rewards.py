"""Rewards on text: the sheets' worked examples, their traps, and how they run beside others."""

import pytest

from rljax.tasks import (
    ExactMatch,
    GroundedAnswer,
    InTag,
    LabelWithReasoning,
    RedundantQueries,
    RepetitionPenalty,
    RewardInput,
    RewardRunner,
    RewardSpec,
    ToolQueries,
    UnlessDegenerate,
    batch_reward,
    foreign_share,
    most_frequent_window,
    query_redundancy,
    repeated_share,
    states_facts,
)


def call(query, name="search"):
    return f'<tool_call>{{"name": "{name}", "arguments": {{"query": {query}}}}}</tool_call>'


@pytest.mark.parametrize(
    ("queries", "redundancy"),
    [
        (["nobel physics 1954 winner", "nobel physics 1954 laureate", "quantum mechanics born biography"], 0.2),
        (["same query"] * 4, 1.0),
        (["only one"], 0.0),
        ([], 0.0),
        (["the of", "in the"], 0.0),  # nothing but stop words
        (["The Nobel prize", "nobel PRIZE?"], 1.0),
    ],
)
def test_redundancy_is_the_mean_similarity_of_two_queries(queries, redundancy):
    assert query_redundancy(queries) == pytest.approx(redundancy)


def test_redundancy_penalty_with_its_published_weight():
    searches = [
        call('["nobel physics 1954 winner", "nobel physics 1954 laureate"]'),
        call('"quantum mechanics born biography"'),
        call('"nobel physics 1954 winner"', name="open"),
        "<tool_call>{broken</tool_call>",
        '<tool_call>["search"]</tool_call>',
        '<tool_call>{"name": "search", "arguments": {"query": 7}}</tool_call>',
        '<tool_call>{"name": "search", "arguments": "text"}</tool_call>',
    ]
    right = RewardInput("q", " and ".join(searches) + "<answer>Born</answer>", columns={"answer": "Born"})
    wrong = RewardInput("q", call('"a b"') + call('"a b"') + "<answer>Bohr</answer>", columns={"answer": "Born"})
    specs = [RewardSpec(ExactMatch(extract=InTag("answer"))), RewardSpec(RedundantQueries(), weight=-0.1)]
    with RewardRunner(specs) as runner:
        results = runner.score([right, wrong])
    assert [r.value for r in results] == pytest.approx([0.98, -0.1])
    assert ToolQueries()(right.completion) == [
        "nobel physics 1954 winner",
        "nobel physics 1954 laureate",
        "quantum mechanics born biography",
    ]


def test_repeated_share_meets_the_worked_examples():
    assert RepetitionPenalty(ngram=2)(completion="a b a b a b") == pytest.approx(-1.2)
    assert RepetitionPenalty(ngram=3)(completion="x y z " * 3) == pytest.approx(-1.142857, abs=1e-6)
    assert repeated_share([1, 2, 3] * 3, ngram=3) == pytest.approx(1 - 3 / 7)
    assert RepetitionPenalty()(completion="too short for twenty words") == 0
    assert RepetitionPenalty()(completion=" ".join(map(str, range(20)))) == 0
    assert repeated_share([], ngram=1) == 0
    with pytest.raises(ValueError, match="ngram=0 must be at least 1"):
        RepetitionPenalty(ngram=0)


def test_most_frequent_window_meets_the_worked_examples():
    assert most_frequent_window("abcdabcdabcd", window=4) == 3
    assert most_frequent_window("abcdefghabcd", window=4) == 2
    assert most_frequent_window([1, 2, 3, 1, 2, 3], window=3) == 2
    assert most_frequent_window("abc", window=4) == 0


def test_foreign_share_counts_letters_of_other_scripts_and_no_formulas():
    assert foreign_share("x² + αβ ≤ \u211d, \U0001d465 → 3 · 10⁵ 🙂\n", "Solve it.") == 0
    assert foreign_share("да нет", "Solve it.") == 5 / 6
    assert foreign_share("да нет", "Реши это.") == 0
    assert foreign_share("好abc", "Solve") == 1 / 4
    assert foreign_share("a\ufffd\x00b", "Solve") == 2 / 4
    assert foreign_share("", "Solve") == 0


def right(completion, answer):
    return float(answer in completion)


@pytest.mark.parametrize(
    ("completion", "token_ids", "reward"),
    [
        ("it is 4", [1, 2, 3], 1.0),
        ("it is 5", [1, 2, 3], 0.0),
        ("it is 4", [1] * 3 + list(range(7)), -1.0),  # overlong, no stop
        ("it is 4", [*range(9), 99], 1.0),  # as long, but ended
        ("it is 4 " * 5, [1, 2, 3], -1.0),  # a stretch of 8 characters, five times
        ("it is 4", [5, 6, 5, 6, 5, 6, 5], -1.0),  # tokens repeat, text does not
        ("it is 4 " + "да" * 4, [1, 2, 3], -1.0),
    ],
)
def test_degenerate_text_costs_the_reward_whatever_the_answer(completion, token_ids, reward):
    made = UnlessDegenerate(verify=right, max_tokens=10, stop_ids=(99,), window=8, ngram=2, repeats=3)
    assert made(prompt="2 + 2?", completion=completion, token_ids=token_ids, answer="4", unused=1) == reward


def test_rules_of_degenerate_text_can_be_switched_off_and_are_mild_by_default():
    off = UnlessDegenerate(verify=right, window=None, ngram=None, foreign=None)
    assert off(prompt="", completion="4 " * 500, token_ids=[7] * 500, answer="4") == 1
    algebra = "".join(f"x_{i} + y_{i} = {i * i}, so x_{i} = {i * i} - y_{i}.\n" for i in range(60))
    mild = UnlessDegenerate(verify=right)
    assert (
        mild(prompt=[{"role": "user", "content": "Solve."}], completion=algebra, token_ids=[1, 2] * 9, answer="4") == 1
    )
    assert mild(prompt="", completion="so, " * 100, token_ids=[], answer="so") == -1


def test_a_wrapped_reward_runs_where_its_inner_one_may_and_names_the_columns_it_wants():
    wrapped = UnlessDegenerate(verify=ExactMatch(column="solution"))
    assert wrapped.is_cheap and not UnlessDegenerate(verify=right).is_cheap
    assert UnlessDegenerate(verify=right).required_columns == ("answer",)
    with RewardRunner([wrapped]) as runner:
        with pytest.raises(ValueError, match="solution"):
            runner.check_columns({"answer"})
        (result,) = runner.score([RewardInput("q", " 4 ", token_ids=(1,), columns={"solution": "4", "answer": "5"})])
    assert result.value == 1

    @batch_reward
    def batch(completions):
        return completions

    with pytest.raises(ValueError, match=r"UnlessDegenerate.verify is a batch reward"):
        UnlessDegenerate(verify=batch)
    with pytest.raises(ValueError, match="repeats=0"):
        UnlessDegenerate(verify=right, repeats=0)


FACTS = ["angle A is 30 degrees", "AB = 4", "the circle touches BC", "O is the centre"]
GOOD = r"<think>Angle A is 30  degrees. The circle touches BC and O is the centre.</think><answer>\boxed{4}</answer>"


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (GOOD, r"\boxed{4}", 1.525),
        (GOOD, "5", 0.625),
        (GOOD.replace("</think>", " a b a b a b</think>"), r"\boxed{4}", None),
        ("no facts, no format", r"\boxed{4}", 0.0),
    ],
)
def test_grounded_answer_meets_the_worked_examples(completion, answer, reward):
    made = GroundedAnswer(verify=right, ngram=2 if reward is None else 20)
    got = made(prompt="q", completion=completion, token_ids=[], answer=answer, facts=FACTS)
    if reward is None:
        words = completion.split()
        reward = 1.525 - 2 * repeated_share(words, ngram=2)
        assert repeated_share(words, ngram=2) > 0
    assert got == pytest.approx(reward, abs=1e-6)


def test_grounded_answer_with_a_repetition_of_the_sheet():
    looped = GroundedAnswer(
        verify=lambda completion: 1.0, stated=lambda text, facts: [1, 0, 1, 1], pattern=".*", ngram=2
    )
    value = looped(prompt="q", completion="a b a b a b", token_ids=[], facts=FACTS)
    assert value == pytest.approx(1.525 - 1.2, abs=1e-6)


def test_facts_are_optional_in_number_but_not_in_kind():
    made = GroundedAnswer(verify=right, stated=lambda text, facts: 1 / 0)
    assert made(prompt="q", completion="4", token_ids=[], answer="4", facts=[]) == 0.9
    with pytest.raises(ValueError, match="'facts' holds 'one'; it must be a list of texts"):
        made(prompt="q", completion="4", token_ids=[], answer="4", facts="one")
    assert made.required_columns == ("answer", "facts")
    assert not made.is_cheap
    assert GroundedAnswer(verify=ExactMatch()).is_cheap
    assert states_facts("It IS so. ", ["it is so.", "", "other"]) == [1, 0, 0]


def label(completion, count, **options):
    made = LabelWithReasoning(**options)
    return made(completion=completion, token_ids=[0] * count, answer="not-entailed", reference_tokens=200)


def test_label_with_reasoning_meets_the_worked_examples_and_closes_the_parsers_traps():
    good = "Some reasoning.\nAnswer: Not entailed.\n"
    assert label(good, 150) == 3.75
    assert label(good, 400) == 4
    assert label("Some reasoning.\nanswer: entailed", 150) == 1.75
    assert label("no answer line", 100) == 0
    assert label("no answer line", 100, pay_unformatted=True) == 0.5  # as released: padding pays
    assert label("answer: not-entailed", 100) == 0  # no reasoning before it
    assert label("text\nanswer: ", 100) == 0
    assert label("text\nmy answer: not-entailed", 100) == 0
    with pytest.raises(ValueError, match="'reference_tokens' holds 0; it must be a positive number"):
        LabelWithReasoning()(completion=good, token_ids=[], answer="x", reference_tokens=0)
