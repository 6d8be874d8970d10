"""An environment whose policy says what it expects to see."""

import copy

import pytest

from rljax.envs import EnvironmentPool, Step
from rljax.envs.base import Snapshots, replay_same
from rljax.envs.library import Predicting


class Drawer:
    """Opens on 'open', and ends."""

    tools = "the tools"

    def __init__(self, text="the drawer 1 is open . in it you see a cup"):
        self.text, self.actions = text, []

    def reset(self, row):
        self.row = row
        return row["prompt"]

    def step(self, action):
        self.actions.append(action)
        done = action.strip() == "close"
        return Step("" if done else self.text, float(done), done, {"tool_calls": 1.0})


class Rewindable(Drawer):
    def snapshot(self):
        return list(self.actions)

    def restore(self, state):
        self.actions = list(state)


ACTION = "I open it. <predict_next>the drawer 1 is open and empty</predict_next>open"


def test_the_prediction_is_taken_out_and_compared_with_what_came():
    environment = Predicting(make=Drawer)
    environment.reset({"prompt": "the drawer 1 is closed"})
    step = environment.step(ACTION)
    assert environment.inner.actions == ["I open it. open"]
    assert step.observation == "the drawer 1 is open . in it you see a cup" and (step.reward, step.done) == (0, False)
    assert step.counts["tool_calls"] == step.counts["predicted"] == 1
    assert step.counts["prediction"] == pytest.approx(0.526316, abs=1e-6)
    assert step.counts["copy_prediction"] == pytest.approx(2 * 4 / 12)  # against the prompt
    step = environment.step(ACTION)
    assert step.counts["copy_prediction"] == step.counts["prediction"] == pytest.approx(0.526316, abs=1e-6)


def test_no_prediction_counts_nothing_and_the_end_is_like_nothing():
    environment = Predicting(make="test_envs_prediction:Drawer", args={"text": "x"})
    environment.reset({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "now"}]})
    assert environment.current == "now"
    step = environment.step("<predict_next>never closed")
    assert (step.observation, dict(step.counts)) == (
        "x",
        {"tool_calls": 1.0, "predicted": 0.0, "prediction": 0.0, "copy_prediction": 0.0},
    )
    step = environment.step("<predict_next>x</predict_next>close")
    assert step.done and step.reward == 1
    assert (step.counts["predicted"], step.counts["prediction"], step.counts["copy_prediction"]) == (1, 0, 1)


def test_the_last_of_several_blocks_counts_and_all_are_taken_out():
    environment = Predicting(make=Drawer, args={"text": "b c"}, tag="next", similarity="of_longer")
    environment.reset({"prompt": "p"})
    step = environment.step("<next>a</next>go<next>b\nd e f</next>")
    assert environment.inner.actions == ["go"]
    assert step.counts["prediction"] == pytest.approx(0.25)
    own = Predicting(make=Drawer, similarity=lambda a, b: 0.5)
    own.reset({"prompt": "p"})
    assert own.step(ACTION).counts["prediction"] == 0.5


def test_an_instruction_ends_the_prompt_and_is_no_observation():
    environment = Predicting(make=Drawer, instruction="Predict.")
    assert environment.reset({"prompt": "p"}) == "p\n\nPredict." and environment.current == "p"
    messages = [{"role": "user", "content": "now"}]
    assert environment.reset({"prompt": messages}) == [{"role": "user", "content": "now\n\nPredict."}]
    assert messages[0]["content"] == "now"


def test_it_is_forked_as_the_environment_inside():
    assert not isinstance(Predicting(make=Drawer), Snapshots)
    environment = Predicting(make=Rewindable)
    assert isinstance(environment, Snapshots) and environment.tools == "the tools"
    opening = environment.reset({"prompt": "p"})
    states, steps = [environment.snapshot()], []
    for action in (ACTION, "look"):
        steps.append(environment.step(action))
        states.append(environment.snapshot())
    replay_same(Predicting(make=Rewindable), {"prompt": "p"}, opening, [ACTION, "look"], steps)
    other = Predicting(make=Rewindable)
    other.restore(copy.deepcopy(states[1]))
    assert other.inner.actions == ["I open it. open"]
    assert other.step(ACTION).counts == environment.step(ACTION).counts


@pytest.mark.parametrize("make", [Drawer, Rewindable])
def test_counts_add_up_over_an_episode_and_forks_repeat_them(make):
    with EnvironmentPool(lambda: Predicting(make=make), workers=2) as pool:
        episode = pool.start({"prompt": "the drawer 1 is closed"}).result()
        for action in (ACTION, "look", "close"):
            pool.step(episode, action).result()
        assert episode.end == "done" and episode.reward == 1
        assert [s.counts["predicted"] for s in episode.steps] == [1, 0, 0]
        fork = pool.fork(episode, 1).result()
        assert fork.steps == episode.steps[:1]
        assert pool.step(fork, ACTION).result().steps[-1].counts["copy_prediction"] == pytest.approx(0.526316, abs=1e-6)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="tag '<p>' must be a name"):
        Predicting(make=Drawer, tag="<p>")
    with pytest.raises(ValueError, match="similarity 'bleu' must be one of dice, of_longer, gestalt"):
        Predicting(make=Drawer, similarity="bleu")
    with pytest.raises(ValueError, match="cannot load 'nowhere:nothing'"):
        Predicting(make="nowhere:nothing")
