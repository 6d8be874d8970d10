"""The least time that a compiled program can take: every kernel at its own roofline.

A GPU's kernel takes max(bytes / bandwidth, FLOPs of its products / peak) plus what a launch costs. XLA for TPUs writes
its own estimate of cycles on a kernel, which is taken where it stands.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

from rljax.parallel.hlo import Instruction, Program, dimensions, parse, shape_bytes
from rljax.parallel.topologies import Chip

LAUNCH = 1.5e-6
"""Seconds between two kernels of a GPU."""

# Names for what is there already, and the ends of what runs in the background.
_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_VIEWS = ("bitcast", "reshape", "transpose")
_SLICES = ("dynamic-slice", "slice", "gather")
# Each element of the result needs the one element of each operand that lies at the same place.
_ELEMENTWISE = {
    "abs",
    "add",
    "and",
    "compare",
    "convert",
    "cosine",
    "divide",
    "exponential",
    "log",
    "logistic",
    "maximum",
    "minimum",
    "multiply",
    "negate",
    "not",
    "or",
    "power",
    "rsqrt",
    "select",
    "sine",
    "sqrt",
    "subtract",
    "tanh",
}


@dataclasses.dataclass(frozen=True)
class Bound:
    """What kernels need at least, added up."""

    seconds: float = 0.0
    bytes: float = 0.0
    """Read from memory and written to it."""
    flops: float = 0.0
    """Of products; 0 of a TPU's program, which has them in forms of its own."""
    kernels: float = 0.0
    custom: float = 0.0
    """Of these, kernels of which the program does not say what they compute: their reads and writes alone count."""

    def __add__(self, other: "Bound") -> "Bound":
        return Bound(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: float) -> "Bound":
        return Bound(*(times * value for value in dataclasses.astuple(self)))


def bound(text: str, chip: Chip, data_loops: Sequence[int] = (1,)) -> Bound:
    """Of one call of the program `text`. Loops count by their trips, those of data as `data_loops` says (see
    `rljax.parallel.collectives`); of a conditional the dearest branch counts. Collectives count as reads and writes of
    memory alone."""
    program = parse(text)
    loops = tuple(data_loops)

    @functools.cache
    def of(name: str, depth: int) -> Bound:
        total = Bound()
        for one in program.computations.get(name, {}).values():
            total = total + _cost(program, name, one, chip, depth, loops, of)
        return total

    return of(program.entry, 0)


def _cost(program: Program, where: str, one: Instruction, chip: Chip, depth: int, loops, of) -> Bound:
    if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
        return Bound()
    if one.opcode == "while":
        trips = program.trips(one)
        deeper = depth + (trips is None)
        times = loops[min(depth, len(loops) - 1)] if trips is None else trips
        inside = Bound()
        for name in one.called:
            inside = inside + of(name, deeper)
        return inside * float(times)
    if one.opcode == "conditional":
        return max((of(name, depth) for name in one.called), key=lambda found: found.seconds, default=Bound())
    if one.opcode in ("call", "async-start"):
        return functools.reduce(lambda total, name: total + of(name, depth), one.called, Bound())

    read, written, flops = _traffic(program, where, one)
    cycles = re.search(r'"?estimated_cycles"?:\s*"?(\d+)', one.attributes)
    if cycles and chip.clock:
        seconds = int(cycles[1]) / chip.clock
    else:
        seconds = max((read + written) / chip.bandwidth, flops / chip.flops) + LAUNCH
    return Bound(seconds, float(read + written), float(flops), 1.0, float(one.opcode == "custom-call"))


def _traffic(program: Program, where: str, one: Instruction) -> tuple[int, int, int]:
    """(bytes read, bytes written, FLOPs of products) of one kernel."""
    if one.opcode == "fusion":
        return _fusion(program, one.called[0])

    computation = program.computations[where]
    if one.opcode == "dynamic-update-slice":
        # In place: the update goes in, and nothing else is touched.
        update = sum(map(shape_bytes, computation[one.operands[1]].shapes))
        return update, update, 0
    operands = [computation[name] for name in one.operands if name in computation]
    read = sum(shape_bytes(shape) for operand in operands for shape in operand.shapes)
    written = sum(map(shape_bytes, one.shapes))
    return read, written, _product(program, where, one)


def _product(program: Program, where: str, one: Instruction) -> int:
    """FLOPs of a product; 0 of all else."""
    if one.opcode != "dot":
        return 0
    left = dimensions(program.computations[where][one.operands[0]].shapes[0])
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    axes = [int(axis) for axis in summed[1].split(",") if axis] if summed else []
    return 2 * math.prod(dimensions(one.shapes[0])) * math.prod(left[axis] for axis in axes)


def _fusion(program: Program, name: str) -> tuple[int, int, int]:
    """(bytes read, bytes written, FLOPs): what passes between its instructions stays on the chip."""
    computation = program.computations[name]
    needed = _needed(computation)

    read = written = flops = 0
    for one in computation.values():
        flops += _product(program, name, one)
        if one.opcode == "fusion":
            flops += _fusion(program, one.called[0])[2]
        if one.opcode == "parameter":
            whole = sum(map(shape_bytes, one.shapes))
            read += round(whole * needed[one.name] / max(_elements(one), 1))
        if one.is_root:
            roots = [computation[operand] for operand in one.operands] if one.opcode == "tuple" else [one]
            written += sum(_written(computation, root) for root in roots)
    return read, written, flops


def _needed(computation: Mapping[str, Instruction]) -> dict[str, float]:
    """Of each value of a fusion, how many of its elements are computed, or read: those that its results need, since
    an element of a result is computed from what it depends on alone."""
    needed = dict.fromkeys(computation, 0.0)

    # Users come behind what they use. They may need the same elements, so that the sum is the most it can be.
    for user in reversed(list(computation.values())):
        size = float(_elements(user))
        needed[user.name] = size if user.is_root else min(needed[user.name], size)
        for name in dict.fromkeys(user.operands):
            if name in computation:
                needed[name] += _taken(user, needed[user.name], name, float(_elements(computation[name])))
    return needed


def _taken(user: Instruction, needed: float, name: str, size: float) -> float:
    """Elements of the operand `name`, which has `size`, that `needed` elements of the result of `user` depend on."""
    is_first = user.operands[0] == name
    if user.opcode == "dynamic-update-slice" and is_first:
        # What lies there already, and stays.
        return 0.0
    if user.opcode in _SLICES:
        return needed if is_first else size
    if user.opcode == "reduce" and len(user.shapes) == 1 and is_first:
        return needed * size / max(_elements(user), 1)
    if user.opcode in _VIEWS or (user.opcode in _ELEMENTWISE and _elements(user) == size):
        return needed
    return size


def _elements(one: Instruction) -> int:
    """Of an array; of a tuple, of all of its arrays."""
    return sum(math.prod(dimensions(shape)) for shape in one.shapes)


def _written(computation, root: Instruction) -> int:
    """Bytes written of a result; of an array that is updated in place, the update."""
    source = root
    while source.opcode in ("bitcast", "convert") and source.operands and source.operands[0] in computation:
        source = computation[source.operands[0]]
    if source.opcode == "dynamic-update-slice":
        return sum(map(shape_bytes, computation[source.operands[1]].shapes))
    return sum(map(shape_bytes, root.shapes))
