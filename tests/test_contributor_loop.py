"""`make check` and `make test-fast` choose tests by their names, so names that have drifted are found here."""

import subprocess
from pathlib import Path

import pytest
from conftest import COSTLY

from rljax.testing.layering import read_rooms

ROOT = Path(__file__).parent.parent
TESTS = {file.stem for file in (ROOT / "tests").glob("test_*.py")}
OF_ALL_ROOMS = (
    "test_fuzz_",
    "test_benchmarks_",
    "test_composability",
    "test_contributor_loop",
    "test_docs_",
    "test_fuzz_",
    "test_aot",
    "test_gpu",
    "test_imports",
    "test_launch_",
)
"""Files, by how their names begin, that belong to no room: the gate runs them, `make check` does not."""


def list_tests(room):
    return subprocess.run(["bash", ".ci/check", "--list", room], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tests_of():
    """The test files that `make check` runs, by room."""
    rooms = [room.replace(".", "/") for room in read_rooms((ROOT / "docs" / "architecture.md").read_text()) if room]
    listed = {room: list_tests(room) for room in rooms}
    assert {room: answer.stderr for room, answer in listed.items() if answer.returncode} == {}
    return {room: {Path(line).stem for line in answer.stdout.split()} for room, answer in listed.items()}


def test_every_room_has_tests_and_every_test_has_a_room(tests_of):
    assert len(tests_of) > 20
    assert [room for room, names in tests_of.items() if not names] == []
    homeless = TESTS - set().union(*tests_of.values())
    assert sorted(name for name in homeless if not name.startswith(OF_ALL_ROOMS)) == []


def test_a_room_is_checked_with_the_tests_of_its_own_name(tests_of):
    named = {room: {name for name in TESTS if name.startswith(f"test_{room}_")} for room in tests_of if "/" not in room}
    assert {room: names - tests_of[room] for room, names in named.items() if names - tests_of[room]} == {}


def test_a_room_that_is_not_there_is_refused_with_those_that_are():
    answer = list_tests("cellar")
    assert answer.returncode == 2
    assert "there is no room 'cellar'; rooms: advantages algorithms " in answer.stderr


@pytest.mark.parametrize("beginnings", [COSTLY, OF_ALL_ROOMS], ids=["costly", "of all rooms"])
def test_every_beginning_of_a_name_still_begins_one(beginnings):
    assert [start for start in beginnings if not any(name.startswith(start) for name in TESTS)] == []
