"""Losses of preferences: what they are worth by NumPy in float64, and that no layout of rows enters them."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import float64, make_rows

from rljax.algorithms import DPO, IPO, KTO, PREFERENCE_RECIPES, BradleyTerry, SimPO
from rljax.losses import PAIR, SIDE

PAIRS = 5


@pytest.fixture(autouse=True)
def _double_precision():
    with float64():
        yield


def data(seed=0):
    """Rows in no order of their pairs: log-probs, the reference's, the loss mask, sides and pairs."""
    rng = np.random.default_rng(seed)
    shape = (2 * PAIRS, 7)
    mask = np.arange(7) < rng.integers(1, 8, 2 * PAIRS)[:, None]
    logprobs = np.where(mask, -rng.exponential(size=shape), np.nan)
    ref = np.where(mask, logprobs + 0.4 * rng.normal(size=shape), np.nan)
    order = rng.permutation(2 * PAIRS)
    side = np.tile([1.0, -1.0], PAIRS)[order]
    pair = np.repeat(np.arange(PAIRS), 2)[order].astype(float)
    return {"logprobs": logprobs, "ref": ref, "mask": mask, SIDE: side, PAIR: pair}


def rows_of(method, d, weights=None):
    rows = make_rows(
        d["mask"],
        aggregate=method.loss.token_weights,
        old=d["logprobs"],
        advantages=np.zeros(d["mask"].shape),
        ref=d["ref"],
        token_weights=weights,
    )
    columns = {name: jnp.asarray(d[name]) for name in (SIDE, PAIR)}
    return dataclasses.replace(rows, columns=columns)


def corrected(method, rows):
    """The rows of a whole minibatch as a loss sees them."""
    if method.loss.correct_fn is None:
        return rows
    many = jax.tree.map(lambda x: jnp.asarray(x)[None], rows)
    return jax.tree.map(lambda x: x[0], method.loss.correct_fn(many).rows)


def value_and_grad(method, d, rows=None):
    rows = corrected(method, rows_of(method, d)) if rows is None else rows
    zeros = jnp.zeros(d["mask"].shape)
    function = jax.value_and_grad(method.loss.loss, has_aux=True)
    (value, metrics), gradient = function(jnp.asarray(d["logprobs"]), zeros, rows)
    return float(value), {name: float(x) for name, x in metrics.items()}, np.asarray(gradient)


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def expected(recipe, d):
    """Loss and gradient by a loop over pairs, or rows."""
    mask, lp, ref = d["mask"], np.nan_to_num(d["logprobs"]), np.nan_to_num(d["ref"])
    count = mask.sum(axis=1)
    total, ratio = lp.sum(axis=1), (lp - ref).sum(axis=1)
    slopes = np.zeros(len(mask))
    value = 0.0
    for pair in range(PAIRS):
        (w,) = np.flatnonzero((d[PAIR] == pair) & (d[SIDE] > 0))
        (l,) = np.flatnonzero((d[PAIR] == pair) & (d[SIDE] < 0))
        per_w, per_l = 1.0, 1.0
        match recipe:
            case DPO():
                z = recipe.beta * (ratio[w] - ratio[l])
                s = recipe.label_smoothing
                value += -(1 - s) * log_sigmoid(z) - s * log_sigmoid(-z)
                slope_w = recipe.beta * (-(1 - s) * np.exp(log_sigmoid(-z)) + s * np.exp(log_sigmoid(z)))
                slope_l = -slope_w
            case IPO():
                per_w, per_l = 1 / count[w], 1 / count[l]
                m = ratio[w] * per_w - ratio[l] * per_l - 1 / (2 * recipe.beta)
                value += m**2
                slope_w, slope_l = 2 * m, -2 * m
            case SimPO():
                per_w, per_l = 1 / count[w], 1 / count[l]
                z = recipe.beta * (total[w] * per_w - total[l] * per_l) - recipe.gamma
                value -= log_sigmoid(z)
                slope_w = -recipe.beta * np.exp(log_sigmoid(-z))
                slope_l = -slope_w
            case BradleyTerry():
                z = total[w] - total[l]
                value += -log_sigmoid(z) + recipe.center * (total[w] + total[l]) ** 2
                both = 2 * recipe.center * (total[w] + total[l])
                slope_w = -np.exp(log_sigmoid(-z)) + both
                slope_l = np.exp(log_sigmoid(-z)) + both
        slopes[w] = slope_w * per_w / PAIRS
        slopes[l] = slope_l * per_l / PAIRS
    return value / PAIRS, np.where(mask, slopes[:, None], 0)


