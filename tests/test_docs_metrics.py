"""docs/not-learning.md explains every metric that the source names, and none that it does not.

Runs of other tests (test_run_loop, test_docs_papers) hold what is really logged against the page.
"""

import ast
import re
from pathlib import Path

from docs_metrics import EXPLAINED, unexplained

PACKAGE = Path(__file__).parent.parent / "rljax"
SOURCES = [path.read_text() for path in PACKAGE.rglob("*.py")]
ROLLOUTS = [path.read_text() for path in (PACKAGE / "rollouts").rglob("*.py")]


def reported(text):
    """Keys of the dictionaries in functions whose name ends in `_stats`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_stats"):
            keys = [key for part in ast.walk(node) if isinstance(part, ast.Dict) for key in part.keys]
            yield from (key.value for key in keys if isinstance(key, ast.Constant))


def test_what_losses_critic_and_learner_report_is_explained():
    named = {name for text in SOURCES for name in re.findall(r'"((?:loss|critic|rollout|compile)/\w+)"', text)}
    assert {"loss/clip_fraction", "critic/explained_variance", "rollout/logprob_gap_max"} <= named
    named.remove("rollout/logprob_gap")  # a prefix that the loop looks for
    assert not unexplained(named)


def test_what_rollouts_report_is_explained():
    named = {name for text in ROLLOUTS for name in reported(text)}
    assert {"busy_share", "conversations", "hard_share", "fork_depth", "reward_mean"} <= named
    assert named <= {name.split("/")[1] for name in EXPLAINED}


def test_nothing_is_explained_that_is_not_logged():
    known = "\n".join(SOURCES)
    for name in EXPLAINED - {"rollout/component/NAME", "rollout/skill/NAME"}:
        short = name.split("/")[1]
        phase = short.removesuffix("_s")
        timed = (f'phase("{phase}")', f'timer("{phase}")', f'seconds["{phase}"]')
        numbered = f'"{name.removesuffix("N")}{{'
        places = (f'"{name}"', numbered, f'"{short}"', f'"{short.removesuffix("k")}', *timed)
        assert any(place in known for place in places), name
