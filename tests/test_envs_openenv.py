"""Environments of OpenEnv: real servers on this machine, their tasks, turns, tools and rewards, through our pool."""

import json
import pathlib
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("openenv", reason="needs openenv: pip install 'rljax-lm[openenv]'")

from rljax.envs import EnvironmentPool
from rljax.envs.library import OpenEnvEnvironment
from rljax.envs.library.openenv_adapter import rows

PROGRAM = pathlib.Path(__file__).with_name("openenv_server_program.py")
KINDS = ("guessing", "one", "moving", "sums")


@pytest.fixture(scope="module")
def servers():
    ports = []
    for _ in KINDS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    started = [subprocess.Popen([sys.executable, str(PROGRAM), kind, str(port)]) for kind, port in zip(KINDS, ports)]
    try:
        urls = {kind: f"http://127.0.0.1:{port}" for kind, port in zip(KINDS, ports)}
        for process, url in zip(started, urls.values()):
            _wait_for(process, url)
        yield urls
    finally:
        for process in started:
            process.kill()
            process.wait()


def _wait_for(process, url):
    deadline = time.monotonic() + 120.0
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5.0):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} does not answer")


def call(name: str, **arguments) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def played(pool, row, *actions):
    episode = pool.start(row).result()
    for action in actions:
        pool.step(episode, action).result()
    return episode


def test_tasks_of_a_split_are_rows_and_so_are_seeds(servers):
    data = rows(servers["guessing"], split="train")
    assert data == [
        {"prompt": "", "reset": {"split": "train", "index": index}, "task": {"number": number}}
        for index, number in enumerate((3, 7, 5))
    ]
    assert len(rows(servers["guessing"], split="train", size=2)) == 2
    assert rows(servers["guessing"], size=2, seed=5) == [{"prompt": "", "reset": {"seed": seed}} for seed in (5, 6)]


def test_a_turn_is_the_text_of_an_action_and_forks_repeat_it(servers):
    row = rows(servers["guessing"], split="train")[1]
    with EnvironmentPool(lambda: OpenEnvEnvironment(servers["guessing"]), workers=4) as pool:
        episode = played(pool, row, "3", "<think>a 9?</think>\n9")
        fork = pool.fork(episode, 1).result()
        pool.step(episode, "7").result()
        pool.step(fork, "8").result()
    assert episode.opening == "Guess a number from 1 to 9."
    assert [step.observation for step in episode.steps] == ["Too low.", "Too high.", ""]
    assert (episode.end, episode.reward) == ("done", 1.0)
    assert [step.observation for step in fork.steps] == ["Too low.", "Too high."]
    assert fork.end is None


def test_episodes_at_the_same_time_do_not_meet(servers):
    data = rows(servers["guessing"], split="train")
    with EnvironmentPool(lambda: OpenEnvEnvironment(servers["guessing"]), workers=8) as pool:
        episodes = [pool.start(data[number % 3]).result() for number in range(24)]
        for turn in [pool.step(episode, "5") for episode in episodes]:
            turn.result()
    assert [episode.steps[0].observation for episode in episodes] == ["Too high.", "Too low.", ""] * 8
    assert [episode.reward for episode in episodes] == [0.0, 0.0, 1.0] * 8


def test_the_prompt_of_a_row_and_a_system_message_stand_before_the_observation(servers):
    environment = OpenEnvEnvironment(servers["guessing"], system="Answer with a digit.")
    row = {"prompt": "A game.", "reset": {"seed": 1}}
    assert environment.reset(row) == [
        {"role": "system", "content": "Answer with a digit."},
        {"role": "user", "content": "A game.\n\nGuess a number from 1 to 9."},
    ]
    environment.close()
    plain = OpenEnvEnvironment(servers["guessing"])
    assert plain.reset(row) == "A game.\n\nGuess a number from 1 to 9."
    plain.close()
    plain.close()


def test_tools_of_a_server_are_called_in_our_formats(servers):
    row = {"prompt": "What is 3 + 4?"}
    with EnvironmentPool(lambda: OpenEnvEnvironment(servers["sums"]), workers=2) as pool:
        episode = played(
            pool,
            row,
            "I think of nothing.",
            "<tool_call>{no json}</tool_call>",
            call("add", a=3, b=4) + call("add", a=1, b=1),
            call("divide", a=1),
            call("add", a="three", b="\ud83d"),
            call("submit", answer=7) + call("add", a=1, b=1),
        )
    assert '"name": "add"' in episode.opening[0]["content"]
    assert episode.opening[1] == {"role": "user", "content": "What is 3 + 4?"}
    texts = [step.observation for step in episode.steps]
    assert texts[0] == "Call a tool, or give the final answer."
    assert texts[2] == "7\n\n2"
    assert texts[3] == "There is no tool 'divide'; the tools are add, submit."
    assert texts[4].startswith("add failed: ")
    assert texts[5] == "submitted"
    assert (episode.end, episode.reward) == ("done", 1.0)
    assert (episode.counts["tool_calls"], episode.counts["malformed_calls"]) == (4.0, 2.0)


