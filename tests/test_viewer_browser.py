"""The page in a real browser: nothing in the console, a forest to be seen, keys, labels, and hostile text."""

import json
import threading

import pytest
from chromium import BINARY, chromium
from test_viewer_server import HOSTILE, put, record, write

from rljax.viewer import Answers, export, open_server

pytestmark = pytest.mark.skipif(BINARY is None, reason="Chromium is not installed (Debian: apt-get install chromium)")


def columns(texts, *, turn=0, sampled=None):
    n = len(texts)
    return {
        "text": texts,
        "turn": [turn] * n if isinstance(turn, int) else turn,
        "sampled": sampled or [1] * n,
        "trained": sampled or [1] * n,
        "entropy": [0.1 * i for i in range(n)],
        "advantage": [(-1) ** i * 0.5 for i in range(n)],
        "log_ratio": [-0.25 * (i == 1) for i in range(n)],
    }


def forest_of(step, prompt_id):
    """A root that calls a tool and hears an answer, and two forks of it: one is given a token, one denied."""
    heard = {"turn": [0, 0, 0, 1, 1, 1], "sampled": [1, 1, 0, 0, 1, 1]}
    texts = [["call", "(x)", "=", "7", "so", " 7"], ["call", "(x)", "wait", " 8"], ["call", HOSTILE, " 9"]]
    root = record(
        step,
        prompt_id,
        0,
        tokens=list(range(6)),
        logprobs=[-1.0] * 6,
        per_token=columns(texts[0], **heard),
        forced=[[2, 4]],
    )
    given = record(
        step,
        prompt_id,
        1,
        tokens=list(range(4)),
        logprobs=[-1.0] * 4,
        per_token=columns(texts[1]),
        parent=0,
        fork_index=2,
        fork_score=0.75,
        forced=[[2, 3]],
        intervention="injected",
    )
    denied = record(
        step,
        prompt_id,
        2,
        tokens=list(range(3)),
        logprobs=[-1.0] * 3,
        per_token=columns(texts[2]),
        parent=0,
        fork_index=1,
        fork_score=0.5,
        intervention="suppressed",
        completion=HOSTILE,
        error=HOSTILE,
        columns={"answer": HOSTILE},
    )
    return [root, given, denied]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """(page, address, folder of the run, answers)."""
    tmp_path = tmp_path_factory.mktemp("viewer")
    folder = write(tmp_path / "run", steps=(1, 2, 3, 4))
    for step in (1, 2):
        put(folder, step, [*forest_of(step, 5), *[record(step, 6, s, prompt=HOSTILE) for s in range(2)]])
    lines = [{"step": s, "rollout/reward_mean": 0.0, "rollout/no_signal_share": 1.0} for s in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    with Answers([folder], index_folder=tmp_path / "index") as answers, open_server(answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with chromium(tmp_path / "profile") as page:
            yield page, f"http://127.0.0.1:{server.server_port}/", folder, answers
        server.shutdown()


def shown(page, address, view):
    page.open(f"{address}#{view}")
    page.wait("document.getElementById('main')?.dataset.shown")


def test_the_overview_has_the_alarm_and_says_what_a_metric_means(seen):
    page, address, _, _ = seen
    shown(page, address, "view=overview")
    assert "100% of the groups" in page.ask("document.querySelector('.alarm').textContent")

    # On the focus as on the pointer, so that a keyboard gets at it too.
    tip = "document.querySelector('[data-metric=\"rollout/no_signal_share\"] .tip')"
    assert page.ask(f"getComputedStyle({tip}).display") == "none"
    page.ask("document.querySelector('[data-metric=\"rollout/no_signal_share\"]').focus()")
    assert page.ask(f"getComputedStyle({tip}).display") == "block"
    assert "groups whose rewards are all equal" in page.ask(f"{tip}.textContent")
    assert "below about 0.5" in page.ask(f"{tip}.textContent")

    names = page.names()
    assert ("image", "rollout/no_signal_share. run: 1 to 1") in names
    assert {("tab", name) for name in ("Overview", "Rollouts", "Side by side", "Search")} <= set(names)
    assert page.problems == []


def test_a_forest_is_seen_and_walked_by_keyboard(seen):
    page, address, _, _ = seen
    shown(page, address, "view=rollouts&run=0&step=1&untrained=0&group=0")
    page.wait("document.querySelectorAll('.forest .branch').length == 3")
    assert page.ask("document.querySelector('.forest').getBoundingClientRect().height") > 60
    names = page.names()
    assert ("button", "sample 1, reward 1, 4 tokens, leaves another one at token 2, fork score 0.75") in names
    assert any(name == "Forest of 3 samples, 2 of them forks, up to 6 tokens" for _, name in names)
    kinds = ("observation", "injected", "suppressed")
    assert [page.ask(f"document.querySelectorAll('.span-{kind}').length") for kind in kinds] == [1, 1, 1]

    # Lanes: the root, the late fork, the early one.
    chosen = "document.querySelector('.branch[aria-pressed=true]').dataset.sample"
    assert page.ask(chosen) == "0"
    for key, sample in (("n", "1"), ("n", "2"), ("p", "1")):
        page.press(key)
        page.wait(f"{chosen} === '{sample}'")
    page.press("j")
    page.wait("location.hash.includes('group=1')")
    page.press("]")
    page.wait("location.hash.includes('step=2')")
    page.press("3")
    page.wait("document.getElementById('main').dataset.shown == 'compare'")
    assert page.ask("document.querySelectorAll('.forest').length") == 2
    page.press("?")
    assert page.ask("document.getElementById('keys').open")
    assert page.problems == []


def test_tokens_are_coloured_by_what_is_recorded(seen):
    page, address, _, _ = seen
    tokens = "[...document.querySelectorAll('.token')]"

    def paints():
        return page.ask(f"{tokens}.map((node) => node.style.background)")

    found = {}
    for colour in ("advantage", "entropy", "gap", "ratio", "none"):
        shown(page, address, f"view=rollouts&run=0&step=1&untrained=0&group=0&sample=0&colour={colour}")
        page.wait(f"{tokens}.length == 6")
        found[colour] = paints()
        # Of what the environment says nothing was sampled.
        assert found[colour][2:4] == ["", ""]
    assert found["none"] == [""] * 6
    assert found["advantage"][0] != found["advantage"][1] and found["advantage"][0] == found["advantage"][4]
    assert len({found["entropy"][i] for i in (0, 1, 4, 5)}) == 4
    assert found["gap"][0] == found["gap"][4] != found["gap"][1]
    assert found["ratio"][0] == found["ratio"][4] != found["ratio"][1]

    page.ask("document.querySelector('.tokens').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert "token 1 (id 1)" in page.ask("document.querySelector('.facts').textContent")
    assert "ratio 0.779" in page.ask("document.querySelector('.facts').textContent")
    headings = page.ask("[...document.querySelectorAll('.tokens .turn')].map((node) => node.textContent)")
    assert headings == ["turn 0", "observation", "turn 1"]
    assert page.problems == []


def test_hostile_text_is_text_everywhere(seen, tmp_path):
    page, address, _, answers = seen
    export(answers, tmp_path / "report.html")
    for base in (address, (tmp_path / "report.html").as_uri()):
        for view in (
            "view=rollouts&run=0&step=1&untrained=0&group=0&sample=2",
            "view=rollouts&run=0&step=1&untrained=0&group=1",
            "view=compare",
            "view=search&search=failed",
        ):
            shown(page, base, view)
            page.wait("document.getElementById('main').textContent.includes('onerror=alert(1)')")
            assert page.ask("document.querySelectorAll('main img, main script').length") == 0
            assert "taken" not in page.ask("document.title")
    assert page.problems == []


def test_the_page_follows_a_run_that_trains(seen):
    page, address, folder, _ = seen
    shown(page, address, "view=overview")
    page.wait("document.getElementById('runs').textContent.includes('step 4 of 9')")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "rollout/reward_mean": 0.9, "rollout/no_signal_share": 0.1}) + "\n")
    page.wait("document.getElementById('runs').textContent.includes('step 5 of 9')")
    page.wait("!document.querySelector('.alarm')")
    page.wait("document.querySelector('[data-metric=\"rollout/reward_mean\"]').textContent.includes('0.9 at 5')")
    assert page.problems == []
