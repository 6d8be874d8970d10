"""The gated delta rule (2412.06464): a layer that remembers in one matrix a head, in place of keys and values.

A token first lets its head's memory fade, and then corrects what the memory says to its key:

    M = exp(g) M;    u = beta (v - M' k);    M = M + k u';    out = M' q

Over a packed forest the corrections `u` of all tokens solve one triangular system, in which a token meets those before
it on its own path (`forest_delta`). That is exact for any tree, in time that grows as attention's does; nothing is kept
of the memories between. A decoder goes token by token (`delta_step`), with the memory as its cache.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from rljax.models.attention_blocks import MASKED, SAVED, padded, whole_blocks
from rljax.models.config import Delta

BLOCK = 64
"""Tokens whose corrections are solved for at once."""

_EXACT = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


class Fade(NamedTuple):
    """The logarithm by which a memory has faded from the root of a token's path on, as the sum of two float32: what
    counts are differences of these, which a long path would drown in rounding."""

    high: Float[Array, "R S H"]
    low: Float[Array, "R S H"]


class Recalled(NamedTuple):
    """All that goes on from one token to the next."""

    memory: Float[Array, "*B H d e"]
    """float32."""
    tail: Float[Array, "*B V C"]
    """`mixed` of the last tokens, as many as the convolution sees but one, the oldest first."""


def parents(subtree_end: Int[Array, "R S"]) -> Int[Array, "R S"]:
    """The packed index of the token before each one on its path; -1 for roots."""
    count = subtree_end.shape[1]
    index = jnp.arange(count)

    def of_row(end):
        # A subtree that ends where a token stands is of the sibling before it, or of the tree before it. A first child
        # follows its parent.
        beside = jnp.full(count + 1, count).at[end].min(index)[:count]
        first = jnp.where(beside < index, beside, index)
        for _ in range(max(count - 1, 1).bit_length()):
            first = first[first]
        follows = (first > 0) & (end[first - 1] > first)
        return jnp.where(follows, first - 1, -1)

    return jax.vmap(of_row)(subtree_end)


def ancestor(parent: Int[Array, "R S"], distance: int) -> Int[Array, "R S"]:
    """The packed index `distance` tokens before each one on its path; -1 where there is none."""
    index = jnp.broadcast_to(jnp.arange(parent.shape[1]), parent.shape)
    for _ in range(distance):
        index = _before(parent + 1, index) - 1
    return index


def path_convolution(
    x: Float[Array, "R S C"], kernel: Float[Array, "C 1 W"], parent: Int[Array, "R S"]
) -> Float[Array, "R S C"]:
    """A causal convolution along each path, channel by channel: `kernel[:, 0, -1]` is of the token itself. float32."""
    wide = x.astype(jnp.float32)
    width = kernel.shape[-1]
    taps = kernel[:, 0].astype(jnp.float32)
    out = wide * taps[:, -1]
    for distance in range(1, width):
        out += _before(wide, ancestor(parent, distance)) * taps[:, width - 1 - distance]
    return out


def fade_of_paths(g: Float[Array, "R S H"], parent: Int[Array, "R S"]) -> Fade:
    """Sums of `g` over the paths, each token's own counted in."""
    high, low, jump = g, jnp.zeros_like(g), parent
    # Each token has the sum of twice as many before it after every round.
    for _ in range(max(g.shape[1] - 1, 1).bit_length()):
        other_high, other_low, further = (_before(x, jump) for x in (high, low, jump + 1))
        # What the sum of two floats rounds off is a float itself (Knuth, The Art of Computer Programming, 4.2.2).
        total = high + other_high
        part = total - high
        lost = (high - (total - part)) + (other_high - part)
        high, low, jump = total, low + other_low + lost, further - 1
    return Fade(high, low)


def _before(x: Array, place: Int[Array, "R S"]) -> Array:
    """Entries of `x` [R, S, ...] at a `place` for each token, 0 where that is -1."""
    has = (place >= 0).reshape(*place.shape, *(1,) * (x.ndim - 2))
    index = jnp.maximum(place, 0).reshape(has.shape)
    return jnp.where(has, jnp.take_along_axis(x, index, axis=1), 0)


