"""What a compiled program moves between devices and how much memory it takes, read off the program; nothing runs."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from rljax.parallel.hlo import Instruction, parse, shape_bytes

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a compiled program."""

    kind: str
    """One of `KINDS`, whether it runs in the background or not."""
    shapes: tuple[str, ...]
    """What one device holds of each array on the larger side, as `bf16[16,8]`: of a gather the result, of all others
    the operand."""
    bytes: int
    """Of these arrays together, on one device. A ring moves about as much over a device's links; twice as much for an
    all-reduce."""
    times: int
    """How often it runs in one call of the program: the product of the trips of the loops around it."""
    op_name: str
    """The path of the JAX operation that it comes from; empty where the compiler made it."""

    @property
    def largest(self) -> int:
        """Bytes of its largest array."""
        return max(map(shape_bytes, self.shapes), default=0)

    def __str__(self) -> str:
        mib = self.bytes * self.times / 2**20
        return f"{self.times} x {self.kind} {' '.join(self.shapes)} = {mib:.1f} MiB  {self.op_name}"


def collectives(compiled: jax.stages.Compiled | str, data_loops: Sequence[int] = (1,)) -> list[Collective]:
    """The collectives that one device takes part in during one call of a program, those that move most first.

    `compiled` is a program or its text. A loop counts by its trips; `data_loops` are those to assume where data decide:
    of the outermost such loop, of those within it, and so on. A conditional counts all of its branches.

    On CPU devices the compiler moves bfloat16 as float32.
    """
    program = parse(compiled if isinstance(compiled, str) else compiled.as_text() or "")
    found = []
    for name, instruction, times in program.executed(data_loops):
        kind = _kind(instruction)
        if kind is None:
            continue

        operands = [program.computations[name][operand] for operand in instruction.operands]
        shapes = tuple(shape for operand in operands for shape in operand.shapes)
        if kind == "all-gather":
            # In the background its result is a tuple of operands and results.
            is_split = instruction.opcode.endswith("-start")
            shapes = instruction.shapes[len(shapes) :] if is_split else instruction.shapes
        found.append(Collective(kind, shapes, sum(map(shape_bytes, shapes)), times, instruction.op_name))
    return sorted(found, key=lambda one: -one.bytes * one.times)


def _kind(instruction: Instruction) -> str | None:
    """The kind of collective that an instruction is or starts; None for all else."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def traffic(found: Iterable[Collective]) -> dict[str, int]:
    """Bytes by kind of collective, times included."""
    total: Counter[str] = Counter()
    for one in found:
        total[one.kind] += one.bytes * one.times
    return dict(total)


@dataclasses.dataclass(frozen=True)
class CompiledMemory:
    """Bytes of one device while a program runs, by part."""

    arguments: int
    """What it is called with."""
    outputs: int
    """What it returns, donated arguments that it is written over included."""
    aliased: int
    """The part of the outputs that is written over donated arguments."""
    temporaries: int
    """What exists in between."""
    code: int
    """The program itself; 0 where the backend does not say."""

    @property
    def peak(self) -> int:
        """Most bytes at a time: all parts, what is aliased once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def compiled_memory(compiled: jax.stages.Compiled) -> CompiledMemory:
    """What the compiler says of a program's memory on one device."""
    stats: Any = compiled.memory_analysis()
    return CompiledMemory(
        arguments=int(stats.argument_size_in_bytes),
        outputs=int(stats.output_size_in_bytes),
        aliased=int(stats.alias_size_in_bytes),
        temporaries=int(stats.temp_size_in_bytes),
        code=int(stats.generated_code_size_in_bytes),
    )
