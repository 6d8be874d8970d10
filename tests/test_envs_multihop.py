"""Multi-hop questions: the walk, one answer each, search that is needed, the episode's rules."""

import json
import os
import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("bm25s", reason="needs the extra agents")

from rljax.envs import EnvironmentLimits, EnvironmentPool
from rljax.envs.formats import load
from rljax.envs.library import MultiHop
from rljax.envs.library.knowledge import MIN_PAGES, RELATIONS, TRAITS, YEARS, documents, knowledge_graph, walk
from rljax.envs.library.multihop import made_up_world, normalised, rows
from rljax.envs.library.questions import answers, ask

ROWS = rows(60, num_pages=240)


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


# A reader of questions and pages that knows the wording and nothing of the graph.


def clauses(kind, text):
    """Tests that a page's text must pass."""
    found = []
    for clause in re.split(r" and (?!\d)", text):
        if years := re.fullmatch(rf"{YEARS[kind][1]} between (\d+) and (\d+)", clause):
            label, first, last = YEARS[kind][0], *map(int, years.groups())
            found.append((None, lambda page, label=label, a=first, b=last: a <= int(value(page, label)) <= b))
            continue
        for _, label, phrase in TRAITS[kind]:
            if match := re.fullmatch(re.escape(phrase).replace(r"\{\}", "(.+)"), clause):
                wanted = match[1]
                found.append((wanted, lambda page, label=label, wanted=wanted: value(page, label) == wanted))
    assert found, text
    return found


def value(page, label):
    match = re.search(rf"\. {label}: ([^.]*)\.", page, re.IGNORECASE)
    return match[1] if match else ""


def kind_of(page):
    return re.search(r" is an? (\w+)\.", page)[1]


def parse(question):
    """The first page's kind and clauses, and for each hop its relation's wording and clauses as text."""
    *parts, _ = re.split(r"(?<=\.) (?=\(\d\) is|What)", question)
    first = re.fullmatch(r"\(1\) is the (\w+) that (.+)\.", parts[0])
    hops = [re.fullmatch(rf"\({i + 2}\) is (.+)\.", part)[1] for i, part in enumerate(parts[1:])]
    return first[1], first[2], hops


def hop_of(kind, text, number):
    """The page's label for a hop, and the clauses on where it leads."""
    for (own, _), (label, phrase) in RELATIONS.items():
        hop = phrase.format(f"({number})")
        if own == kind and (text == hop or text.startswith(f"{hop} that ")):
            return label, text[len(hop) + len(" that ") :]
    raise AssertionError(text)


def fits(page, text):
    return not text or all(test(page) for _, test in clauses(kind_of(page), text))


def readable_answers(question, pages, skip_first=False):
    """Every title that the question allows, from the pages' texts alone."""
    kind, described, hops = parse(question)
    found = {t for t, page in pages.items() if kind_of(page) == kind and (skip_first or fits(page, described))}
    for number, text in enumerate(hops, start=1):
        reached = set()
        for title in found:
            label, condition = hop_of(kind_of(pages[title]), text, number)
            reached |= {t for t in value(pages[title], label).split("; ") if t and fits(pages[t], condition)}
        found = reached
    return found


def solve(question):
    """Searches hop by hop: a generator of actions that is sent observations."""
    kind, described, hops = parse(question)
    words = [wanted for wanted, _ in clauses(kind, described) if wanted]
    results = yield call("search", query=f"{kind} {' '.join(words)}")
    frontier = []
    for number in range(1, results.count("\n\n") + 2):
        page = yield call("open", page=number)
        if kind_of(page) == kind and fits(page, described):
            frontier.append(page)
    for number, text in enumerate(hops, start=1):
        reached = {}
        for page in frontier:
            label, condition = hop_of(kind_of(page), text, number)
            for title in value(page, label).split("; "):
                if title and title not in reached:
                    yield call("search", query=title)
                    other = yield call("open", page=title)
                    if fits(other, condition):
                        reached[title] = other
        frontier = list(reached.values())
    yield call("finish", answer=frontier[0].split("\n")[0])


def play(environment, row, policy):
    """Reward of an episode, and its steps."""
    environment.reset(row)
    steps, action = [], next(policy)
    while True:
        steps.append(environment.step(action))
        if steps[-1].done:
            return sum(step.reward for step in steps), steps
        action = policy.send(steps[-1].observation)


