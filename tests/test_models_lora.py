"""Adapters: what they add, their gradient, their files, and several of them in one model."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as safetensors
from objectives import float64

from rljax.models import (
    MATRICES,
    DecoderConfig,
    Experts,
    Lora,
    adapters_of,
    base_params,
    fresh_config,
    hidden_states,
    init_adapters,
    init_params,
    is_adapter,
    load_peft,
    logits,
    merged_params,
    read_lora,
    save_hf,
    save_peft,
    side_by_side,
    with_adapters,
)
from rljax.sampling import Request, Sampler, SamplerSpec, TurnDecoder, TurnDecoderSpec, sampling_params
from rljax.sampling.score import score_tokens
from rljax.types import Packed

CONFIG = DecoderConfig(
    vocab_size=24, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24, max_position=64
)
LORA = Lora(rank=3, alpha=6.0)
IDS = np.arange(14).reshape(2, 7) % CONFIG.vocab_size


def adapted(lora, config=CONFIG):
    return dataclasses.replace(config, lora=lora)


def trained(lora, seed=1, size=0.3):
    """Adapters that have moved away from where they begin."""
    fresh = init_adapters(adapted(lora), jax.random.key(seed))
    noise = iter(jax.random.split(jax.random.key(seed + 100), len(jax.tree.leaves(fresh))))
    return jax.tree.map(lambda x: x + size * jax.random.normal(next(noise), x.shape), fresh)


@functools.partial(jax.jit, static_argnums=0)
def outputs(config, params):
    positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    hidden = hidden_states(config, params, jnp.asarray(IDS), positions, jnp.full(IDS.shape, IDS.shape[1]))
    return logits(config, params, hidden)


BASE = init_params(CONFIG, jax.random.key(0))


def test_fresh_adapters_add_exactly_nothing_and_leave_other_weights_as_they_are():
    config = adapted(LORA)
    params = init_params(config, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, base_params(params), BASE)
    np.testing.assert_array_equal(outputs(config, params), outputs(CONFIG, BASE))
    for name in MATRICES:
        rows = BASE["layers"][name].shape[1]
        down = np.abs(params["layers"][f"{name}_lora_a"])
        assert 0.8 < down.max() * rows**0.5 <= 1 and not np.any(params["layers"][f"{name}_lora_b"])


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_adapters_add_scaled_products_to_each_matrix(rank_stabilized):
    """By NumPy's products of the matrices, in both directions of the scale."""
    lora = dataclasses.replace(LORA, rank_stabilized=rank_stabilized, targets=("q", "o", "down"))
    adapters = trained(lora)
    by_hand = dict(BASE["layers"])
    for name in lora.targets:
        down, up = (np.asarray(adapters["layers"][f"{name}_lora_{end}"], np.float64) for end in "ab")
        scale = 6 / 3**0.5 if rank_stabilized else 6 / 3
        by_hand[name] = np.asarray(by_hand[name] + scale * (down @ up), np.float32)
    want = outputs(CONFIG, {**BASE, "layers": by_hand})
    params = with_adapters(BASE, adapters)
    np.testing.assert_allclose(outputs(adapted(lora), params), want, atol=2e-6)
    np.testing.assert_allclose(outputs(CONFIG, merged_params(adapted(lora), params)), want, atol=2e-6)
    assert np.abs(want - outputs(CONFIG, BASE)).max() > 0.1


