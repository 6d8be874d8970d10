"""The least time of a compiled program: what its kernels read, write and multiply, at what a chip can do."""

import pytest

from rljax.parallel import Chip, bound
from rljax.parallel.roofline import LAUNCH

CHIP = Chip(flops=1e9, bandwidth=1e6, memory=2**30, links=1e6, kinds=("a chip",))

# A product of [8, 16] and [16, 4] in float32; a row of 4 written into an array of 100 in place; a loop around a copy.
PROGRAM = """HloModule jit_f, is_scheduled=true

%body (b.1: (f32[64])) -> (f32[64]) {
  %b.1 = (f32[64]{0}) parameter(0)
  %b.2 = f32[64]{0} get-tuple-element(%b.1), index=0
  %b.3 = f32[64]{0} copy(%b.2)
  ROOT %b.4 = (f32[64]{0}) tuple(%b.3)
}

%cond (c.1: (f32[64])) -> pred[] {
  %c.1 = (f32[64]{0}) parameter(0)
  ROOT %c.2 = pred[] constant(true)
}

ENTRY %main (p.1: f32[8,16], p.2: f32[16,4], p.3: f32[100], p.4: f32[4], p.5: s32[], p.6: (f32[64])) -> f32[100] {
  %p.1 = f32[8,16]{1,0} parameter(0)
  %p.2 = f32[16,4]{1,0} parameter(1)
  %p.3 = f32[100]{0} parameter(2)
  %p.4 = f32[4]{0} parameter(3)
  %p.5 = s32[] parameter(4)
  %p.6 = (f32[64]{0}) parameter(5)
  %dot.1 = f32[8,4]{1,0} dot(%p.1, %p.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %while.1 = (f32[64]{0}) while(%p.6), condition=%cond, body=%bodyTRIPS
  ROOT %update.1 = f32[100]{0} dynamic-update-slice(%p.3, %p.4, %p.5)
}
"""


@pytest.mark.parametrize("is_known", [True, False])
def test_a_kernel_counts_what_it_moves_and_a_loop_its_trips(is_known):
    """Trips that data decide are those that are assumed."""
    known = ', backend_config={"known_trip_count":{"n":"3"}}' if is_known else ""
    found = bound(PROGRAM.replace("TRIPS", known), CHIP, (1,) if is_known else (3,))
    of_product = 4 * (8 * 16 + 16 * 4 + 8 * 4)
    of_copy = 2 * 4 * 64
    of_update = 2 * 4 * 4
    assert found.bytes == of_product + 3 * of_copy + of_update
    assert found.flops == 2 * 8 * 16 * 4
    assert (found.kernels, found.custom) == (5, 0)
    # Memory is what holds all of them up.
    assert found.seconds == pytest.approx(found.bytes / 1e6 + 5 * LAUNCH)


def test_a_product_that_computes_for_longer_than_it_reads_takes_that_long():
    slow = Chip(flops=1e3, bandwidth=1e6, memory=2**30, links=1e6, kinds=("a chip",))
    text = PROGRAM.replace("TRIPS", "")
    assert bound(text, slow, (0,)).seconds == pytest.approx(2 * 8 * 16 * 4 / 1e3 + 32 / 1e6 + 2 * LAUNCH)


# Of a sum of two [8, 60] the columns from 10 to 20 alone, squared and written over [8, 10] of an array.
SLICED = """HloModule jit_g, is_scheduled=true

%add (a.1: f32[], a.2: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  %a.2 = f32[] parameter(1)
  ROOT %a.3 = f32[] add(%a.1, %a.2)
}

%sliced (s.1: f32[2,8,60], s.2: f32[8,100]) -> f32[8,100] {
  %s.1 = f32[2,8,60]{2,1,0} parameter(0)
  %s.2 = f32[8,100]{1,0} parameter(1)
  %s.3 = f32[] constant(0)
  %s.4 = f32[8,60]{1,0} reduce(%s.1, %s.3), dimensions={0}, to_apply=%add
  %s.5 = f32[8,60]{1,0} sqrt(%s.4)
  %s.6 = f32[8,10]{1,0} slice(%s.5), slice={[0:8], [10:20]}
  %s.7 = f32[8,10]{1,0} multiply(%s.6, %s.6)
  %s.8 = s32[] constant(0)
  ROOT %s.9 = f32[8,100]{1,0} dynamic-update-slice(%s.2, %s.7, %s.8, %s.8)
}

ENTRY %main (p.1: f32[2,8,60], p.2: f32[8,100]) -> f32[8,100] {
  %p.1 = f32[2,8,60]{2,1,0} parameter(0)
  %p.2 = f32[8,100]{1,0} parameter(1)
  ROOT %fusion.1 = f32[8,100]{1,0} fusion(%p.1, %p.2), kind=kLoop, calls=%sliced
}
"""


def test_a_kernel_reads_what_its_results_are_computed_from():
    """Which is two of each element that it writes."""
    assert bound(SLICED, CHIP).bytes == 4 * (2 * 8 * 10 + 8 * 10)
    # What is not known to go element by element needs all of its operand.
    whole = SLICED.replace("sqrt(%s.4)", "cholesky(%s.4)")
    assert bound(whole, CHIP).bytes == 4 * (2 * 8 * 60 + 8 * 10)
