"""Training adapters: what an update sees and changes, what it costs, and a run from its start to its exports."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_training_learner import CONFIG, FLAT, PACKINGS, assert_close, params, rollout, update_config

from rljax import losses as L
from rljax.algorithms import GRPO, PPO
from rljax.experiment import (
    CriticConfig,
    EvaluationConfig,
    FreshModel,
    LoraConfig,
    PretrainedModel,
    RunModel,
    WarmupConfig,
)
from rljax.experiment.build import build
from rljax.experiment.check import check
from rljax.experiment.convert import convert
from rljax.experiment.evaluate import checkpoint_params
from rljax.experiment.fine_tune import fine_tune
from rljax.experiment.memory import held_state
from rljax.experiment.train import train
from rljax.models import (
    TARGETS,
    Lora,
    adapters_of,
    base_config,
    base_params,
    init_adapters,
    load_model,
    load_peft,
    merged_params,
    save_hf,
    with_adapters,
)
from rljax.rollouts.engines.build import exporter
from rljax.testing import tiny_config
from rljax.testing.results import run_metrics
from rljax.text import CharTokenizer
from rljax.training import Critic, Learner, LossNeeds, OptimizerConfig, fingerprint, trained_of

ADAPTED = dataclasses.replace(CONFIG, lora=Lora(rank=2, alpha=4.0))
HEADED = dataclasses.replace(CONFIG, tied_embeddings=False, lora=Lora(rank=2, alpha=4.0, targets=TARGETS))
LOSS = GRPO(kl_coef=0.1).build().loss
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)


def started(noise=0.0, config=ADAPTED):
    """A model with adapters, fresh or moved away from there."""
    adapters = init_adapters(config, jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(adapters))))
    moved = jax.tree.map(lambda x: x + noise * jax.random.normal(next(keys), x.shape), adapters)
    base = jax.tree.map(jnp.copy, params())
    if not config.tied_embeddings:
        base["head"] = jnp.copy(base["embedding"][::-1])
    return with_adapters(base, moved)


def make(packing=FLAT, config=ADAPTED, **changes):
    update = update_config(packing, **changes)
    needs = LossNeeds(reference=True)
    return Learner(config, LOSS, OPTIMIZER, update, needs=needs, subtree=trained_of(config))


def gradient(packing):
    """That of adapters in all places that there are."""
    learner = make(PACKINGS[packing], HEADED)
    state = learner.init_state(started(0.05, HEADED))
    minibatch = learner.prepare(state, *rollout())[0]
    return jax.jit(learner.program.gradients)(state.trainable, minibatch, None, base=state.base)


def test_gradients_of_a_forest_are_those_of_its_rows():
    want = gradient("one microbatch")
    assert jax.tree.structure(want.grads) == jax.tree.structure(adapters_of(started(config=HEADED)))
    assert all(np.any(x) for x in jax.tree.leaves(want.grads))
    got = gradient("whole")
    assert_close(got.grads, want.grads)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)


def test_an_update_begins_at_the_reference_and_moves_adapters_alone():
    """The ratio to the old policy is 1 and the divergence from the reference 0; afterwards the reference still is the
    model with its adapters off, whose weights lie where they lay."""
    learner = make()
    model = started()
    before = jax.device_get(adapters_of(model))
    state = learner.init_state(model)
    batch, advantages = rollout()
    base = base_params(model)
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(base)]
    state, first = learner.update(state, learner.prepare(state, batch, advantages)[0])
    assert abs(first["loss/kl_ref"]) < 1e-12 and first["loss/approx_kl"] == 0
    state, second = learner.update(state, learner.prepare(state, batch, advantages)[0])
    assert second["loss/kl_ref"] > 1e-4
    learner.check()

    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.base)] == places
    assert jax.tree.structure(state.base) == jax.tree.structure(base)
    off = Learner(base_config(ADAPTED), LOSS, OPTIMIZER, update_config(FLAT)).score_rows(params(), batch)
    np.testing.assert_array_equal(learner.score_rows(learner.reference_params(state), batch), off)
    assert np.abs(learner.score_rows(learner.policy_params(state), batch) - off).max() > 1e-3
    for name, moved in state.trainable["layers"].items():
        assert (np.asarray(moved) != before["layers"][name]).mean() > 0.9, name


def test_optimizer_and_gradients_cost_less_than_a_twentieth():
    def cost(lora):
        shape = {"embed_dim": 512, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "mlp_dim": 1536}
        run = build(tiny_config(model=FreshModel(alphabet="abcdefgh=", num_layers=2, **shape), lora=lora))
        held = held_state(run)
        # A gradient is as large as what is trained.
        trained = sum(x.size * 4 for x in jax.tree.leaves(run.learner.abstract_state().trainable))
        return held["optimizer"] + trained, held["parameters"]

    whole, weights = cost(LoraConfig())
    adapted, held = cost(LoraConfig(rank=8, base_dtype="bfloat16"))
    assert adapted < 0.05 * whole
    assert held < 0.55 * weights


def test_a_critic_with_adapters_stands_on_the_weights_of_the_policy():
    critic = Critic(
        ADAPTED, L.value_loss(clip=0.2), OPTIMIZER, lambda batch: 1.0 * batch.action_mask, update_config(FLAT),
        subtree=trained_of(ADAPTED),
    )  # fmt: skip
    model = started()
    before = jax.device_get(adapters_of(model))
    state = critic.init_state(model)
    shared = {name: x for name, x in base_params(model).items() if name != "head"}
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.base)] == [
        x.unsafe_buffer_pointer() for x in jax.tree.leaves(shared)
    ]
    batch, _ = rollout()
    batch = critic.with_values(state, batch)
    assert not np.any(batch.values)
    # The head begins at 0, so that adapters move from the second update on.
    for _ in range(3):
        state, metrics = critic.update(state, critic.with_values(state, batch))
    assert metrics["critic/loss"] < 0.5
    assert set(state.trainable) == {"layers", "value_head", "value_bias"} and np.all(state.trainable["value_head"])
    for name, moved in state.trainable["layers"].items():
        assert np.any(np.asarray(moved) != before["layers"][name]), name


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of two layers in a folder."""
    folder = tmp_path_factory.mktemp("model")
    toy = tiny_config().model
    tokenizer = toy.tokenizer_of()
    decoder = toy.decoder_of(tokenizer)
    save_hf(folder, decoder, toy.params_of(decoder, None, 0), tokenizer=tokenizer)
    return folder


