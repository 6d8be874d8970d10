"""Memory: formulas with worked numbers, rankings, tools, what is paid for, questions that need what they say."""

import itertools
import json
import math
import re

import numpy as np
import pytest

pytest.importorskip("bm25s", reason="needs the extra agents")

from rljax.envs import replay_same
from rljax.envs.library import Conversation, Memory, MemoryEnvironment, Outcome, Reading, at_granularity, multi_granular
from rljax.envs.library import evidence_reward as reward
from rljax.envs.library import retrieval as R
from rljax.envs.library.corpus import Corpus, Document
from rljax.envs.library.histories import KINDS, SPLITS, rows
from rljax.envs.library.memory import COUNTS, answer_reward
from rljax.envs.library.memory_store import FIRST_LINKED, GRANULARITIES

ROWS = rows(20, num_conversations=8, seed=2)


# Formulas.


def test_a_router_weighs_rankings_by_how_sure_they_are():
    scores = [np.array([0.9, 0.5, 0.4, 0.4]), np.array([0.62, 0.60, 0.58, 0.60])]
    nats = [R.entropy(s, temperature=0.1) for s in scores]
    assert nats == pytest.approx([0.167605, 1.376344], abs=5e-7)
    released = R.router_weights([R.released_certainty(h, 4) for h in nats])
    assert released == pytest.approx([1.8252, -0.8252], abs=5e-5)
    relative = R.router_weights([R.relative_certainty(h, 4) for h in nats])
    assert relative == pytest.approx([0.9919, 0.0081], abs=5e-5)


def test_the_released_router_prefers_the_less_sure_one_above_one_nat_and_ours_does_not():
    unsure = (3.2, 3.6)
    released = R.router_weights([R.released_certainty(h, 50) for h in unsure])
    assert released == pytest.approx([0.4583, 0.5417], abs=5e-5)
    relative = R.router_weights([R.relative_certainty(h, 50) for h in unsure])
    assert relative == pytest.approx([0.6953, 0.3047], abs=5e-5)
    mixed = R.router_weights([R.released_certainty(h, 50) for h in (0.6, 1.3)])
    assert mixed == pytest.approx([4.0, -3.0])
    assert R.router_weights([0.0, 0.0]) == pytest.approx([0.5, 0.5])
    assert R.relative_certainty(0.0, 1) == 1.0


def test_a_walk_that_starts_again_is_that_of_the_worked_path():
    path = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], float)
    start = np.array([2.0, 0.0, 0.0])
    assert R.pagerank(path, start, damping=0.1) == pytest.approx([0.904545, 0.090909, 0.004545], abs=5e-7)
    assert R.pagerank(path, start, damping=0.85) == pytest.approx([0.345270, 0.459459, 0.195270], abs=5e-7)


def test_a_walk_starts_again_where_no_link_leads_on_and_its_places_sum_to_one():
    rng = np.random.default_rng(0)
    links = rng.random((6, 6)) * (rng.random((6, 6)) < 0.4)
    links[2] = 0.0
    start = rng.random(6)
    found = R.pagerank(links, start, damping=0.6)

    # Against the solution of the linear system.
    begin = start / start.sum()
    walk = np.array([row / row.sum() if row.sum() else begin for row in links])
    want = np.linalg.solve(np.eye(6) - 0.6 * walk.T, 0.4 * begin)
    assert found == pytest.approx(want, abs=1e-11)
    assert found.sum() == pytest.approx(1.0)
    for damping, restart in ((1.0, start), (0.5, np.zeros(6))):
        with pytest.raises(ValueError, match=f"damping {damping} must be in"):
            R.pagerank(links, restart, damping=damping)


def test_the_upper_of_two_clusters_is_accepted():
    rng = np.random.default_rng(1)
    scores = np.concatenate([rng.normal(0.2, 0.02, 20), rng.normal(0.8, 0.03, 5)])
    assert R.accepted(scores).tolist() == [False] * 20 + [True] * 5
    order = rng.permutation(25)
    assert R.accepted(7.0 * scores[order] - 3.0).tolist() == (order >= 20).tolist()
    assert R.accepted(np.array([0.3, 0.3, 0.3])).tolist() == [True, False, False]
    assert R.accepted(np.array([0.1, 0.4])).tolist() == [False, True]
    assert R.accepted(np.zeros(0)).tolist() == []


