"""The decoder against a float64 reference, packed forests against separate rows, and its execution variants."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import (
    DecoderConfig,
    Experts,
    Forward,
    RopeScaling,
    abstract_params,
    hidden_states,
    init_params,
    logical_axes,
    logits,
    output_projection,
    unstack_layers,
)

TINY = DecoderConfig(
    vocab_size=61, num_layers=3, embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=40, max_position=64
)
LLAMA3 = RopeScaling(type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16)
CONFIGS = {
    "plain": TINY,
    "tied_llama3": dataclasses.replace(TINY, tied_embeddings=True, rope_scaling=LLAMA3, rope_theta=500.0),
    "biases_window": dataclasses.replace(
        TINY,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        sliding_window=4,
        sliding_layers=(True, False, True),
    ),
    "qk_norm_yarn": dataclasses.replace(
        TINY,
        qk_norm=True,
        num_kv_heads=1,
        rope_theta=100.0,
        rope_scaling=RopeScaling(type="yarn", factor=4.0, original_max_position=256, beta_fast=8.0),
    ),
    "experts": dataclasses.replace(TINY, experts=Experts(count=5, per_token=2, mlp_dim=12)),
    "experts_chosen_by_a_bias_in_groups": dataclasses.replace(
        TINY,
        experts=Experts(
            count=8,
            per_token=3,
            mlp_dim=12,
            selection_bias=True,
            groups=4,
            kept_groups=2,
            weight_scale=1.7,
            shared=2,
            dense_layers=1,
        ),
    ),
    "sinks_clamped_biased_experts": dataclasses.replace(
        TINY,
        attention_bias=True,
        output_bias=True,
        sinks=True,
        sliding_window=4,
        sliding_layers=(True, False, True),
        experts=Experts(count=5, per_token=2, mlp_dim=12, biases=True, limit=0.7, slope=1.3),
    ),
    "four_norms_two_bases": dataclasses.replace(
        TINY,
        qk_norm=True,
        post_norms=True,
        norm_offset=True,
        activation="gelu_tanh",
        embed_scale=24**0.5,
        score_scale=0.2,
        sliding_window=4,
        sliding_layers=(True, False, True),
        local_rope_theta=50.0,
    ),
    "norms_behind_partly_rotated": dataclasses.replace(
        TINY,
        qk_norm=True,
        qk_norm_whole=True,
        pre_norms=False,
        post_norms=True,
        residual_scale=0.6,
        logits_divisor=0.5,
        rotary_dim=4,
        rotated_layers=(True, False, True),
    ),
}


def weights(config, seed=0, scale=0.3):
    """Random weights large enough that every part of the decoder shows in its output."""
    keys = iter(jax.random.split(jax.random.key(seed), 64))
    shapes = abstract_params(config)
    return jax.tree.map(
        lambda leaf: (scale * jax.random.normal(next(keys), leaf.shape) + (leaf.ndim < 3)).astype(leaf.dtype), shapes
    )


def forward(config, params, tokens, positions=None, subtree_end=None, **options):
    tokens = np.atleast_2d(tokens)
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    if subtree_end is None:
        subtree_end = np.full(tokens.shape, tokens.shape[1])
    arrays = map(jnp.asarray, (tokens, positions, subtree_end))
    return _forward(config, params, *arrays, **options)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("remat",))
def _forward(config, params, tokens, positions, subtree_end, remat="none"):
    how = Forward(remat)
    return logits(config, params, hidden_states(config, params, tokens, positions, subtree_end, forward=how))


def reference_frequencies(config, theta):
    """Inverse wavelengths and attention factor, one pair of dimensions at a time, from the papers' formulas."""
    scaling, found = config.rope_scaling, []
    dim, original = config.rotary_dim or config.head_dim, config.rope_scaling.original_max_position
    for pair in range(dim // 2):
        frequency = theta ** (-2 * pair / dim)
        if scaling.type == "llama3":
            turns = original * frequency / (2 * math.pi)
            blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            blend = min(max(blend, 0.0), 1.0)
            frequency = (1 - blend) * frequency / scaling.factor + blend * frequency
        if scaling.type == "yarn":
            bounds = [
                dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
                for turns in (scaling.beta_fast, scaling.beta_slow)
            ]
            low, high = max(math.floor(bounds[0]), 0), min(math.ceil(bounds[1]), dim - 1)
            interpolated = min(max((pair - low) / (high - low), 0.0), 1.0)
            frequency = interpolated * frequency / scaling.factor + (1 - interpolated) * frequency
        found.append(frequency)
    return found, 0.1 * math.log(scaling.factor) + 1 if scaling.type == "yarn" else 1.0


def reference_logits(config, params, tokens):
    """One row in float64, position by position and head by head."""
    c, p = config, jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / math.sqrt((x * x).mean() + c.norm_eps) * (scale + 1 if c.norm_offset else scale)

    def norm_if(x, w, name):
        return norm(x, w[name]) if name in w else x

    def rotate(x, position, index):
        out = x.copy()
        if c.rotated_layers and not c.rotated_layers[index]:
            return out
        is_local = c.local_rope_theta and c.sliding_layers[index]
        frequencies, factor = reference_frequencies(c, c.local_rope_theta if is_local else c.rope_theta)
        for i, frequency in enumerate(frequencies):
            j = i + len(frequencies)
            cos, sin = math.cos(position * frequency) * factor, math.sin(position * frequency) * factor
            out[i], out[j] = x[i] * cos - x[j] * sin, x[j] * cos + x[i] * sin
        return out

    def activated(x):
        if c.activation == "silu":
            return x / (1 + np.exp(-x))
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def expert(x, w, i):
        gate, up = (x @ w[name][i] + (w[f"{name}_bias"][i] if c.experts.biases else 0) for name in ("gate", "up"))
        inner = activated(gate) * up
        if c.experts.limit is not None:
            gate = np.minimum(gate, c.experts.limit)
            up = np.maximum(np.minimum(up, c.experts.limit), -c.experts.limit)
            inner = gate / (1 + np.exp(-c.experts.slope * gate)) * (up + 1)
        return inner @ w["down"][i] + (w["down_bias"][i] if c.experts.biases else 0)

    def mixture(h, w, linear):
        e = c.experts
        scores = linear(h, "router")
        chances = 1 / (1 + np.exp(-scores)) if e.selection_bias else np.exp(scores) / np.exp(scores).sum()
        wanted = chances + w.get("selection_bias", 0.0)
        size = e.count // e.groups
        of_groups = [sum(sorted(wanted[g * size : (g + 1) * size])[-2:]) for g in range(e.groups)]
        kept = np.argsort(of_groups)[-e.kept_groups :]
        best = sorted((i for i in range(e.count) if i // size in kept), key=lambda i: -wanted[i])[: e.per_token]
        out = e.weight_scale * chances[best] / chances[best].sum() @ np.stack([expert(h, w, i) for i in best])
        if e.shared:
            out = out + linear(activated(linear(h, "shared_gate")) * linear(h, "shared_up"), "shared_down")
        return out

    score_scale = c.score_scale or 1 / math.sqrt(c.head_dim)
    stream = [c.embed_scale * p["embedding"][token] for token in tokens]
    for index in range(c.num_layers):
        stack, layers = next((stack, layers) for stack, layers in c.stacks.items() if index in layers)
        w = {name: value[layers.index(index)] for name, value in p[stack].items()}

        def linear(x, name, w=w):
            return x @ w[name] + w.get(f"{name}_bias", 0.0)

        def heads(x, name, count, position, turn=True, w=w, linear=linear, index=index):
            whole = linear(x, name)
            if c.qk_norm_whole and turn:
                whole = norm(whole, w[f"{name}_norm"])
            parts = np.split(whole, count)
            if c.qk_norm and not c.qk_norm_whole and turn:
                parts = [norm(part, w[f"{name}_norm"]) for part in parts]
            return [rotate(part, position, index) if turn else part for part in parts]

        normed = [norm_if(x, w, "attention_norm") for x in stream]
        q = [heads(x, "q", c.num_heads, t) for t, x in enumerate(normed)]
        k = [heads(x, "k", c.num_kv_heads, t) for t, x in enumerate(normed)]
        v = [heads(x, "v", c.num_kv_heads, t, turn=False) for t, x in enumerate(normed)]
        after = []
        for t, x in enumerate(stream):
            seen = range(max(0, t - c.windows[index] + 1), t + 1)
            mixed = []
            for head in range(c.num_heads):
                group = head * c.num_kv_heads // c.num_heads
                scores = np.array([q[t][head] @ k[s][group] * score_scale for s in seen])
                sink = np.exp(w["sinks"][head] - scores.max()) if c.sinks else 0.0
                scores = np.exp(scores - scores.max())
                shares = scores / (scores.sum() + sink)
                mixed.append(sum(a * v[s][group] for a, s in zip(shares, seen, strict=True)))
            x = x + c.residual_scale * norm_if(linear(np.concatenate(mixed), "o"), w, "attention_post_norm")
            h = norm_if(x, w, "mlp_norm")
            if "router" not in w:
                out = linear(activated(linear(h, "gate")) * linear(h, "up"), "down")
            else:
                out = mixture(h, w, linear)
            after.append(x + c.residual_scale * norm_if(out, w, "mlp_post_norm"))
        stream = after
    head = p["embedding"] if c.tied_embeddings else p["head"]
    return np.stack([head @ norm(x, p["final_norm"]) for x in stream]) / c.logits_divisor


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_a_float64_reference(name):
    config = CONFIGS[name]
    params = weights(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 23)
    want = reference_logits(config, params, tokens)
    got = np.asarray(forward(config, params, tokens))[0]
    assert np.abs(want).max() > 3
    assert np.abs(got - want).max() < 2e-5 * np.abs(want).max()


def forest():
    """Two trees and padding in depth-first order; and each root-to-leaf path as (tokens, packed indices)."""
    rng = np.random.default_rng(5)
    tree_a = (6, [(4, [(3, []), (5, [])]), (2, []), (7, [])])
    tree_b = (3, [(5, []), (1, [(4, [])])])
    tokens, positions, ends, paths = [], [], [], []

    def walk(node, above):
        length, children = node
        start = len(tokens)
        own = list(range(start, start + length))
        tokens.extend(rng.integers(0, TINY.vocab_size, length).tolist())
        positions.extend(range(len(above), len(above) + length))
        ends.extend([0] * length)
        for child in children:
            walk(child, above + own)
        for i in own:
            ends[i] = len(tokens)
        if not children:
            paths.append(above + own)

    walk(tree_a, [])
    walk(tree_b, [])
    padding = 5
    arrays = [np.array(x + [0] * padding)[None] for x in (tokens, positions, ends)]
    return *arrays, [np.array(path) for path in paths]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_forest_gives_the_logits_of_its_rows(name):
    config = CONFIGS[name]
    params = weights(config, seed=1)
    tokens, positions, ends, paths = forest()
    packed = np.asarray(forward(config, params, tokens, positions, ends))[0]
    assert np.isfinite(packed).all()  # padding sees nothing, and must not be NaN
    assert len(paths) == 6
    for path in paths:
        alone = np.asarray(forward(config, params, tokens[0, path]))[0]
        assert np.abs(packed[path] - alone).max() < 2e-5 * np.abs(alone).max()


def test_a_token_depends_on_its_path_alone():
    """The gradient of one token's logits is zero for every token that is not on its path."""
    config = CONFIGS["biases_window"]
    config = dataclasses.replace(config, sliding_window=None, sliding_layers=None)
    params = weights(config)
    tokens, positions, ends, paths = forest()
    x = jnp.asarray(tokens)

    def out(embedding_rows, at):
        # every packed token has a row of its own in the table, so its gradient tells whether it was looked at
        own = {**params, "embedding": embedding_rows}
        hidden = hidden_states(config, own, jnp.arange(x.shape[1])[None], jnp.asarray(positions), jnp.asarray(ends))
        return hidden[0, at].sum()

    rows = jnp.take(params["embedding"], x[0], axis=0)
    for path in paths[:3]:
        gradient = np.asarray(jax.grad(out)(rows, int(path[-1])))
        touched = np.flatnonzero(np.abs(gradient).sum(-1))
        assert touched.tolist() == path.tolist()


@pytest.mark.parametrize("name", ["tied_llama3", "biases_window", "four_norms_two_bases"])
def test_rematerialised_layers_agree_with_kept_ones(name):
    config = CONFIGS[name]
    params = weights(config, scale=0.1)  # rounding of the inputs alone moves the gradient of larger ones by 1e-5
    tokens, positions, ends, _ = forest()

    def loss(params, **options):
        out = forward(config, params, tokens, positions, ends, **options)
        return jnp.mean(jnp.sin(out)), out

    def run(**options):
        return jax.jit(jax.value_and_grad(lambda p: loss(p, **options), has_aux=True))(params)

    (_, kept), gradient = run()
    for remat in ("full", "attention_saved", "products_saved"):
        (_, other), other_gradient = run(remat=remat)
        assert np.abs(other - kept).max() < 1e-4
        for a, b in zip(jax.tree.leaves(other_gradient), jax.tree.leaves(gradient), strict=True):
            assert np.abs(a - b).max() < 1e-5 * max(1.0, float(np.abs(b).max()))


def test_what_remat_saves_is_not_computed_again_and_costs_its_size():
    """Of the program of a gradient: how often a softmax looks for its largest score, how many products there are, and
    what is kept for that."""
    config = CONFIGS["tied_llama3"]
    params = abstract_params(config)
    tokens, positions, ends = (jnp.asarray(x) for x in forest()[:3])

    def out(params, remat):
        return jnp.sum(hidden_states(config, params, tokens, positions, ends, forward=Forward(remat)))

    def count(remat, operation):
        return str(jax.make_jaxpr(jax.grad(lambda p: out(p, remat)))(params)).count(operation)

    def softmaxes(remat):
        return count(remat, "reduce_max")

    def products(remat):
        return count(remat, "dot_general")

    def kept(remat):
        pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: out(p, remat), p)[1], params)
        return sum(x.size for x in jax.tree.leaves(pullback))

    assert softmaxes("attention_saved") == softmaxes("none") == softmaxes("full") / 2
    of_query = config.num_heads * (config.head_dim + 1)
    assert kept("attention_saved") - kept("full") == config.num_layers * tokens.size * of_query
    assert kept("none") > 2 * kept("attention_saved")

    # Of a layer: q, k, v, what is added to its input, and the two halves of the MLP.
    of_products = 2 * config.num_kv_heads * config.head_dim + config.num_heads * config.head_dim
    of_products += config.embed_dim + 2 * config.mlp_dim
    more = kept("products_saved") - kept("attention_saved")
    assert more == config.num_layers * tokens.size * of_products < kept("none") - kept("attention_saved")
    assert products("products_saved") == products("none") < products("attention_saved")

    with pytest.raises(ValueError, match="remat='all' must be one of 'none', 'products_saved', 'attention_s"):
        # By itself: the hook that checks types of tests would be first.
        Forward.__post_init__(types.SimpleNamespace(remat="all"))


def test_bfloat16_activations_give_float32_logits_near_the_exact_ones():
    tokens = jnp.arange(30)[None]
    ends = jnp.full_like(tokens, 30)
    exact_params = jax.tree.map(lambda x: 5 * x, init_params(TINY, jax.random.key(0)))
    exact = logits(TINY, exact_params, hidden_states(TINY, exact_params, tokens, tokens, ends))
    for param_dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(TINY, dtype="bfloat16", param_dtype=param_dtype)
        params = jax.tree.map(lambda x, t=param_dtype: x.astype(t), exact_params)
        hidden = hidden_states(config, params, tokens, tokens, ends)
        assert hidden.dtype == jnp.bfloat16
        found = logits(config, params, hidden)
        assert found.dtype == jnp.float32
        relative = np.abs(found - exact).mean() / np.abs(exact).mean()
        assert 2**-11 < relative < 2**-5  # a rounding of bfloat16 is 2**-9; a few dozen of them add up in quadrature


def test_unstacking_keeps_every_layer():
    params = weights(TINY)
    layers = unstack_layers(TINY, params)["layers"]
    assert len(layers) == TINY.num_layers
    for index, layer in enumerate(layers):
        assert np.array_equal(layer["gate"], params["layers"]["gate"][index])

    config = CONFIGS["experts_chosen_by_a_bias_in_groups"]
    params = weights(config)
    whole = unstack_layers(config, params)
    assert "dense_layers" not in whole
    assert [layer["gate"].ndim for layer in whole["layers"]] == [2, 3, 3]
    assert np.array_equal(whole["layers"][2]["gate"], params["layers"]["gate"][1])


def test_weights_are_declared_once():
    for config in CONFIGS.values():
        params, shapes, axes = init_params(config, jax.random.key(0)), abstract_params(config), logical_axes(config)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
        is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
        same = jax.tree.map(lambda a, s: len(a) == s.ndim, axes, shapes, is_leaf=is_axes)
        assert all(jax.tree.leaves(same))
        assert output_projection(config, params).shape == (config.vocab_size, config.embed_dim)


def test_initial_weights_do_not_depend_on_other_weights():
    plain = init_params(TINY, jax.random.key(0))
    other = init_params(dataclasses.replace(TINY, qk_norm=True, mlp_bias=True), jax.random.key(0))
    assert np.array_equal(plain["layers"]["down"], other["layers"]["down"])
    assert abs(float(plain["layers"]["down"].std()) - 0.02) < 1e-3
    assert not np.array_equal(plain["layers"]["down"][0], plain["layers"]["down"][1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"sliding_layers": (True,)}, "sliding_layers has 1 entries for num_layers=3"),
    ],
)
def test_impossible_configs_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **settings)
