"""Counts the FLOPs of a function on its jaxpr: matrix products and convolutions, also in loops.

A compiler's own count takes the body of a loop once, and a stack of layers is a loop here.
Elementwise operations are not counted, as is usual for utilisation.

Utilisation refers to *model FLOPs*: those of the step without rematerialisation (`model_flops`),
because work that is repeated to save memory is not work of the model.
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
    """Returns the model FLOPs of one training step on all devices; tracing takes a few seconds.

    Args:
        objective, make_optimizer, mesh: as in `training.step.blueprint`.
        batch: batch of the whole step, arrays or shapes.
        microbatches: as in `make_train_step`.
    """
    plain = without_remat(objective)
    graph, optimizer, like = blueprint(plain, make_optimizer, mesh)
    step = make_train_step(plain, graph, optimizer, like, microbatches)
    with jax.set_mesh(mesh):
        return count_flops(step, like, batch)


def count_flops(function: Callable, *args: Any, while_trips: int = 1) -> int:
    """Returns the FLOPs of `function(*args)`: 2 M N K for each matrix product whose result is used.

    The sum is over all devices. A `cond` counts with its most expensive branch, and a Pallas call
    with its `cost_estimate` or else with its body times its grid.

    Args:
        function: traceable; nothing is computed or compiled.
        args: pytrees of arrays or `jax.ShapeDtypeStruct`s.
        while_trips: assumed iterations of a `while_loop`, such as the length of an answer in greedy
            decoding. A `scan`, and a `fori_loop` between fixed bounds, has a known number.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    flops, _ = _count(jaxpr, [True] * len(jaxpr.outvars), while_trips)
    return flops


def without_remat(config: Any) -> Any:
    """Returns nested frozen dataclasses (an objective) with every `remat` field set to "none"."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    changed = {name: without_remat(value) for name, value in fields.items()}
    if "remat" in changed:
        changed["remat"] = "none"
    return dataclasses.replace(config, **changed)


def _count(jaxpr, live_out: Sequence[bool], trips: int) -> tuple[int, list[bool]]:
    """Returns the FLOPs that the live outputs need, and which inputs they need.

    Goes backwards, since autodiff leaves unused equations behind, which the compiler drops.
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
    return not hasattr(atom, "val")  # a literal has it, and cannot be hashed


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
    if len(inner) != 1:  # no jaxpr inside, or those of further rules of the same call
        own = params.get("call_jaxpr", params.get("fun_jaxpr"))
        inner = [*_jaxprs(own)] if own is not None else inner
    if name == "shard_map":  # the shapes inside are per device
        flops, needed = _count(inner[0], out, trips)
        axes = params.get("manual_axes", params["mesh"].axis_names)
        return flops * math.prod(params["mesh"].shape[axis] for axis in axes), needed
    if len(inner) == 1 and len(inner[0].outvars) == len(out):
        flops, needed = _count(inner[0], out, trips)  # jit, remat, custom derivatives
        if len(needed) == len(everything):
            return flops, needed
        return flops, everything
    # Not a call: the jaxpr inside, such as the operator of a sort, has no matrix products.
    return 0, everything


def _jaxprs(value: Any) -> list:
    """Returns the jaxprs in a parameter of an equation."""
    if isinstance(value, tuple | list):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def _dot(eqn) -> int:
    """Returns 2 x the result's elements x the product of the contracted sizes."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _convolution(eqn) -> int:
    """Returns 2 x the result's elements x the kernel's elements for each; padding counts."""
    kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
    features = kernel[numbers.rhs_spec[0]]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // features


def _scan(eqn, out: list[bool], trips: int) -> tuple[int, list[bool]]:
    """Returns the body's FLOPs times its length; a carry is live if the next iteration needs it."""
    live, body = list(out), eqn.params["jaxpr"].jaxpr

    def whole(outer, inner) -> int:
        """Returns the number of constants and carries, which have the same rank inside."""
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