def test_other_actions_are_made_by_a_function(servers):
    def act(turn):
        found = re.fullmatch(r"(\d) (\d)", turn)
        if not found:
            raise ValueError("write a row and a column")
        return {"row": int(found[1]), "column": int(found[2])}

    environment = OpenEnvEnvironment(servers["moving"], act=act)
    assert json.loads(environment.reset({"prompt": ""})) == {"cells": [[0, 0], [0, 0]], "note": "Fill it."}
    step = environment.step("left")
    assert step.observation == "The action cannot be read: write a row and a column"
    assert step.counts == {"malformed_calls": 1.0}
    step = environment.step("0 1")
    assert (json.loads(step.observation), step.reward) == ({"cells": [[0, 1], [0, 0]]}, 0.25)
    for turn in ("0 0", "1 0"):
        assert not environment.step(turn).done
    assert environment.step("1 1").done
    environment.close()


def test_an_action_that_the_schema_refuses_is_an_observation(servers):
    environment = OpenEnvEnvironment(
        servers["moving"], act=lambda turn: {"row": turn, "column": 0}, observe="cells", system=""
    )
    assert environment.reset({"prompt": ""}) == "[[0, 0], [0, 0]]"
    step = environment.step("top")
    assert step.observation == "The action is refused; it takes row (integer), column (integer)."
    assert step.counts == {"malformed_calls": 1.0}
    assert environment.step("0").observation == "[[1, 0], [0, 0]]"
    environment.close()


def test_what_cannot_work_is_named(servers):
    with pytest.raises(ValueError, match=r"need the fields \['row', 'column'\], not one text; give act"):
        OpenEnvEnvironment(servers["moving"])
    with pytest.raises(ValueError, match=r"act='word' is no field .* \['message'\]"):
        OpenEnvEnvironment(servers["guessing"], act="word")
    with pytest.raises(ValueError, match=r"no split 'test' of tasks; it has \['train'\]"):
        rows(servers["guessing"], split="test")
    with pytest.raises(ValueError, match="splits"):
        rows(servers["moving"], split="train")
    with pytest.raises(ValueError, match="need a split of the server's tasks, or a size"):
        rows(servers["guessing"])
    with pytest.raises(ValueError, match="does not answer GET /schema"):
        OpenEnvEnvironment("http://127.0.0.1:9")
    with pytest.raises(ValueError, match="NO_SUCH_TOKEN"):
        OpenEnvEnvironment(servers["guessing"], token_variable="NO_SUCH_TOKEN")
    environment = OpenEnvEnvironment(servers["guessing"], observe="text")
    with pytest.raises(RuntimeError, match=r"observe='text' is no field .* \['hint', 'metadata'\]"):
        environment.reset({"prompt": ""})
    environment.close()


def test_a_server_that_fails_or_has_no_room_costs_the_episode(servers):
    data = rows(servers["guessing"], size=1)
    with EnvironmentPool(lambda: OpenEnvEnvironment(servers["guessing"]), workers=2) as pool:
        failed = played(pool, data[0], "raise")
        over = played(pool, {"prompt": "", "reset": {"seed": 1, "over": True}})
        fine = played(pool, data[0], "5")
    assert failed.end == "raised" and "failed" in failed.error and "EXECUTION_ERROR" in failed.error
    assert over.end == "raised" and "with its reset" in over.error
    assert fine.steps[0].observation in ("Too low.", "Too high.", "")

    with EnvironmentPool(lambda: OpenEnvEnvironment(servers["one"]), workers=2) as pool:
        first = pool.start(data[0]).result()
        second = pool.start(data[0]).result()
    assert first.end is None
    assert second.end == "raised" and "has no room for another session" in second.error
    assert "max_concurrent_envs" in second.error


def test_a_session_that_is_lost_is_not_replaced_by_one_that_was_never_reset():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(PROGRAM), "sums", str(port)]
    url = f"http://127.0.0.1:{port}"
    first = subprocess.Popen(command)
    _wait_for(first, url)
    try:
        with EnvironmentPool(lambda: OpenEnvEnvironment(url), workers=2) as pool:
            episode = played(pool, {"prompt": "What is 3 + 4?"}, call("add", a=3, b=4))
            first.kill()
            first.wait()
            second = subprocess.Popen(command)
            try:
                _wait_for(second, url)
                pool.step(episode, call("submit", answer=7)).result()
            finally:
                second.kill()
                second.wait()
    finally:
        first.kill()
    assert episode.end == "raised" and episode.reward == 0.0
    assert url in episode.error


def test_a_step_behind_a_failure_or_before_a_reset_is_told(servers):
    environment = OpenEnvEnvironment(servers["guessing"])
    with pytest.raises(RuntimeError, match="step comes behind reset"):
        environment.step("5")
    environment.reset({"prompt": "", "reset": {"seed": 1}})
    with pytest.raises(RuntimeError, match=rf"OpenEnv server {servers['guessing']} failed: .*EXECUTION_ERROR"):
        environment.step("raise")
    with pytest.raises(RuntimeError, match="step comes behind reset"):
        environment.step("5")
    assert environment.reset({"prompt": "", "reset": {"seed": 1}}) == "Guess a number from 1 to 9."
    assert environment.step("5 (code: VALIDATION_ERROR)").observation
    environment.close()