def test_ranks_count_as_in_the_worked_ranking():
    ranking = ["d2", "d7", "d5"]
    gold = {"d2", "d5"}
    assert R.recall_any(ranking, gold, 1) == 1.0
    assert R.recall_all(ranking, gold, 1) == 0.0
    assert R.recall_all(ranking, gold, 3) == 1.0
    assert R.ndcg((1, 0, 1), 3) == pytest.approx(0.9197, abs=5e-5)
    assert R.ndcg((0, 1), 2) == pytest.approx(0.6309, abs=5e-5)
    assert R.ndcg((0, 0), 2) == 0.0


def test_labels_of_evidence_and_their_distance_from_a_prediction():
    labels = R.evidence_labels(np.array([0.8, 0.6, 0.1]))
    assert labels == pytest.approx([0.431906, 0.353615, 0.214478], abs=5e-7)
    loss = R.alignment_loss(labels, np.full(3, 1 / 3))
    assert loss == pytest.approx(0.012736, abs=5e-7)
    assert 3 * loss == pytest.approx(0.038208, abs=5e-7)
    assert R.evidence_recall({"a", "c"}, dict(zip("abc", labels))) == pytest.approx(0.431906 + 0.214478, abs=1e-6)
    assert R.evidence_recall({"a"}, {}) == 0.0


def test_a_graph_is_cut_to_the_best_nodes_and_what_they_are_linked_with():
    links = np.zeros((6, 6), bool)
    for a, b in ((0, 1), (1, 2), (3, 4)):
        links[a, b] = links[b, a] = True
    seeds, kept = R.pruned(np.array([0.1, 0.9, 0.0, 0.9, 0.2, 0.0]), links, 2)
    assert seeds.tolist() == [1, 3] and kept.tolist() == [0, 1, 2, 3, 4]
    seeds, kept = R.pruned(np.zeros(6), links, 2)
    assert seeds.tolist() == [] and kept.tolist() == []


def test_of_several_answers_the_one_that_others_agree_with_is_taken_and_the_shorter_of_equal_ones():
    answers = ["in oslo", "bergen", "oslo"]
    assert R.token_f1("oslo", "in oslo") == pytest.approx(2 / 3)
    assert R.token_f1("oslo", "bergen") == 0.0 and R.token_f1("", "") == 1.0
    assert R.most_consistent(answers, lambda text: True) == "oslo"
    assert R.most_consistent(answers, lambda text: text != "oslo") == "bergen"
    assert R.most_consistent(["a b", "b a", "c"], lambda text: True) == "a b"
    assert R.most_consistent(answers, lambda text: False) is None


def test_scores_are_bm25_without_the_customary_factor():
    bm25s = pytest.importorskip("bm25s")
    texts = ["ana moved to oslo in may", "ben likes oslo and the sea", "ana sold the red boat"]
    index = bm25s.BM25(method="lucene")
    index.index(bm25s.tokenize(texts, stopwords=None, show_progress=False), show_progress=False)
    assert index.get_scores(["ana", "oslo"]) == pytest.approx([0.3663065, 0.1831533, 0.1985109], abs=5e-8)

    # The corpus leaves stop words out, which changes lengths and nothing else.
    corpus = Corpus([Document(str(i), "", text) for i, text in enumerate(texts)])
    lengths = np.array([4, 4, 4])
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    one = idf / (1 + 1.5 * (0.25 + 0.75 * lengths / lengths.mean()))
    assert corpus.scores("Ana, Oslo?") == pytest.approx([2 * one[0], one[1], one[2]], rel=1e-6)
    assert corpus.scores("nobody").tolist() == [0.0, 0.0, 0.0]
    assert [hit.document.id for hit in corpus.search("ana oslo")] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("outcome", "worth"),
    [
        (Outcome(True, 1.0, 0.4), 0.92),
        (Outcome(True, 0.0, 1.0), 0.80),
        (Outcome(False, 0.5, 0.4), 0.03),
        (Outcome(False, 1.0, 1.0), 0.0),
    ],
)
def test_what_an_outcome_is_worth(outcome, worth):
    assert reward(outcome) == pytest.approx(worth)
    assert answer_reward(outcome) == outcome.is_right


