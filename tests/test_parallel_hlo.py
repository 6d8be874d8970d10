"""The text of compiled programs: how often a loop runs."""

import jax
import jax.numpy as jnp
import pytest

from rljax.parallel.hlo import parse

# As a TPU's compiler writes a loop over layers: the number of its trips stands in the condition alone.
COUNTED = """HloModule jit_step, is_scheduled=true

%condition.1 (c.1: (s32[], f32[4,8])) -> pred[] {
  %c.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(4,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(36)
  %count = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%count, %limit), direction=LT, metadata={op_name="jit(step)/while/cond/lt"}
}

%body.1 (b.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %b.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(4,128)}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %b.2 = s32[]{:T(128)} get-tuple-element(%b.1), index=0
  %b.3 = s32[]{:T(128)} copy(%b.2)
  %b.4 = f32[4,8]{1,0:T(4,128)} get-tuple-element(%b.1), index=1
  %b.5 = s32[]{:T(128)} add(%b.3, %one), metadata={op_name="jit(step)/while/body/add"}
  ROOT %b.6 = (s32[]{:T(128)}, f32[4,8]{1,0:T(4,128)}) tuple(%b.5, %b.4)
}

ENTRY %main.1 (p.1: f32[4,8], p.2: s32[]) -> f32[4,8] {
  %p.1 = f32[4,8]{1,0:T(4,128)} parameter(0)
  %p.2 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %copied = s32[]{:T(128)} copy(%zero)
  %start = (s32[]{:T(128)}, f32[4,8]{1,0:T(4,128)}) tuple(%copied, %p.1)
  %while.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(4,128)}) while(%start), condition=%condition.1, body=%body.1
  ROOT %out = f32[4,8]{1,0:T(4,128)} get-tuple-element(%while.1), index=1
}
"""


def trips(text):
    program = parse(text)
    all_of_it = [one for inside in program.computations.values() for one in inside.values()]
    return [program.trips(one) for one in all_of_it if one.opcode == "while"]


def test_a_loop_that_counts_up_has_the_trips_of_its_condition():
    assert trips(COUNTED) == [36]
    assert trips(COUNTED.replace("constant(0)", "constant(30)")) == [6]
    assert [times for _, one, times in parse(COUNTED).executed((5,)) if one.name == "b.5"] == [36]


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("direction=LT", "direction=NE"),
        ("%limit = s32[]{:T(128)} constant(36)", "%limit = s32[]{:T(128)} get-tuple-element(%c.1), index=0"),
        ("copy(%zero)", "copy(%p.2)"),
        ("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(2)"),
        ("add(%b.3, %one)", "multiply(%b.3, %one)"),
        ("body=%body.1", "body=%elsewhere"),
    ],
)
def test_trips_of_any_other_loop_are_those_that_are_assumed(written, instead):
    text = COUNTED.replace(written, instead)
    assert text != COUNTED
    assert trips(text) == [None]


def test_what_a_compiler_writes_down_counts():
    def five(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x) * 2, None), x, length=5)[0]

    def until(x):
        return jax.lax.while_loop(lambda x: x[0] < 10, lambda x: x + 1, x)

    x = jnp.zeros(3)
    assert trips(jax.jit(five).lower(x).compile().as_text()) == [5]
    assert trips(jax.jit(until).lower(x).compile().as_text()) == [None]
