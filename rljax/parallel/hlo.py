"""The text of a compiled program (`Compiled.as_text()`), read into instructions: what runs, and how often."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_BITS = {"pred": 8, "c64": 64, "c128": 128, "bf16": 16}
"""Types whose name does not end with their number of bits; the rest are read off it (f32, s8, u4)."""

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) )?.*\{$")
# The shape of a TPU's array holds parentheses of its own, but no lower-case word in front of one.
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\]")
_CALLED = re.compile(r"\b(?:calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    """Unique in its program."""
    opcode: str
    """Such as `fusion`, `dot`, `all-gather`, `while`."""
    shapes: tuple[str, ...]
    """Its results without layouts, as `bf16[16,8]`; several for a tuple."""
    operands: tuple[str, ...]
    """Names of instructions of the same computation."""
    attributes: str
    """What follows the operands, as it stands."""
    is_root: bool
    """Whether it is the result of its computation."""

    @property
    def op_name(self) -> str:
        """The path of the JAX operation that it comes from; empty where the compiler made it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that run when it does. Those that combine two elements, of a reduction say, do not count."""
        names = _CALLED.findall(self.attributes)
        for inside in _BRANCHES.findall(self.attributes):
            names += [name.strip().lstrip("%") for name in inside.split(",")]
        if self.opcode == "call":
            names += re.findall(r"\bto_apply=%?([\w.\-]+)", self.attributes)
        return tuple(names)


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each its instructions by name."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    @functools.cached_property
    def _by_name(self) -> dict[str, Instruction]:
        return {name: one for inside in self.computations.values() for name, one in inside.items()}

    def trips(self, loop: Instruction) -> int | None:
        """How often the body of a `while` runs; None where data decide."""
        known = re.search(r"known_trip_count[^0-9}]*(\d+)", loop.attributes)
        return int(known[1]) if known else self._counted(loop)

    def _counted(self, loop: Instruction) -> int | None:
        """Trips of a loop that counts from one constant up to another: a TPU's compiler does not write them down."""
        test = self._root(loop, "condition")
        before = self._by_name.get(loop.operands[0])
        after = self._root(loop, "body")
        if test is None or before is None or after is None:
            return None
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None

        counter, limit = (self._by_name[name] for name in test.operands)
        place = re.search(r"\bindex=(\d+)", counter.attributes)
        if counter.opcode != "get-tuple-element" or place is None or {before.opcode, after.opcode} != {"tuple"}:
            return None
        begin = self._constant(self._by_name[before.operands[int(place[1])]])
        end = self._constant(limit)

        # One more at each trip.
        stepped = self._by_name[after.operands[int(place[1])]]
        steps = [self._constant(self._by_name[name]) for name in stepped.operands]
        if begin is None or end is None or stepped.opcode != "add" or 1 not in steps:
            return None
        return max(end - begin, 0)

    def _root(self, loop: Instruction, which: str) -> Instruction | None:
        """The result of the `condition` or the `body` of a loop."""
        named = re.search(rf"\b{which}=%?([\w.\-]+)", loop.attributes)
        inside = self.computations.get(named[1], {}) if named else {}
        return next((one for one in inside.values() if one.is_root), None)

    def _constant(self, one: Instruction) -> int | None:
        """The whole number that an instruction is, itself or as a copy of one; None for what is none."""
        while one.opcode == "copy":
            one = self._by_name[one.operands[0]]
        found = re.match(r"(-?\d+)\)", one.attributes) if one.opcode == "constant" else None
        return int(found[1]) if found else None

    def executed(self, data_loops: Sequence[int] = (1,)) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, times) of all that runs, at each place that it is called from.

        A conditional counts all of its branches. `data_loops` are trips to assume for loops whose number of trips is
        data: of the outermost, of those within it, and so on; the last holds for all that are deeper.
        """
        yield from self._executed(self.entry, 1, 0, tuple(data_loops))

    def _executed(self, name: str, times: int, depth: int, data_loops: tuple[int, ...]):
        for instruction in self.computations.get(name, {}).values():
            yield name, instruction, times

            inside = times
            deeper = depth
            if instruction.opcode == "while":
                trips = self.trips(instruction)
                if trips is None:
                    trips = data_loops[min(depth, len(data_loops) - 1)]
                    deeper = depth + 1
                inside = times * trips
            for called in instruction.called:
                yield from self._executed(called, inside, deeper, data_loops)


@functools.lru_cache(maxsize=4)
def parse(text: str) -> Program:
    """The program of a text. ValueError for one that has no entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    current: dict[str, Instruction] | None = None

    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is not None:
            if found := _instruction(line):
                current[found.name] = found
        elif header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            if header[1]:
                entry = header[2]
    if not entry:
        raise ValueError(f"no ENTRY computation in a text of {len(text)} characters; give Compiled.as_text()")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    found = _LINE.match(line)
    if found is None:
        return None

    root, name, shape, opcode, rest = found.groups()
    operands, _, attributes = rest.partition(")")
    if opcode == "constant":
        attributes = rest
    return Instruction(
        name=name,
        opcode=opcode,
        shapes=tuple(f"{kind}[{sizes}]" for kind, sizes in _ARRAY.findall(shape)),
        operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
        attributes=attributes,
        is_root=root is not None,
    )


def dimensions(shape: str) -> tuple[int, ...]:
    """`bf16[16,8]` -> (16, 8). A bounded dimension counts with its bound."""
    found = _ARRAY.fullmatch(shape)
    return tuple(int(size.lstrip("<=")) for size in found[2].split(",") if size) if found else ()


def shape_bytes(shape: str) -> int:
    """Bytes of an array `bf16[16,8]`, without padding; 0 for a token."""
    kind = shape.partition("[")[0]
    if kind == "token":
        return 0
    number = re.search(r"^[a-z]+(\d+)", kind)
    bits = _BITS.get(kind) or (int(number[1]) if number else 0)
    return math.prod(dimensions(shape)) * bits // 8