def test_no_wrong_answer_earns_as_much_as_any_right_one():
    shares = np.linspace(0, 1, 6)
    by_truth = {
        right: [reward(Outcome(right, recall, cost)) for recall, cost in itertools.product(shares, shares)]
        for right in (True, False)
    }
    assert min(by_truth[True]) > max(by_truth[False])


# Rankings.


def talks():
    """Five talks of nothing, and three of which the last two are of one thing."""
    of_nothing = [Conversation(f"n{i}", "", (f"word{i} and thing{i}",), f"word{i}", f"thing{i}") for i in range(5)]
    boat = Conversation("boat", "", ("the red boat", "a storm"), "boat", "boat storm")
    sail = Conversation("sail", "", ("that boat again", "sails"), "boat sails", "boat sails", links=("boat",))
    tree = Conversation("tree", "", ("an old oak", "leaves"), "oak", "oak leaves")
    return Memory([*of_nothing, boat, tree, sail])


def test_a_ranking_by_a_granularity_is_the_mean_of_its_texts_by_the_best():
    memory = talks()
    scores = at_granularity("turn")(memory, "boat")
    assert scores.argmax() in (5, 7) and scores.max() == 1.0
    assert np.flatnonzero(scores).tolist() == [5, 7]
    assert not memory.similarities("zebra").any()
    with pytest.raises(ValueError, match="granularity 'page' is not one of conversation, turn, summary, keyword"):
        at_granularity("page")


def test_what_is_associated_comes_later_and_is_found_through_others():
    memory = talks()
    nodes = memory.associations
    assert (nodes == nodes.T).all() and nodes.any()
    count = len(memory.conversations)
    owners = {tuple(sorted((a % count, b % count))) for a, b in zip(*np.nonzero(nodes))}
    # The first ones are linked from later ones only.
    assert all(max(pair) >= FIRST_LINKED for pair in owners) and (5, 7) in owners

    # A query that no text of `sail` holds reaches it by what it is associated with.
    scores = multi_granular()(memory, "storm")
    assert scores.argmax() == 5 and scores[7] > scores[6]
    assert at_granularity("turn")(memory, "storm")[7] == 0.0
    assert not multi_granular()(memory, "zebra").any()


def test_the_released_router_is_a_function_that_can_take_the_place_of_ours():
    scores = multi_granular(certainty=R.released_certainty)(talks(), "boat")
    assert np.isfinite(scores).all() and scores.min() >= 0.0


def test_conversations_without_a_summary_are_found_by_the_others():
    memory = Memory([Conversation("a", "", ("the red boat",), "", ""), Conversation("b", "", ("an oak",), "", "")])
    assert memory.similarities("boat").tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert multi_granular()(memory, "boat").argmax() == 0


def test_a_memory_refuses_ids_twice_and_links_to_nowhere():
    one = Conversation("a", "", ("x",), "x", "x")
    for given in ([], [one, one], [Conversation("b", "", ("x",), "x", "x", links=("c",))]):
        with pytest.raises(ValueError, match="a memory needs at least one"):
            Memory(given)


# The environment.


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def play(row, *actions, **options):
    environment = MemoryEnvironment(**options)
    environment.reset(row)
    return [environment.step(action) for action in actions]


def total(steps):
    return {name: sum(step.counts[name] for step in steps) for name in COUNTS}


def of_kind(kind):
    return next(row for row in ROWS if row["kind"] == kind)


def test_evidence_counts_when_it_is_opened_and_not_when_it_is_listed():
    row = of_kind("two-hop")
    assert len(row["evidence"]) == 2
    first, second = row["evidence"]
    steps = play(
        row,
        call("search", query=row["prompt"]),
        call("open", id=first),
        call("open", id=f"[{second}]"),
        call("open", id=first),
        call("answer", candidates=f"perhaps | {row['answer']} | {row['answer'].upper()}"),
    )
    assert [step.counts["evidence_recall"] for step in steps] == [0.0, 0.5, 0.5, 0.0, 0.0]
    read = sum(len(step.observation.split()) for step in steps[:-1])
    counts = total(steps)
    assert counts["read_share"] == pytest.approx(read / Reading().budget)
    assert counts["is_right"] == counts["sufficient"] == counts["opens_after_enough"] == 1.0
    assert steps[-1].done and steps[-1].reward == pytest.approx(1 - 0.2 * read / Reading().budget)


