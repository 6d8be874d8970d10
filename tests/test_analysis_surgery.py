"""Model Surgery: the sheet's numbers, what an edit touches and leaves alone, and the study end to end in its smallest
size."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.analysis.study_surgery import SurgeryOptions, reading, study_surgery, texts_of, verdict
from rljax.analysis.surgery import (
    PAPER_SHARE,
    add_to_gates,
    choose_neurons,
    edited,
    fit_probe,
    gate_columns,
    gate_directions,
    gate_inputs,
    of_each_layer,
)
from rljax.experiment import RowsData
from rljax.experiment.build import build
from rljax.models import DecoderConfig, Experts, hidden_states, init_params, logits

CONFIGS = Path(__file__).parent.parent / "configs" / "papers"
CONFIG = DecoderConfig(
    vocab_size=12, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24, tied_embeddings=True
)

GATE = np.array([[1, 0], [-1, 0.2], [0, 1], [-0.5, -0.5]]).T[None]
W = np.array([[0.8, 0.6]])


def test_the_worked_example():
    neurons = choose_neurons(GATE, W, 2)
    assert neurons.tolist() == [3, 1]  # cosines .8, -.666795, .6, -.989949
    assert choose_neurons(GATE, W, 2, region="firing").tolist() == [0, 2]

    new = np.asarray(add_to_gates(GATE, W, neurons, 0.5))[0]
    np.testing.assert_allclose(new.T, [[1, 0], [-0.6, 0.5], [0, 1], [-0.1, -0.2]], atol=1e-7)

    unwanted = np.array([0.9, 0.3])
    np.testing.assert_allclose(unwanted @ GATE[0], [0.9, -0.84, 0.3, -0.6], atol=1e-7)
    np.testing.assert_allclose(unwanted @ new, [0.9, -0.39, 0.3, -0.15], atol=1e-7)
    silu = [float(jax.nn.silu((unwanted @ gate)[3])) for gate in (GATE[0], new)]
    np.testing.assert_allclose(silu, [-0.212606, -0.069386], atol=1e-6)
    orthogonal = np.array([-0.3, 0.4])
    np.testing.assert_allclose(orthogonal @ new, [-0.3, 0.38, 0.4, -0.05], atol=1e-7)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def test_an_edit_moves_its_neurons_alone_by_one_rank_a_layer_and_is_undone_with_the_same_neurons(params):
    directions = gate_directions(CONFIG, params, np.arange(1.0, 17))
    gate = gate_columns(params)
    neurons = choose_neurons(gate, directions, 7)
    new = edited(params, directions, neurons, 1.5)

    change = np.asarray(new["layers"]["gate"] - params["layers"]["gate"], np.float64)
    moved = np.flatnonzero(np.abs(change).max(axis=1).reshape(-1))
    assert moved.tolist() == sorted(neurons.tolist())
    for layer in range(2):
        assert np.linalg.svd(change[layer], compute_uv=False)[1] < 1e-6

    # All else is the very same arrays, so nothing that the optimizer owns is written to.
    for name, leaf in params["layers"].items():
        assert name == "gate" or new["layers"][name] is leaf
    assert all(new[name] is params[name] for name in params if name != "layers")
    same = edited(params, directions, neurons, 0.0)
    np.testing.assert_array_equal(same["layers"]["gate"], params["layers"]["gate"])
    undone = edited(new, directions, neurons, -1.5)
    np.testing.assert_allclose(undone["layers"]["gate"], params["layers"]["gate"], atol=1e-7)
    assert choose_neurons(gate_columns(new), directions, 7).tolist() != neurons.tolist()


def test_a_direction_asks_of_a_gate_what_it_asks_of_the_final_states():
    rng = np.random.default_rng(0)
    params = init_params(CONFIG, jax.random.key(1))
    layers = {**params["layers"], "mlp_norm": jnp.asarray(rng.uniform(0.5, 2, (2, 16)), jnp.float32)}
    params = {**params, "layers": layers, "final_norm": jnp.asarray(rng.uniform(0.5, 2, 16), jnp.float32)}
    direction = rng.normal(size=16)
    found = np.asarray(gate_directions(CONFIG, params, direction), np.float64)

    x = rng.normal(size=(50, 16))
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True))
    final = x * np.asarray(params["final_norm"]) @ direction
    for layer in range(2):
        at_gate = x * np.asarray(layers["mlp_norm"][layer]) @ found[layer]
        ratio = at_gate / final
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
        assert ratio[0] > 0
        norms = np.linalg.norm(np.asarray(layers["gate"][layer]), axis=0)
        assert np.linalg.norm(found[layer]) == pytest.approx(np.median(norms), rel=1e-5)


def test_gates_without_a_norm_are_never_chosen_and_too_many_are_refused():
    gate = np.concatenate([GATE, np.zeros((1, 2, 1))], axis=2)
    assert sorted(choose_neurons(gate, W, 4).tolist()) == [0, 1, 2, 3]
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"{count} neurons cannot be edited; a number from 1 to 4 can"):
            choose_neurons(gate, W, count)


def test_experts_of_a_layer_stand_side_by_side():
    config = dataclasses.replace(CONFIG, experts=Experts(count=3, per_token=1, mlp_dim=5), family="qwen3_moe")
    params = init_params(config, jax.random.key(0))
    directions = gate_directions(config, params, np.arange(1.0, 17))
    # Layer 1, expert 2, neuron 4.
    new = edited(params, directions, np.array([1 * 15 + 2 * 5 + 4]), 2.0)
    change = np.array(new["layers"]["gate"] - params["layers"]["gate"])
    np.testing.assert_allclose(change[1, 2, :, 4], 2 * np.asarray(directions[1]), rtol=1e-5, atol=1e-7)
    change[1, 2, :, 4] = 0
    assert not change.any()


def test_a_probe_is_the_minimum_of_its_loss():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    features = rng.normal(size=(200, 3)) + 3 + labels[:, None] * [1.0, 0, -0.5]
    probe = fit_probe(features, labels, ridge=0.02)

    def loss(w, b):
        margin = (2 * labels - 1) * (features @ w + b)
        return np.log1p(np.exp(-margin)).mean() + 0.01 * w @ w

    best = loss(probe.direction, probe.bias)
    for step in 1e-3 * np.vstack([np.eye(4), -np.eye(4), rng.normal(size=(20, 4))]):
        assert loss(probe.direction + step[:3], probe.bias + step[3]) > best
    right = np.mean((features @ probe.direction + probe.bias > 0) == labels)
    assert probe.accuracy(features, labels) == right > 0.6
    with pytest.raises(ValueError, match="texts of both kinds"):
        fit_probe(features, np.ones(200, int))


def test_directions_of_each_layer_are_scaled_to_its_own_gates(params):
    rng = np.random.default_rng(0)
    own = rng.normal(size=(2, 16))
    found = np.asarray(of_each_layer(params, own))
    for layer in range(2):
        norm = np.median(np.linalg.norm(np.asarray(params["layers"]["gate"][layer]), axis=0))
        np.testing.assert_allclose(found[layer], own[layer] / np.linalg.norm(own[layer]) * norm, rtol=1e-5)


def test_gates_read_the_states_that_their_layer_shows_them(params):
    tokens = jnp.array([[3, 1, 4, 1, 5]])
    found = np.asarray(gate_inputs(CONFIG, params, tokens))
    assert found.shape == (2, 1, 5, 16)
    first = jax.tree.map(lambda x: x[:1], params["layers"])
    one = {**params, "layers": first, "final_norm": first["mlp_norm"][0]}
    # Without its MLP, what a layer returns is what the norm before the MLP reads.
    one["layers"] = {**first, "down": jnp.zeros_like(first["down"])}
    config = dataclasses.replace(CONFIG, num_layers=1)
    positions = jnp.arange(5)[None]
    want = hidden_states(config, one, tokens, positions, jnp.full((1, 5), 5))
    np.testing.assert_allclose(found[0], want, atol=1e-6)
    # The second layer reads what the whole first one returns.
    both = {**params["layers"], "down": params["layers"]["down"].at[1].set(0.0)}
    two = {**params, "layers": both, "final_norm": params["layers"]["mlp_norm"][1]}
    np.testing.assert_allclose(found[1], hidden_states(CONFIG, two, tokens, positions, jnp.full((1, 5), 5)), atol=1e-6)


def test_experts_that_all_tokens_share_are_of_the_mlp(params):
    """Gates read what stands before it, whatever these make of it; an edit would leave them as they are."""
    experts = Experts(count=3, per_token=1, mlp_dim=5, shared=1)
    config = dataclasses.replace(CONFIG, num_layers=1, experts=experts, family="qwen3_moe")
    mixture = init_params(config, jax.random.key(0))
    tokens = jnp.array([[3, 1, 4, 1, 5]])
    louder = {**mixture, "layers": {**mixture["layers"], "shared_down": 9 * mixture["layers"]["shared_down"]}}
    np.testing.assert_array_equal(gate_inputs(config, mixture, tokens), gate_inputs(config, louder, tokens))
    with pytest.raises(ValueError, match="experts that all tokens share, have gates beside those"):
        gate_columns(mixture)


@pytest.fixture(scope="module")
def smoke():
    """The config of the study in its smallest size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CONFIGS)
        spec = importlib.util.spec_from_file_location("paper_model_surgery", CONFIGS / "model_surgery.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module.get_config("smoke")


def test_a_model_is_at_no_distance_from_itself_and_its_perplexity_is_that_of_a_loop(smoke):
    run = build(smoke)
    texts = texts_of(run, run.dataset.test[:3])
    params = jax.tree.map(lambda x: 5 * x, run.initial_params())
    perplexity, divergence = reading(run.decoder, params, params, texts, batch=2)
    assert divergence == 0

    losses = []
    for tokens, mask in zip(texts.tokens, texts.mask, strict=True):
        row = jnp.asarray(tokens[mask][None])
        positions = jnp.arange(row.shape[1])[None]
        states = hidden_states(run.decoder, params, row, positions, jnp.full_like(row, row.shape[1]))
        scores = np.asarray(logits(run.decoder, params, states)[0], np.float64)
        scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
        losses += [-scores[i, token] for i, token in enumerate(tokens[mask][1:])]
    assert perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


@pytest.mark.slow
def test_the_study_measures_the_model_and_every_edit_of_every_kind(smoke, tmp_path):
    report = study_surgery(smoke, str(tmp_path), SurgeryOptions(alphas=(-1.0, 1.0), seeds=1, texts=100))
    assert json.loads((tmp_path / "surgery.json").read_text())["lines"] == report["lines"]
    kinds = ("silent neurons", "firing neurons", "random neurons", "random direction")
    wanted = [("none", 0.0), *((kind, alpha) for kind in kinds for alpha in (-1.0, 1.0))]
    assert [(line["kind"], line["alpha"]) for line in report["lines"]] == wanted
    base, *edits = report["lines"]
    assert (base["moved"], base["perplexity_ratio"], base["divergence"]) == ([0.0], [1.0], 0.0)
    assert all(line["divergence"] > 0 and line["perplexity_ratio"][0] != 1 for line in edits)
    assert set(base["rewards"]) == {"unwanted", "real_words"}


def test_a_verdict_goes_by_the_best_alpha_that_keeps_perplexity():
    def line(kind, moved, ratio):
        return {"kind": kind, "moved": [moved], "perplexity_ratio": [ratio]}

    lines = [line("none", 0, 1), line("own", -0.5, 1.5), line("own", -0.2, 1.02), line("random", -0.1, 1.0)]
    assert "own -0.200, random -0.100; the edit moves it further than every control" in verdict(lines)
    lines.append(line("random", -0.3, 1.0))
    assert "own -0.200, random -0.300; a control does as well or better" in verdict(lines)
    # What only raises it does not count as a fall.
    assert "own +0.000" in verdict([lines[0], line("own", 0.4, 1.0), lines[3]])


def test_what_cannot_be_studied_is_refused_in_one_line(smoke, tmp_path):
    for options, said in (
        (SurgeryOptions(alphas=(0.0,)), "--alphas=0.0 must be finite numbers other than 0"),
        (SurgeryOptions(share=0.0), f"--share=0.0 must be above 0 and at most 1; the paper's is {PAPER_SHARE:.4f}"),
        (SurgeryOptions(seeds=0), "--seeds=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said.replace("(", r"\(")):
            study_surgery(smoke, str(tmp_path), options)
    calm = RowsData("shouted_words:text_rows", args={"size": 1}, test_args={"size": 2, "seed": 1})
    with pytest.raises(ValueError, match=r"config.data: the training rows have \['0'\] as `unwanted`; each needs 1"):
        study_surgery(dataclasses.replace(smoke, data=calm), str(tmp_path))
    unjudged = dataclasses.replace(smoke, actor=dataclasses.replace(smoke.actor, rewards=smoke.actor.rewards[1:]))
    with pytest.raises(ValueError, match=r"config.actor.rewards has real_words; the study needs one named `unwanted`"):
        study_surgery(unjudged, str(tmp_path))
