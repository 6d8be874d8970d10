"""Each promise of docs/robustness.md names a test that is there."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "robustness.md"


def promises():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return [line for line in lines if not line.startswith("| what happens |")]


def test_every_promise_names_a_test_that_is_there():
    missing = []
    for line in promises():
        names = re.findall(r"`(test_\w+)::(test_\w+)`", line.rsplit("|", 2)[1])
        if not names:
            missing.append(line)
        for file, name in names:
            path = TESTS / f"{file}.py"
            if not path.is_file() or not re.search(rf"^ *def {name}\(", path.read_text(), re.M):
                missing.append(f"{file}::{name}")
    assert not missing