def config_of(source, **changes):
    lora = changes.pop("lora", LoraConfig(rank=2, base_dtype="bfloat16"))
    algorithm = GRPO(group_size=4, kl_coef=0.1)
    return tiny_config(model=PretrainedModel(path=str(source)), lora=lora, algorithm=algorithm, steps=2, **changes)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_its_adapters_go_everywhere(source, tmp_path):
    config = config_of(source)
    train(config, str(tmp_path / "whole"))
    train(dataclasses.replace(config, steps=1), str(tmp_path / "parts"))
    train(config, str(tmp_path / "parts"))
    assert run_metrics(tmp_path / "parts") == run_metrics(tmp_path / "whole")
    first, last = (run_metrics(tmp_path / "whole")[i] for i in (0, -1))
    assert abs(first["loss/kl_ref"]) < 1e-12 and last["loss/kl_ref"] > 0 and first["rollout/logprob_gap_max"] < 1e-5

    run = build(config)
    trained, step = checkpoint_params(run, str(tmp_path / "whole"))
    assert step == 2 and trained["layers"]["q"].dtype == jnp.bfloat16
    assert fingerprint(trained) == fingerprint(checkpoint_params(run, str(tmp_path / "parts"))[0])
    assert fingerprint(adapters_of(trained)) != fingerprint(adapters_of(run.initial_params()))

    # Out in PEFT's format, and in again as the beginning of another run.
    adapter = convert(str(tmp_path / "whole"), str(tmp_path / "adapter"), adapter=True)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(source)
    again = build(config_of(source, lora=LoraConfig(path=str(adapter), base_dtype="bfloat16")))
    assert again.decoder == run.decoder
    assert fingerprint(again.initial_params()) == fingerprint(trained)

    # Merged, from the run as from the folder: rounded once, in float32.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    merged = merged_params(run.decoder, wide)
    _, found = load_model(convert(str(tmp_path / "whole"), str(tmp_path / "merged")))
    assert fingerprint(found) == fingerprint(merged)
    decoder, base = load_model(source)
    _, found = load_model(convert(str(adapter), str(tmp_path / "from_adapter")))
    exact = merged_params(dataclasses.replace(decoder, lora=run.decoder.lora), with_adapters(base, wide))
    assert fingerprint(found) == fingerprint(exact)

    # What engines get is the same model.
    exporter(run.decoder, run.tokenizer, "float32", run.mesh)(tmp_path / "engine", trained)
    assert fingerprint(load_model(tmp_path / "engine")[1]) == fingerprint(merged)


