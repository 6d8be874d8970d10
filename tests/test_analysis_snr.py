"""The simulated signal to noise: against cases done by hand, and the figures that the arena's predictions are of."""

import numpy as np
import pytest

from rljax.advantages import global_and_local, group_normalized
from rljax.analysis.snr import Scheme, page, parse_chances, sample_rows, signal_to_noise
from rljax.types import NO_PARENT


def test_two_rows_of_one_token_by_hand():
    """Rows differ with 2 p q. Then A is +-sqrt(1/2), so g = sqrt(1/2) (q + p): its mean is sqrt(2) p q, its variance
    p q - 2 (p q)^2, and a prompt costs two tokens."""
    for p in (0.5, 0.8):
        pq = p * (1 - p)
        found = signal_to_noise([p], Scheme(2), groups=8000)
        assert abs(found.value - 1e3 * 2 * pq**2 / (pq - 2 * pq**2) / 2) < 4 * found.error
        assert found.tokens == 2 and found.success == pytest.approx(p, abs=0.02)


GRPO = group_normalized()


@pytest.mark.parametrize(
    "chances, scheme, expected",
    [
        ("0.8*4", Scheme(8, credit=GRPO), 61),
        ("0.8*4", Scheme(4, credit=GRPO), 45),
        ("0.8*4", Scheme(2, 2, credit=GRPO), 40),
        ("0.85*16", Scheme(8, credit=GRPO), 2.6),
        ("0.85*16", Scheme(4, credit=GRPO), 1.6),
        ("0.85*16", Scheme(2, 2, credit=GRPO), 1.6),
        ("0.85*16", Scheme(4, 2, credit=global_and_local()), 2.1),
    ],
)
def test_figures_that_an_independent_simulation_gave(chances, scheme, expected):
    found = signal_to_noise(parse_chances(chances), scheme, groups=8000)
    # The figures are rounded to two digits.
    assert abs(found.value - expected) < 3 * found.error + 0.02 * expected
    assert found.tokens == pytest.approx(
        len(parse_chances(chances)) * 4 * (2 if expected in (61, 2.6, 2.1) else 1), rel=0.02
    )


def test_forks_keep_what_is_before_their_place_and_no_place_is_taken_twice():
    p = np.array([1.0, 0.6, 1.0, 0.6, 0.7, 0.5])
    rows = sample_rows(p, Scheme(2, 2, rounds=2), 200, np.random.default_rng(0))
    assert rows.right.shape == (200, 2 * (1 + 2 * 2), 6)
    for right, parent, fork in zip(*rows, strict=True):
        assert (parent[[0, 5]] == NO_PARENT).all() and (fork[[0, 5]] == 0).all()
        forks = [i for i in range(10) if i % 5]
        assert all(parent[i] // 5 == i // 5 and fork[i] > 0 for i in forks)
        assert all((right[i, : fork[i]] == right[parent[i], : fork[i]]).all() for i in forks)
        # A fork owns the tokens from its place on, and none of them is forked at its own first one.
        assert all(fork[i] > fork[parent[i]] or parent[i] in (0, 5) for i in forks)
        assert len({(parent[i], fork[i]) for i in forks}) == 8
    assert rows.right[:, :, [0, 2]].all()


def test_surprisal_forks_begin_at_the_least_likely_tokens():
    p = np.array([1.0, 0.9, 1.0, 0.6, 0.8])
    rows = sample_rows(p, Scheme(1, 1, places="surprisal"), 300, np.random.default_rng(0))
    surprisals = np.where(rows.right[:, 0], -np.log(p), -np.log(np.maximum(1 - p, 1e-300)))
    surprisals[:, 0] = -1
    assert (rows.fork[:, 1] == surprisals.argmax(axis=1)).all()
    assert set(rows.fork[:, 1]) == {1, 3, 4}


def test_what_cannot_be_simulated_is_refused():
    for text in ("0.8*", "x", "0.8*4;1", ""):
        with pytest.raises(ValueError, match="--chances"):
            parse_chances(text)
    assert parse_chances("1*2,0.5") == (1.0, 1.0, 0.5)
    for chances, scheme, message in (
        ([1.0, 1.0], Scheme(2), "one of them below 1"),
        ([0.0, 0.5], Scheme(2), "above 0"),
        ([0.5], Scheme(1), "nothing to be compared with"),
        ([0.5, 0.5], Scheme(1, 3), "no 3 places to fork at"),
    ):
        with pytest.raises(ValueError, match=message):
            signal_to_noise(chances, scheme, groups=1000)


def test_the_page_has_its_assumptions_and_the_table():
    text = page([("method", "0.8*4"), ("GRPO 8", "61 (1.00)")], "rljax snr")
    assert "| method | 0.8 x 4 |\n|---|---|\n| GRPO 8 | 61 (1.00) |" in text
    assert "What is assumed" in text and "one update" in text