def test_a_wrong_answer_earns_by_the_evidence_that_was_opened_and_an_old_one_is_counted():
    row = of_kind("temporal update")
    steps = play(row, call("open", id=row["evidence"][0]), row["stale"])
    read = len(steps[0].observation.split()) / Reading().budget
    assert steps[-1].done and steps[-1].reward == pytest.approx(0.1 * (1 - read))
    counts = total(steps)
    assert counts["stale_answer"] == 1.0 and counts["evidence_recall"] == 1.0 and counts["is_right"] == 0.0


def test_what_was_never_said_has_an_answer_and_no_evidence():
    row = of_kind("unanswerable")
    for answer, right in (("unknown", 1.0), ("Arlen", 0.0)):
        steps = play(row, call("answer", candidates=answer))
        assert steps[-1].reward == right
        counts = total(steps)
        assert (counts["is_right"], counts["false_answer"]) == (right, 1.0 - right)
        assert counts["evidence_recall"] == counts["sufficient"] == 0.0


def test_what_is_missing_is_looked_for_among_what_is_not_open_and_only_so_often():
    row = of_kind("single fact")
    looks = [call("missing", what=row["prompt"])] * 3
    opened = row["evidence"][0]
    steps = play(row, call("open", id=opened), *looks, reading={"missing_rounds": 2, "num_missing": 1})
    assert all(f"[{opened}]" not in step.observation for step in steps[1:3])
    assert len(steps[1].observation.splitlines()) == 1
    assert "looked for often enough" in steps[3].observation and steps[3].counts["tool_errors"] == 1.0


def test_a_graph_shows_what_the_best_ones_are_linked_with():
    row = of_kind("two-hop")
    environment = MemoryEnvironment(reading=Reading(num_seeds=1), ranking=at_granularity("turn"))
    environment.reset(row)
    shown = re.findall(r"^\[(\w+)\]", environment.step(call("graph", query=row["prompt"])).observation, re.MULTILINE)
    (best,) = re.findall(r"^\[(\w+)\]", environment.step(call("search", query=row["prompt"])).observation, re.M)[:1]
    linked = environment.step(call("neighbours", id=best)).observation
    assert set(shown) == {best, *re.findall(r"^\[(\w+)\]", linked, re.MULTILINE)}
    order = [c["id"] for c in row["conversations"]]
    assert shown == sorted(shown, key=order.index)


def test_what_goes_wrong_is_told_and_the_episode_goes_on():
    steps = play(
        ROWS[0],
        call("open", id="nowhere"),
        call("search", query="zebra"),
        call("search", query="zebra", granularity="page"),
        call("note", text="x"),
        call("answer", candidates="a far longer text than any answer to such a question has"),
        call("answer", candidates="unknown"),
    )
    said = [step.observation for step in steps]
    assert "there is no conversation 'nowhere'" in said[0] and said[1] == "Nothing fits."
    assert "is not one of conversation, turn" in said[2] and said[3] == "Noted."
    assert "no candidate has the form of an answer" in said[4]
    assert [step.done for step in steps] == [False] * 5 + [True]


def test_functions_are_given_by_name_and_weights_by_evidence():
    row = {**of_kind("two-hop"), "evidence": dict(zip(of_kind("two-hop")["evidence"], (3.0, 1.0)))}
    first = next(iter(row["evidence"]))
    steps = play(
        row,
        call("open", id=first),
        call("answer", candidates=row["answer"]),
        reward="rljax.envs.library.memory:answer_reward",
        count_tokens="builtins:len",
    )
    assert steps[0].counts["evidence_recall"] == pytest.approx(0.75)
    assert steps[0].counts["read_share"] == pytest.approx(min(1.0, len(steps[0].observation) / Reading().budget))
    assert steps[1].reward == 1.0


