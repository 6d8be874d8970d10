"""A run over turns from its config: trained, evaluated, resumed, with every way to collect episodes."""

import dataclasses
import json
import threading

import jax
import numpy as np
import pytest
from breaking import break_off
from docs_metrics import unexplained
from test_rollouts_endpoint import CONFIG as MODEL
from test_rollouts_endpoint import make_tokenizer, params

import rljax.experiment.train
from rljax.algorithms import ARPO, GRPO, M2PO, ActGuideRL, AgentRL, DecoupledPPO, DeepDive, RoleAgent, TreeGRPO
from rljax.experiment import (
    BlackBox,
    CheckpointConfig,
    Config,
    EvaluationConfig,
    FailedTasks,
    FreshModel,
    GroupsConfig,
    Guided,
    MultiTurn,
    PretrainedModel,
    RolloutConfig,
    RowsData,
    SamplingConfig,
    UpdateConfig,
    WarmupConfig,
)
from rljax.experiment.build import build
from rljax.experiment.check import check
from rljax.experiment.train import train
from rljax.models import save_hf
from rljax.tasks import Example
from rljax.testing import rollout_records, run_metrics


def demonstrations(examples):
    """Two turns each: what is said and what comes back take turns."""
    return [Example(f"{e.prompt}:", {"completion": ["5;", " >\n", f"{e.columns['number']}"]}) for e in examples]


ASCII = "".join(chr(i) for i in range(32, 127)) + "\n"


@pytest.mark.slow
def test_accelerators_compute_in_bfloat16_and_train_float32_weights(monkeypatch):
    def dtypes(where, **changes):
        monkeypatch.setattr("rljax.experiment.model.platform", lambda: where)
        fresh = FreshModel(**changes)
        shipped = PretrainedModel(**changes)
        decoders = [source.decoder_of(source.tokenizer_of()) for source in (fresh, shipped)]
        assert {decoder.param_dtype for decoder in decoders} == {"float32"}
        return {decoder.dtype for decoder in decoders}

    assert dtypes("cpu") == {"float32"}
    assert dtypes("gpu") == dtypes("tpu") == dtypes("cpu", dtype="bfloat16") == {"bfloat16"}
    assert dtypes("tpu", dtype="float32") == {"float32"}


def test_the_dtype_is_chosen_by_the_devices_of_the_run(monkeypatch):
    """They need not be those of this machine."""
    meshes = []

    def platform():
        meshes.append(jax.sharding.get_abstract_mesh())
        return "gpu"

    monkeypatch.setattr("rljax.experiment.model.platform", platform)
    run = build(make_config())
    assert run.decoder.dtype == "bfloat16"
    assert [mesh.axis_names for mesh in meshes] == [run.mesh.axis_names]