PAIRED = (DPO(), DPO(beta=0.5, label_smoothing=0.2), IPO(), SimPO(), BradleyTerry(), BradleyTerry(center=0.01))


@pytest.mark.parametrize("recipe", PAIRED, ids=str)
def test_a_loss_of_pairs_and_its_gradient_are_those_of_a_loop_over_pairs(recipe):
    d = data()
    value, metrics, gradient = value_and_grad(recipe.build(), d)
    want, slope = expected(recipe, d)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(gradient, slope, rtol=0, atol=1e-12)
    assert metrics["preference/loss"] == value and 0 < metrics["preference/accuracy"] < 1
    ahead = metrics["preference/chosen"] - metrics["preference/rejected"]
    np.testing.assert_allclose(metrics["preference/margin"], ahead, rtol=1e-12)


def with_other_rows(d):
    """Every fifth row is of no side."""
    return d | {SIDE: np.where(np.arange(len(d[SIDE])) % 5 == 0, 0.0, d[SIDE])}


def labelled_weights(method, d):
    """Those of a minibatch in which rows of side 0 count nothing."""
    return np.where(d["mask"] & (d[SIDE] != 0)[:, None], 1 / np.sum(d[SIDE] != 0), 0)


@pytest.mark.parametrize("flipped", [1, -1])
def test_kto_is_that_of_a_loop_over_rows_and_its_baseline_is_never_negative(flipped):
    recipe = KTO(beta=0.3, desirable=1.2, undesirable=0.7)
    method = recipe.build()
    d = with_other_rows(data())
    mask, ratio = d["mask"], np.nansum(d["logprobs"] - d["ref"], axis=1)
    others = flipped * np.abs(ratio[d[SIDE] == 0])
    at = np.flatnonzero(d[SIDE] == 0)
    ref = d["ref"].copy()
    ref[at, 0] += ratio[at] - others
    d = d | {"ref": ref}
    ratio = np.nansum(d["logprobs"] - d["ref"], axis=1)
    z = max(0.0, others.mean())
    assert (z > 0) == (flipped > 0)

    losses, slopes = [], np.zeros(len(ratio))
    labelled = np.flatnonzero(d[SIDE])
    for i in labelled:
        weight = recipe.desirable if d[SIDE][i] > 0 else recipe.undesirable
        p = 1 / (1 + np.exp(-d[SIDE][i] * recipe.beta * (ratio[i] - z)))
        losses.append(weight * (1 - p))
        slopes[i] = -weight * d[SIDE][i] * recipe.beta * p * (1 - p) / len(labelled)

    rows = corrected(method, rows_of(method, d, labelled_weights(method, d)))
    value, metrics, gradient = value_and_grad(method, d, rows)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-12)
    np.testing.assert_allclose(gradient, np.where(mask, slopes[:, None], 0), rtol=0, atol=1e-12)
    assert (gradient[at] == 0).all() and 0 < metrics["preference/accuracy"] < 1


GOLDEN = json.loads((Path(__file__).parent / "golden" / "preferences.json").read_text())
TRL = {
    "DPO": DPO(beta=0.1),
    "IPO": IPO(beta=0.1),
    "SimPO": SimPO(beta=2.0, gamma=1.0),
    "KTO": KTO(beta=0.1),
    "KTO weighted": KTO(beta=0.5, desirable=1.33),
    "BradleyTerry": BradleyTerry(),
    "BradleyTerry centered": BradleyTerry(center=0.01),
}


def test_the_numbers_of_trl_are_of_the_script_that_makes_them():
    script = Path(__file__).parent.parent / "benchmarks" / "parity" / "preferences.py"
    made = runpy.run_path(str(script))
    for name, values in made["make_data"]().items():
        np.testing.assert_array_equal(values, GOLDEN["data"][name], err_msg=name)
    assert made["DPO"] | made["SIMPO"] | made["KTO"] | made["REWARD"] == GOLDEN["settings"]
    assert set(GOLDEN["settings"]) == set(TRL) == set(GOLDEN["found"])