# The walk


def test_the_walk_of_the_sheet():
    graph = {"A": "BCD", "B": "AC", "C": "ABD", "D": "C", "E": ""}

    def go(length):
        return walk(
            graph,
            "A",
            length,
            min_degree=2,
            max_degree=3,
            num_candidates=9,
            choose=lambda _, candidates: min(candidates),
            rng=random.Random(0),
        )

    assert go(2) == ["A", "B", "C"]
    assert go(3) is None


def test_walks_pass_no_hub_and_no_leaf_and_no_page_twice():
    graph = knowledge_graph(240)
    by_title = {page.title: page for page in graph.values()}
    assert max(len(page.neighbours) for page in graph.values() if page.kind == "region") > 8
    for row in ROWS:
        path = [by_title[title] for title in row["path"]]
        assert row["hops"] == len(path) - 1 in (2, 3, 4)
        assert all(4 <= len(page.neighbours) <= 8 for page in path)
        assert all(b.id in a.neighbours for a, b in pairwise(path))
        assert len(set(row["path"])) == len(path)


# The questions


def test_every_question_has_one_answer_and_needs_its_first_page():
    pages = {d.title: d.text for d in documents(knowledge_graph(240))}
    for row in ROWS:
        assert readable_answers(row["question"], pages) == {row["answer"]}
        assert len(readable_answers(row["question"], pages, skip_first=True)) > 1


def test_the_constraints_of_a_question_hold_for_one_page_only():
    graph = knowledge_graph(240)
    links = {id_: page.neighbours for id_, page in graph.items()}
    rng, asked, later = random.Random(0), 0, 0
    for start in sorted(graph):
        path = walk(
            links, start, 3, min_degree=4, max_degree=8, num_candidates=5, choose=lambda _, c: rng.choice(c), rng=rng
        )
        question = ask(graph, path, rng) if path else None
        if question is None:
            continue
        asked, later = asked + 1, later + any(question.clues[1:])
        assert answers(graph, question.relations, question.clues) == {path[-1]}
        for i, own in enumerate(question.clues):  # every page of the walk fits
            assert all(clue.holds(graph[path[i]]) for clue in own)
            blurred = [clue for clue in own if clue.attribute == "year"]
            assert all(clue.last - clue.first == 11 and clue.first <= graph[path[i]].year for clue in blurred)
            assert not blurred or str(blurred[0].first) in question.text
        bare = [question.clues[0][:1], *question.clues[1:]]
        assert len(answers(graph, question.relations, bare)) > 1
    assert asked > 100 and later > 3  # where a relation leads to several pages, clues choose


def test_no_title_stands_in_a_question():
    titles = [page.title.lower() for page in knowledge_graph(240).values() if page.kind != "year"]
    assert len({normalised(title) for title in titles}) == len(titles) == 240
    for row in ROWS:
        assert not [title for title in titles if title in row["question"].lower()]


def test_the_question_itself_finds_no_page_with_the_answer():
    corpus = made_up_world(240, 0).corpus
    for row in ROWS:
        assert not any(
            row["answer"] in hit.document.title + hit.document.text for hit in corpus.search(row["question"])
        )


def test_searching_hop_by_hop_solves_what_cannot_be_guessed():
    environment = MultiHop(top_k=5)
    titles = [page.title for page in knowledge_graph(240).values() if page.kind != "year"]
    rng = random.Random(0)
    solved, guessed = 0.0, 0.0
    for row in ROWS:
        reward, steps = play(environment, row, solve(row["question"]))
        solved += reward
        assert sum(step.counts["tool_errors"] for step in steps) == 0
        guessed += play(environment, row, iter([call("finish", answer=rng.choice(titles))]))[0]
    assert solved == len(ROWS)
    assert guessed <= 2  # 60 guesses among 240 titles


def test_the_recorded_actions_lead_to_the_answer():
    environment = MultiHop()
    for row in ROWS[:10]:
        environment.reset(row)
        assert not any(row["answer"] in str(action) for action in row["actions"])
        steps = [environment.step(call(action["name"], **action["arguments"])) for action in row["actions"]]
        assert not any(step.done or step.counts["tool_errors"] for step in steps)
        assert row["answer"] in steps[-1].observation


