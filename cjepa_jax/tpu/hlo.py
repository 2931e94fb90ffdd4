"""Reads from the text of a compiled TPU program (`compiled.as_text()`) what it says about its own cost.

The TPU compiler notes `estimated_cycles` on most instructions of a schedule. `analyse` adds them up, each as often as
its loop runs, and lists the instructions that carry none. The sum is a lower bound: it includes tiling, padding and
layout copies, but no stalls.
"""

import collections
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Instructions that do no work of their own, or whose work is counted elsewhere.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier"}
_FREE |= {"partition-id", "replica-id", "async-start", "while", "call", "conditional", "collective"}
_FREE |= {"custom-call AllocateBuffer", "custom-call ConcatBitcast"}
_UNKNOWN_LOOP = "while (turns unknown, counted once)"

# Bytes that a chip sends for each byte of its operands, in a group of n chips.
_SENT = dict.fromkeys(["reduce-scatter", "all-to-all", "ragged-all-to-all"], lambda n: (n - 1) / n)
_SENT |= {"all-reduce": lambda n: 2 * (n - 1) / n, "all-gather": lambda n: n - 1}
_SENT |= dict.fromkeys(["collective-permute", "collective-broadcast"], lambda n: 1)


class Instruction(NamedTuple):
    """Holds one line `%name = shape opcode(operands), attributes` without its layouts and comments."""

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str


class Collective(NamedTuple):
    """Describes one exchange of data between chips."""

    name: str
    opcode: str
    group: int  # chips that take part together
    operand_bytes: int  # on one chip, one time
    times: int  # in one run of the program
    overlapped: bool  # whether the schedule computes while it is under way

    @property
    def sent_bytes(self) -> float:
        """Returns the bytes that one chip sends over all times together, by the best known algorithm."""
        return self.times * self.operand_bytes * _SENT[self.opcode](self.group)


class Cost(NamedTuple):
    """Describes an instruction that has an estimate; `cycles` adds up all the times that it runs."""

    name: str
    source: str  # where in the model: JAX' name stack
    cycles: int
    times: int


class Uncosted(NamedTuple):
    """Counts the instructions of one opcode or custom-call target that have no estimate."""

    times: int
    result_bytes: int


class Kernel(NamedTuple):
    """Describes the calls of a Pallas kernel, of which the compiler gives no estimate."""

    name: str  # as the kernel has it
    operands: str  # their shapes
    times: int
    flops: float  # of its products, as it says itself, of all times together
    result_bytes: int


class ProgramCost(NamedTuple):
    """Describes what one run of a compiled program costs on one chip."""

    costs: list[Cost]
    uncosted: dict[str, Uncosted]
    collectives: list[Collective]
    kernels: list[Kernel]
    matmul_flops: float  # of convolutions, dots and kernels

    @property
    def cycles(self) -> int:
        """Returns the compiler's estimate, which leaves out `uncosted`, `kernels` and `collectives`."""
        return sum(cost.cycles for cost in self.costs)