@pytest.mark.parametrize("name", TRL)
def test_a_loss_and_its_gradient_are_those_of_trl(name):
    """Made by benchmarks/parity/preferences.py with TRL's own code."""
    recipe = TRL[name]
    method = recipe.build()
    their = GOLDEN["found"][name]
    given = {key: np.array(value) for key, value in GOLDEN["data"].items()}
    if method.scores_values:
        values = given["rewards"][:, None]
        given = {"logprobs": values, "ref": values, "mask": np.ones(values.shape, bool)}
    rows = np.shape(their["gradient"])[0]
    d = {key: given[key][:rows] for key in ("logprobs", "ref", "mask")}
    pairs = rows // (4 if method.has_other_rows else 2)
    d[SIDE] = np.concatenate([np.ones(pairs), -np.ones(pairs), np.zeros(rows - 2 * pairs)])
    d[PAIR] = np.arange(rows, dtype=float) % pairs
    weights = labelled_weights(method, d) if method.has_other_rows else None
    value, _, gradient = value_and_grad(method, d, corrected(method, rows_of(method, d, weights)))
    np.testing.assert_allclose(value, their["loss"], rtol=0, atol=1e-8)
    wanted = np.reshape(their["gradient"], gradient.shape)
    # TRL's planted models know no mask: they answer for padding as well, which its sums take in.
    np.testing.assert_allclose(gradient, np.where(d["mask"], wanted, 0), rtol=0, atol=1e-8)
    assert np.abs(wanted).max() > 1e-3


@pytest.mark.parametrize("recipe", [r() for r in PREFERENCE_RECIPES], ids=lambda r: type(r).__name__)
def test_order_padding_and_microbatches_change_nothing_and_off_the_mask_nothing_is_learned(recipe):
    method = recipe.build()
    d = data(seed=1)
    weights = None
    if method.has_other_rows:
        d = with_other_rows(d)
        weights = labelled_weights(method, d)
    rows = corrected(method, rows_of(method, d, weights))
    value, metrics, gradient = value_and_grad(method, d, rows)
    assert np.isfinite(gradient).all() and (gradient[~d["mask"]] == 0).all() and np.abs(gradient).max() > 0

    # Two microbatches of whole pairs, rows in another order, and a row of padding in each.
    order = np.random.default_rng(2).permutation(len(d["mask"]))
    parts = [order[d[PAIR][order] < 2], order[d[PAIR][order] >= 2]]
    total, summed = 0.0, dict.fromkeys(metrics, 0.0)
    for part in parts:

        def taken(x, part=part):
            x = np.asarray(x)
            return x if x.ndim == 0 else np.concatenate([x[part], np.zeros_like(x[:1])])

        of_part = {name: taken(x) for name, x in d.items()}
        some, more, slope = value_and_grad(method, of_part, jax.tree.map(taken, rows))
        np.testing.assert_allclose(slope[:-1], gradient[part], rtol=0, atol=1e-12)
        total += some
        summed = {name: summed[name] + x for name, x in more.items()}
    np.testing.assert_allclose(total, value, rtol=1e-12)
    for name, x in metrics.items():
        np.testing.assert_allclose(summed[name], x, rtol=1e-12, err_msg=name)


def test_a_pair_without_one_of_its_sides_is_no_number():
    method = DPO().build()
    d = data()
    alone = np.arange(len(d["mask"])) != int(np.flatnonzero(d[PAIR] == 3)[0])
    assert np.isnan(value_and_grad(method, {name: x[alone] for name, x in d.items()})[0])


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (DPO(beta=0.0), "DPO: beta=0.0 must be above 0"),
        (DPO(label_smoothing=0.5), "DPO: label_smoothing=0.5 must be at least 0 and below 0.5"),
        (IPO(beta=-1.0), "IPO: beta=-1.0 must be above 0"),
        (SimPO(gamma=-1.0), "SimPO: gamma=-1.0 must be at least 0"),
        (KTO(undesirable=0.0), "KTO: undesirable=0.0 must be above 0"),
        (BradleyTerry(center=-1.0), "BradleyTerry: center=-1.0 must be at least 0"),
    ],
)
def test_hyperparameters_that_cannot_work_are_named(recipe, says):
    with pytest.raises(ValueError, match=f"^{says}$"):
        recipe.build()
