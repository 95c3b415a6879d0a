"""What a compiled program does on one device: collectives and matrix products, loops multiplied.

Reads the text of an optimised HLO module (`compiled.as_text()`). The compiler's own cost analysis
takes a loop's body once; here everything inside counts as often as the loop goes round, which the
text says (`known_trip_count`, GPU) or the loop's condition does (TPU). Of a loop that may stop
early the most passes count.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from geode_jax.sharding import AXES

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|called_computations|branch_computations|true_computation|"
    r"false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
"""The collectives, as the compiler calls them; their asynchronous forms are these, too."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `[ROOT] %name = shape opcode(operands), rest`."""

    name: str
    shape: str
    opcode: str
    operands: str
    rest: str
    root: bool

    def dims(self) -> tuple[int, ...]:
        """Sizes of the result, of the first of several."""
        return _dims(self.shape)


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """Attributes:
    kind: one of `KINDS`.
    axes: mesh axes whose devices exchange, joined by "+".
    times: how often it runs in a step.
    size: bytes of what one device sends, each time: by a ring, which sends least.
    group: numbers of the first group's devices, in the mesh's order.
    place: the operation in the program that it serves.
    """

    kind: str
    axes: str
    times: int
    size: int
    group: tuple[int, ...]
    place: str

    @property
    def bytes(self) -> int:
        """In a step."""
        return self.times * self.size


class Module:
    """A parsed module.

    Attributes:
        computations: name -> instructions by name.
        times: name -> how often the computation runs in a step.
        unknown_loops: loops whose number of passes nothing says; they count once.
    """

    def __init__(self, text: str):
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
        """(place in the loop's state, constant) of every `state < constant` in a condition."""
        body = self.computations.get(name, {})
        for instruction in body.values():
            operands = _NAME.findall(instruction.operands)
            for callee in self._callees[name][instruction.name]:
                # The state reaches a fusion as an operand: which one it is, the call says.
                states = [s for s in (_state_index(body, n) for n in operands) if s is not None]
                for index, bound in self._bounds(callee, start):
                    yield (states[0] if index < 0 and states else index), bound
            if instruction.opcode == "compare" and "direction=LT" in instruction.rest:
                index, bound = _state_index(body, operands[0]), _value(body, operands[1], start)
                inside = body[operands[0]].opcode == "parameter"
                if bound is not None and bound > 0 and (index is not None or inside):
                    yield (-1 if index is None else index), bound

    def instructions(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Everything that runs, the computation that it stands in and how often it runs."""
        for name, times in self.times.items():
            body = self.computations.get(name, {})
            for instruction in body.values():
                yield instruction, body, times

    def flops(self) -> int:
        """Of matrix products, convolutions and TPU kernels (their estimates), on one device."""
        return sum(
            times * _flops(instruction, body) for instruction, body, times in self.instructions()
        )

    def collectives(self, mesh_shape: tuple[int, ...]) -> list[Collective]:
        """What one device exchanges with others.

        Args:
            mesh_shape: sizes of `sharding.AXES`; a device's number is its place in this order.
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
                if kind not in KINDS:
                    continue
                # A TPU spreads one over several fusions, each of which names it: its start counts.
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
            name = _NAME.search(line)[1]
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
        name=_NAME.search(left)[1],
        shape=shape,
        opcode=right[:opening],
        operands=right[opening + 1 : closing],
        rest=right[closing + 1 :],
        root=left.lstrip().startswith("ROOT"),
    )


def _close(text: str, opening: int) -> int:
    """Where the parenthesis closes that opens there."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _callees(instruction: Instruction) -> list[str]:
    return [name for group in _CALLED.findall(instruction.rest) for name in _NAME.findall(group)]


def _channel(instruction: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", instruction.rest)
    return found[1] if found else ""


def _starts(body: Computation) -> bool:
    return any('"AsyncCollectiveStart"' in i.rest for i in body.values())


def _through(body: Computation, name: str) -> Instruction:
    """What a value is, behind its copies."""
    while body[name].opcode in ("copy", "bitcast", "convert"):
        name = _NAME.findall(body[name].operands)[0]
    return body[name]


def _state_index(body: Computation, name: str) -> int | None:
    """The place in the loop's state that a value was taken from."""
    taken = _through(body, name)
    if taken.opcode != "get-tuple-element":
        return None
    return int(re.search(r"index=(\d+)", taken.rest)[1])