def test_the_gradient_is_the_full_one_projected():
    """With G the gradient of the merged matrix: that of A is scale G B^T, that of B scale A^T G."""
    with float64():
        wide = dataclasses.replace(CONFIG, dtype="float64", param_dtype="float64")
        config = adapted(LORA, wide)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), with_adapters(BASE, trained(LORA)))
        cotangent = np.random.default_rng(0).normal(size=(*IDS.shape, CONFIG.vocab_size))

        def gradient(config, params):
            return jax.grad(lambda p: jnp.sum(outputs(config, p) * cotangent))(params)["layers"]

        layers = {}
        for name in MATRICES:
            down, up = (params["layers"][f"{name}_lora_{end}"] for end in "ab")
            layers[name] = params["layers"][name] + LORA.scale * down @ up
        whole = gradient(wide, {**BASE, "layers": {**base_params(params)["layers"], **layers}})
        got = gradient(config, params)
        for name in MATRICES:
            down, up = (np.asarray(params["layers"][f"{name}_lora_{end}"]) for end in "ab")
            of_matrix = np.asarray(whole[name])
            want = {"a": of_matrix @ up.swapaxes(1, 2), "b": down.swapaxes(1, 2) @ of_matrix}
            for end, projected in want.items():
                scale = np.abs(projected).max()
                np.testing.assert_allclose(got[f"{name}_lora_{end}"], LORA.scale * projected, atol=1e-6 * scale)


HEADED = dataclasses.replace(LORA, targets=("q", "head"))


def test_an_adapter_of_the_head_adds_its_product_to_the_logits():
    """By NumPy's product of the matrices, which the merged model has; fresh ones add nothing."""
    config = adapted(HEADED)
    assert init_adapters(config, jax.random.key(0))["head_lora_a"].shape == (CONFIG.embed_dim, 3)
    np.testing.assert_array_equal(outputs(config, init_params(config, jax.random.key(0))), outputs(CONFIG, BASE))

    params = with_adapters(BASE, trained(HEADED))
    down, up = (np.asarray(params[f"head_lora_{end}"], np.float64) for end in "ab")
    head = np.asarray(BASE["head"] + 2 * (down @ up).T, np.float32)
    merged = merged_params(config, params)
    np.testing.assert_allclose(merged["head"], head, atol=1e-6)
    want = outputs(CONFIG, merged)
    np.testing.assert_allclose(outputs(config, params), want, atol=4e-6)
    assert np.abs(want - outputs(CONFIG, merged | {"head": BASE["head"]})).max() > 0.1


def test_the_head_in_chunks_has_the_gradient_of_the_whole_one_projected():
    """Log-probs and gradients of two chunks are those of one, and of the merged head's gradient G: scale G^T B^T of A,
    scale A^T G^T of B."""
    length = IDS.shape[1]
    index = np.broadcast_to(np.arange(length), IDS.shape)
    packed = Packed(
        tokens=IDS,
        positions=index,
        predecessor=index - 1,
        subtree_end=np.full(IDS.shape, length),
        score_index=np.where(index > 0, index, -1),
    )
    weights = np.random.default_rng(0).normal(size=(2, *IDS.shape)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def scored(config, params, chunk):
        def total(params):
            found = jnp.stack(score_tokens(config, params, packed, chunk=chunk))
            return jnp.sum(found * weights), found

        return jax.grad(total, has_aux=True)(params)

    params = with_adapters(BASE, trained(HEADED))
    config = adapted(HEADED)
    whole, found = scored(config, params, 512)
    parts, in_chunks = scored(config, params, 8)
    np.testing.assert_allclose(in_chunks, found, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), parts, whole)

    merged, of_merged = scored(CONFIG, merged_params(config, params), 512)
    np.testing.assert_allclose(found, of_merged, atol=4e-6)
    down, up = (np.asarray(params[f"head_lora_{end}"], np.float64) for end in "ab")
    of_head = np.asarray(merged["head"], np.float64)
    for end, want in {"a": of_head.T @ up.T, "b": down.T @ of_head.T}.items():
        np.testing.assert_allclose(whole[f"head_lora_{end}"], 2 * want, atol=2e-5 * np.abs(want).max())


def test_a_sampler_has_the_log_probs_of_the_trainer_where_the_head_is_adapted():
    config = adapted(HEADED)
    params = with_adapters(BASE, trained(HEADED))
    sampler = Sampler(config, SamplerSpec(prompt_slots=1, sample_slots=2, prompt_buckets=(4,), max_new_tokens=4))
    sampler.set_params(params)
    ((sample, *_),) = sampler.generate([Request([1, 2, 3], 0, range(2))], sampling_params(), seed=0, step=0)
    ids = np.zeros(IDS.shape, np.int32)
    ids[:, :7] = [1, 2, 3, *sample.tokens]
    positions = jnp.broadcast_to(jnp.arange(7), ids.shape)
    hidden = hidden_states(config, params, jnp.asarray(ids), positions, jnp.full(ids.shape, 7))
    log_p = jax.nn.log_softmax(logits(config, params, hidden), axis=-1)[0, 2:6]
    np.testing.assert_allclose(sample.logprobs, log_p[np.arange(4), sample.tokens], atol=1e-5)


