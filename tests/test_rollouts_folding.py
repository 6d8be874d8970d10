"""Episodes longer than the context: what is folded, that every token is trained in the context in which it was said,
and that an episode counts once however often it was folded."""

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from forward import row_logprobs
from objectives import make_batch
from test_rollouts_endpoint import CONFIG as MODEL
from test_rollouts_endpoint import TEMPLATE, make_tokenizer, params, play

import rljax.advantages as A
from rljax.envs import Step
from rljax.experiment import PretrainedModel
from rljax.experiment.check import check
from rljax.experiment.sft import demonstration_row
from rljax.experiment.train import train
from rljax.losses import token_mean
from rljax.models import save_hf
from rljax.rollouts import BlackBox, BlackBoxActor, ChatEndpoint, RolloutSettings
from rljax.rollouts.black_box import FoldingAgent, folded
from rljax.rollouts.black_box.folding import NOTE, latest_alone, results_shown
from rljax.sampling import Stops, TurnDecoder, TurnDecoderSpec, sampling_params
from rljax.tasks import Example
from rljax.testing import run_metrics
from rljax.text import Dialogue

CONFIGS = Path(__file__).parent.parent / "configs" / "papers"
CONTEXT = 160
TURNS = 48


class Long:
    """Answers with a line of its own for `TURNS` turns; the reward is at the end, for having come so far."""

    told = 0

    def reset(self, row):
        self.turn = 0
        return [{"role": "system", "content": "go"}, {"role": "user", "content": row["prompt"]}]

    def step(self, action):
        self.turn += 1
        said = f"turn {self.turn:02} is over, so go on."
        Long.told += len(said)
        return Step(said, float(self.turn == TURNS), self.turn == TURNS)


def chat(count):
    opening = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    exchanges = [
        ({"role": "assistant", "content": f"a{i}"}, {"role": "user", "content": f"r{i}"}) for i in range(count)
    ]
    return opening + [message for exchange in exchanges for message in exchange]


def test_of_eight_results_the_first_three_are_left_out_when_five_are_kept():
    new = folded(chat(8), 5)
    assert [m["content"] for m in new[3::2]] == [NOTE] * 3 + [f"r{i}" for i in range(3, 8)]
    # All else stands, what opens the chat among it, and nothing is folded where there is nothing to fold.
    assert [m for i, m in enumerate(new) if i not in (3, 5, 7)] == [
        m for i, m in enumerate(chat(8)) if i not in (3, 5, 7)
    ]
    assert folded(chat(5), 5) == chat(5) and folded(chat(0), 5) == chat(0)
    assert folded(folded(chat(8), 5), 5) == new
    assert (results_shown(chat(8)), results_shown(new), results_shown(chat(0))) == (8, 5, 0)
    assert latest_alone(chat(8)) == [*chat(0), *chat(8)[-2:]]
    assert latest_alone(chat(0)) == chat(0) and latest_alone(chat(1)) == chat(1)


def test_folds_come_where_too_many_results_or_tokens_are_shown():
    agent = FoldingAgent("test_rollouts_folding:Long", keep=2, most=4, discard_beyond=100)
    assert agent.shortened(chat(4), 100) == chat(4)
    assert agent.shortened(chat(5), 100) == folded(chat(5), 2)
    assert agent.shortened(chat(5), 101) == latest_alone(chat(5))
    # The published form folds at every turn beyond k, and never discards.
    published = FoldingAgent("test_rollouts_folding:Long", keep=2)
    assert published.shortened(chat(3), 10**6) == folded(chat(3), 2)