def analyse(text: str) -> ProgramCost:
    """Returns the cost of a compiled program. Raises ValueError where the text is not one."""
    entry, computations = parse(text)
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    chips = int(partitions[1]) if partitions else 1
    costs: list[Cost] = []
    traffic: dict[str, Collective] = {}  # by channel: the parts of an overlapped collective repeat the instruction
    overlapped: set[str] = set()  # channels
    uncosted: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    kernels: list[Kernel] = []
    flops = 0.0

    def walk(computation: str, times: int, fused: bool, computes: bool) -> None:
        nonlocal flops
        shapes = {i.name: i.shape for i in computations[computation]}
        for place, i in enumerate(computations[computation]):
            opcode = i.opcode.removesuffix("-start")
            if i.opcode.endswith(("-done", "-update")):  # their "-start" has been counted
                continue
            callees = list(_callees(i, computations))
            for callee, trips in callees:
                busy = computes or (i.opcode == "fusion" and _cycles(i.attributes) > 0)
                walk(callee, times * (trips or 1), fused or i.opcode == "fusion", busy)
            if opcode in _SENT:
                size = sum(shape_bytes(shapes[name]) for name in _names(i.operands))
                if computation.startswith("all-reduce-scatter"):  # which keeps one part of the sum
                    opcode = "reduce-scatter"
                channel = re.search(r"channel_id=\d+", i.attributes)
                collective = Collective(i.name, opcode, _group(i.attributes, chips), size, times, False)
                key = channel[0] if channel else i.name
                traffic.setdefault(key, collective)
                if computes or _computes_meanwhile(computations[computation], place):
                    overlapped.add(key)
            elif opcode in ("convolution", "dot"):
                flops += times * _flops(i, shapes)
            elif kernel := _kernel(i, shapes, times):
                kernels.append(kernel)
                flops += kernel.flops
                continue
            if fused or opcode in _SENT:
                continue
            if cycles := _cycles(i.attributes):
                source = re.search(r'op_name="([^"]*)"', i.attributes)
                costs.append(Cost(i.name, source[1] if source else "", cycles * times, times))
            elif any(trips is None for _, trips in callees) or (kind := _kind(i, computations)) not in _FREE:
                found = uncosted[_UNKNOWN_LOOP if i.opcode == "while" else kind]
                found[0] += times
                found[1] += times * shape_bytes(i.shape)

    walk(entry, 1, False, False)
    listed = {kind: Uncosted(*counts) for kind, counts in sorted(uncosted.items())}
    found = [collective._replace(overlapped=key in overlapped) for key, collective in traffic.items()]
    return ProgramCost(costs, listed, found, kernels, flops)


def _computes_meanwhile(computation: list[Instruction], start: int) -> bool:
    """Tells whether instructions with an estimate stand between a "-start" and its "-done"."""
    if not computation[start].opcode.endswith("-start"):
        return False
    done = computation[start].opcode.removesuffix("start") + "done"
    for i in computation[start + 1 :]:
        if i.opcode == done and computation[start].name in _names(i.operands):
            return False
        if _cycles(i.attributes):
            return True
    return False


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """Returns the name of the entry and the instructions of every computation. Raises ValueError without an entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if not line.startswith(" "):
            if header := re.match(r"(ENTRY )?%?([\w.-]+) .*-> .*\{$", line):
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif current is not None and (instruction := _instruction(line)):
            current.append(instruction)
    if entry is None:
        raise ValueError("no ENTRY: this is not the text of a compiled program")
    return entry, computations


def shape_bytes(shape: str) -> int:
    """Returns the bytes of an array, "bf16[8,128]", or of a whole tuple, "(f32[2], s32[])"; padding is not counted."""
    bits = 0
    for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape):
        digits = re.search(r"\d+", dtype)
        bits += math.prod(_dims(dims)) * (int(digits[0]) if digits else {"pred": 8}.get(dtype, 0))
    return (bits + 7) // 8


def _instruction(line: str) -> Instruction | None:
    """Parses a line; returns None where it is not an instruction.

    Layouts, which follow `]`, and comments in long lists are removed first, because they would hide the opcode.
    """
    line = re.sub(r"(?<=\])\{[^{}]*\}", "", re.sub(r"/\*.*?\*/", "", line))
    if not (start := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)):
        return None
    rest = line[start.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    if not (opcode := re.match(r" ([a-z][\w-]*)\(", rest[end:])):
        return None
    opening = end + opcode.end() - 1
    closing = _closing(rest, opening)
    return Instruction(start[1], rest[:end], opcode[1], rest[opening + 1 : closing], rest[closing + 1 :])


def _kernel(instruction: Instruction, shapes: dict[str, str], times: int) -> Kernel | None:
    """Returns the call of a named Pallas kernel, or None for any other instruction."""
    name = re.search(r'op_name="(?:[^"]*\W)?(\w+)\)*/pallas_call"', instruction.attributes)
    if not name or 'custom_call_target="tpu_custom_call"' not in instruction.attributes:
        return None
    flops = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
    operands = ", ".join(shapes[operand] for operand in _names(instruction.operands))
    return Kernel(
        name[1], operands, times, times * float(flops[1] if flops else 0), times * shape_bytes(instruction.shape)
    )


def _kind(instruction: Instruction, computations: dict[str, list[Instruction]]) -> str:
    """Returns the name under which an instruction without an estimate is listed."""
    if target := re.search(r'custom_call_target="([^"]*)"', instruction.attributes):
        return f"custom-call {target[1]}"
    if instruction.opcode in _FREE:
        return instruction.opcode
    inside = {i.opcode for name, _ in _callees(instruction, computations) for i in computations[name]}
    if inside & _SENT.keys():
        return "collective"
    if shape_bytes(instruction.shape) <= 8:
        return "scalar operation"
    slow = sorted(inside & {"gather", "scatter", "sort", "dynamic-slice", "dynamic-update-slice"})
    return f"{instruction.opcode} with {slow[0]}" if slow else instruction.opcode


def _closing(text: str, opening: int) -> int:
    """Returns the position where the bracket that opens at `opening` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _dims(dims: str) -> list[int]:
    return [int(d) for d in dims.split(",") if d]