def make_config(algorithm=None, alphabet="n0123456789:;?y<> \n", **changes) -> Config:
    base = Config(
        steps=2,
        prompts_per_step=4,
        model=FreshModel(
            alphabet=alphabet,
            num_layers=1,
            embed_dim=32,
            num_heads=2,
            num_kv_heads=2,
            head_dim=16,
            mlp_dim=64,
            max_position=2048,
        ),
        data=RowsData(rows="agent_tasks:rows", args={"size": 40}, test_args={"size": 6, "first": 100}),
        actor=MultiTurn(
            make="agent_tasks:Ask",
            tool_format="agent_tasks:FORMAT",
            context_length=512,
            prefill_chunks=(8, 64, 256),
            workers=4,
            answers_after=1,  # so that two runs can be compared to the last bit
        ),
        algorithm=algorithm or GRPO(group_size=4, kl_coef=0.0),
        sampling=SamplingConfig(max_new_tokens=6, truncated_is_wrong=False),
        update=UpdateConfig(pack_length=512, head_chunk=256),
        evaluation=EvaluationConfig(problems=4, samples=2, batch_prompts=4),
        checkpoint=CheckpointConfig(every=0),
        warmup=WarmupConfig(steps=2, batch_size=8, demonstrations=demonstrations),
    )
    return dataclasses.replace(base, **changes)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_over_turns_trains_and_reports(tmp_path):
    summary = train(make_config(), str(tmp_path))
    first = lines(tmp_path)[0]
    assert summary["steps"] == 2 and np.isfinite(first["loss/total"])
    assert 0 < first["play/busy_share"] <= 1 and first["play/turns"] >= 16
    assert first["rollout/component/turns"] > 0 and 0 < first["play/reused_share"] < 1
    record = json.loads((tmp_path / "rollouts" / "step_000001.jsonl").read_text().splitlines()[0])
    assert record["prompt"].startswith("n") and record["components"]["turns"] >= 0 and record["completion"]
    assert first["rollout/logprob_gap_max"] < 2e-5


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        pytest.param(TreeGRPO(chains=2, points=1, rounds=1), {}, id="tree_grpo"),
        pytest.param(ARPO(chains=2, points=1), {}, id="arpo", marks=pytest.mark.slow),
        pytest.param(RoleAgent(group_size=4), {}, id="role_agent", marks=pytest.mark.slow),
        pytest.param(DeepDive(group_size=4), {}, id="deepdive", marks=pytest.mark.slow),
        pytest.param(
            AgentRL(group_size=4),
            {"stale_share": 0.5, "stale_every": 2, "unfinished_reward": -0.2},
            id="agentrl",
            marks=pytest.mark.slow,
        ),
        pytest.param(DecoupledPPO(group_size=4), {"groups_in_flight": 2}, id="in_flight", marks=pytest.mark.slow),
    ],
)
def test_methods_train_over_turns(tmp_path, algorithm, changes):
    config = make_config(algorithm)
    config.actor = dataclasses.replace(config.actor, **changes)
    train(config, str(tmp_path))
    assert len(lines(tmp_path)) == 2


def test_groups_in_flight_are_not_lost_when_a_run_breaks_off(tmp_path, monkeypatch):
    """What a checkpoint holds of groups under way is trained on after the resume, or still under way at the end."""
    config = make_config(DecoupledPPO(group_size=4), steps=4, checkpoint=CheckpointConfig(every=1))
    config.actor = dataclasses.replace(config.actor, groups_in_flight=3)
    states = []

    def saved(run, step, state=rljax.experiment.train.host_state):
        states.append(state(run, step)["actor"])
        return state(run, step)

    monkeypatch.setattr(rljax.experiment.train, "host_state", saved)
    break_off(config, tmp_path, before=2)
    under_way = {group["example_id"] for group in states[-1]["groups"]}
    assert len(under_way) == 3

    train(config, str(tmp_path))
    trained = {
        json.loads(line)["prompt_id"]
        for number in (3, 4)
        for line in (tmp_path / "rollouts" / f"step_{number:06d}.jsonl").read_text().splitlines()
    }
    left = {group["example_id"] for group in states[-1]["groups"]}
    assert len(trained) == 8 and under_way <= trained | left and len(left) == 3
    assert [line["play/groups_in_flight"] for line in lines(tmp_path)] == [3] * 4


@pytest.mark.slow
def test_a_share_of_older_weights_is_the_same_behind_a_resume(tmp_path):
    config = make_config(AgentRL(group_size=4), steps=4, checkpoint=CheckpointConfig(every=1))
    # Weights move whatever the rewards are.
    config.optimizer = dataclasses.replace(config.optimizer, learning_rate=0.1, weight_decay=1.0)
    config.actor = dataclasses.replace(config.actor, stale_share=0.5, stale_every=3)
    train(config, str(tmp_path / "straight"))
    assert [line["rollout/staleness_max"] for line in lines(tmp_path / "straight")] == [0, 1, 2, 0]

    break_off(config, tmp_path / "resumed", before=2)
    train(config, str(tmp_path / "resumed"))

    # Which conversations are computed together depends on the time, and rounds the last bits.
    straight, resumed = (rollout_records(tmp_path / name) for name in ("straight", "resumed"))
    for number, records in straight.items():
        for one, other in zip(records, resumed[number], strict=True):
            assert one["tokens"] == other["tokens"]
            np.testing.assert_allclose(one["logprobs"], other["logprobs"], atol=1e-5)