def _value(body: Computation, name: str, start: Callable) -> int | None:
    """A constant, in the loop or handed to it; None: it is none."""
    index, what = _state_index(body, name), _through(body, name)
    if index is not None:
        return start(index)
    value = what.operands
    return int(value) if what.opcode == "constant" and value.lstrip("-").isdigit() else None


def _initial(loop: Instruction, around: Computation, index: int) -> int | None:
    """What a place in a loop's state starts as, where that is a constant."""
    (state,) = _NAME.findall(loop.operands)[:1]
    if index < 0 or around[state].opcode != "tuple":
        return None
    return _value(around, _NAME.findall(around[state].operands)[index], lambda _: None)


def _step(body: Computation, index: int, start: Callable) -> int:
    """What is added to a place in the loop's state with each pass."""
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
    """Bytes of a shape as the text has it, of all parts of a tuple."""
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
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
        summed = math.prod(lhs[int(i)] for i in contracted.split(",") if i)
        return 2 * math.prod(instruction.dims()) * summed
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, body)
    if instruction.opcode == "custom-call" and '"__cublas$' in instruction.rest:
        lhs = _dims(_operand_shapes(instruction, body)[0])
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)[1]
        summed = math.prod(lhs[int(i)] for i in re.findall(r"\d+", contracted))
        return 2 * math.prod(instruction.dims()) * summed
    if instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.rest:
        estimate = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.rest)
        return int(estimate[1]) if estimate else 0
    return 0


def _convolution_flops(instruction: Instruction, body: Computation) -> int:
    """A TPU's products are convolutions, a batched product's batch one of their spatial axes.

    Only what meets a real element of the input counts, not the padding between and around them.
    """
    lhs, kernel = (_dims(shape) for shape in _operand_shapes(instruction, body)[:2])
    out = instruction.dims()
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
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


def _collective(kind, instruction, body, times, mesh_shape) -> Collective:
    held = sum(shape_bytes(shape) for shape in _operand_shapes(instruction, body))
    if kind == "collective-permute":  # passed on along a whole axis, mostly both ways at once
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
    """The mesh axes along which the devices of a group differ, joined by "+"."""
    places = np.array(np.unravel_index(np.array(group), mesh_shape))
    varying = np.any(places != places[:, :1], axis=1)
    return "+".join(axis for axis, on in zip(AXES, varying, strict=True) if on)


def _line(group: Sequence[int], mesh_shape: tuple[int, ...]) -> tuple[int, ...]:
    """All devices that lie as these do on the mesh axes along which these do not differ."""
    numbers = np.arange(math.prod(mesh_shape)).reshape(mesh_shape)
    places = np.array(np.unravel_index(np.array(group), mesh_shape))
    index = tuple(slice(None) if len(set(p)) > 1 else p[0] for p in places.tolist())
    return tuple(int(i) for i in numbers[index].reshape(-1))


def _pair(rest: str) -> tuple[int, ...]:
    """The first two different devices between which something is passed on."""
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", rest)
    for source, target in re.findall(r"\{(\d+),(\d+)\}", pairs[1] if pairs else ""):
        if source != target:
            return int(source), int(target)
    return (0,)


def _group(rest: str, devices: int) -> tuple[int, ...]:
    """The first replica group, in any of the three ways in which they are written."""
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
    """`mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'b'}`: along b, and of an axis maybe a part."""
    named = re.match(r"mesh\[([^\]]*)\]", text)
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
    ids = np.arange(devices)
    order = re.match(r"[^{]*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", text)
    if order:
        ids = _iota(order[1], order[2]).reshape(-1)
    ids = ids.reshape(tuple(sizes.values()))
    over = re.search(r"\{([^}]*)\}", text)[1]
    chosen = [slice(0, 1)] * len(sizes)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        size = sizes[name]
        stride = size // (int(before) * int(part)) if part else 1
        stop = stride * int(part) if part else size
        chosen[list(sizes).index(name)] = slice(0, stop, stride)
    return tuple(int(i) for i in ids[tuple(chosen)].reshape(-1))


def _iota(sizes: str, permutation: str | None) -> np.ndarray:
    """0, 1, 2, ... as an array of these sizes, its axes then permuted."""
    ids = np.arange(math.prod(_sizes(sizes))).reshape(_sizes(sizes))
    return ids.transpose(_sizes(permutation)) if permutation else ids


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]
