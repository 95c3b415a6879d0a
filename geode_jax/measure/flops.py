"""FLOPs of a function, counted on its jaxpr: matrix products and convolutions, loops multiplied.

A compiler's own count takes the body of a loop once, whatever its length, and a layer stack is a
loop here. Elementwise work is left out, as everywhere that utilisation is quoted.

Utilisation is quoted against *model FLOPs*: those of the step without rematerialisation
(`model_flops`), frozen parts and what no gradient needs as they are. What is computed a second time
to save memory is work of the machine, not of the model.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from geode_jax.objectives.base import Objective
from geode_jax.shapes import Batch
from geode_jax.training.step import blueprint, make_train_step


def model_flops(
    objective: Objective,
    make_optimizer: Callable,
    mesh: jax.sharding.Mesh,
    batch: Batch,
    microbatches: int,
) -> int:
    """Model FLOPs of one training step, of all devices together; a few seconds of tracing.

    Args:
        objective, make_optimizer, mesh: as of `training.step.blueprint`.
        batch: of the whole step, arrays or shapes.
        microbatches: as of `make_train_step`.
    """
    plain = without_remat(objective)
    graph, optimizer, like = blueprint(plain, make_optimizer, mesh)
    step = make_train_step(plain, graph, optimizer, like, microbatches)
    with jax.set_mesh(mesh):
        return count_flops(step, like, batch)


def count_flops(function: Callable, *args: Any, while_trips: int = 1) -> int:
    """FLOPs of `function(*args)`: 2 M N K of every matrix product whose result is used.

    Args:
        function: traceable; nothing is computed or compiled.
        args: arrays or `jax.ShapeDtypeStruct`s, in pytrees.
        while_trips: passes assumed of a `while_loop`, whose number nobody knows beforehand: an
            answer's length for greedy decoding. A `scan`, and a `fori_loop` between fixed bounds,
            knows its own.

    Returns:
        Of all devices together. Of a `cond` the dearest branch; of a Pallas call its
        `cost_estimate`, without one its body times its grid.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    flops, _ = _count(jaxpr, [True] * len(jaxpr.outvars), while_trips)
    return flops


def without_remat(config: Any) -> Any:
    """The same nest of frozen dataclasses (an objective) with every `remat` field "none"."""
    if not dataclasses.is_dataclass(config):
        return config
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    changed = {name: without_remat(value) for name, value in fields.items()}
    if "remat" in changed:
        changed["remat"] = "none"
    return dataclasses.replace(config, **changed)


def _count(jaxpr, live_out: Sequence[bool], trips: int) -> tuple[int, list[bool]]:
    """FLOPs of what the live outputs need, and which inputs they need.

    Backwards, since autodiff leaves behind what nobody asks for: the compiler drops it.
    """
    live = {var for var, on in zip(jaxpr.outvars, live_out, strict=True) if on and _is_var(var)}
    flops = 0
    for eqn in reversed(jaxpr.eqns):
        out = [var in live for var in eqn.outvars]
        if not any(out) and not eqn.effects:
            continue
        own, needed = _count_equation(eqn, out, trips)
        flops += own
        live |= {var for var, on in zip(eqn.invars, needed, strict=True) if on and _is_var(var)}
    return flops, [var in live for var in jaxpr.invars]


def _is_var(atom) -> bool:
    return not hasattr(atom, "val")  # a literal is no variable, and cannot be hashed


def _count_equation(eqn, out: list[bool], trips: int) -> tuple[int, list[bool]]:
    name, params = eqn.primitive.name, eqn.params
    everything = [True] * len(eqn.invars)
    if name == "dot_general":
        return _dot(eqn), everything
    if name == "conv_general_dilated":
        return _convolution(eqn), everything
    if name == "scan":
        return _scan(eqn, out, trips)
    if name == "while":
        body, test = params["body_jaxpr"].jaxpr, params["cond_jaxpr"].jaxpr
        flops, _ = _count(body, [True] * len(body.outvars), trips)
        return trips * (flops + _count(test, [True], trips)[0]), everything
    if name == "cond":
        branches = [_count(branch.jaxpr, out, trips) for branch in params["branches"]]
        needed = [any(of) for of in zip(*(needed for _, needed in branches), strict=True)]
        return max(flops for flops, _ in branches), [True, *needed]
    if name == "pallas_call":
        return _pallas(eqn, trips), everything
    inner = [sub for value in params.values() for sub in _jaxprs(value)]
    if len(inner) != 1:  # nothing inside, or functions that stand for other rules of the same call
        own = params.get("call_jaxpr", params.get("fun_jaxpr"))
        inner = [*_jaxprs(own)] if own is not None else inner
    if name == "shard_map":  # shapes inside are those of one device
        flops, needed = _count(inner[0], out, trips)
        axes = params.get("manual_axes", params["mesh"].axis_names)
        return flops * math.prod(params["mesh"].shape[axis] for axis in axes), needed
    if len(inner) == 1 and len(inner[0].outvars) == len(out):
        flops, needed = _count(inner[0], out, trips)  # jit, remat, custom derivatives
        if len(needed) == len(everything):
            return flops, needed
        return flops, everything
    # No call: what is inside (a reduction's or a sort's operator) multiplies no matrices.
    return 0, everything


def _jaxprs(value: Any) -> list:
    """The jaxpr that a parameter of an equation is, or those in its tuple."""
    if isinstance(value, tuple | list):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def _dot(eqn) -> int:
    """2 x the result's elements x the length of what is summed over."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _convolution(eqn) -> int:
    """2 x the result's elements x the kernel's elements that make one; padding is counted."""
    kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
    features = kernel[numbers.rhs_spec[0]]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // features


def _scan(eqn, out: list[bool], trips: int) -> tuple[int, list[bool]]:
    """The body times its length. A carry is live where the next pass needs it."""
    live, body = list(out), eqn.params["jaxpr"].jaxpr

    def whole(outer, inner) -> int:
        """How many are passed as they are, constants and carries, and not cut into steps."""
        return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))

    carries = whole(eqn.outvars, body.outvars)
    consts = whole(eqn.invars, body.invars) - carries
    while True:
        flops, needed = _count(body, live, trips)
        carried = [a or b for a, b in zip(live, needed[consts : consts + carries], strict=False)]
        if carried == live[:carries]:
            return flops * eqn.params["length"], needed
        live[:carries] = carried


def _pallas(eqn, trips: int) -> int:
    estimate = eqn.params.get("cost_estimate")
    if estimate is not None:
        return int(estimate.flops)
    jaxpr = eqn.params["jaxpr"]
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    body, _ = _count(jaxpr, [True] * len(jaxpr.outvars), trips)
    return body * math.prod(int(size) for size in eqn.params["grid_mapping"].grid)
