"""What a compiled program sends between devices, read off its text."""

import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    kind: str
    elements: int
    """Of the largest array that goes in or comes out, on one device."""
    in_loop: bool


def collectives(text: str) -> list[Collective]:
    """Every array of every collective of a compiled module's text."""
    bodies = _computations(text)
    looped = _reached(bodies, set(re.findall(r"body=%?([\w.\-]+)", text)))
    found = []
    for name, lines in bodies.items():
        shapes = {}
        for line in lines:
            if define := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) [\w\-]+\(", line):
                shapes[define[1]] = _elements(define[2])
        for line in lines:
            call = re.search(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\((.*?)\)", line)
            if not call:
                continue
            results = _elements(call[1])
            operands = [size for x in re.findall(r"%([\w.\-]+)", call[3]) for size in shapes.get(x, ())]
            # One array after the other where both sides list as many; else the largest stands for all.
            pairs = zip(results, operands, strict=True) if len(results) == len(operands) else [(*results, *operands)]
            found += [Collective(call[2], max(pair), name in looped) for pair in pairs]
    return found


def _computations(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and "->" in line:
            name = head[1]
            found[name] = []
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line)
    return found


def _reached(bodies: dict[str, list[str]], names: set[str]) -> set[str]:
    """The computations `names`, and all that they call."""
    reached: set[str] = set()
    while names:
        reached |= names
        called = {x for name in names for line in bodies.get(name, ()) for x in re.findall(r"%([\w.\-]+)", line)}
        names = (called & bodies.keys()) - reached
    return reached


def _elements(shape: str) -> list[int]:
    sizes = []
    for dims in re.findall(r"\w+\[([\d,]*)\]", shape):
        size = 1
        for dim in dims.split(","):
            size *= int(dim or 1)
        sizes.append(size)
    return sizes
