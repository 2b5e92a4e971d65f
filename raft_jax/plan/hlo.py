"""Reads an optimised HLO module (`compiled.as_text()`): its collectives and the compiler's estimate of its cycles.

Each instruction is counted as often as it runs: the bodies of loops by their trip counts. A loop whose trip count the
compiler does not know (decoding ends when every row has ended) is counted `unknown_trips` times.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2}
BYTES |= {"u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8}
ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{\s*$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
CALLED = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
SEVERAL_CALLED = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")

# Factor of a collective's bytes: an all-reduce moves twice what an all-gather of its result moves.
COLLECTIVES = {
    "all-gather": 1,
    "all-reduce": 2,
    "reduce-scatter": 1,
    "all-to-all": 1,
    "ragged-all-to-all": 1,
    "collective-permute": 1,
}
NO_ESTIMATE = 2**62  # the compiler writes the largest integer then
REDUCERS = ("all-reduce", "reduce", "reduce-scatter", "reduce-window", "scatter", "select-and-scatter", "sort", "map")


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest[: self.rest.find(")") + 1])

    @property
    def source(self) -> str:
        """The JAX operation that it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match.group(1) if match else self.name


class Collective(NamedTuple):
    """A collective of one device. `num_bytes` is of one run, of its result, or of what a reduce-scatter reads."""

    kind: str
    shape: str
    source: str
    runs: float
    num_bytes: float
    in_loop: bool

    @property
    def equivalent_bytes(self) -> float:
        """Bytes of all runs, in units of an all-gather's."""
        return COLLECTIVES[self.kind] * self.runs * self.num_bytes


def num_bytes(type: str) -> float:
    """Size of a type, which may be a tuple.

    >>> num_bytes("(bf16[2,3]{1,0}, u32[])")
    16
    """
    return sum(BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in ARRAY.findall(type))


class Module:
    """The instructions of an optimised module, and how often each computation runs."""

    def __init__(self, text: str, unknown_trips: int = 1):
        self.computations, self.entry = _parse(text)
        self.runs, self.fused, self.looped = defaultdict(float), set(), set()
        self._count(unknown_trips)

    def collectives(self) -> list[Collective]:
        """The collectives, those that move most first."""
        rows = {}
        for computation, instructions in self.computations.items():
            types = {instruction.name: instruction.type for instruction in instructions}
            for instruction in instructions:
                kind = instruction.opcode.removesuffix("-start")
                if kind not in COLLECTIVES or not self.runs[computation]:
                    continue
                read = sum(num_bytes(types.get(name, "")) for name in instruction.operands)
                size = num_bytes(instruction.type)
                if instruction.opcode.endswith("-start") and size > read:
                    size -= read  # the result of an asynchronous start holds its operands, too
                if kind == "reduce-scatter":
                    size = read
                # One collective may stand in several copies of a computation, of which one runs at a time.
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                name = channel.group(1) if channel else instruction.name
                shape = ", ".join(f"{dtype}[{dims}]" for dtype, dims in ARRAY.findall(instruction.type))
                runs = self.runs[computation]
                if name not in rows or runs < rows[name].runs:
                    looped = computation in self.looped
                    rows[name] = Collective(kind, shape, instruction.source, runs, size, looped)
        return sorted(rows.values(), key=lambda row: -row.equivalent_bytes)

    def cycles(self) -> float:
        """The sum of the TPU compiler's own `estimated_cycles`. Collectives are not in it, nor what has no estimate."""
        total = 0.0
        for computation, instructions in self.computations.items():
            if computation in self.fused:
                continue
            for instruction in instructions:
                estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
                if estimate and instruction.opcode != "while" and int(estimate.group(1)) < NO_ESTIMATE:
                    total += self.runs[computation] * int(estimate.group(1))
        return total

    def _count(self, unknown_trips: int) -> None:
        self.runs[self.entry] = 1
        for caller in reversed(self._callees_first()):
            for instruction in self.computations[caller]:
                for role, callee in _called(instruction):
                    if callee not in self.computations:
                        continue
                    factor = 1.0
                    if instruction.opcode == "while":
                        factor = self._trips(instruction, unknown_trips)
                        self.looped.add(callee)
                    elif instruction.opcode.removesuffix("-start") in REDUCERS and role == "to_apply":
                        factor = 0
                    if instruction.opcode in ("fusion", "custom-call") or caller in self.fused:
                        self.fused.add(callee)
                    if caller in self.looped:
                        self.looped.add(callee)
                    self.runs[callee] += self.runs[caller] * factor

    def _callees_first(self) -> list[str]:
        order, visited = [], set()

        def visit(computation: str) -> None:
            if computation in visited or computation not in self.computations:
                return
            visited.add(computation)
            for instruction in self.computations[computation]:
                for _, callee in _called(instruction):
                    visit(callee)
            order.append(computation)

        visit(self.entry)
        return order

    def _trips(self, loop: Instruction, unknown_trips: int) -> float:
        known = re.search(r"known_trip_count[^\d]*(\d+)", loop.rest)
        if known:
            return int(known.group(1))
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        bounds = sorted(self._bounds(condition.group(1))) if condition else []
        if bounds and "windowed_dot_general" in loop.rest:  # XLA's own loop around a product: two steps per trip
            return bounds[-1] / 2
        return bounds[-1] if bounds else unknown_trips

    def _bounds(self, condition: str) -> Iterator[int]:
        """The positive constants that a loop's condition compares with."""
        for instruction in self.computations.get(condition, ()):
            constant = re.match(r"(\d+)\)", instruction.rest) if instruction.opcode == "constant" else None
            if constant and instruction.type[:5] in ("s32[]", "u32[]") and int(constant.group(1)):
                yield int(constant.group(1))
            for _, callee in _called(instruction):
                yield from self._bounds(callee)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line and not line[0].isspace():
            head = COMPUTATION.match(line)
            if head:
                current = computations[head.group(2)] = []
                entry = head.group(2) if head.group(1) else entry
        elif current is not None and (match := INSTRUCTION.match(line)):
            type, rest = _split_type(match.group(2))
            opcode = re.match(r"([\w\-]+)\(", rest)
            if opcode:
                current.append(Instruction(match.group(1), type, opcode.group(1), rest[len(opcode.group(1)) + 1 :]))
    return computations, entry


def _split_type(text: str) -> tuple[str, str]:
    """The type, which may be a tuple or have a layout in braces, and what follows it."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "({") - (letter in ")}")
        if letter == " " and depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


def _called(instruction: Instruction) -> list[tuple[str, str]]:
    called = CALLED.findall(instruction.rest)
    for names in SEVERAL_CALLED.findall(instruction.rest):
        called += [("branch", name.strip().lstrip("%")) for name in names.split(",")]
    return called
