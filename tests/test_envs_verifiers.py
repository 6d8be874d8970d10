"""Environments of verifiers: its rows, turns, tools, stop conditions and rubric, through our pool."""

import signal

import pytest
from replays import replay

vf = pytest.importorskip("verifiers", reason="needs verifiers: pip install 'rljax-lm[verifiers]'")
if not hasattr(vf, "MultiTurnEnv"):
    pytest.skip("needs a version 0.2 of verifiers: pip install 'rljax-lm[verifiers]'", allow_module_level=True)

from datasets import Dataset  # noqa: E402

from rljax.envs import EnvironmentPool, replay_same  # noqa: E402
from rljax.envs.library.verifiers_adapter import VerifiersEnvironment, rows  # noqa: E402

HERE = __name__


def is_exact(completion, answer):
    return float(completion[-1]["content"].strip() == answer)


def sums(size: int = 3):
    """Single-turn: add two numbers."""
    data = Dataset.from_list([{"question": f"{n} + 1 = ?", "answer": str(n + 1)} for n in range(size)])
    return vf.SingleTurnEnv(dataset=data, system_prompt="Answer with a number.", rubric=vf.Rubric(funcs=[is_exact]))


class Guessing(vf.MultiTurnEnv):
    """Multi-turn: guess the number; the state holds the number of tries."""

    async def setup_state(self, state, **kwargs):
        state["tries"] = 0
        return state

    @vf.stop
    async def is_found(self, state, **kwargs) -> bool:
        return state.get("found", False)

    async def env_response(self, messages, state, **kwargs):
        state["tries"] += 1
        said = str(messages[-1]["content"]).strip()
        if said == "break":
            raise vf.Error("broken")
        if said == "raise":
            raise KeyError("no such thing")
        if not said.isdigit():
            return [{"role": "user", "content": "That is no number."}]
        if said == state["answer"]:
            state["found"] = True
            state["final_env_response"] = [{"role": "user", "content": f"Right after {state['tries']}."}]
            return state["final_env_response"]
        return [{"role": "user", "content": "Too low." if int(said) < int(state["answer"]) else "Too high."}]


async def found_soon(state):
    return 1.0 if state.get("found") else 0.0


def tries(state):
    return float(state["tries"])


def guessing(max_turns: int = 4):
    data = Dataset.from_list([{"question": "Guess.", "answer": str(n)} for n in (3, 7)])
    rubric = vf.Rubric(funcs=[found_soon, tries], weights=[1.0, 0.0])
    return Guessing(dataset=data, rubric=rubric, max_turns=max_turns)


def length(word: str) -> int:
    """Count the letters of a word.

    Args:
        word: The word.
    """
    return len(word)


def tools():
    data = Dataset.from_list([{"question": "How many letters has 'forest'?", "answer": "6"}])
    return vf.ToolEnv(tools=[length], dataset=data, rubric=vf.Rubric(funcs=[is_exact]))


def groups():
    def best_of(completions):
        return [1.0 for _ in completions]

    data = Dataset.from_list([{"question": "x", "answer": "y"}])
    return vf.SingleTurnEnv(dataset=data, rubric=vf.Rubric(funcs=[best_of]))


def no_environment():
    return 7


def make(name, **options):
    return VerifiersEnvironment(f"{HERE}:{name}", **options)


def test_single_turns_are_scored_by_the_rubric():
    data = rows(f"{HERE}:sums", args={"size": 5})
    assert len(data) == 5 and data[2]["answer"] == "3"
    assert data[2]["prompt"][-1] == {"role": "user", "content": "2 + 1 = ?"}
    with EnvironmentPool(lambda: make("sums"), workers=4) as pool:
        episodes = [pool.start(row).result() for row in data[:3]]
        for episode, said in zip(episodes, ("1", "2", "17")):
            pool.step(episode, said).result()
    assert episodes[0].opening == [
        {"role": "system", "content": "Answer with a number."},
        {"role": "user", "content": "0 + 1 = ?"},
    ]
    assert [(episode.end, episode.reward) for episode in episodes] == [("done", 1.0), ("done", 1.0), ("done", 0.0)]
    assert episodes[0].counts["metric/is_exact"] == 1.0


def test_turns_go_on_until_a_stop_condition_and_forks_replay_them():
    row = rows(f"{HERE}:guessing")[1]
    with EnvironmentPool(lambda: make("guessing"), workers=4) as pool:
        episode = pool.start(row).result()
        for said in ("3", "nine"):
            pool.step(episode, said).result()
        wrong = pool.fork(episode, 2).result()
        pool.step(episode, "7").result()
        for said in ("8", "9"):
            pool.step(wrong, said).result()
    assert [step.observation for step in episode.steps] == ["Too low.", "That is no number.", "Right after 3."]
    assert (episode.end, episode.reward, episode.counts["metric/tries"]) == ("done", 1.0, 3.0)
    assert [step.observation for step in wrong.steps[2:]] == ["Too high.", ""]
    assert (wrong.end, wrong.reward) == ("done", 0.0)  # its own limit of 4 turns
    opening, steps = replay(make("guessing"), row, ["1", "7"])
    replay_same(make("guessing"), row, opening, ["1", "7"], steps)


def test_episodes_at_once_keep_their_states_apart():
    data = rows(f"{HERE}:guessing")
    with EnvironmentPool(lambda: make("guessing"), workers=8) as pool:
        episodes = [pool.start(data[i % 2]).result() for i in range(16)]
        for said in ("5", "3"):
            for turn in [pool.step(episode, said) for episode in episodes if episode.end is None]:
                turn.result()
    assert [episode.reward for episode in episodes] == [1.0, 0.0] * 8
    assert [episode.steps[0].observation for episode in episodes] == ["Too high.", "Too low."] * 8


def test_tools_are_called_in_our_formats_and_a_bad_call_is_an_observation():
    row = rows(f"{HERE}:tools")[0]
    environment = make("tools")
    opening = environment.reset(row)
    assert opening[0]["role"] == "system" and '"name": "length"' in opening[0]["content"]
    assert environment.schemas[0]["function"]["parameters"]["required"] == ["word"]
    step = environment.step('<tool_call>{"name": "length", "argum')
    assert "never closed" in step.observation and step.counts["malformed_calls"] == 1.0
    step = environment.step('<tool_call>{"name": "width", "arguments": {}}</tool_call>')
    assert "width" in step.observation and not step.done
    step = environment.step('<tool_call>{"name": "length", "arguments": {"word": "forest"}}</tool_call>')
    assert step.observation == "6" and step.counts["tool_calls"] == 1.0
    step = environment.step("6")
    assert step.done and step.reward == 1.0 and step.counts["metric/length_calls"] == 1.0


@pytest.mark.parametrize("said", ["break", "raise"])
def test_an_environment_that_fails_ends_its_own_episode(said):
    with EnvironmentPool(lambda: make("guessing"), workers=2) as pool:
        one, two = (pool.start(rows(f"{HERE}:guessing")[0]).result() for _ in range(2))
        assert pool.step(one, said).result().end == "raised"
        assert pool.step(two, "3").result().reward == 1.0


def test_signals_of_the_process_stay_ours():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    make("guessing", args={"max_turns": 9})
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_what_cannot_be_used_is_named():
    with pytest.raises(ValueError, match="group of episodes"):
        make("groups")
    with pytest.raises(ValueError, match="is a int; it must be a MultiTurnEnv"):
        make("no_environment")
    with pytest.raises(ValueError, match="no-such-environment"):
        VerifiersEnvironment("no-such-environment")
    with pytest.raises(ValueError, match="split 'test'"):
        rows(f"{HERE}:sums", split="test")