@pytest.fixture(scope="module")
def with_rules(tmp_path_factory):
    """A config whose environment fails at times, with groups in flight that keep their keys and values; and the folder
    of its run."""
    folder = tmp_path_factory.mktemp("rules")
    config = make_config(DecoupledPPO(group_size=4), steps=4, checkpoint=CheckpointConfig(every=2))
    config.actor = dataclasses.replace(
        config.actor, make="agent_tasks:Fragile", groups_in_flight=2, at_hand_over="keep", answers_after=1
    )
    config.rollout = RolloutConfig(groups=GroupsConfig(incomplete="reweight", max_age=1))
    train(config, str(folder))
    return config, folder


def test_incomplete_groups_are_weighed_or_drawn_again_in_a_run(with_rules):
    _, folder = with_rules
    found = lines(folder)
    assert all(np.isfinite(line["loss/total"]) for line in found)
    assert sum(line["rollout/incomplete_groups"] for line in found) > 0
    assert sum(line["rollout/invalid_rewards"] for line in found) > 0
    assert not set().union(*map(unexplained, found))
    for line in found:
        records = (folder / "rollouts" / f"step_{line['step']:06d}.jsonl").read_text().splitlines()
        trained = [json.loads(record) for record in records if "advantage" in record]
        groups = [trained[i : i + 4] for i in range(0, len(trained), 4)]
        assert len(groups) == 4
        # More than half of every group has a reward, and what broke down says why.
        assert all(sum(record["reward"] is not None for record in group) > 2 for group in groups)
        assert all("the tool is gone" in r["error"] for g in groups for r in g if r["reward"] is None)


@pytest.mark.slow
def test_a_run_that_keeps_keys_and_values_goes_on_with_the_same_numbers(with_rules, tmp_path):
    """It breaks off behind a rollout that is no longer in its checkpoint, and would lack what that had computed."""
    config, folder = with_rules
    break_off(config, tmp_path, before=3)
    train(config, str(tmp_path))
    assert run_metrics(tmp_path) == run_metrics(folder)


def test_building_a_run_opens_nothing(tmp_path):
    save_hf(str(tmp_path / "model"), MODEL, params(), tokenizer=make_tokenizer())
    before = set(threading.enumerate())
    agent = BlackBox(agent="agent_tasks:chat", context_length=128, prefill_chunks=(16, 64))
    model = PretrainedModel(path=str(tmp_path / "model"))
    for changes in ({}, {"actor": agent, "model": model}):
        run = build(make_config(**changes))
        assert run.actor.cache_bytes() > 0 and set(threading.enumerate()) == before


@pytest.mark.slow
def test_guided_rollouts_over_turns(tmp_path):
    config = make_config(ActGuideRL(group_size=4), ASCII)
    config.actor = Guided(config.actor, column="actions", probes=1)
    config.curriculum = FailedTasks()
    train(config, str(tmp_path))
    assert all(0 <= line["play/hard_share"] <= 1 and "play/probe_tokens" in line for line in lines(tmp_path))


@pytest.mark.slow
def test_a_black_box_agent_is_trained_from_a_config(tmp_path):
    save_hf(str(tmp_path / "model"), MODEL, params(), tokenizer=make_tokenizer())
    config = make_config(
        model=PretrainedModel(path=str(tmp_path / "model")),
        actor=BlackBox(
            agent="agent_tasks:chat", context_length=128, prefill_chunks=(16, 64), workers=8, timeout_s=60.0
        ),
        update=UpdateConfig(pack_length=128, head_chunk=256),
        warmup=WarmupConfig(steps=0),
    )
    train(config, str(tmp_path / "run"))
    line = lines(tmp_path / "run")[0]
    assert line["play/failed"] == 0 and line["rollout/component/turns"] == 2
    assert line["rollout/logprob_gap_max"] < 2e-5


