"""Packed sequences that several devices share give the numbers of one device, and send keys and values alone."""

import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from test_models_attention_kernel import ALL, chains, forests, inputs
from test_parallel_mesh import run_python
from test_training_learner import CONFIG, FLAT, grpo, update_config

from rljax.models import Shares, attention_stream, forest_attention
from rljax.models.attention_kernel import forest_attention_kernel
from rljax.parallel import MESH_AXES
from rljax.training import Learner, OptimizerConfig

FEW = ["1x1x1x8 forest tokens", "1x2x1x4 flat tokens full"]
"""data x fsdp x tensor x sequence, packing, what is scored, what the backward pass computes again."""
MORE = ["1x2x2x2 forest tokens", "2x2x1x2 flat tokens", "1x1x2x4 flat tokens attention_saved", "1x4x1x2 forest values"]
MORE += ["1x2x2x2 forest otherwise", "1x2x2x2 forest hybrid", "1x2x1x4 flat hybrid full"]
CASES = FEW + [pytest.param(case, marks=pytest.mark.slow) for case in MORE]


def run(cases):
    return json.loads(run_python("sequence_mesh_program.py", *cases, devices=8))


@pytest.fixture(scope="module")
def few():
    return run(FEW)


@pytest.fixture(scope="module")
def more():
    return run(MORE)


@pytest.fixture
def found(request, case):
    return request.getfixturevalue("few" if case in FEW else "more")["cases"][case]


@pytest.mark.parametrize("case", CASES)
def test_shared_sequences_compute_what_one_device_does(found, case):
    """Up to the order of sums over keys and over devices; log-probs are of size 10."""
    assert found["loss"] < 1e-5
    assert found["scores"] < 1e-5
    assert found["gradients"] < 1e-5


class Sent(NamedTuple):
    """An array of a collective: its kind, its elements on the larger side, and how often it is sent."""

    kind: str
    elements: int
    times: int


@pytest.mark.parametrize("case", FEW)
def test_a_layer_sends_its_keys_and_values_and_no_other_activations(found, case):
    layers = CONFIG.num_layers
    activations = [Sent(*x) for x in found["sent"] if x[1] > found["weight"]]
    in_layers = sorted(x for x in activations if x.times == layers)

    # Keys and values; once more where the backward pass computes the layer again. Then their gradients.
    gathers = 4 if "full" in case else 2
    gather = Sent("all-gather", found["keys"], layers)
    scatter = Sent("reduce-scatter", found["keys"], layers)
    assert in_layers == [gather] * gathers + [scatter] * 2

    # Behind the layers: the hidden states, once each way.
    states = [x for x in activations if x.elements == found["states"]]
    assert sorted(states) == [Sent("all-gather", found["states"], 1), Sent("reduce-scatter", found["states"], 1)]


@pytest.mark.parametrize("form", ["plain", "gpu", "tpu"])
@pytest.mark.parametrize(("layout", "window"), [("forests", 5), ("chains", ALL)])
def test_queries_from_anywhere_see_what_they_see_among_all(monkeypatch, layout, window, form):
    """Values and gradients, with blocks that do not divide the queries, and with padding behind the trees; in plain
    operations, and of the kernels for either device."""
    attend = forest_attention
    if form != "plain":
        attend = functools.partial(forest_attention_kernel, block_q=32, block_k=16, interpret=form)
    monkeypatch.setattr(attention_stream, "BLOCK", 16)
    length, first, count = 72, 19, 45
    trees = forests(length) if layout == "forests" else chains(length, 20, 31, 11)
    positions, ends = (jnp.asarray(x) for x in trees)
    q, k, v, g = inputs(len(positions), length, 4, 2, 8)
    # Of queries that see nothing the result is meaningless.
    g = jnp.where((jnp.arange(length) < ends)[..., None, None], g, 0)
    mine = slice(first, first + count)

    def whole(q, k, v):
        return jnp.sum((forest_attention(q, k, v, positions, ends, window) * g)[:, mine])

    def part(q, k, v, start):
        out = attend(q[:, mine], k, v, positions, ends, window, query_start=start)
        return jnp.sum(out * g[:, mine])

    want = jax.value_and_grad(whole, (0, 1, 2))(q, k, v)
    got = jax.jit(jax.value_and_grad(part, (0, 1, 2)))(q, k, v, first)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_queries_that_see_nothing_yield_nothing():
    positions, ends = (jnp.asarray(x) for x in chains(24, 10))
    q, k, v, g = inputs(1, 24, 4, 2, 8)

    @jax.jit
    def attend(q, k, v):
        return forest_attention(q, k, v, positions, ends, ALL, query_start=0)

    out, pull = jax.vjp(attend, q, k, v)
    assert not np.any(out[:, 10:])
    assert not any(np.any(x) for x in pull(jnp.where(jnp.arange(24)[:, None, None] < 10, 0, g)))


def seen_blocks(start, queries, positions, ends):
    blocks = attention_stream._blocks(
        queries, jnp.asarray(positions), jnp.asarray(ends), jnp.int32(ALL), jnp.int32(start)
    )
    return int(blocks.needed.sum())


def test_devices_go_through_as_many_blocks_of_keys(monkeypatch):
    """Those that see something, of one tree without branches."""
    monkeypatch.setattr(attention_stream, "BLOCK", 8)
    shares = Shares(parts=4, length=128)
    positions, ends = chains(128, 128)
    work = [
        sum(seen_blocks(c * shares.chunk, shares.chunk, positions, ends) for c in (device, 7 - device))
        for device in range(4)
    ]
    assert work == [sum(range(1, 17)) // 4] * 4


def test_blocks_of_other_trees_are_left_out(monkeypatch):
    monkeypatch.setattr(attention_stream, "BLOCK", 8)
    assert seen_blocks(32, 32, *chains(64, 32, 32)) == 1 + 2 + 3 + 4


def test_shares_hold_every_position_once():
    shares = Shares(parts=3, length=12)
    order = jnp.arange(12)[None]
    shared = shares.in_shares(order)
    assert shared[0].tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert shares.in_order(shared).tolist() == order.tolist()
    assert shared[0, shares.place(order[0])].tolist() == order[0].tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            dict(pack_length=48),
            r"pack_length=48 and its quarters .* config.mesh.sequence.* multiple of 32",
        ),
        (dict(length_buckets=(12, 32)), r"config.update.length_buckets=\(12, 32\): 12 does .* multiples of 8"),
    ],
    ids=str,
)
def test_lengths_that_devices_cannot_share_are_refused(changes, said):
    mesh = Mesh(np.full((1, 1, 4, 1, 1), jax.devices()[0]), MESH_AXES)  # of which nothing but the sizes is read
    with pytest.raises(ValueError, match=said):
        Learner(CONFIG, grpo(), OptimizerConfig(), update_config(FLAT, **changes), mesh=mesh)


def test_decoding_takes_the_devices_of_a_sequence_for_more_prompts(few):
    shape, keeps_order = few["decoding"]
    assert shape == {"data": 1, "fsdp": 4, "sequence": 1, "expert": 1, "tensor": 2}
    assert keeps_order