def test_an_adapter_of_the_head_is_a_module_of_peft(tmp_path):
    config = adapted(HEADED)
    adapters = trained(HEADED)
    save_peft(tmp_path, config, with_adapters(BASE, adapters))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "lm_head"]
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    np.testing.assert_array_equal(tensors["base_model.model.lm_head.lora_A.weight"], adapters["head_lora_a"].T)
    np.testing.assert_array_equal(tensors["base_model.model.lm_head.lora_B.weight"], adapters["head_lora_b"].T)
    assert read_lora(tmp_path, CONFIG) == HEADED
    jax.tree.map(np.testing.assert_array_equal, load_peft(tmp_path, config), adapters)


def test_a_head_that_is_the_embedding_or_side_by_side_has_no_adapter():
    with pytest.raises(ValueError, match=r"lora's targets q, head: this model's head is its embedding .*leave head"):
        dataclasses.replace(CONFIG, tied_embeddings=True, lora=HEADED)
    for refused in (
        lambda: adapted(dataclasses.replace(HEADED, count=2)),
        lambda: side_by_side([(HEADED, trained(HEADED))]),
    ):
        with pytest.raises(ValueError, match=r"adapters side by side are of layers, and lora's target head is of none"):
            refused()
    # A critic has another head.
    assert set(init_adapters(dataclasses.replace(adapted(HEADED), value_head=True), jax.random.key(0))) == {"layers"}


def test_folders_of_peft_go_both_ways(tmp_path):
    """The names and keys are those that PEFT 0.21 writes for a Llama and reads back."""
    lora = dataclasses.replace(LORA, targets=("q", "down"), rank_stabilized=True)
    params = with_adapters(BASE, trained(lora))
    save_peft(tmp_path / "one", adapted(lora), params, base="somewhere")
    said = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "somewhere" and said["use_rslora"] and said["lora_alpha"] == 6
    assert said["target_modules"] == ["q_proj", "down_proj"]
    tensors = safetensors.load_file(tmp_path / "one" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_A.weight"], params["layers"]["down_lora_a"][1].T)
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_B.weight"], params["layers"]["down_lora_b"][1].T)
    assert len(tensors) == 2 * 2 * CONFIG.num_layers

    found = read_lora(tmp_path / "one", CONFIG)
    assert found == lora
    back = load_peft(tmp_path / "one", adapted(found))
    assert jax.tree.structure(back) == jax.tree.structure(trained(lora))
    jax.tree.map(np.testing.assert_array_equal, back, trained(lora))
    save_peft(tmp_path / "two", adapted(found), with_adapters(BASE, back), base="somewhere")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_each_expert_has_an_adapter_of_its_own(tmp_path):
    """It adds what the merged matrices of the experts say, by NumPy; a folder of PEFT has one module for each."""
    experts = Experts(count=4, per_token=2, mlp_dim=12)
    plain = dataclasses.replace(CONFIG, family="qwen3_moe", qk_norm=True, experts=experts)
    lora = dataclasses.replace(LORA, targets=("k", "gate", "down"))
    config = dataclasses.replace(plain, lora=lora)
    base = init_params(plain, jax.random.key(0))
    fresh = init_params(config, jax.random.key(0))
    assert fresh["layers"]["gate_lora_a"].shape == (2, 4, 16, 3)
    np.testing.assert_array_equal(outputs(config, fresh), outputs(plain, base))

    adapters = {"layers": {}}
    merged = dict(base["layers"])
    rng = np.random.default_rng(0)
    for name in lora.targets:
        down, up = (rng.normal(size=fresh["layers"][f"{name}_lora_{end}"].shape) / 2 for end in "ab")
        merged[name] = np.asarray(merged[name] + lora.scale * (down @ up), np.float32)
        adapters["layers"] |= {f"{name}_lora_a": jnp.float32(down), f"{name}_lora_b": jnp.float32(up)}
    params = with_adapters(base, adapters)
    want = outputs(plain, {**base, "layers": merged})
    np.testing.assert_allclose(outputs(config, params), want, atol=2e-6)
    assert np.abs(want - outputs(plain, base)).max() > 1e-2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged_params(config, params)["layers"], merged
    )

    save_peft(tmp_path, config, params)
    assert read_lora(tmp_path, plain) == lora
    jax.tree.map(np.testing.assert_array_equal, load_peft(tmp_path, config), adapters)
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.experts.2.down_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[name], adapters["layers"]["down_lora_a"][1, 2].T)
    with pytest.raises(ValueError, match="adapters side by side are of matrices that all tokens share, and lora's"):
        dataclasses.replace(config, lora=dataclasses.replace(lora, count=2))