def test_the_plan_counts_the_conversations():
    actor = build(make_config()).actor
    (decoder,) = actor.decoders
    decoder._allocate()
    held = jax.tree.leaves((decoder._kept, decoder._cache))
    assert actor.cache_bytes() == sum(x.nbytes for x in held)


def guided(config, **settings):
    config.actor = Guided(config.actor, **settings)


def in_flight(config, **settings):
    config.algorithm = DecoupledPPO(group_size=4)
    config.actor = dataclasses.replace(config.actor, groups_in_flight=2, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.actor, "make", ""), "config.actor.make is empty"),
        (lambda c: setattr(c.actor, "context_length", 6), "context_length=6, the length of an episode"),
        (lambda c: setattr(c.actor, "tool_format", "xml"), "tool format 'xml'"),
        (lambda c: setattr(c.actor, "stale_share", 1.0), "stale_share=1.0"),
        (lambda c: setattr(c.actor.limits, "turns", 0), "turns is 0"),
        (lambda c: guided(c, probes=0), "probes=0"),
        (lambda c: guided(c, column=""), "config.actor.column is empty"),
        (lambda c: (setattr(c.actor, "groups_in_flight", 2), guided(c)), "groups_in_flight=2 and guidance exclude"),
        (lambda c: setattr(c.actor, "groups_in_flight", 2), "groups_in_flight=2 trains on .* GRPO takes them for"),
        (lambda c: setattr(c.actor, "steps_in_flight", 2), r"steps_in_flight=2 has no effect .*groups_in_flight=0"),
        (
            lambda c: (in_flight(c, steps_in_flight=2), setattr(c.rollout.groups, "max_age", 3)),
            r"groups\.max_age=3 and config\.actor\.steps_in_flight=2 both bound",
        ),
        (lambda c: setattr(c.rollout.groups, "max_age", 3), r"groups\.max_age=3 has no effect"),
        (
            lambda c: (
                setattr(c, "algorithm", TreeGRPO(chains=2, points=1)),
                setattr(c.rollout.groups, "incomplete", "pad"),
            ),
            "incomplete='pad' counts independent members",
        ),
        (lambda c: setattr(c.actor, "stale_share", 0.25), r"stale_share=0.25 trains on .*\.use_sampler_logprobs=True"),
        (guided, r"actor=Guided\(...\) trains on tokens that other policies sampled, and GRPO"),
        (
            lambda c: (setattr(c, "algorithm", M2PO(group_size=4)), setattr(c.update, "use_sampler_logprobs", True)),
            "use_sampler_logprobs=True makes .* M2PO corrects by their difference",
        ),
        (lambda c: setattr(c, "actor", BlackBox(agent="")), "config.actor.agent is empty"),
        (
            lambda c: (
                setattr(c, "actor", BlackBox(agent="a:b", context_length=512)),
                setattr(c, "algorithm", TreeGRPO(chains=2, points=1)),
            ),
            "cannot be forked",
        ),
        (
            lambda c: setattr(c, "actor", BlackBox(agent="a:b", context_length=512, trained_conversations=3)),
            "multiple of config.actor.trained_conversations=3",
        ),
    ],
)
def test_impossible_configs_are_refused(change, message):
    config = make_config()
    change(config)
    with pytest.raises(ValueError, match=message):
        check(config, jax.device_count())


@pytest.mark.parametrize(
    ("recipe", "changes"), [(AgentRL, {}), (M2PO, {}), (GRPO, {"use_sampler_logprobs": True})], ids=str
)
def test_rollouts_of_older_policies_are_for_losses_that_know_who_sampled(recipe, changes):
    config = make_config(recipe(group_size=4))
    config.actor.groups_in_flight = 2
    config.update = dataclasses.replace(config.update, **changes)
    check(config, jax.device_count())


def test_an_environment_that_cannot_be_made_is_refused():
    config = make_config()
    config.actor.args = {"mots": 3}
    with pytest.raises(ValueError, match=r"agent_tasks:Ask with args \{'mots': 3\} makes no environment: TypeError"):
        build(config)