def _cycles(attributes: str) -> int:
    """Returns the estimate, or 0 where there is none; the largest integer, of 19 digits, means none too."""
    found = re.search(r'"estimated_cycles":"(\d{1,18})"', attributes)
    return int(found[1]) if found else 0


def _names(operands: str) -> list[str]:
    return re.findall(r"%([\w.-]+)", operands)


def _callees(instruction: Instruction, computations: dict[str, list[Instruction]]) -> Iterator[tuple[str, int | None]]:
    """Yields each computation that an instruction runs, and how often; None stands for a loop of unknown length."""
    attributes = instruction.attributes
    if instruction.opcode == "while":
        body, condition = (re.search(rf"{key}=%?([\w.-]+)", attributes) for key in ("body", "condition"))
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes)
        if body and condition:
            yield body[1], int(known[1]) if known else _turns(computations[condition[1]])
    elif instruction.opcode in ("fusion", "call", "async-start", "conditional"):
        for found in re.finditer(r"(?:calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)", attributes):
            for name in re.findall(r"[\w.-]+", found[1]):
                yield name, 1


def _turns(condition: list[Instruction]) -> int | None:
    """Returns the N of a loop `while i < N` as `jax.lax.scan` makes them, from 0 in steps of 1, or else None."""
    values = {i.name: int(i.operands) for i in condition if i.opcode == "constant" and i.operands.isdecimal()}
    compare = condition[-1]
    bound = values.get(_names(compare.operands)[-1]) if compare.opcode == "compare" else None
    return bound if "direction=LT" in compare.attributes else None


def _group(attributes: str, chips: int) -> int:
    """Returns how many chips one group of a collective has; XLA has four notations, and an empty one means all."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])  # 'axis', or a part of it: 'axis':(2)4
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(_dims(found[1]))
    return chips


def _flops(instruction: Instruction, shapes: dict[str, str]) -> float:
    """Counts 2 FLOPs for each multiply-add that does not fall on padding.

    XLA counts so too. Padding matters because TPU programs write a batch dimension as a window.
    """
    names = _names(instruction.operands)
    lhs, rhs, out = (
        _dims(shape[shape.find("[") + 1 : shape.find("]")])
        for shape in (shapes[names[0]], shapes[names[1]], instruction.shape)
    )
    attributes = instruction.attributes
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
        return 2.0 * math.prod(out) * math.prod(lhs[d] for d in _dims(contracted[1] if contracted else ""))
    left, right, result = re.split("_|->", re.search(r"dim_labels=([\w?>-]+)", attributes)[1])  # type: ignore[index]
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    count = lhs[left.index("b")] * rhs[right.index("i")] * rhs[right.index("o")] // (int(groups[1]) if groups else 1)
    window = re.search(r"window=\{([^}]*)\}", attributes)
    options = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    for dim in range(len(left) - 2):
        option = {key: value.split("x")[dim] for key, value in options.items()}
        count *= _positions(
            lhs[left.index(str(dim))],
            rhs[right.index(str(dim))],
            out[result.index(str(dim))],
            *(int(option.get(key, "1").split("_")[0]) for key in ("stride", "lhs_dilate", "rhs_dilate")),
            int(option.get("pad", "0_0").split("_")[0]),
        )
    return 2.0 * count


@functools.cache
def _positions(size: int, window: int, out: int, stride: int, dilate: int, window_dilate: int, low: int) -> int:
    """Counts the pairs of an output and a window position that meet an input element, along one dimension."""
    at = np.arange(out) * stride - low + np.arange(window)[:, None] * window_dilate
    return int(((at >= 0) & (at < size * dilate) & (at % dilate == 0)).sum())