def test_settings_that_cannot_work_are_named():
    for settings, said in (
        ({"keep": 0}, "config.actor.args.keep=0 must be at least 1"),
        ({"keep": 3, "most": 2}, "config.actor.args.most=2 must be at least 3"),
        ({"discard_beyond": 0}, "config.actor.args.discard_beyond=0 must be at least 1"),
        ({"turns": 0}, "config.actor.args.turns=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            FoldingAgent("test_rollouts_folding:Long", **settings)
    with pytest.raises(
        ValueError, match=r"config.actor.args=.* are for a class, and agent=agent_tasks:chat is a function"
    ):
        BlackBox(agent="agent_tasks:chat", args={"keep": 2}).load_agent()
    with pytest.raises(ValueError, match=r"config.actor.agent=.*: args .* do not fit: .*'kept'"):
        BlackBox(agent="rljax.rollouts.black_box:FoldingAgent", args={"make": "m:f", "kept": 2}).load_agent()


def test_an_episode_of_eight_times_the_context_ends_and_each_token_is_scored_where_it_was_said():
    Long.told = 0
    agent = FoldingAgent("test_rollouts_folding:Long", keep=1, discard_beyond=110, turns=TURNS)
    settings = RolloutSettings(seed=3, sampling=sampling_params())
    spec = TurnDecoderSpec(
        conversations=2, rows=1, context_length=CONTEXT, max_new_tokens=24, prefill_chunks=(64,), check_every=8
    )
    tokenizer = make_tokenizer()
    # Most bytes end a turn, so that none is cut off.
    stops = Stops(tokens=[tokenizer.eos_id, *(i for i in range(256) if i % 8)], decode_text=tokenizer.decode)
    with ChatEndpoint(TurnDecoder(MODEL, spec, stops), tokenizer) as endpoint:
        endpoint.set_params(params(), version=7)
        actor = BlackBoxActor(endpoint, agent, None, settings, BlackBox(workers=1, trained_conversations=TURNS))
        (group,) = play(actor, EXAMPLE, samples=TURNS)
        (run,) = {id(result): result for result in group.results}.values()

    assert run.value == 1.0 and run.components["turns"] == TURNS
    assert len(group.samples) == run.components["conversations"] > 8
    said = sum(int(sample.sampled.sum()) for sample in group.samples)
    # Bytes are tokens here: what came back counts beside what was said.
    assert said + Long.told > 8 * CONTEXT
    assert set(group.episodes) == {0}

    # Log-probs by a plain forward pass over each row: a token that stood in another context would have others.
    rows = [group.prompt + sample.tokens.tolist() for sample in group.samples]
    assert max(map(len, rows)) <= CONTEXT
    assert 0 < sum(NOTE in tokenizer.decode(ids) for ids in rows) < len(rows)
    for sample, ids in list(zip(group.samples, rows, strict=True))[::6]:
        # What lies behind is not seen; of one length, all rows share a program.
        want = row_logprobs(MODEL, params(), ids + [0] * (CONTEXT - len(ids)))[len(group.prompt) : len(ids)]
        np.testing.assert_allclose(sample.logprobs, np.where(sample.sampled, want, 0), atol=5e-5)
    # Every turn is trained once: what is said again behind a fold is given there.
    assert sum(len(np.unique(sample.turns[sample.sampled])) for sample in group.samples) == TURNS


EXAMPLE = [Example("one")]


def test_an_episode_counts_once_in_its_group_however_many_rows_it_has():
    """Rewards 1, 0, 0 of three episodes, the first of three rows: the mean is a third and not three fifths."""
    rewards = [1, 1, 1, 0, 0]
    batch = make_batch(group_id=[0] * 5, rewards=rewards, lengths=[2, 3, 1, 2, 2])
    batch = dataclasses.replace(batch, episode_id=np.array([0, 0, 0, 3, 4], np.int32))
    found = np.asarray(A.once_per_episode(A.group_centered())(batch))
    for row, want in enumerate([2 / 3, 2 / 3, 2 / 3, -1 / 3, -1 / 3]):
        np.testing.assert_allclose(found[row][batch.action_mask[row]], want, rtol=1e-6)
        assert not found[row][~batch.action_mask[row]].any()

    # A first row that is not valid gives its place to the next one; without shared episodes nothing changes.
    broken = dataclasses.replace(batch, is_valid=np.array([False, True, True, True, True]))
    found = np.asarray(A.once_per_episode(A.group_centered())(broken))
    assert not found[0].any()
    np.testing.assert_allclose(found[2][batch.action_mask[2]], 2 / 3, rtol=1e-6)
    alone = dataclasses.replace(batch, episode_id=np.arange(5, dtype=np.int32))
    for credit in (A.group_normalized(), A.leave_one_out()):
        np.testing.assert_array_equal(A.once_per_episode(credit)(alone), credit(alone))


def test_how_often_an_episode_was_folded_does_not_change_what_its_tokens_weigh():
    whole = np.ones((1, 12), bool)
    parts = np.zeros((3, 12), bool)
    parts[0, :5] = parts[1, :4] = parts[2, :3] = True
    other = np.ones((1, 12), bool)
    for mask in (np.concatenate([whole, other]), np.concatenate([parts, other])):
        weights = np.asarray(token_mean(mask))
        np.testing.assert_allclose(weights[mask], weights[mask][0])
        np.testing.assert_allclose(weights[:-1].sum(), weights[-1].sum(), rtol=1e-6)


@pytest.fixture(scope="module")
def context_folding():
    """The config's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CONFIGS)
        spec = importlib.util.spec_from_file_location("paper_context_folding", CONFIGS / "context_folding.py")
        module = importlib.util.module_from_spec(spec)
        # The class of the recipe is found by the name of its module.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        yield module
    sys.modules.pop("paper_context_folding")


def test_the_config_says_how_to_run_it_and_is_valid_in_all_sizes(context_folding):
    assert "    rljax train --config=papers/context_folding --workdir=runs/context_folding\n" in context_folding.__doc__
    for size in ("full", "smoke", "characters", "whole"):
        config = context_folding.get_config(size)
        check(config)
        assert isinstance(config.actor.load_agent(), FoldingAgent)
    with pytest.raises(ValueError, match="big: the size must be one of full, smoke, characters, whole"):
        context_folding.get_config("big")


@pytest.mark.parametrize("size", ["characters", "whole"])
def test_demonstrations_stand_in_the_contexts_that_the_agent_makes(context_folding, monkeypatch, size):
    config = context_folding.get_config(size)
    tokenizer = config.model.tokenizer_of()
    trail = importlib.import_module("trail")
    (row,) = trail.rows(1, "train")
    environment = trail.Trail()
    asked = []

    def ask(self, base_url, messages, tools):
        """Says what is right; the tokens are those of an endpoint."""
        asked.append(messages)
        stage = row["stages"][len(asked) - 1]
        text = f"{row['way']} {stage[row['way']]}"
        total = len(tokenizer.apply_chat_template(messages)) + len(text) + 1
        assert total <= config.actor.context_length
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        return {"choices": [choice], "usage": {"total_tokens": total}}

    monkeypatch.setattr(FoldingAgent, "_ask", ask)
    agent = config.actor.load_agent()
    assert agent._play(environment, "", row) == 1.0 and len(asked) == trail.PLACES

    example = Example(row["prompt"], row)
    dialogue = Dialogue(tokenizer, role="user")

    def rows_of(demonstrations):
        return [demonstration_row(dialogue, made.prompt, made.columns["completion"], 0, 0) for made in demonstrations]

    contexts = []
    for demonstration in rows_of(config.warmup.demonstrations([example], share=0.0)):
        said = demonstration.action_mask
        starts = np.flatnonzero(said & ~np.concatenate([[False], said[:-1]]))
        contexts += [demonstration.tokens[:start].tolist() for start in starts]
    assert contexts == [tokenizer.apply_chat_template(messages) for messages in asked]
    (whole,) = rows_of(trail.strayed_in_one([example], share=0.0))
    assert 8 * trail.CONTEXT < len(whole.tokens) <= trail.WHOLE_CONTEXT

    # A share of turns takes the other way, to where it leads.
    made = config.warmup.demonstrations([example], share=0.5)
    turns = [turn for demonstration in made for turn in demonstration.columns["completion"][::2]]
    taken = [
        next(way for way in trail.WAYS if turn == f"{way} {stage[way]}")
        for turn, stage in zip(turns, row["stages"], strict=True)
    ]
    assert 0.2 < np.mean([way != row["way"] for way in taken]) < 0.8
    environment.reset(row)
    assert environment.step("by air").done


@pytest.mark.slow
def test_a_run_trains_on_folded_episodes(context_folding, tmp_path):
    save_hf(str(tmp_path / "model"), MODEL, params(), tokenizer=make_tokenizer(TEMPLATE))
    config = context_folding.get_config("smoke")
    config.model = PretrainedModel(path=str(tmp_path / "model"))
    config.actor.args = {"make": "test_rollouts_folding:Long", "keep": 1, "most": 2, "discard_beyond": 200, "turns": 6}
    # Of 16 random bytes one is a character of this kind, so that turns end and the environment answers.
    config.sampling.stop_strings = tuple(map(chr, range(32, 127)))
    train(config, str(tmp_path / "run"))
    first = next(iter(run_metrics(tmp_path / "run")))
    assert first["play/failed"] == 0 and first["rollout/logprob_gap_max"] < 2e-5
    assert first["play/conversations"] > 1