def forest_delta(
    q: Float[Array, "R S K d"],
    k: Float[Array, "R S K d"],
    v: Float[Array, "R S H e"],
    g: Float[Array, "R S H"],
    beta: Float[Array, "R S H"],
    subtree_end: Int[Array, "R S"],
    parent: Int[Array, "R S"],
    *,
    block: int = BLOCK,
) -> Float[Array, "R S H e"]:
    """What each token of packed forests reads, in float32. `H` is a multiple of `K`: heads that follow each other share
    keys. `parent` is that of `parents`. Padding, whose subtree ends at 0, reads nothing and is read by nobody."""
    out, _, _ = _forest_delta(q, k, v, g, beta, subtree_end, parent, block)
    return out


def _forest_delta(q, k, v, g, beta, subtree_end, parent, block):
    """The result and the corrections, [R, S, H, e], and the fades."""
    count = q.shape[1]
    block = min(block, whole_blocks(count, 8))
    size = whole_blocks(count, block)
    q, k, v, g, beta = (padded(x.astype(jnp.float32), 1, size) for x in (q, k, v, g, beta))
    end = padded(subtree_end, 1, size)
    # What pads fades by nothing, so that its parent is of no account.
    fade = fade_of_paths(g, padded(parent, 1, size))

    corrections = _corrections(block, k, v, fade, beta, end)
    out = _read(block, q, k, corrections, fade, end)
    return out[:, :count], corrections[:, :count], jax.tree.map(lambda x: x[:, :count], fade)