def test_an_episode_repeats_itself():
    row = of_kind("aggregate")
    actions = [call("search", query=row["prompt"]), call("missing", what="pets"), call("answer", candidates="2")]
    environment = MemoryEnvironment()
    opening = environment.reset(row)
    steps = [environment.step(action) for action in actions]
    replay_same(MemoryEnvironment(), row, opening, actions, steps)
    replay_same(environment, row, opening, actions, steps)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"evidence": ["zz"]}, r"the row's evidence \['zz'\] is none of its conversations"),
        ({"conversations": [{"id": "a", "turns": ["x"]}]}, "a conversation of the row does not fit"),
    ],
)
def test_rows_that_do_not_fit_are_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        MemoryEnvironment().reset({**ROWS[0], **changes})


@pytest.mark.parametrize(
    ("reading", "problem"), [({"budget": 0}, "reading.budget is 0"), ({"hits": 3}, "reading .* does not fit")]
)
def test_a_reading_that_cannot_be_is_refused(reading, problem):
    with pytest.raises(ValueError, match=problem):
        MemoryEnvironment(reading=reading)


# Questions.


def facts(row, among):
    """(person, sentence) of what the conversations say, in their order, read by their wording alone."""
    lines = [line for c in row["conversations"] if among is None or c["id"] in among for line in c["turns"][1:]]
    return [tuple(line.split(": ", 1)) for line in lines]


BEGINS = {"town": "I moved to ", "job": "I work as a ", "dish": "What I like to eat most is ", "pet": "I got a "}


def answered(row, among=None):
    """The answer by what some of the conversations say, or all of them."""
    said = facts(row, among)
    person = row["asked"]["person"]
    if row["kind"] == "two-hop":
        friends = [
            text.removeprefix("My best friend is ")[:-1] for who, text in said if who == person and "friend" in text
        ]
        if not friends:
            return None
        person = friends[-1]
    begin = BEGINS[row["asked"]["attribute"]]
    values = [
        text.removeprefix(begin).split(".")[0].split(" now")[0] for who, text in said if who == person and begin in text
    ]
    if row["kind"] == "aggregate":
        return str(len(values))
    return values[-1] if values else None


def test_what_a_question_needs_is_enough_and_nothing_of_it_can_be_left_out():
    assert {row["kind"] for row in ROWS} == set(KINDS)
    for row in ROWS:
        if row["kind"] == "unanswerable":
            assert answered(row) is None and row["evidence"] == [] and row["answer"] == "unknown"
            continue
        assert answered(row) == answered(row, row["evidence"]) == row["answer"]
        for left in row["evidence"]:
            assert answered(row, {*row["evidence"]} - {left}) != row["answer"]
        if row["kind"] == "temporal update":
            everything = {c["id"] for c in row["conversations"]}
            assert answered(row, everything - set(row["evidence"])) == row["stale"] != row["answer"]


def test_questions_are_the_same_again_and_splits_share_none():
    assert rows(20, num_conversations=8, seed=2) == ROWS
    prompts = [{json.dumps(row["conversations"]) for row in rows(20, split=split)} for split in SPLITS]
    assert not any(a & b for a, b in itertools.combinations(prompts, 2))
    assert len(prompts[0]) == 20 and set(GRANULARITIES) == {"conversation", "turn", "summary", "keyword"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"size": 0}, "size 0 must be at least 1"),
        ({"size": 1, "split": "dev"}, "split 'dev' is not one of all, train, test"),
        ({"size": 1, "kinds": ["riddle"]}, "must be some of single fact"),
        ({"size": 1, "num_people": 1}, "num_people 1"),
        ({"size": 1, "num_people": 2, "num_conversations": 40}, "no history of 2 people fills 40 conversations"),
    ],
)
def test_questions_that_cannot_be_had_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        rows(**options)


def test_the_second_hop_shares_no_word_with_the_question():
    row = of_kind("two-hop")
    begin = BEGINS[row["asked"]["attribute"]]
    said = next(text for _, text in facts(row, row["evidence"]) if text.startswith(begin))
    # Words of three letters and more: shorter ones say nothing.
    words = [set(re.findall(r"\w{3,}", text.lower())) for text in (said, row["prompt"])]
    assert not words[0] & words[1]
