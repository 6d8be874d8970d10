"""DoRA: the lengths of columns beside adapters that turn them, by NumPy and in files of PEFT."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as safetensors
from test_models_lora import BASE, CONFIG, IDS, adapted, outputs

from rljax.models import (
    Experts,
    Lora,
    hidden_states,
    init_adapters,
    init_params,
    load_peft,
    logits,
    merged_params,
    read_lora,
    save_peft,
    side_by_side,
    with_adapters,
)
from rljax.sampling import Request, Sampler, SamplerSpec, TurnDecoder, TurnDecoderSpec, sampling_params
from rljax.training import LoraConfig

DORA = Lora(rank=3, alpha=6.0, targets=("q", "o", "gate", "down"), dora=True)
PLAIN = dataclasses.replace(DORA, dora=False)


def trained(lora=DORA, size=0.3):
    """Adapters, and lengths, that have moved away from where they begin."""
    fresh = init_adapters(adapted(lora), jax.random.key(1), BASE)
    noise = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(fresh))))
    return jax.tree.map(lambda x: x * (1 + size * jax.random.normal(next(noise), x.shape)) + size / 10, fresh)


def by_hand(adapters):
    """{name: (W + scale A B, its columns' lengths, the lengths that were learned)}, in float64."""
    parts = {}
    for name in DORA.targets:
        down, up, norm = (
            np.asarray(adapters["layers"][f"{name}_lora_{end}"], np.float64) for end in ("a", "b", "norm")
        )
        turned = np.asarray(BASE["layers"][name], np.float64) + 2.0 * down @ up
        parts[name] = turned, np.sqrt((turned**2).sum(axis=1)), norm
    return parts


def test_fresh_ones_change_nothing_whatever_they_begin_over():
    """But for the rounding of a length over itself."""
    params = init_params(adapted(DORA), jax.random.key(0))
    norm = params["layers"]["gate_lora_norm"]
    assert norm.shape == (CONFIG.num_layers, CONFIG.mlp_dim)
    np.testing.assert_allclose(norm, np.linalg.norm(BASE["layers"]["gate"], axis=1), rtol=1e-6)
    np.testing.assert_allclose(outputs(adapted(DORA), params), outputs(CONFIG, BASE), atol=1e-6)

    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
    own = init_adapters(adapted(DORA), jax.random.key(0), half)["layers"]["q_lora_norm"]
    assert own.dtype == jnp.float32
    np.testing.assert_allclose(own, np.linalg.norm(np.float32(half["layers"]["q"]), axis=1), rtol=1e-6)
    with pytest.raises(
        ValueError, match="begins with the lengths of the columns of the model's matrices; give it base"
    ):
        init_adapters(adapted(DORA), jax.random.key(0))


def test_columns_are_turned_and_have_lengths_of_their_own():
    """The matrix is m (W + scale A B) over the lengths of its columns: in the forward pass, and merged."""
    adapters = trained()
    layers = dict(BASE["layers"])
    for name, (turned, lengths, norm) in by_hand(adapters).items():
        layers[name] = np.float32(turned * (norm / lengths)[:, None])
    want = outputs(CONFIG, {**BASE, "layers": layers})
    params = with_adapters(BASE, adapters)
    np.testing.assert_allclose(outputs(adapted(DORA), params), want, atol=3e-6)
    np.testing.assert_allclose(outputs(CONFIG, merged_params(adapted(DORA), params)), want, atol=3e-6)
    plain = with_adapters(BASE, {"layers": {k: x for k, x in adapters["layers"].items() if "norm" not in k}})
    assert np.abs(want - outputs(adapted(PLAIN), plain)).max() > 0.01


def test_lengths_of_columns_are_constants_in_the_gradient():
    """With G the gradient of the matrix and g its gain: A has scale (G g) B^T, B scale A^T (G g), and a length the sum
    of its column of G (W + scale A B) over the length of that."""
    adapters = trained()
    params = with_adapters(BASE, adapters)
    cotangent = np.random.default_rng(0).normal(size=(*IDS.shape, CONFIG.vocab_size))

    def gradient(config, params):
        return jax.grad(lambda p: jnp.sum(outputs(config, p) * cotangent))(params)["layers"]

    of_matrix = gradient(CONFIG, merged_params(adapted(DORA), params))
    got = gradient(adapted(DORA), params)
    for name, (turned, lengths, norm) in by_hand(adapters).items():
        whole = np.asarray(of_matrix[name], np.float64)
        gained = whole * (norm / lengths)[:, None]
        down, up = (np.asarray(adapters["layers"][f"{name}_lora_{end}"], np.float64) for end in "ab")
        want = {
            "a": 2.0 * gained @ up.swapaxes(1, 2),
            "b": 2.0 * down.swapaxes(1, 2) @ gained,
            "norm": (whole * turned).sum(axis=1) / lengths,
        }
        for end, expected in want.items():
            np.testing.assert_allclose(got[f"{name}_lora_{end}"], expected, atol=2e-5 * np.abs(expected).max())


def test_both_decoders_sample_with_the_log_probs_of_the_merged_model():
    params = with_adapters(BASE, trained())
    prompt = [1, 2, 3]
    sampler = Sampler(adapted(DORA), SamplerSpec(prompt_slots=1, sample_slots=1, prompt_buckets=(4,), max_new_tokens=4))
    sampler.set_params(params)
    ((sample,),) = sampler.generate([Request(prompt, 0, [0])], sampling_params(), seed=0, step=0)
    spec = TurnDecoderSpec(conversations=1, rows=1, context_length=16, max_new_tokens=1, prefill_chunks=(4,))
    decoder = TurnDecoder(adapted(DORA), spec)
    decoder.set_params(params)
    whole = [*prompt, *map(int, sample.tokens)]
    (scored,) = decoder.score_prompts([whole])

    ids = jnp.zeros(IDS.shape, jnp.int32).at[0].set(jnp.asarray(whole))
    merged = merged_params(adapted(DORA), params)
    log_p = jax.nn.log_softmax(_logits(merged, ids)[0])
    want = log_p[jnp.arange(2, 6), jnp.asarray(sample.tokens)]
    np.testing.assert_allclose(sample.logprobs, want, atol=1e-5)
    np.testing.assert_allclose(scored.logprobs[-4:], want, atol=1e-5)


def _logits(params, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return logits(CONFIG, params, hidden_states(CONFIG, params, ids, positions, jnp.full(ids.shape, ids.shape[1])))


def test_a_folder_of_pefts_holds_them(tmp_path):
    adapters = trained()
    save_peft(tmp_path, adapted(DORA), with_adapters(BASE, adapters))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector"
    np.testing.assert_array_equal(tensors[name], adapters["layers"]["down_lora_norm"][1])
    assert len(tensors) == 3 * len(DORA.targets) * CONFIG.num_layers

    assert read_lora(tmp_path, CONFIG) == DORA
    jax.tree.map(np.testing.assert_array_equal, load_peft(tmp_path, adapted(DORA)), adapters)


def test_where_lengths_have_no_meaning_they_are_refused():
    experts = Experts(count=4, per_token=2, mlp_dim=12)
    with pytest.raises(
        ValueError, match=r"dora=True is of matrices that all tokens share, .*down, gate are of one expert"
    ):
        dataclasses.replace(CONFIG, family="qwen3_moe", qk_norm=True, experts=experts, lora=DORA)
    with pytest.raises(ValueError, match="lora's target head is of none; leave head out"):
        dataclasses.replace(DORA, targets=("q", "head"))
    with pytest.raises(ValueError, match="adapters side by side are plain ones, and dora=True gives"):
        dataclasses.replace(DORA, count=2)
    with pytest.raises(ValueError, match="adapters side by side are plain ones, and one has dora=True; merge it"):
        side_by_side([(PLAIN, trained(PLAIN)), (DORA, trained())])
    with pytest.raises(ValueError, match="dora=True has no effect with rank=0; leave one of them out"):
        LoraConfig(dora=True).check()
