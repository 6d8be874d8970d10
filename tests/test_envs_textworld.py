"""TextWorld: games from a seed, won by their walkthrough, the same when replayed."""

import functools
import json
import re
from concurrent.futures import wait
from pathlib import Path

import pytest
from replays import replay

pytest.importorskip("textworld", reason="needs textworld: pip install 'rljax-lm[textworld]'")

from rljax.envs import EnvironmentLimits, EnvironmentPool, replay_same
from rljax.envs.library.textworld import TextWorldEnvironment, make_game, rows

OPTIONS = {"quests": 2, "quest_length": 2, "objects": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("games"))


def walkthrough(row, folder):
    game = make_game(row["seed"], row["options"], folder=folder)
    return dict(json.loads(game.with_suffix(".json").read_text())["metadata"])["walkthrough"]


def test_the_walkthrough_wins_and_a_wrong_policy_scores_nothing(folder):
    games = rows(2, 5, folder=folder)
    with EnvironmentPool(lambda: TextWorldEnvironment(folder=folder), workers=4) as pool:
        right, wrong = ([pool.start(row).result() for row in games] for _ in range(2))
        for row, episode in zip(games, right):
            assert row["prompt"] in episode.opening and "-= " in episode.opening
            for command in walkthrough(row, folder):
                pool.step(episode, command).result()
        for episode in wrong:
            for _ in range(4):
                pool.step(episode, "look").result()
    assert [(episode.end, episode.reward) for episode in right] == [("done", 1.0)] * 2
    assert [(episode.end, episode.reward) for episode in wrong] == [(None, 0.0)] * 2
    assert all(e.counts == {"moves": float(len(e.actions)), "invalid_commands": 0.0} for e in right)
    assert "The End" in right[0].steps[-1].observation


def test_each_quest_brings_its_share_of_the_reward(folder):
    row = rows(1, 3, folder=folder, options=OPTIONS)[0]
    _, steps = replay(TextWorldEnvironment(folder=folder), row, walkthrough(row, folder))
    gains = [step.reward for step in steps if step.reward]
    assert len(gains) > 1 and sum(gains) == pytest.approx(1.0)
    assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]


@pytest.mark.parametrize(
    "action",
    [
        "fly to the moon",
        "",
        "restart",
        "quit",
        "undo",
        "tw-extra-infos score",
        "<think>",
        "quit, now",
        "go ☃",
        "a\0b",
        "say \\h",
        "x" * 5000,
    ],
)
def test_an_invalid_action_is_an_observation_and_changes_nothing(action, folder):
    row = rows(1, 5, folder=folder)[0]
    environment = TextWorldEnvironment(folder=folder)
    environment.reset(row)
    step = environment.step(action)
    assert step.observation and not step.done and step.reward == 0.0
    assert step.counts == {"moves": 0.0, "invalid_commands": 1.0}
    steps = [environment.step(command) for command in walkthrough(row, folder)]
    assert steps[-1].done and steps[-1].reward == 1.0


def test_only_the_first_command_after_the_thinking_is_taken(folder):
    environment = TextWorldEnvironment(folder=folder)
    environment.reset(rows(1, 5, folder=folder)[0])
    step = environment.step("<think>quit\n</think>\n> look. restart\nquit")
    assert "-= " in step.observation and step.counts["moves"] == 1.0
    assert not step.observation.rstrip().endswith(">") and "/1" not in step.observation


def test_a_game_repeats_itself_so_forks_by_replay_work(folder):
    row = rows(1, 5, folder=folder)[0]
    commands = ["look", "inventory", "fly", *walkthrough(row, folder)]
    opening, steps = replay(TextWorldEnvironment(admissible=True, folder=folder), row, commands)
    replay_same(TextWorldEnvironment(admissible=True, folder=folder), row, opening, commands, steps)
    limits = EnvironmentLimits(turns=20)
    with EnvironmentPool(lambda: TextWorldEnvironment(folder=folder), workers=8, limits=limits) as pool:
        episode = pool.start(row).result()
        for command in commands[:4]:
            pool.step(episode, command).result()
        forks = [pool.fork(episode, 3) for _ in range(16)]
        wait(forks)
        forks = [fork.result() for fork in forks]
        for command in commands[3:]:
            wait([pool.step(fork, command) for fork in forks])
        assert [(fork.end, fork.reward) for fork in forks] == [("done", 1.0)] * 16


def test_games_run_in_worker_processes(folder):
    row = rows(1, 5, folder=folder)[0]
    make = functools.partial(TextWorldEnvironment, folder=folder)
    with EnvironmentPool(make, workers=1, hosts="processes") as pool:
        episode = pool.start(row).result()
        for command in walkthrough(row, folder):
            pool.step(episode, command).result()
    assert (episode.end, episode.reward) == ("done", 1.0)


def test_admissible_commands_are_shown_and_all_of_them_work(folder):
    row = rows(1, 5, folder=folder)[0]
    environment = TextWorldEnvironment(admissible=True, folder=folder)
    commands = environment.reset(row).rpartition("Commands: ")[2].split(", ")
    assert walkthrough(row, folder)[0] in commands
    for command in commands:
        environment.reset(row)
        step = environment.step(command)
        assert step.counts["moves"] == 1.0 and (step.done or "\nCommands: " in step.observation)


def test_games_are_made_once_and_can_be_given_as_files(folder):
    first = make_game(5, folder=folder)
    changed = first.stat().st_mtime_ns
    assert make_game(5, folder=folder) == first and first.stat().st_mtime_ns == changed
    assert make_game(6, folder=folder) != first
    given = TextWorldEnvironment().reset({"game_file": str(first)})
    assert given == TextWorldEnvironment(folder=folder).reset(rows(1, 5, folder=folder)[0])


def test_what_no_game_can_be_made_of_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="option 'room' is not one of rooms"):
        rows(1, options={"room": 3})
    with pytest.raises(ValueError, match="quest_length is 0"):
        rows(1, options={"quest_length": 0})
    with pytest.raises(ValueError, match="theme 'space'"):
        rows(1, options={"theme": "space"})
    with pytest.raises(ValueError, match="no TextWorld game"):
        TextWorldEnvironment().reset({"game_file": str(tmp_path / "zork.z5")})


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    page = (Path(__file__).parent.parent / "docs" / "environments.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "TextWorldEnvironment(" in block]
    exec(block, {})
    assert len(list((tmp_path / "rljax" / "textworld").glob("*.z8"))) == 2