def test_splits_share_neither_questions_nor_answers():
    train = rows(40, split="train", seed=1)
    test = [row for seed in (1, 2) for row in rows(10, split="test", seed=seed)]
    for column in ("question", "answer"):
        assert not {row[column] for row in train} & {row[column] for row in test}
    assert len({row["question"] for row in train}) == 40
    assert len({row["answer"] for row in ROWS}) == len(ROWS)


def test_rows_are_the_same_in_another_process():
    code = "import json; from rljax.envs.library.multihop import rows; print(json.dumps(rows(60)))"
    env = {**os.environ, "PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert json.loads(done.stdout) == ROWS
    assert rows(60, seed=1) != ROWS


# The episode


@pytest.mark.parametrize(
    ("action", "violation"),
    [
        ("I think it is Paris.", "missing_tool_call"),
        ("<tool_call>{not json}</tool_call>", "malformed_tool_call"),
        ('<tool_call>{"name": "search", "arguments": {"query": "a"}}', "malformed_tool_call"),
        ('<tool_call>{"name": "search", "arguments": [1]}</tool_call>', "malformed_tool_call"),
        (call("browse", query="bells"), "invalid_tool_call"),
        (call("search"), "invalid_tool_call"),
        (call("search", query=3), "invalid_tool_call"),
        (call("open", page=1), "invalid_tool_call"),
    ],
)
def test_the_first_invalid_turn_ends_the_episode(action, violation):
    row = ROWS[0]
    environment = MultiHop()
    environment.reset(row)
    step = environment.step(action)
    assert (step.done, step.reward, step.counts[violation]) == (True, 0.0, 1.0)
    assert step.observation
    environment.reset(row)
    both = environment.step(action + call("finish", answer=row["answer"]))
    assert both.done and both.reward == (1.0 if violation == "missing_tool_call" else 0.0)

    lenient = MultiHop(early_exit=False)
    lenient.reset(row)
    step = lenient.step(action)
    assert (step.done, step.reward, step.counts[violation]) == (False, 0.0, 1.0)
    assert lenient.step(call("finish", answer=row["answer"])).reward == 1.0


def test_pages_that_are_not_there_are_no_violation():
    environment = MultiHop(top_k=2)
    environment.reset(ROWS[0])
    assert "no page with the title 'Atlantis'" in environment.step(call("open", page="Atlantis")).observation
    assert environment.step(call("search", query="xyzzy")).observation.startswith("No page matches")
    assert "no result 1" in environment.step(call("open", page="1")).observation
    shown = environment.step(call("search", query="person painter")).observation
    assert shown.startswith("[1] ") and shown.count("\n\n[") == 1
    title = shown.split("\n")[0].removeprefix("[1] ")
    by_number, by_title = (environment.step(call("open", page=p)).observation for p in ("[1]", title.upper()))
    assert by_number == by_title and by_number.startswith(f"{title}\n")
    year = ROWS[0] and next(p.title for p in knowledge_graph(240).values() if p.kind == "year")
    assert environment.step(call("open", page=int(year))).observation.startswith(f"{year}\n")


def test_answers_are_compared_without_case_punctuation_and_articles():
    assert normalised("  The Song, of  a Dell! ") == "song of dell"
    assert normalised("Theatre") == "theatre"
    row = {**ROWS[0], "answer": ["Song of Dell", "Dell's Song"]}
    environment = MultiHop()
    for text, reward in (("the song of dell.", 1.0), ("DELLS SONG", 1.0), ("Song of Dell and more", 0.0)):
        environment.reset(row)
        assert environment.step(call("finish", answer=text)).reward == reward


@pytest.mark.parametrize(("answer", "reward"), [("right", 0.98), ("wrong", -0.02)])
def test_redundant_queries_are_taxed(answer, reward):
    queries = ["nobel physics 1954 winner", "nobel physics 1954 laureate", "quantum mechanics born biography"]
    row = {**ROWS[0], "answer": "right"}
    actions = [*(call("search", query=query) for query in queries), call("finish", answer=answer)]
    total, steps = play(MultiHop(redundancy_weight=0.1), row, replies(actions))
    assert sum(step.counts["redundancy"] for step in steps) == pytest.approx(0.2)
    assert total == pytest.approx(reward)
    assert play(MultiHop(), row, replies(actions))[0] == float(answer == "right")


def replies(actions):
    for action in actions:
        _ = yield action


def test_an_episode_that_repeats_itself_and_never_answers_pays_the_whole_tax():
    with EnvironmentPool(lambda: MultiHop(redundancy_weight=0.1), workers=1, limits=EnvironmentLimits(turns=3)) as pool:
        episode = pool.start(ROWS[0]).result()
        for _ in range(3):
            pool.step(episode, call("search", query="copper bells")).result()
    assert episode.end == "turns"
    assert episode.counts["redundancy"] == pytest.approx(1.0)
    assert episode.reward == pytest.approx(-0.1)


def test_pages_with_forbidden_texts_are_neither_found_nor_opened(tmp_path):
    question = "Which bridge is old?"
    pages = [
        {"title": "Quiz", "text": f"{question.upper()}  Answer: the stone bridge, bridge, bridge."},
        {"title": "Stone", "text": "The stone bridge is from 1901, and so old that few know it."},
        {"title": "Tower", "text": "A tower at a bridge."},
    ]
    path = tmp_path / "pages.jsonl"
    path.write_text("".join(json.dumps(page) + "\n" for page in pages))
    row = {"prompt": question, "answer": "Stone", "forbidden": [question]}
    environment = MultiHop(documents=str(path), top_k=2, snippet_chars=20)
    assert environment.reset(row).endswith(question)
    found = environment.step(call("search", query="old bridge")).observation
    assert found == "[1] Stone\nThe stone bridge is ...\n\n[2] Tower\nA tower at a bridge."
    assert environment.step(call("open", page="Quiz")).observation == "There is no page with the title 'Quiz'."
    environment.reset({**row, "forbidden": question})
    assert environment.step(call("search", query="old bridge")).observation == found
    environment.reset({**row, "forbidden": []})
    assert "Quiz" in environment.step(call("search", query="old bridge")).observation


def test_episodes_run_in_a_pool_and_fork_by_replay():
    make = load("rljax.envs.library.multihop:MultiHop")
    args = json.loads(json.dumps({"tool_format": "tags", "top_k": 5, "redundancy_weight": 0.0}))
    row = json.loads(json.dumps(ROWS[1]))
    with EnvironmentPool(lambda: make(**args), workers=4) as pool:
        first = pool.start(row).result()
        assert first.opening.endswith(row["question"]) and "<open>page</open>" in first.opening
        pool.step(first, "<search>person painter</search>").result()
        pool.step(first, "<open>2</open>").result()
        second = pool.fork(first, 1).result()
        pool.step(second, "<open>2</open>").result()
        assert second.steps == first.steps
        for episode, answer, reward in ((first, row["answer"], 1.0), (second, "nobody", 0.0)):
            pool.step(episode, f"<finish>{answer}</finish>").result()
            assert (episode.end, episode.reward) == ("done", reward)
        assert not any(pool.failures.values())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"size": 0}, "size 0"),
        ({"size": 5, "walks": {"min_hops": 3, "max_hops": 2}}, "min_hops 3"),
        ({"size": 5, "walks": {"hops": 3}}, "walks {'hops': 3} do not fit"),
        ({"size": 5, "split": "dev"}, "'dev' is not one of all, train, test"),
        ({"size": 5, "test_fraction": 1.5}, "test_fraction 1.5"),
        ({"size": 5, "num_pages": 10}, f"at least {MIN_PAGES}"),
        ({"size": 60, "num_pages": 40}, "of 60 questions were found"),
    ],
)
def test_rows_that_cannot_be_made_are_refused(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        rows(**arguments)


def test_what_the_environment_cannot_use_is_refused():
    with pytest.raises(ValueError, match="top_k 0"):
        MultiHop(top_k=0)
    with pytest.raises(ValueError, match="tool format 'xml'"):
        MultiHop(tool_format="xml")
    with pytest.raises(ValueError, match="world is None"):
        MultiHop().reset({"prompt": "Who?", "answer": "x"})


def test_the_example_of_the_docs_runs():
    page = (Path(__file__).parent.parent / "docs" / "environments.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "MultiHop(" in block]
    exec(block, {})