@pytest.mark.slow
def test_a_run_over_few_bits_goes_on_bit_for_bit_and_is_written_as_it_computes(source, tmp_path):
    """Over a model's files and over a fresh model, whose weights the run folder keeps."""
    lora = LoraConfig(rank=2, base_dtype="int8")
    for name, model in (("files", PretrainedModel(path=str(source))), ("fresh", tiny_config().model)):
        config = dataclasses.replace(config_of(source, lora=lora), model=model)
        train(config, str(tmp_path / name / "whole"))
        train(dataclasses.replace(config, steps=1), str(tmp_path / name / "parts"))
        train(config, str(tmp_path / name / "parts"))
        metrics = run_metrics(tmp_path / name / "whole")
        assert run_metrics(tmp_path / name / "parts") == metrics
        assert abs(metrics[0]["loss/kl_ref"]) < 1e-12 and metrics[0]["rollout/logprob_gap_max"] < 1e-5

        run = build(config)
        trained, _ = checkpoint_params(run, str(tmp_path / name / "whole"))
        assert trained["layers"]["q"].dtype == jnp.int8
        merged = merged_params(run.decoder, trained)
        _, found = load_model(convert(str(tmp_path / name / "whole"), str(tmp_path / name / "merged")))
        assert fingerprint(found) == fingerprint(merged)
        behind = build(
            dataclasses.replace(config, lora=LoraConfig(), model=RunModel(path=str(tmp_path / name / "whole")))
        )
        assert fingerprint(behind.initial_params()) == fingerprint(merged)
        exporter(run.decoder, run.tokenizer, "float32", run.mesh)(tmp_path / name / "engine", trained)
        assert fingerprint(load_model(tmp_path / name / "engine")[1]) == fingerprint(merged)


@pytest.mark.slow
def test_a_critic_of_a_run_needs_no_weights_of_its_own(source, tmp_path):
    def held(**changes):
        config = dataclasses.replace(config_of(source, **changes), algorithm=PPO(), prompts_per_step=4)
        return held_state(build(config))["critic"]

    assert held(critic=CriticConfig(adapters=True)) < 0.4 * held()
    # What a whole critic starts from is not rounded further.
    whole = dataclasses.replace(config_of(source, lora=LoraConfig(rank=2, base_dtype="int8")), algorithm=PPO())
    train(dataclasses.replace(whole, steps=1, prompts_per_step=4), str(tmp_path / "int8"))
    config = dataclasses.replace(config_of(source, critic=CriticConfig(adapters=True)), algorithm=PPO())
    train(dataclasses.replace(config, steps=1), str(tmp_path))
    train(config, str(tmp_path))
    before, after = run_metrics(tmp_path)
    assert 0 < after["critic/loss"] != before["critic/loss"]


def spoken(examples):
    """Demonstrations: the first letter, four times."""
    return [dataclasses.replace(e, columns={**e.columns, "said": 4 * e.columns["answer"]}) for e in examples]


def supervised(model, **changes):
    """Each update sees all demonstrations."""
    lora = LoraConfig(rank=4, base_dtype="float32")
    warmup = WarmupConfig(
        steps=6, batch_size=51, completion_column="said", demonstrations=spoken,
        optimizer=OptimizerConfig(learning_rate=5e-3),
    )  # fmt: skip
    return tiny_config(model=model, warmup=warmup, evaluation=EvaluationConfig(problems=-1), **{"lora": lora} | changes)


