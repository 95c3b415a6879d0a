"""Counts the collectives and matrix products of a compiled program on one device.

The input is the text of an optimised HLO module (`compiled.as_text()`). The compiler's own cost
analysis counts the body of a loop once; here it counts once for each iteration. The number of
iterations is in the text (`known_trip_count`, GPU) or follows from the loop's condition (TPU). A
loop that may stop early counts with its maximum.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from geode_jax.errors import UserError
from geode_jax.sharding import AXES

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|called_computations|branch_computations|true_computation|"
    r"false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)
COLLECTIVE_KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"),
)
"""The compiler's names of the collectives; an asynchronous one begins with NAME-start."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of the text: `[ROOT] %name = shape opcode(operands), rest`."""

    name: str
    shape: str
    opcode: str
    operands: str
    rest: str
    root: bool

    def dims(self) -> tuple[int, ...]:
        """Returns the sizes of the result, or of the first of several results."""
        return _dims(self.shape)


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
        kind: one of `COLLECTIVE_KINDS`.
        axes: mesh axes along which devices exchange, joined by "+".
        times: how often it runs in a step.
        size: bytes that one device sends each time, by a ring, which needs the fewest.
        group: numbers of the devices of the first group, in the mesh's order.
        place: `op_name` of the operation that needs it.
    """

    kind: str
    axes: str
    times: int
    size: int
    group: tuple[int, ...]
    place: str

    @property
    def bytes(self) -> int:
        """Bytes that one device sends in a step."""
        return self.times * self.size


class Module:
    """A parsed module.

    Attributes:
        computations: name -> instructions by name.
        times: name -> how often the computation runs in a step.
        unknown_loops: number of loops with an unknown number of iterations; they count once.
    """

    def __init__(self, text: str):
        """Parses the text of an optimised HLO module.

        Raises:
            UserError: an instruction has another form than this file knows.
        """
        self.computations, entry = _parse(text)
        self.times: dict[str, int] = {}
        self.unknown_loops = 0
        self._callees = {
            name: {i.name: _callees(i) for i in body.values()}
            for name, body in self.computations.items()
        }
        self._visit(entry, 1)

    def _visit(self, name: str, times: int) -> None:
        self.times[name] = self.times.get(name, 0) + times
        for instruction in self.computations.get(name, {}).values():
            inner = times
            if instruction.opcode == "while":
                trips = self._trips(instruction, self.computations[name])
                self.unknown_loops += trips is None
                inner *= trips or 1
            for callee in self._callees[name][instruction.name]:
                self._visit(callee, inner)

    def _trips(self, loop: Instruction, around: Computation) -> int | None:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        names = dict(re.findall(r"\b(condition|body)=%([\w.\-]+)", loop.rest))
        start = functools.partial(_initial, loop, around)
        for index, bound in self._bounds(names["condition"], start):
            step = _step(self.computations[names["body"]], index, start)
            return -(-(bound - (start(index) or 0)) // step)
        return None

    def _bounds(self, name: str, start: Callable) -> Iterator[tuple[int, int]]:
        """Yields (index into the loop's state, constant) of each `state < constant` in a condition.

        The index is -1 if the state itself is a single number.
        """
        body = self.computations.get(name, {})
        for instruction in body.values():
            operands = _NAME.findall(instruction.operands)
            for callee in self._callees[name][instruction.name]:
                # A fusion gets the number as an operand; its index is known at the call alone.
                states = [s for s in (_state_index(body, n) for n in operands) if s is not None]
                for index, bound in self._bounds(callee, start):
                    yield (states[0] if index < 0 and states else index), bound
            if instruction.opcode == "compare" and "direction=LT" in instruction.rest:
                index, bound = _state_index(body, operands[0]), _value(body, operands[1], start)
                inside = body[operands[0]].opcode == "parameter"
                if bound is not None and bound > 0 and (index is not None or inside):
                    yield (-1 if index is None else index), bound

    def instructions(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Yields each instruction that runs, its computation and how often it runs."""
        for name, times in self.times.items():
            body = self.computations.get(name, {})
            for instruction in body.values():
                yield instruction, body, times

    def flops(self) -> int:
        """Returns the FLOPs of one device: products, convolutions, TPU kernels (as estimated)."""
        return sum(
            times * _flops(instruction, body) for instruction, body, times in self.instructions()
        )

    def collectives(self, mesh_shape: tuple[int, ...]) -> list[Collective]:
        """Returns the collectives that join one device with others.

        Args:
            mesh_shape: sizes of `sharding.AXES`; devices are numbered in this order, row-major.
        """
        started = {
            _channel(instruction)
            for name, body in self.computations.items()
            if name in self.times and _starts(body)
            for instruction in body.values()
        }
        found = []
        for name, times in self.times.items():
            body = self.computations.get(name, {})
            for instruction in body.values():
                kind = instruction.opcode.removesuffix("-start")
                if kind not in COLLECTIVE_KINDS:
                    continue
                # On TPUs several fusions name the same collective; the one that starts it counts.
                pieces = "async_collective_fusion_config" in instruction.rest
                if pieces and _channel(instruction) in started and not _starts(body):
                    continue
                if name.startswith("all-reduce-scatter"):  # a TPU's reduce-scatter, as a fusion
                    kind = "reduce-scatter"
                found.append(_collective(kind, instruction, body, times, mesh_shape))
        return [c for c in found if len(c.group) > 1]


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations, entry, body = {}, "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            name = _found(_NAME, line)[1]
            body = computations.setdefault(name, {})
            if line.startswith("ENTRY"):
                entry = name
        elif line.startswith("}"):
            body = None
        elif body is not None and " = " in line:
            instruction = _instruction(line)
            body[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction:
    left, right = line.split(" = ", 1)
    end = _close(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, right = right[:end], right[end:].lstrip()
    opening = right.index("(")
    closing = _close(right, opening)
    return Instruction(
        name=_found(_NAME, left)[1],
        shape=shape,
        opcode=right[:opening],
        operands=right[opening + 1 : closing],
        rest=right[closing + 1 :],
        root=left.lstrip().startswith("ROOT"),
    )


def _close(text: str, opening: int) -> int:
    """Returns the index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _found(pattern: str | re.Pattern[str], text: str, name: str = "") -> re.Match[str]:
    """Returns the first match in a part of an instruction, which must have one.

    Raises:
        UserError: it has none; the message has the instruction's name, if that is known.
    """
    match = re.search(pattern, text)
    if match is None:
        part = " ".join(f"%{name} {text}".split()) if name else text.strip()
        raise UserError(f"plan: the compiled program has an unknown form: {part[:120]}")
    return match


def _callees(instruction: Instruction) -> list[str]:
    return [name for group in _CALLED.findall(instruction.rest) for name in _NAME.findall(group)]


def _channel(instruction: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", instruction.rest)
    return found[1] if found else ""


def _starts(body: Computation) -> bool:
    return any('"AsyncCollectiveStart"' in i.rest for i in body.values())


def _through(body: Computation, name: str) -> Instruction:
    """Returns the instruction that a value comes from, behind copies and conversions."""
    while body[name].opcode in ("copy", "bitcast", "convert"):
        name = _NAME.findall(body[name].operands)[0]
    return body[name]


def _state_index(body: Computation, name: str) -> int | None:
    """Returns the index into the loop's state that a value comes from; None: from elsewhere."""
    taken = _through(body, name)
    if taken.opcode != "get-tuple-element":
        return None
    return int(_found(r"index=(\d+)", taken.rest, taken.name)[1])


def _value(body: Computation, name: str, start: Callable) -> int | None:
    """Returns a value's constant, in the loop or in its initial state; None: it is not constant."""
    index, what = _state_index(body, name), _through(body, name)
    if index is not None:
        return start(index)
    value = what.operands
    return int(value) if what.opcode == "constant" and value.lstrip("-").isdigit() else None


def _initial(loop: Instruction, around: Computation, index: int) -> int | None:
    """Returns the constant that an entry of a loop's state starts with; None: no constant."""
    (state,) = _NAME.findall(loop.operands)[:1]
    if index < 0 or around[state].opcode != "tuple":
        return None
    return _value(around, _NAME.findall(around[state].operands)[index], lambda _: None)


def _step(body: Computation, index: int, start: Callable) -> int:
    """Returns the number that each iteration adds to an entry of the loop's state."""
    (root,) = (i for i in body.values() if i.root)
    if index < 0 or root.opcode != "tuple":
        return 1
    added = _through(body, _NAME.findall(root.operands)[index])
    if added.opcode != "add":
        return 1
    return _value(body, _NAME.findall(added.operands)[1], start) or 1


# --- Sizes ----------------------------------------------------------------------------------------


def _dims(shape: str) -> tuple[int, ...]:
    found = _SHAPE.search(shape)
    return tuple(int(size.lstrip("<=")) for size in found[2].split(",") if size) if found else ()


def shape_bytes(shape: str) -> int:
    """Returns the bytes of a shape as the text has it; those of a tuple are added up."""
    bits = 0
    for kind, sizes in _SHAPE.findall(shape):
        named = re.search(r"\d+", kind)
        width = _BITS.get(kind, 8 if kind.startswith("f8") or not named else int(named[0]))
        bits += width * math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
    return bits // 8


def _operand_shapes(instruction: Instruction, body: Computation) -> list[str]:
    return [body[name].shape for name in _NAME.findall(instruction.operands)]


# --- Products -------------------------------------------------------------------------------------


def _flops(instruction: Instruction, body: Computation) -> int:
    if instruction.opcode == "dot":
        lhs = _dims(_operand_shapes(instruction, body)[0])
        contracted = _found(
            r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest, instruction.name
        )[1]
        summed = math.prod(lhs[int(i)] for i in contracted.split(",") if i)
        return 2 * math.prod(instruction.dims()) * summed
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, body)
    if instruction.opcode == "custom-call" and '"__cublas$' in instruction.rest:
        lhs = _dims(_operand_shapes(instruction, body)[0])
        contracted = _found(
            r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest, instruction.name
        )[1]
        summed = math.prod(lhs[int(i)] for i in re.findall(r"\d+", contracted))
        return 2 * math.prod(instruction.dims()) * summed
    if instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.rest:
        estimate = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.rest)
        return int(estimate[1]) if estimate else 0
    return 0


def _convolution_flops(instruction: Instruction, body: Computation) -> int:
    """Returns the FLOPs of a convolution, without those on padding.

    TPU compilers write matrix products as convolutions, and the batch of a batched product as one
    of their spatial axes.
    """
    lhs, kernel = (_dims(shape) for shape in _operand_shapes(instruction, body)[:2])
    out = instruction.dims()
    labels = _found(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest, instruction.name)
    lhs_labels, kernel_labels, out_labels = labels[1], labels[2], labels[3]
    flops = 2 * out[out_labels.index("b")] * out[out_labels.index("f")]
    flops *= kernel[kernel_labels.index("i")]
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    for axis, label in enumerate(sorted(set(out_labels) - {"b", "f"})):
        sizes = [fields.get(name, "") for name in ("size", "stride", "lhs_dilate", "rhs_dilate")]
        taps, stride, gap, step = (int(s.split("x")[axis]) if s else 1 for s in sizes)
        low = fields["pad"].split("x")[axis].split("_")[0] if "pad" in fields else "0"
        places = np.arange(out[out_labels.index(label)])[:, None] * stride - int(low)
        places = places + np.arange(taps) * step
        inside = (places >= 0) & (places <= (lhs[lhs_labels.index(label)] - 1) * gap)
        flops *= int(np.count_nonzero(inside & (places % gap == 0)))
    return flops


# --- Collectives ----------------------------------------------------------------------------------


def _collective(
    kind: str,
    instruction: Instruction,
    body: Computation,
    times: int,
    mesh_shape: tuple[int, ...],
) -> Collective:
    held = sum(shape_bytes(shape) for shape in _operand_shapes(instruction, body))
    if kind == "collective-permute":  # along a whole axis, mostly in both directions at once
        group = _line(_pair(instruction.rest), mesh_shape)
    else:
        group = _group(instruction.rest, math.prod(mesh_shape))
    n = len(group)
    size = {
        "all-gather": held * (n - 1),
        "all-reduce": 2 * held * (n - 1) // n,
        "reduce-scatter": held * (n - 1) // n,
        "all-to-all": held * (n - 1) // n,
        "collective-permute": held,
    }[kind]
    place = re.search(r'op_name="([^"]*)"', instruction.rest)
    axes = mesh_axes(group, mesh_shape)
    return Collective(kind, axes, times, size, group, place[1] if place else instruction.name)


def mesh_axes(group: Sequence[int], mesh_shape: tuple[int, ...]) -> str:
    """Returns the mesh axes along which the devices of a group differ, joined by "+"."""
    places = np.array(np.unravel_index(np.array(group), mesh_shape))
    varying = np.any(places != places[:, :1], axis=1)
    return "+".join(axis for axis, on in zip(AXES, varying, strict=True) if on)


def _line(group: Sequence[int], mesh_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns all devices of the mesh axes along which the devices of a group differ."""
    numbers = np.arange(math.prod(mesh_shape)).reshape(mesh_shape)
    places = np.array(np.unravel_index(np.array(group), mesh_shape))
    index = tuple(slice(None) if len(set(p)) > 1 else p[0] for p in places.tolist())
    return tuple(int(i) for i in numbers[index].reshape(-1))


def _pair(rest: str) -> tuple[int, ...]:
    """Returns source and target of the first permutation between two different devices."""
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", rest)
    for source, target in re.findall(r"\{(\d+),(\d+)\}", pairs[1] if pairs else ""):
        if source != target:
            return int(source), int(target)
    return (0,)


def _group(rest: str, devices: int) -> tuple[int, ...]:
    """Returns the first replica group, written in any of the three forms of HLO."""
    text = rest.split("replica_groups=", 1)[1] if "replica_groups=" in rest else "{}"
    if text.startswith("mesh["):
        return _mesh_group(text, devices)
    listed = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if listed:
        ids = _iota(listed[2], listed[3])
        return tuple(int(i) for i in ids.reshape(_sizes(listed[1]))[0])
    first = re.match(r"\{\{([\d,]+)\}", text)
    return tuple(_sizes(first[1])) if first else tuple(range(devices))


def _mesh_group(text: str, devices: int) -> tuple[int, ...]:
    """Returns the first group of the form `mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'b'}`.

    This example has groups along b. A group may also take a part of an axis, `{'b':(4)2}`.
    """
    named = _found(r"^mesh\[([^\]]*)\]", text)
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
    ids = np.arange(devices)
    order = re.match(r"[^{]*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", text)
    if order:
        ids = _iota(order[1], order[2]).reshape(-1)
    ids = ids.reshape(tuple(sizes.values()))
    over = _found(r"\{([^}]*)\}", text)[1]
    chosen = [slice(0, 1)] * len(sizes)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        size = sizes[name]
        stride = size // (int(before) * int(part)) if part else 1
        stop = stride * int(part) if part else size
        chosen[list(sizes).index(name)] = slice(0, stop, stride)
    return tuple(int(i) for i in ids[tuple(chosen)].reshape(-1))


def _iota(sizes: str, permutation: str | None) -> np.ndarray:
    """Returns 0, 1, 2, ... as an array of these sizes with permuted axes."""
    ids = np.arange(math.prod(_sizes(sizes))).reshape(_sizes(sizes))
    return ids.transpose(_sizes(permutation)) if permutation else ids


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]
