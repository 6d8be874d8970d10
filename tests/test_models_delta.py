"""The gated delta rule over forests and step by step, beside loops in float64 and the rule of transformers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_trees import depths, ends, path_to, random_parents

from rljax.models import (
    Delta,
    Experts,
    Forward,
    Lora,
    base_config,
    config_from_hf,
    config_to_hf,
    dequantized_params,
    fresh_config,
    hidden_states,
    init_params,
    logits,
    merged_params,
    quantized_params,
)
from rljax.models.delta import (
    ancestor,
    delta_step,
    forest_delta,
    parents,
    path_convolution,
    prompt_delta,
    unit_length,
)

CHAIN = [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
FOREST = [-1, 0, 1, 2, 1, 4, 5, 0, 7, -1, 9, 10, 9, 12, 9, -1]


def inputs(seed, count, heads=(2, 4), dims=(5, 3), fade=1.0):
    rng = np.random.default_rng(seed)
    (k_heads, v_heads), (d, e) = heads, dims
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    q, k = (unit(rng.normal(size=(count, k_heads, d))) for _ in range(2))
    v = rng.normal(size=(count, v_heads, e))
    g = -fade * rng.random((count, v_heads))
    return q, k, v, g, rng.random((count, v_heads))


def looped(parent, q, k, v, g, beta):
    """What each token reads, by walking its path from the root."""
    out = np.zeros_like(v)
    share = v.shape[1] // k.shape[1]
    for token in range(len(parent)):
        for head in range(v.shape[1]):
            out[token, head] = q[token, head // share] @ looped_memory(parent, token, head, k, v, g, beta)
    return out


def looped_memory(parent, token, head, k, v, g, beta):
    """What a head remembers behind a token."""
    share = v.shape[1] // k.shape[1]
    memory = np.zeros((k.shape[-1], v.shape[-1]))
    for i in path_to(parent, token):
        key = k[i, head // share]
        memory = memory * np.exp(g[i, head])
        memory += np.outer(key, beta[i, head] * (v[i, head] - key @ memory))
    return memory


def single(x, padding=0):
    return jnp.pad(jnp.asarray(x, jnp.float32), [(0, padding), *[(0, 0)] * (np.ndim(x) - 1)])[None]


def over(parent, arrays, padding=0, block=64):
    end = jnp.asarray(ends(parent, padding))[None]
    out = forest_delta(*(single(x, padding) for x in arrays), end, parents(end), block=block)
    return out[0]


class TestParents:
    @pytest.mark.parametrize("parent", [CHAIN, FOREST, *(random_parents(seed, 60) for seed in range(4))])
    def test_of_forests(self, parent):
        found = parents(jnp.asarray(ends(parent, padding=3))[None])[0]
        assert found[: len(parent)].tolist() == parent

    def test_ancestors(self):
        parent = random_parents(7, 50)
        for distance in range(4):
            found = ancestor(jnp.asarray(parent)[None], distance)[0]
            paths = [path_to(parent, token) for token in range(50)]
            assert found.tolist() == [path[-1 - distance] if distance < len(path) else -1 for path in paths]


class TestForest:
    @pytest.mark.parametrize("block", [4, 64])
    @pytest.mark.parametrize("parent", [CHAIN, FOREST, random_parents(1, 75), random_parents(2, 40)])
    def test_is_the_loop_over_each_path(self, parent, block):
        arrays = inputs(len(parent), len(parent))
        np.testing.assert_allclose(
            over(parent, arrays, padding=5, block=block)[: len(parent)], looped(parent, *arrays), atol=2e-6
        )

    def test_padding_reads_nothing(self):
        assert not over(FOREST, inputs(0, len(FOREST)), padding=5)[len(FOREST) :].any()

    def test_long_fades_are_exact(self):
        # By the end the memory has faded by more than 1,500 on the logarithm, where float32 tells steps of 1e-4 alone.
        parent = [*range(-1, 399), 99, *range(400, 499)]
        arrays = inputs(3, 500, heads=(1, 1), fade=8.0)
        np.testing.assert_allclose(over(parent, arrays), looped(parent, *arrays), atol=2e-6)

    def test_equal_keys_do_not_blow_up(self):
        # Tokens that repeat: powers of the triangle have entries beyond 1e18.
        q, k, v, g, beta = inputs(5, 200, heads=(1, 1))
        k, g, beta = np.ones_like(k) / k.shape[-1] ** 0.5, 0 * g, 0 * beta + 1
        parent = list(range(-1, 199))
        np.testing.assert_allclose(over(parent, (q, k, v, g, beta)), looped(parent, q, k, v, g, beta), atol=2e-6)

    @pytest.mark.parametrize("parent", [FOREST, random_parents(4, 20)])
    def test_gradient_is_that_of_the_loop(self, parent):
        arrays = inputs(9, len(parent), heads=(1, 2), dims=(3, 2))
        weights = np.random.default_rng(0).normal(size=arrays[2].shape)

        def loss(*arrays):
            return jnp.sum(over(parent, arrays, padding=2, block=8)[: len(parent)] * weights)

        found = jax.grad(loss, argnums=range(5))(*(jnp.asarray(x, jnp.float32) for x in arrays))
        for which, own in enumerate(found):
            # Central differences in float64, number by number.
            wanted = np.zeros_like(arrays[which])
            for place in np.ndindex(wanted.shape):
                moved = []
                for step in (1e-6, -1e-6):
                    other = [x.copy() for x in arrays]
                    other[which][place] += step
                    moved.append(np.sum(looped(parent, *other) * weights))
                wanted[place] = (moved[0] - moved[1]) / 2e-6
            np.testing.assert_allclose(own, wanted, atol=2e-5)

    def test_is_the_chunked_rule_of_transformers(self):
        # Float32 kernels of torch differ by processor (4e-5 of these numbers on one, 3e-7 on another), ours less:
        # so theirs names the definition, and the loop in float64 says how near to it we are.
        torch = pytest.importorskip("torch")
        rule = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5").torch_chunk_gated_delta_rule
        rng = np.random.default_rng(0)
        q, k = (rng.normal(size=(100, 4, 8)) for _ in range(2))
        _, _, v, g, beta = inputs(1, 100, heads=(4, 4), dims=(8, 6))
        theirs, memory = rule(
            *(torch.tensor(x, dtype=torch.float32)[None] for x in (q, k, v)),
            g=torch.tensor(g, dtype=torch.float32)[None],
            beta=torch.tensor(beta, dtype=torch.float32)[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )

        parent = list(range(-1, 99))
        unit = lambda x: x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)  # noqa: E731
        exact = looped(parent, unit(q) * 8**-0.5, unit(k), v, g, beta)
        behind = [looped_memory(parent, 99, head, unit(k), v, g, beta) for head in range(4)]
        np.testing.assert_allclose(theirs[0].numpy(), exact, atol=1e-4)
        np.testing.assert_allclose(memory[0].numpy(), behind, atol=1e-4)

        q, k = (unit_length(jnp.asarray(x, jnp.float32)) for x in (q, k))
        np.testing.assert_allclose(over(parent, (q * 8**-0.5, k, v, g, beta)), exact, atol=2e-6)
        _, own = prompt_delta(*(single(x) for x in (k, k, v, g, beta)), jnp.asarray([100]))
        np.testing.assert_allclose(own[0], behind, atol=2e-6)


class TestSteps:
    def test_steps_behind_a_memory_are_the_forest(self):
        arrays = inputs(2, 30)
        whole = over(list(range(-1, 29)), arrays)
        q, k, v, g, beta = (jnp.asarray(x, jnp.float32) for x in arrays)
        for begun in (0, 1, 17):
            out, memory = prompt_delta(*(single(x) for x in arrays), jnp.asarray([begun]))
            np.testing.assert_allclose(out[0, :begun], whole[:begun], atol=2e-6)
            memory = memory[0]
            for token in range(begun, 30):
                out, memory = delta_step(memory, q[token], k[token], v[token], g[token], beta[token])
                np.testing.assert_allclose(out, whole[token], atol=2e-6)


class TestConvolution:
    def test_along_each_path(self):
        parent = random_parents(3, 40)
        rng = np.random.default_rng(0)
        x = rng.normal(size=(40, 6))
        kernel = rng.normal(size=(6, 1, 4))
        wanted = np.zeros_like(x)
        for token in range(40):
            for distance, i in enumerate(reversed(path_to(parent, token)[-4:])):
                wanted[token] += x[i] * kernel[:, 0, 3 - distance]
        end = jnp.asarray(ends(parent))[None]
        own = path_convolution(single(x), jnp.asarray(kernel, jnp.float32), parents(end))
        np.testing.assert_allclose(own[0], wanted, atol=1e-6)


SIZES = {"vocab_size": 29, "num_layers": 4, "embed_dim": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
FRESH = fresh_config("qwen3_5_text", mlp_dim=24, max_position=64, **SIZES | {"num_layers": 8})
# Two blocks of two layers.
HYBRID = dataclasses.replace(
    FRESH, num_layers=4, delta=dataclasses.replace(FRESH.delta, layers=(True, False, True, False))
)
PARAMS = jax.tree.map(lambda x: 5 * x if x.ndim == 3 else x, init_params(HYBRID, jax.random.key(0)))


def outputs(config, params, ids, parent, padding=0, remat="none"):
    """Log-probs behind each token of one packed row."""
    row = jnp.asarray([*ids, *[0] * padding])[None]
    depth, end = (jnp.asarray(of(parent, padding))[None] for of in (depths, ends))
    return _logprobs(config, Forward(remat=remat), params, row, depth, end)[0, : len(parent)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logprobs(config, forward, params, row, depth, end):
    hidden = hidden_states(config, params, row, depth, end, forward=forward)
    return jax.nn.log_softmax(logits(config, params, hidden))


class TestDecoder:
    def test_fresh_models_have_three_such_layers_and_then_one_that_attends(self):
        assert FRESH.delta.layers == (True, True, True, False) * 2
        assert FRESH.blocks == ((4, 2),) and FRESH.attending == 2
        assert {stack: len(layers) for stack, layers in FRESH.stacks.items()} == {"delta_layers": 6, "layers": 2}
        assert config_from_hf(config_to_hf(FRESH)) == FRESH
        assert config_from_hf(config_to_hf(HYBRID)) == HYBRID and HYBRID.blocks == ((2, 2),)

    def test_a_forest_is_its_paths(self):
        parent = random_parents(5, 24)
        ids = np.random.default_rng(0).integers(0, HYBRID.vocab_size, 24)
        packed = outputs(HYBRID, PARAMS, ids, parent, padding=4)
        for leaf in sorted(set(range(24)) - set(parent)):
            path = path_to(parent, leaf)
            alone = outputs(HYBRID, PARAMS, ids[path], list(range(-1, len(path) - 1)), padding=28 - len(path))
            np.testing.assert_allclose(packed[jnp.asarray(path)], alone, atol=2e-5)

    def test_other_patterns_are_scanned_layer_by_layer(self):
        """The same layers in another order of kinds, beside a model of one layer after the other."""
        kinds = (False, True, True, False, True)
        own = dataclasses.replace(HYBRID, num_layers=5, delta=dataclasses.replace(HYBRID.delta, layers=kinds))
        assert own.blocks == ((5, 1),)
        ids = np.arange(9) % HYBRID.vocab_size
        params = init_params(own, jax.random.key(2))
        chain = list(range(-1, 8))
        whole = outputs(own, params, ids, chain)
        # With what the second layer of a kind adds gone, the model is one without it.
        silent = dict(params)
        silent["delta_layers"] = {
            name: x.at[1].set(0) if name in ("o", "down") else x for name, x in params["delta_layers"].items()
        }
        others = dataclasses.replace(own.delta, layers=kinds[:2] + kinds[3:])
        fewer = dataclasses.replace(own, num_layers=4, delta=others)
        taken = dict(params)
        taken["delta_layers"] = {name: x[jnp.asarray([0, 2])] for name, x in params["delta_layers"].items()}
        np.testing.assert_allclose(outputs(own, silent, ids, chain), outputs(fewer, taken, ids, chain), atol=1e-6)
        assert np.abs(whole - outputs(fewer, taken, ids, chain)).max() > 1e-5

    @pytest.mark.parametrize("remat", ["attention_saved", "full"])
    def test_what_is_computed_again_changes_no_gradient(self, remat):
        ids = np.arange(len(FOREST)) % HYBRID.vocab_size

        def loss(params, remat):
            return jnp.sum(outputs(HYBRID, params, ids, FOREST, remat=remat)[:, 3])

        plain, again = (jax.grad(loss)(PARAMS, kind) for kind in ("none", remat))
        # Rounding alone, of gradients through norms of what is nearly nothing.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), plain, again)

    def test_adapters_are_those_of_both_kinds_of_layers(self):
        config = dataclasses.replace(HYBRID, lora=Lora(rank=2, alpha=4.0))
        fresh = init_params(config, jax.random.key(1))
        names = {name for name in fresh["delta_layers"] if name.endswith("_lora_b")}
        assert names == {f"{name}_lora_b" for name in ("q", "k", "v", "o", "gate", "up", "down")}
        moved = {
            stack: {name: x + 0.1 if "lora" in name else x for name, x in fresh[stack].items()}
            for stack in config.stacks
        }
        params = {**fresh, **moved}
        ids = np.arange(7)
        chain = list(range(-1, 6))
        np.testing.assert_allclose(
            outputs(config, params, ids, chain),
            outputs(base_config(config), merged_params(config, params), ids, chain),
            atol=2e-5,
        )

    def test_in_few_bits_it_is_the_model_of_what_they_stand_for(self):
        sizes = SIZES | {"embed_dim": 32, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8}
        plain = fresh_config("qwen3_5_text", mlp_dim=32, max_position=64, **sizes)
        config = dataclasses.replace(plain, quantized="int8")
        params = quantized_params(config, init_params(plain, jax.random.key(4)))
        assert params["delta_layers"]["v"].dtype == jnp.int8 and params["delta_layers"]["fade"].dtype == jnp.float32
        ids = np.arange(9)
        chain = list(range(-1, 8))
        whole = dequantized_params(config, params)
        np.testing.assert_allclose(outputs(config, params, ids, chain), outputs(plain, whole, ids, chain), atol=2e-5)
        with pytest.raises(ValueError, match=r"which do not divide delta's value_heads \* value_dim=24"):
            dataclasses.replace(config, delta=dataclasses.replace(config.delta, value_dim=6))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"layers": (True, False)}, "delta's layers has 2 entries for num_layers=4"),
            ({"layers": (True,) * 4}, "delta is of some layers, and others attend"),
            ({"key_heads": 3}, "value_heads=4 must be a multiple of its key_heads=3"),
            ({"kernel": 0}, "delta's kernel=0 must be a whole number of at least 1"),
        ],
    )
    def test_what_is_none(self, change, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(HYBRID, delta=Delta(**dataclasses.asdict(HYBRID.delta) | change))

    def test_what_cannot_be(self):
        with pytest.raises(ValueError, match="num_layers=3 must be at least 4 in qwen3_5_text"):
            fresh_config("qwen3_5_text", mlp_dim=24, **SIZES | {"num_layers": 3})
        with pytest.raises(ValueError, match="dense_layers=1 are no family's that has a delta rule"):
            dataclasses.replace(HYBRID, experts=Experts(count=4, per_token=2, mlp_dim=8, dense_layers=1))
        with pytest.raises(ValueError, match="shared_score=True is of shared experts"):
            Experts(count=4, per_token=2, mlp_dim=8, shared_score=True)
        with pytest.raises(ValueError, match="surgery needs a model all of whose layers attend; 2 of 4 here"):
            HYBRID.check_attends("surgery")