def _weights(first, block, a, k, fade: Fade, end, *, strict: bool) -> Float[Array, "R H B S"]:
    """Products of the `block` rows of `a` from `first` on with all keys, faded from key to row; 0 where a row does not
    see the key, or, `strict`, is its own."""
    rows = jax.lax.dynamic_slice_in_dim(a, first, block, axis=1)
    own = Fade(*(jax.lax.dynamic_slice_in_dim(x, first, block, axis=1) for x in fade))
    heads = fade.high.shape[-1]
    scores = jnp.repeat(_EXACT("rbkd,rskd->rkbs", rows, k), heads // k.shape[2], axis=1)

    def spread(row, key):
        return jnp.moveaxis(row, 2, 1)[..., None] - jnp.moveaxis(key, 2, 1)[:, :, None]

    between = spread(own.high, fade.high) + spread(own.low, fade.low)
    sees = _sees(first, block, end, strict=strict)[:, None]
    return scores * jnp.exp(jnp.where(sees, between, MASKED))


def _sees(first, block: int, end: Int[Array, "R S"], *, strict: bool) -> Bool[Array, "R B S"]:
    row = first + jnp.arange(block)[:, None]
    key = jnp.arange(end.shape[1])
    before = key < row if strict else key <= row
    return before & (end[:, None] > row)


def _system(first, block, k, fade, beta, end):
    """Rows [R, H, B, S] of the system's strictly lower part, the `block` from `first` on."""
    own = jax.lax.dynamic_slice_in_dim(beta, first, block, axis=1)
    return jnp.moveaxis(own, 2, 1)[..., None] * _weights(first, block, k, k, fade, end, strict=True)


def _inverse(lower: Float[Array, "... B B"]) -> Float[Array, "... B B"]:
    """Of one plus a strictly lower triangle. Blocks of twice the size are inverted from those within: no power of the
    triangle is taken, whose entries may be huge where their sum is not."""
    size = lower.shape[-1]
    index = jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    width = 1
    while width < size:
        number = index // width
        joins = (number[:, None] % 2 == 1) & (number == number[:, None] - 1)
        inverse -= _EXACT("...ab,...bc,...cd->...ad", inverse, jnp.where(joins, lower, 0), inverse)
        width *= 2
    return inverse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _corrections(block, k, v, fade: Fade, beta, end) -> Float[Array, "R S H e"]:
    """Corrections `u` of all tokens: `u_i + beta_i sum_j<i fade_ij (k_i k_j) u_j = beta_i v_i` over ancestors j."""

    def step(solved, first):
        lower = _system(first, block, k, fade, beta, end)
        given = jax.lax.dynamic_slice_in_dim(v * beta[..., None], first, block, axis=1)
        # What is not solved yet is 0.
        given -= _EXACT("rhbs,rshe->rbhe", lower, solved)
        own = _EXACT("rhbc,rche->rbhe", _inverse(_diagonal(lower, first, block)), given)
        return jax.lax.dynamic_update_slice_in_dim(solved, own, first, axis=1), None

    return jax.lax.scan(step, jnp.zeros_like(v), jnp.arange(0, v.shape[1], block))[0]


def _diagonal(lower, first, block):
    return jax.lax.dynamic_slice_in_dim(lower, first, block, axis=3)


def _corrections_forward(block, k, v, fade, beta, end):
    solved = checkpoint_name(_corrections(block, k, v, fade, beta, end), SAVED[0])
    return solved, (k, v, fade, beta, end, solved)


def _corrections_backward(block, residuals, gradient):
    """The transposed system gives the gradient of its right side, from the last block to the first; that of the system
    is the product of it with the solution."""
    k, v, fade, beta, end, solved = residuals

    def step(carry, first):
        left, sums = carry
        lower, back = jax.vjp(lambda k, fade, beta: _system(first, block, k, fade, beta, end), k, fade, beta)
        given = jax.lax.dynamic_slice_in_dim(left, first, block, axis=1)
        own = _EXACT("rhcb,rche->rbhe", _inverse(_diagonal(lower, first, block)), given)
        # Rows of the system are of later tokens, and reach back to all before them.
        left = left - _EXACT("rhbs,rbhe->rshe", lower, own)
        left = jax.lax.dynamic_update_slice_in_dim(left, own, first, axis=1)
        sums = jax.tree.map(jnp.add, sums, back(-_EXACT("rbhe,rshe->rhbs", own, solved)))
        return (left, sums), None

    zeros = jax.tree.map(jnp.zeros_like, (k, fade, beta))
    firsts = jnp.arange(0, v.shape[1], block)
    (right, (d_k, d_fade, d_beta)), _ = jax.lax.scan(step, (gradient, zeros), firsts, reverse=True)
    return d_k, right * beta[..., None], d_fade, d_beta + jnp.sum(right * v, axis=-1), None


_corrections.defvjp(_corrections_forward, _corrections_backward)


def _read(block, q, k, corrections, fade, end) -> Float[Array, "R S H e"]:
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(_, first):
        weights = _weights(first, block, q, k, fade, end, strict=False)
        return None, jnp.einsum("rhbs,rshe->rbhe", weights, corrections, preferred_element_type=jnp.float32)

    _, out = jax.lax.scan(step, None, jnp.arange(0, q.shape[1], block))
    return jnp.moveaxis(out, 0, 1).reshape(corrections.shape)


def prompt_delta(
    q: Float[Array, "R S K d"],
    k: Float[Array, "R S K d"],
    v: Float[Array, "R S H e"],
    g: Float[Array, "R S H"],
    beta: Float[Array, "R S H"],
    length: Int[Array, " R"],
    memory: Float[Array, "R H d e"] | None = None,
) -> tuple[Float[Array, "R S H e"], Float[Array, "R H d e"]]:
    """`forest_delta` of rows that are one path each and go on from a `memory`, None for an empty one, and the memory,
    float32, behind their first `length` tokens. What those behind read means nothing."""
    rows, count = g.shape[:2]
    counts = jnp.arange(count) < length[:, None]
    # Nothing fades and nothing is corrected behind the last.
    g, beta = (jnp.where(counts[..., None], x, 0) for x in (g, beta))
    end = jnp.full((rows, count), count)
    parent = jnp.broadcast_to(jnp.arange(count) - 1, (rows, count))
    if memory is not None:
        # What an earlier memory says to a key is known to it, and what it says to a query is read beside the rest.
        fade = jnp.exp(jnp.cumsum(g, axis=1))
        v = v.astype(jnp.float32) - _said(memory, k, fade)
    out, corrections, fades = _forest_delta(q, k, v, g, beta, end, parent, BLOCK)
    left = (fades.high[:, -1:] - fades.high) + (fades.low[:, -1:] - fades.low)
    wide = jnp.repeat(k.astype(jnp.float32), g.shape[-1] // k.shape[2], axis=2)
    behind = _EXACT("rshd,rsh,rshe->rhde", wide, jnp.exp(left), corrections)
    if memory is not None:
        out += _said(memory, q, fade)
        behind += fade[:, -1, :, None, None] * memory
    return out, behind


def _said(
    memory: Float[Array, "R H d e"], a: Float[Array, "R S K d"], fade: Float[Array, "R S H"]
) -> Float[Array, "R S H e"]:
    """What a memory, faded by a factor for each token, says to the `a` of each."""
    wide = jnp.repeat(a.astype(jnp.float32), memory.shape[1] // a.shape[2], axis=2)
    return fade[..., None] * _EXACT("rhde,rshd->rshe", memory, wide)


def delta_step(
    memory: Float[Array, "*B H d e"],
    q: Float[Array, "*B K d"],
    k: Float[Array, "*B K d"],
    v: Float[Array, "*B H e"],
    g: Float[Array, "*B H"],
    beta: Float[Array, "*B H"],
) -> tuple[Float[Array, "*B H e"], Float[Array, "*B H d e"]]:
    """What one more token reads, and the memory behind it, both in float32."""
    q, k, v, g, beta = (x.astype(jnp.float32) for x in (q, k, v, g, beta))
    q, k = (jnp.repeat(x, g.shape[-1] // x.shape[-2], axis=-2) for x in (q, k))
    memory = memory * jnp.exp(g)[..., None, None]
    known = _EXACT("...hde,...hd->...he", memory, k)
    memory = memory + _EXACT("...hd,...he->...hde", k, beta[..., None] * (v - known))
    return _EXACT("...hde,...hd->...he", memory, q), memory


# A layer calls these with what it makes of its tokens: queries, keys and values side by side, `mixed` [.., C], before a
# causal convolution; its taps `kernel` [C, 1, W], fades `g` [.., H] and weights `beta` [.., H] of corrections.


def forest_recall(
    delta: Delta,
    mixed: Float[Array, "R S C"],
    kernel: Float[Array, "C 1 W"],
    g: Float[Array, "R S H"],
    beta: Float[Array, "R S H"],
    subtree_end: Int[Array, "R S"],
    parent: Int[Array, "R S"],
) -> Float[Array, "R S H e"]:
    """What tokens of packed forests recall, in float32."""
    q, k, v = _heads(delta, path_convolution(mixed, kernel, parent))
    return forest_delta(q, k, v, g, beta, subtree_end, parent)


def prompt_recall(
    delta: Delta,
    mixed: Float[Array, "N S C"],
    kernel: Float[Array, "C 1 W"],
    g: Float[Array, "N S H"],
    beta: Float[Array, "N S H"],
    length: Int[Array, " N"],
    before: Recalled | None = None,
) -> tuple[Float[Array, "N S H e"], Recalled]:
    """What right-padded tokens of one path a row recall, in float32, and what goes on behind their first `length`.
    They follow what is recalled `before` them; None for prompts, which nothing comes before."""
    memory, tail = (None, jnp.zeros((len(mixed), delta.kernel - 1, mixed.shape[2]))) if before is None else before
    seen = jnp.concatenate([tail.astype(mixed.dtype), mixed], axis=1)
    parent = jnp.broadcast_to(jnp.arange(seen.shape[1]) - 1, seen.shape[:2])
    q, k, v = _heads(delta, path_convolution(seen, kernel, parent)[:, delta.kernel - 1 :])
    out, behind = prompt_delta(q, k, v, g, beta, length, memory)
    last = length[:, None] + jnp.arange(delta.kernel - 1)
    return out, Recalled(behind, _before(seen, last))


def next_recall(
    delta: Delta,
    mixed: Float[Array, "*B C"],
    kernel: Float[Array, "C 1 W"],
    g: Float[Array, "*B H"],
    beta: Float[Array, "*B H"],
    before: Recalled,
) -> tuple[Float[Array, "*B H e"], Recalled]:
    """What one more token recalls, in float32, and what goes on behind it."""
    seen = jnp.concatenate([before.tail, mixed[..., None, :]], axis=-2)
    taps = kernel[:, 0].astype(jnp.float32)
    convolved = jnp.einsum("...wc,cw->...c", seen.astype(jnp.float32), taps, precision=jax.lax.Precision.HIGHEST)
    out, memory = delta_step(before.memory, *_heads(delta, convolved), g, beta)
    return out, Recalled(memory, seen[..., 1:, :])


def _heads(delta: Delta, convolved: Float[Array, "*B C"]) -> tuple[Array, Array, Array]:
    """Queries and keys [.., K, d] of length one, the former scaled as those of attention, and values [.., H, e]."""
    q, k, v = jnp.split(jax.nn.silu(convolved), (delta.widths[0], 2 * delta.widths[0]), axis=-1)
    q, k = (unit_length(x.reshape(*x.shape[:-1], delta.key_heads, delta.key_dim)) for x in (q, k))
    return q * delta.key_dim**-0.5, k, v.reshape(*v.shape[:-1], delta.value_heads, delta.value_dim)


def unit_length(x: Float[Array, "*B d"], eps: float = 1e-6) -> Float[Array, "*B d"]:
    """float32 of length one, but for `eps` under the root, as Qwen3.5 has it."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + eps)
