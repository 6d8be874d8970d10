"""What a compiled program moves between devices is read off it: kinds, bytes and loop trips."""

import json

import pytest
from test_parallel_mesh import run_python

from rljax.parallel import collectives
from rljax.parallel.hlo import dimensions, shape_bytes


@pytest.fixture(scope="module")
def found():
    return json.loads(run_python("compiled_mesh_program.py", devices=8))


def test_every_collective_is_found_with_its_larger_side(found):
    by_kind = {one["kind"]: one for one in found["manual"]}
    assert len(found["manual"]) == 3
    assert by_kind["all-gather"]["shapes"] == ["f32[16,8]"] and by_kind["all-gather"]["bytes"] == 16 * 8 * 4
    assert by_kind["all-reduce"]["shapes"] == by_kind["reduce-scatter"]["shapes"] == ["f32[8]"]
    assert "all_gather" in by_kind["all-gather"]["op_name"]


def test_loops_count_by_their_trips_and_those_of_data_by_what_is_assumed(found):
    # Three trips within a loop whose number is an argument.
    assert [one["times"] for one in found["manual"]] == [3 * 7, 1, 1]
    assert found["once"] == [3, 1, 1]
    assert found["traffic"] == {"all-gather": 21 * 512, "all-reduce": 32, "reduce-scatter": 32}


def test_a_scan_over_layers_counts_each(found):
    # Features of the activations are split over `tensor`. Each layer needs them whole, [2, 16], and so does the end.
    assert [(one["kind"], one["times"], one["bytes"]) for one in found["layers"]] == [
        ("all-gather", 5, 2 * 16 * 4),
        ("all-gather", 1, 2 * 16 * 4),
    ]
    assert found["text"]


def test_memory_comes_by_part(found):
    memory = found["memory"]
    assert memory["arguments"] == (2 * 16 + 16 * 8) * 4
    assert memory["outputs"] == 2 * 16 * 4
    # The donated argument is written over by the result.
    assert memory["aliased"] == 2 * 16 * 4
    there = sum(memory[name] for name in ("arguments", "outputs", "temporaries", "code"))
    assert memory["peak"] == there - memory["aliased"]


# As XLA writes programs for a TPU (layouts with parentheses, a gather within a fusion) and for a GPU (gathers and
# reductions in the background).
TPU = """HloModule jit_f, is_scheduled=true

%async.1 (param_0.1: bf16[256,1024]) -> (bf16[4096,1024], u32[]) {
  %param_0.1 = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.9 = bf16[4096,1024]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.1), channel_id=3, dimensions={0}
}

ENTRY %main.5 (param.1: bf16[256,1024]) -> (bf16[4096,1024], u32[]) {
  %param.1 = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %f = (bf16[4096,1024]{1,0:T(8,128)(2,1)}, /*index=1*/u32[]{:T(128)}) fusion(%param.1), calls=%async.1
}
"""
GPU = """HloModule jit_f, is_scheduled=true

ENTRY %main.5 (p.1: f32[4,8], p.2: bf16[8]) -> f32[16,8] {
  %p.1 = f32[4,8]{1,0} parameter(0)
  %p.2 = bf16[8]{0} parameter(1)
  %go.1 = ((f32[4,8], bf16[8]), (f32[16,8], bf16[32])) all-gather-start(%p.1, %p.2), metadata={op_name="jit(f)/gather"}
  %done.1 = (f32[16,8]{1,0}, bf16[32]{0}) all-gather-done(%go.1)
  %start.2 = f32[4,8]{1,0} all-reduce-start(%p.1), to_apply=%add
  %done.2 = f32[4,8]{1,0} all-reduce-done(%start.2)
  ROOT %get.1 = f32[16,8]{1,0} get-tuple-element(%done.1), index=0
}
"""


def test_programs_of_accelerators_are_read_as_well():
    (one,) = collectives(TPU)
    assert (one.kind, one.shapes, one.bytes) == ("all-gather", ("bf16[4096,1024]",), 4096 * 1024 * 2)

    gather, reduce = collectives(GPU)
    assert (gather.kind, gather.shapes) == ("all-gather", ("f32[16,8]", "bf16[32]"))
    assert (gather.bytes, gather.largest, gather.op_name) == (16 * 8 * 4 + 64, 512, "jit(f)/gather")
    assert (reduce.kind, reduce.bytes) == ("all-reduce", 4 * 8 * 4)


def test_sizes_of_arrays():
    assert dimensions("bf16[4,<=3]") == (4, 3)
    sizes = {"f32[]": 4, "bf16[3,5]": 30, "pred[7]": 7, "s4[8]": 4, "u8[2]": 2, "f8e4m3fn[4]": 4, "c64[2]": 16}
    assert {shape: shape_bytes(shape) for shape in sizes} == sizes
    assert shape_bytes("token[]") == 0


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("nothing")