def test_a_target_is_of_shared_experts_and_of_layers_without_experts_too(tmp_path):
    """What the adapters add is what the merged model computes; a folder of PEFT names each module."""
    experts = Experts(count=4, per_token=2, mlp_dim=12, selection_bias=True, shared=2, dense_layers=1)
    plain = dataclasses.replace(CONFIG, family="glm4_moe", experts=experts)
    lora = dataclasses.replace(LORA, targets=("k", "gate"))
    config = dataclasses.replace(plain, lora=lora)
    rng = np.random.default_rng(0)
    params = init_params(config, jax.random.key(0))
    for stack in ("dense_layers", "layers"):
        own = {name: rng.normal(size=x.shape) / 2 for name, x in params[stack].items() if is_adapter(name)}
        params[stack] |= {name: jnp.float32(x) for name, x in own.items()}
    assert params["layers"]["shared_gate_lora_a"].shape == (1, 16, 3)
    assert params["dense_layers"]["gate_lora_b"].shape == (1, 3, CONFIG.mlp_dim)

    got = outputs(config, params)
    np.testing.assert_allclose(got, outputs(plain, merged_params(config, params)), atol=2e-6)
    assert np.abs(got - outputs(plain, base_params(params))).max() > 1e-2

    save_peft(tmp_path, config, params)
    assert read_lora(tmp_path, plain) == lora
    jax.tree.map(np.testing.assert_array_equal, load_peft(tmp_path, config), adapters_of(params))
    names = set(safetensors.load_file(tmp_path / "adapter_model.safetensors"))
    modules = ["0.mlp.gate_proj", "0.self_attn.k_proj", "1.mlp.shared_experts.gate_proj", "1.mlp.experts.3.gate_proj"]
    assert {f"base_model.model.model.layers.{module}.lora_B.weight" for module in modules} <= names
    assert len(names) == 2 * (2 + 1 + 1 + 4)


