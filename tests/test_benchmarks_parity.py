"""The comparison with other libraries' objectives: what we would send and compute, without the peers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from objectives import float64

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def parity():
    before = list(sys.path)
    sys.path[:0] = [str(FOLDER / "parity"), str(FOLDER)]
    import losses

    yield losses
    sys.path[:] = before
    for name in ("losses", "_exchange", "_environments"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_every_comparison_can_be_made_on_our_side(parity):
    data = parity.make_data(0)
    assert not data["mask"].all(axis=1).any() and data["mask"].any(axis=1).all()
    with float64():
        for call in parity.CALLS:
            found = call.ours(data)
            assert set(found) <= {"loss", "gradient", "advantage", "returns"} and found, call.name
            for what, array in found.items():
                assert array.dtype == np.float64 and np.isfinite(array).all() and np.any(array != 0), (call.name, what)
                if array.ndim:
                    assert (array[~data["mask"]] == 0).all(), (call.name, what)


def test_calls_travel_as_json_under_names_of_their_own(parity):
    for peer in ("trl", "verl"):
        calls = [call for call in parity.CALLS if call.peer == peer]
        json.dumps([call.settings for call in calls])
        assert len({call.name for call in calls}) == len(calls) > 5


def test_answers_come_back_and_a_failing_call_costs_itself(parity, tmp_path, monkeypatch):
    import _exchange

    data = parity.make_data(0)
    _exchange.write_data(tmp_path, data)
    calls = [
        {"name": "twice", "kind": "double", "settings": {"of": "old"}},
        {"name": "no", "kind": "none", "settings": {}},
    ]
    (tmp_path / "calls.json").write_text(json.dumps({"peer": calls}))
    monkeypatch.setattr(sys, "argv", ["peer.py", str(tmp_path)])
    _exchange.answer("peer", ("numpy",), {"double": lambda d, settings: {"out": 2 * d[settings["of"]]}})
    found, about = _exchange.read_answer(tmp_path, "peer")
    np.testing.assert_array_equal(found["twice"]["out"], 2 * data["old"])
    assert about["versions"] == {"numpy": np.__version__} and list(about["failed"]) == ["no"]


def test_a_difference_is_relative_to_the_largest_number(parity):
    assert parity.difference(np.array([1.0, 100.0]), np.array([2.0, 100.0])) == pytest.approx(0.01)
