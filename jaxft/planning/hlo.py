"""Read a compiled program: its collectives, how often they run, and its largest buffers.

This module parses the text of XLA's optimized modules. The text names every computation, what calls it, and how often a
loop runs. `cost_analysis` counts the body of a loop only once, and NVIDIA's compiler has no such analysis.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|async_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
_NO_BUFFER = {  # operations that only name or pass on a buffer of another operation
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "copy-done",
    "optimization-barrier", "after-all", "partition-id", "all-gather-done", "all-reduce-done",
    "collective-permute-done", "async-done", "async-update",
}  # fmt: skip


class Array(NamedTuple):
    """An array of one device, as in f32[8,128]."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits[0]) if digits else 0)
        return -(-math.prod(self.shape) * bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Buffer(NamedTuple):
    """An array that the program makes, and the operation that it belongs to."""

    array: Array
    operation: str


class Collective(NamedTuple):
    """One kind of collective over some axes of the mesh: what one device sends in one run of the program."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    count: int
    bytes: int


class Instruction(NamedTuple):
    name: str
    arrays: tuple[Array, ...]
    opcode: str
    rest: str


@dataclass(frozen=True)
class Program:
    """The computations of a module, and how often each runs in one run of the whole."""

    computations: Mapping[str, Sequence[Instruction]]
    runs: Mapping[str, int]
    fused: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> "Program":
        computations: dict[str, list[Instruction]] = {}
        entry = current = None
        for line in text.splitlines():
            if opened := _COMPUTATION.match(line):
                current = computations.setdefault(opened[2], [])
                entry = opened[2] if opened[1] else entry
            elif current is not None and (found := _INSTRUCTION.match(line)):
                current.append(Instruction(found[1], tuple(_arrays(found[2])), found[3], found[4]))
        runs: dict[str, int] = {}
        fused: set[str] = set()

        def visit(name: str, times: int) -> None:
            runs[name] = runs.get(name, 0) + times
            for instruction in computations[name]:
                inside = times * _trips(instruction, computations) if instruction.opcode == "while" else times
                for called in _called(instruction):
                    if instruction.opcode not in ("while", "conditional", "call") and "async" not in instruction.opcode:
                        fused.add(called)
                    visit(called, inside)

        visit(entry, 1)
        return cls(computations, runs, frozenset(fused))

    def collectives(self, mesh: Mapping[str, int]) -> list[Collective]:
        """By kind, axes and dtype, the largest first. Bytes are what each device sends, by a ring algorithm.

        Args:
            mesh: size of each axis, in the order of the device assignment.
        """
        totals: dict[tuple, list[int]] = {}
        seen: set[tuple] = set()
        for name, times in self.runs.items():
            for instruction in self.computations[name]:
                kind = instruction.opcode.removesuffix("-start")
                if kind not in KINDS:
                    continue
                arrays = _results(instruction)
                if name in self.fused:  # TPUs run one collective in several fusions, a piece in each
                    channel = re.search(r"channel_id=\d+", instruction.rest)
                    mark = (kind, arrays, channel and channel[0], _operation(instruction))
                    if mark in seen:
                        continue
                    seen.add(mark)
                axes = _axes(instruction, mesh)
                ways = math.prod(mesh[axis] for axis in axes)
                entry = totals.setdefault((kind, axes, arrays[0].dtype), [0, 0])
                entry[0] += times
                entry[1] += int(times * sum(array.bytes for array in arrays) * _sent(kind, ways))
        found = [Collective(*key, *total) for key, total in totals.items()]
        return sorted(found, key=lambda collective: -collective.bytes)

    def largest_buffers(self, count: int = 10) -> list[Buffer]:
        """The largest arrays that the program makes, one for each dtype and shape; its arguments are not among them."""
        found: dict[Array, str] = {}
        for name in self.runs:
            if name in self.fused:
                continue
            for instruction in self.computations[name]:
                if instruction.opcode in _NO_BUFFER:
                    continue
                for array in instruction.arrays:
                    found.setdefault(array, _operation(instruction))
        ranked = sorted(found.items(), key=lambda item: -item[0].bytes)
        return [Buffer(*item) for item in ranked[:count]]


def _arrays(text: str) -> Iterator[Array]:
    for dtype, sizes in _SHAPE.findall(text):
        yield Array(dtype, tuple(int(size) for size in sizes.split(",") if size))


def _called(instruction: Instruction) -> list[str]:
    names = []
    for one, several in _CALLED.findall(instruction.rest):
        names += [one] if one else [name.strip().lstrip("%") for name in several.split(",")]
    return names


def _trips(loop: Instruction, computations: Mapping[str, Sequence[Instruction]]) -> int:
    """How often a loop runs: as the compiler says, or by the bound in its condition; 1 if it depends on data."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]
    bounds = [
        int(value[1])
        for instruction in computations[condition]
        if instruction.opcode == "constant" and (value := re.match(r"(\d+)\)", instruction.rest))
    ]
    return bounds[0] if len(bounds) == 1 else 1


def _operation(instruction: Instruction) -> str:
    """The operation's name in the program before it was compiled, or else its own name."""
    operation = re.search(r'op_name="([^"]*)"', instruction.rest)
    return operation[1] if operation else instruction.name


def _results(collective: Instruction) -> tuple[Array, ...]:
    """The arrays that a collective gives. The start of an asynchronous one also lists its operands."""
    arrays = collective.arrays
    if collective.opcode.endswith("-start") and collective.opcode != "all-reduce-start":
        arrays = tuple(array for array in arrays if array.shape or array.dtype != "u32")
        return arrays[len(arrays) // 2 :]
    return arrays


def _sent(kind: str, ways: int) -> float:
    """Bytes that a device sends for each byte of its result."""
    return {
        "all-gather": (ways - 1) / ways,
        "all-reduce": 2 * (ways - 1) / ways,
        "reduce-scatter": ways - 1,
        "all-to-all": (ways - 1) / ways,
        "collective-permute": 1,
    }[kind]


def _axes(collective: Instruction, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the devices of a group differ."""
    group = _group(collective.rest, math.prod(mesh.values()))
    places = np.stack(np.unravel_index(group, tuple(mesh.values())))
    return tuple(axis for axis, row in zip(mesh, places, strict=True) if len(set(row)) > 1)


def _group(text: str, devices: int) -> np.ndarray:
    """The devices of one group, in any of the ways that XLA writes groups."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return np.array([int(pairs[1]), int(pairs[2])])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return np.array([int(device) for device in listed[1].split(",")])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        chosen = re.findall(r"'(\w+)'", named[2])
        grid = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        return grid[tuple(slice(None) if name in chosen else 0 for name in sizes)].reshape(-1)
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source, order = ([int(n) for n in part.split(",")] if part else None for part in counted.groups())
        grid = np.arange(math.prod(source)).reshape(source)
        return (grid if order is None else grid.transpose(order)).reshape(shape)[0]
    return np.arange(devices)