CHANGED = {
    "peft_type": ("LOHA", "peft_type 'LOHA' is not supported; supported is LORA"),
    "use_dora": ("yes", "use_dora='yes' must be true or false"),
    "rank_pattern": ({"q_proj": 8}, "rank_pattern=.* is not supported"),
    "modules_to_save": (["lm_head"], "modules_to_save=.* is not supported"),
    "r": (5, "lora_A.weight is .*, the config implies"),
    "init_lora_weights": ("pissa_niter_4", "init_lora_weights='pissa_niter_4' is not supported"),
    "alora_invocation_tokens": ([1, 2], "alora_invocation_tokens=.* is not supported"),
    "use_rslora": ("false", "use_rslora='false' must be true or false"),
    "target_modules": ([["q_proj"]], r"target_modules=\[\['q_proj'\]\] must be a list of names of modules"),
    "lora_alpha": (0, "lora's alpha=0.0 must be a finite number above 0"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_an_adapter_of_another_kind_would_change_is_refused(name, tmp_path):
    save_peft(tmp_path, adapted(LORA), with_adapters(BASE, trained(LORA)))
    file = tmp_path / "adapter_config.json"
    value, message = CHANGED[name]
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path, adapted(read_lora(tmp_path, CONFIG)))


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter_config.json; give a folder that PEFT or rljax"):
        read_lora(tmp_path, CONFIG)
    save_peft(tmp_path, adapted(LORA), with_adapters(BASE, trained(LORA)))
    deep = dataclasses.replace(CONFIG, num_layers=3, lora=LORA)
    with pytest.raises(ValueError, match=r"lacks tensor base_model.*layers\.2"):
        load_peft(tmp_path, deep)
    few = adapted(dataclasses.replace(LORA, targets=("q",)))
    save_peft(tmp_path / "few", few, with_adapters(BASE, trained(few.lora)))
    file = tmp_path / "few" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["q_proj", "lm_head", "mlp.up_proj"]}))
    with pytest.raises(ValueError, match=r"target_modules names lm_head, of which adapter_model.* has no tensor"):
        read_lora(tmp_path / "few", CONFIG)
    with pytest.raises(ValueError, match=r"a llama config.json cannot express lora="):
        save_hf(tmp_path / "whole", adapted(LORA), with_adapters(BASE, trained(LORA)))
    for targets in ((), ("q", "embedding")):
        with pytest.raises(ValueError, match=r"lora's target '(|embedding)' is none of q, k"):
            Lora(rank=2, alpha=1.0, targets=targets)


JOINED = dataclasses.replace(CONFIG, family="phi3")
MODULES = {"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": ("gate", "up")}


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_a_module_of_several_matrices_has_their_adapters_one_behind_the_other(rank_stabilized, tmp_path):
    """What the file adds to a module, with the rank and scale that it says of it, is what each matrix has; of one that
    has none, nothing."""
    lora = dataclasses.replace(LORA, targets=("q", "v", "o", "up"), rank_stabilized=rank_stabilized)
    params = with_adapters(BASE, trained(lora))
    save_peft(tmp_path, adapted(lora, JOINED), params)
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["rank_pattern"] == {"qkv_proj": 9, "gate_up_proj": 6}
    assert said["target_modules"] == ["o_proj", "qkv_proj", "gate_up_proj"]

    for module, names in MODULES.items():
        start = f"base_model.model.model.layers.1.{module}"
        down, up = (np.float64(tensors[f"{start}.lora_{end}.weight"]) for end in "AB")
        kind = module.rpartition(".")[2]
        rank = said["rank_pattern"][kind]
        scale = said["alpha_pattern"][kind] / (rank**0.5 if rank_stabilized else rank)
        added = []
        for name in names:
            own = np.zeros(BASE["layers"][name].shape[1:])
            if name in lora.targets:
                own = np.float64(params["layers"][f"{name}_lora_a"][1]) @ params["layers"][f"{name}_lora_b"][1]
            added.append(lora.scale * own.T)
        np.testing.assert_allclose(scale * up @ down, np.concatenate(added), atol=1e-6)

    # Read again, what had none has one that adds nothing and is as it was.
    found = read_lora(tmp_path, JOINED)
    assert found == dataclasses.replace(lora, targets=("q", "k", "v", "o", "gate", "up"))
    back = load_peft(tmp_path, adapted(found, JOINED))["layers"]
    for name, want in trained(lora)["layers"].items():
        np.testing.assert_array_equal(back[name], want)
    assert not any(np.any(back[f"{name}_lora_{end}"]) for name in ("k", "gate") for end in "ab")
    with pytest.raises(ValueError, match=r"lora_B.weight adapts more than q, k, and the rest of it would be lost"):
        load_peft(tmp_path, adapted(dataclasses.replace(found, targets=("q", "k", "o", "gate", "up")), JOINED))


