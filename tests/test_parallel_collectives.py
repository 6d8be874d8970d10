"""What programs send between devices does not grow with what each of them holds: 8 and 64 virtual devices."""

import json
from typing import NamedTuple

import numpy as np
import pytest
from test_parallel_mesh import run_python


@pytest.fixture(scope="module")
def results():
    return json.loads(run_python("collectives_mesh_program.py", devices=64))


class Sent(NamedTuple):
    """An array of a collective."""

    kind: str
    elements: int
    """On one device, on the larger side."""
    in_loop: bool


def sent(found) -> list[Sent]:
    return [Sent(*x) for x in found["sent"]]


def test_the_head_is_gathered_and_its_gradient_reduced_once_whatever_the_chunk(results):
    for name, found in results["heads"].items():
        large = [x for x in sent(found) if x.elements >= found["head"]]
        assert not [x for x in large if x.in_loop], name
        assert [x.kind for x in large if x.kind != "all-reduce"] == ["all-gather", "reduce-scatter"], name
        assert len(large) <= 3, name


def test_chunks_send_statistics_and_gradients_of_hidden_states_alone(results):
    for name, found in results["heads"].items():
        in_loop = [x for x in sent(found) if x.in_loop]
        assert bool(in_loop) == ("x2," in name and "chunks of 2" in name), name
        assert all(x.elements <= found["states"] for x in in_loop), name


def test_gradients_of_a_split_head_are_those_of_one_device(results):
    """Up to the order of sums over devices, and over parts of the vocabulary."""
    for name, found in results["heads"].items():
        assert found["gap"] < 2e-6, name


def test_embeddings_exchange_what_is_looked_up_and_never_the_table(results):
    """There and back; replicas of the weights add up their gradients, and parts of the vocabulary what they found."""
    for name, found in results["embeddings"].items():
        data, fsdp, tensor = (found[axis] for axis in ("data", "fsdp", "tensor"))
        states = found["states"] // (data * fsdp)
        want = {
            "all-gather": found["tokens"] // data,
            "all-to-all": 2 * states,
            "all-reduce": (data > 1) * found["table"] // (fsdp * tensor) + (tensor > 1) * states,
        }
        total = dict.fromkeys(want, 0)
        for x in sent(found):
            total[x.kind] += x.elements
        assert total == want, name


def test_embeddings_are_those_of_one_device(results):
    """Bit for bit; of the gradient only the order of the sum over replicas and their tokens differs."""
    for name, found in results["embeddings"].items():
        assert found["equal"], name
        assert found["gap"] < (1e-6 if found["data"] > 1 else 1e-30), name


def test_conversations_stay_on_the_devices_that_keep_them(results):
    """Only a copy from one device to another sends anything: the one conversation, or prompt."""
    for name, found in results["stores"].items():
        moved = sent(found)
        if name.split()[0] in ("lay_conversations", "keep_turns", "resize_prompts"):
            assert not moved, name
        elif name.split()[0] in ("copy_prompt", "copy_conversations"):
            assert [(x.kind, x.elements) for x in moved] == [("all-reduce", found["one"])] * 2, name


def test_each_device_computes_prompts_of_its_own_slots(results):
    """Keys and values are not sent, and the products are shared out among the devices."""
    for name, found in results["stores"].items():
        if found["share"] is None:
            continue
        # Without a split vocabulary and split heads there is nothing to reduce.
        expected = [("all-reduce", found["states"])] if "2x2x2" in name else []
        assert [(x.kind, x.elements) for x in sent(found)] == expected, name
        assert 1 <= found["share"] < 1.25, name


def test_a_decode_step_sends_the_same_whatever_the_vocabulary(results):
    """A few numbers of each row: its maximum, sums, places of a truncation, and the token."""
    for name, (small, large) in results["decoding"].items():
        assert small and small == large, name


def test_parts_of_a_vocabulary_draw_what_the_whole_draws(results):
    """Tokens are equal. Sums over parts are rounded otherwise: by two units in the last place of a normaliser."""
    for name, (whole, *others) in results["draws"].items():
        for tokens, logprobs, entropies in others:
            assert tokens == whole[0], name
            np.testing.assert_allclose(logprobs, whole[1], rtol=0, atol=1e-6, err_msg=name)
            np.testing.assert_allclose(entropies, whole[2], rtol=2e-6, atol=2e-6, err_msg=name)