@pytest.mark.slow
def test_supervised_fine_tuning_trains_adapters_that_another_run_begins_with(source, tmp_path):
    """The model's files stay as they are, and checkpoints hold adapters alone. A run that begins with them has the
    merged model, and is exported over a folder with what its own adapters stand beside."""
    weights = (source / "model.safetensors").read_bytes()
    fine_tune(supervised(PretrainedModel(path=str(source))), str(tmp_path / "first"))
    losses = [line["loss/nll"] for line in run_metrics(tmp_path / "first")]
    assert losses[-1] < losses[0] - 0.1
    assert (source / "model.safetensors").read_bytes() == weights and not (tmp_path / "first" / "base").exists()

    adapter = convert(str(tmp_path / "first"), str(tmp_path / "adapter"), adapter=True)
    run = build(supervised(PretrainedModel(path=str(source))))
    trained, step = checkpoint_params(run, str(tmp_path / "first"))
    stored = load_peft(adapter, run.decoder)
    assert step == 6 and fingerprint(stored) == fingerprint(adapters_of(trained))
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "host": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(tmp_path / "first" / "checkpoints", item_handlers=handlers) as manager:
        saved = manager.item_metadata(6)["state"].tree["trainable"]
    assert jax.tree.structure(saved) == jax.tree.structure(jax.tree.map(lambda x: 0, stored))

    # Another run, on the merged model.
    merged = load_model(convert(str(tmp_path / "first"), str(tmp_path / "merged")))[1]
    behind = supervised(RunModel(path=str(tmp_path / "first")))
    assert fingerprint(base_params(build(behind).initial_params())) == fingerprint(merged)
    fine_tune(behind, str(tmp_path / "second"))
    assert run_metrics(tmp_path / "second")[0]["loss/nll"] < losses[0] - 0.1
    check_exports(tmp_path, "second", merged)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_adapters_of_a_fresh_model_are_exported_over_its_weights(family, tmp_path):
    """Phi-3's files keep `q`, `k` and `v` in one tensor, and adapters of two of them."""
    lora = LoraConfig(rank=2, targets=("q", "v", "down"))
    config = supervised(dataclasses.replace(tiny_config().model, family=family), lora=lora)
    fine_tune(config, str(tmp_path / "run"))
    check_exports(tmp_path, "run", base_params(build(config).initial_params()))


def check_exports(folder, name, base):
    """Adapters are written over `base`, which lies in the run folder, and merged as from there."""
    adapter = convert(str(folder / name), str(folder / f"{name}_adapter"), adapter=True)
    where = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert where == str(folder / name / "base")
    assert fingerprint(load_model(where)[1]) == fingerprint(base)
    merged = [load_model(convert(str(x), str(folder / f"{x.name}_whole")))[1] for x in (folder / name, adapter)]
    assert fingerprint(merged[0]) == fingerprint(merged[1]) != fingerprint(base)


REFUSED = {
    "no rank": ({"lora": LoraConfig(alpha=8.0)}, r"config\.lora\.alpha=8\.0 has no effect with rank=0; leave one"),
    "a folder": ({"lora": LoraConfig(rank=4, path="x")}, r"config\.lora\.rank=4 has no effect with path='x', whose"),
    "a target": ({"lora": LoraConfig(rank=4, targets=("embed",))}, r"config\.lora\.targets=\('embed',\) must name"),
    "twice": ({"lora": LoraConfig(rank=4, targets=("q", "q"))}, r"config\.lora\.targets=.* each once"),
    "a critic": ({"critic": CriticConfig(adapters=True)}, r"config\.critic\.adapters=True trains adapters as config"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_settings_without_effect_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        check(tiny_config(**changes))


def test_adapters_that_are_not_there_cannot_be_written(source, tmp_path):
    with pytest.raises(ValueError, match=r"--adapter: .* has no adapters; leave it out"):
        convert(str(source), str(tmp_path / "out"), adapter=True)
    (tmp_path / "run" / "model").mkdir(parents=True)
    CharTokenizer("ab").save(tmp_path / "run" / "model")
    (tmp_path / "run" / "model" / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "run" / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    for text, says in {
        '{"base_dtype": "float32"}': r"^[^\n]*run has adapters, and [^\n]*base is missing, the folder with the weights",
        '{"base_model_name_or_path": 5}': r"^[^\n]*adapter_config.json: base_model_name_or_path=5 must be a name",
        f'{{"base_model_name_or_path": "{source}"}}': r"^[^\n]*adapter_config.json: base_dtype=None must be float32 or",
        "[1": r"^[^\n]*adapter_config.json is not valid JSON",
    }.items():
        (tmp_path / "run" / "model" / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            convert(str(tmp_path / "run"), str(tmp_path / "out"))