def test_an_adapter_that_several_matrices_share_is_read_into_each(tmp_path):
    """PEFT trains one A for all matrices of a module."""
    rng = np.random.default_rng(0)
    start = "base_model.model.model.layers"
    down = {i: rng.normal(size=(3, 16)) for i in range(2)}
    up = {i: rng.normal(size=(48, 3)) for i in range(2)}
    tensors = {f"{start}.{i}.mlp.gate_up_proj.lora_A.weight": np.float32(x) for i, x in down.items()}
    tensors |= {f"{start}.{i}.mlp.gate_up_proj.lora_B.weight": np.float32(x) for i, x in up.items()}
    safetensors.save_file(tensors, tmp_path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["gate_up_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))

    found = read_lora(tmp_path, JOINED)
    assert found == dataclasses.replace(LORA, targets=("gate", "up"))
    layers = load_peft(tmp_path, adapted(found, JOINED))["layers"]
    for i in range(2):
        for name, rows in (("gate", slice(0, 24)), ("up", slice(24, 48))):
            np.testing.assert_array_equal(layers[f"{name}_lora_a"][i], np.float32(down[i]).T)
            np.testing.assert_array_equal(layers[f"{name}_lora_b"][i], np.float32(up[i])[rows].T)

    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"rank_pattern": {"gate_up_proj": 3}}))
    with pytest.raises(ValueError, match=r"rank_pattern={'gate_up_proj': 3}, .*supported is none, or those of modules"):
        read_lora(tmp_path, JOINED)


def test_lengths_are_of_whole_modules(tmp_path):
    lora = Lora(rank=2, alpha=4.0, targets=("o", "up"), dora=True)
    config = adapted(lora, JOINED)
    with pytest.raises(ValueError, match="phi3 keeps up with others in gate_up_proj, which PEFT's DoRA takes whole"):
        save_peft(tmp_path, config, init_params(config, jax.random.key(0)))
    both = adapted(dataclasses.replace(lora, targets=("o", "gate", "up")), JOINED)
    params = init_params(both, jax.random.key(0))
    save_peft(tmp_path, both, params)
    assert read_lora(tmp_path, JOINED) == both.lora
    jax.tree.map(np.testing.assert_array_equal, load_peft(tmp_path, both), adapters_of(params))
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    norm = tensors["base_model.model.model.layers.1.mlp.gate_up_proj.lora_magnitude_vector"]
    want = np.concatenate([np.linalg.norm(params["layers"][name][1], axis=0) for name in ("gate", "up")])
    np.testing.assert_allclose(norm, want, rtol=1e-6)


def test_an_adapter_of_a_parameter_is_no_folder_of_peft(tmp_path):
    """gpt-oss has all experts' matrices in one, which is the weight of no module."""
    experts = Experts(count=2, per_token=1, mlp_dim=CONFIG.mlp_dim, biases=True)
    config = dataclasses.replace(CONFIG, family="gpt_oss", experts=experts, lora=Lora(2, 4.0, ("o", "down")))
    with pytest.raises(ValueError, match="gpt_oss keeps down of all experts in the parameter down_proj, which is no"):
        save_peft(tmp_path, config, init_params(config, jax.random.key(0)))


def test_a_kind_of_layer_that_an_adapter_leaves_as_it_is_has_one_of_zeros(tmp_path):
    """An adapter of a hybrid's attention alone, as PEFT writes one: its delta rule has a `q` of its own."""
    sizes = {"vocab_size": 24, "num_layers": 4, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    plain = fresh_config("qwen3_5_text", mlp_dim=24, max_position=64, **sizes)
    start = "base_model.model.model.layers.3.self_attn"
    down = np.ones((3, 16), np.float32)
    up = {"q": np.ones((32, 3), np.float32), "v": np.ones((8, 3), np.float32)}
    tensors = {}
    for name, x in up.items():
        tensors |= {f"{start}.{name}_proj.lora_A.weight": down, f"{start}.{name}_proj.lora_B.weight": x}
    safetensors.save_file(tensors, tmp_path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))

    found = read_lora(tmp_path, plain)
    params = load_peft(tmp_path, dataclasses.replace(plain, lora=found))
    adapted_stacks = {stack for stack, own in params.items() if any(np.any(x) for x in own.values())}
    assert len(params) == 2 and len(adapted_stacks) == 1
    # One that is named has to be there.
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"target_modules": ["q_proj", "in_proj_qkv"]}))
    with pytest.raises(
        ValueError, match=r"target_modules names in_proj_qkv, of which adapter_model.safetensors has no"
    ):
        read_lora(tmp_path, plain)


def test_adapters_side_by_side_are_each_what_it_was():
    """Of different ranks, targets and scales."""
    kinds = [LORA, Lora(rank=2, alpha=1.0, targets=("v", "up"))]
    adapters = [trained(kinds[0], 1), trained(kinds[1], 2)]
    whole, stacked = side_by_side(list(zip(kinds, adapters, strict=True)))
    assert (whole.count, whole.rank, whole.targets) == (2, 3, MATRICES)
    for index, (lora, own) in enumerate(zip(kinds, adapters, strict=True)):
        for name in MATRICES:
            down, up = (np.asarray(stacked["layers"][f"{name}_lora_{end}"])[:, index] for end in "ab")
            added = whole.scale * down @ up
            want = 0 * added
            if name in lora.targets:
                want = lora.scale * own["layers"][f"{name}_lora_a"] @ own["layers"][f"{name}_lora_b"]
            np.testing.assert_allclose(added, want, atol=1e-6)


def test_rows_of_several_adapters_are_those_of_each_alone():
    """Interleaved in one batch; prompts that differ in their adapter alone are answered otherwise."""
    lora = dataclasses.replace(LORA, targets=("q", "down"))
    adapters = [trained(lora, 1), trained(lora, 2)]
    spec = SamplerSpec(prompt_slots=3, sample_slots=2, prompt_buckets=(4,), max_new_tokens=5)
    prompts = [[1, 2], [1, 2], [3], [4, 5, 6]]
    requests = [Request(prompt, 0, range(3), adapter=i % 2) for i, prompt in enumerate(prompts)]

    def samples(config, params, requests):
        sampler = Sampler(config, spec)
        sampler.set_params(params)
        return sampler.generate(requests, sampling_params(), seed=0, step=0)

    whole, stacked = side_by_side([(lora, own) for own in adapters])
    mixed = samples(adapted(whole), with_adapters(BASE, stacked), requests)
    for index, own in enumerate(adapters):
        alone = [request._replace(adapter=0) for request in requests[index::2]]
        want = samples(adapted(lora), with_adapters(BASE, own), alone)
        flat = zip(itertools.chain(*mixed[index::2]), itertools.chain(*want), strict=True)
        for a, b in flat:
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert all(abs(a.logprobs[0] - b.logprobs[0]) > 1e-3 for a, b in zip(mixed[0], mixed[1], strict=True))


def test_several_adapters_are_refused_where_there_is_one():
    whole, stacked = side_by_side([(LORA, trained(LORA)), (LORA, trained(LORA, 2))])
    config = adapted(whole)
    params = with_adapters(BASE, stacked)
    with pytest.raises(ValueError, match=r"packed sequences have one adapter, and this model has 2"):
        outputs(config, params)
    with pytest.raises(ValueError, match=r"2 adapters side by side cannot be merged"):
        merged_params(config, params)
    with pytest.raises(ValueError, match=r"2 adapters side by side are not one folder"):
        save_peft("nowhere", config, params)
    with pytest.raises(ValueError, match=r"conversations have one adapter, and this model has 2"):
        TurnDecoder(config, TurnDecoderSpec(conversations=2, rows=2, context_length=16, max_new_tokens=4))
    with pytest.raises(ValueError, match=r"give at least one adapter"):
        side_by_side([(whole, stacked)])
    sampler = Sampler(config, SamplerSpec(prompt_slots=1, sample_slots=1, prompt_buckets=(4,), max_new_tokens=2))
    sampler.set_params(params)
    with pytest.raises(ValueError, match=r"adapter=2 is none of the model's 2, which count from 0"):
        sampler.generate([Request([1], 0, [0], adapter=2)], sampling_params(), seed=0, step=0)
