"""The device mesh, and the table that maps logical axis names to mesh axes.

`models.layers.param` names the axes of every parameter, and `constrain` those of the activations
between blocks. `RULES` maps a name to the mesh axes over which it is sharded; the compiler
propagates the rest. An axis whose size the mesh axes do not divide is replicated.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from geode_jax.runtime.devices import find_devices
from geode_jax.shapes import Array

AXES = ("data", "fsdp", "model")

RULES: Mapping[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),  # scenes, or rows of text in scene order
    "length": (),
    "width": (),
    # parameters
    "embed": ("fsdp",),
    "head_dim": (),
    "layer": (),
    # both: tensor parallelism
    "heads": ("model",),
    "kv_heads": ("model",),
    "mlp": ("model",),
    "inner": ("model",),
    "vocab": ("model",),
}
"""Logical axis -> mesh axes over which it is sharded; another name raises a KeyError."""


def make_mesh(
    shape: tuple[int, int, int] = (1, -1, 1), devices: list | None = None
) -> jax.sharding.Mesh:
    """Returns a mesh with the axes data, fsdp, model.

    Axes are `Auto`: the compiler propagates shardings from the annotations of parameters and
    activations, so gathers and reshapes need none.

    Args:
        shape: sizes of the axes; one size may be -1 (all remaining devices).
        devices: devices of the mesh; None: all devices of all processes.

    Raises:
        UserError: no device is found.
        ValueError: the product of the sizes is not the number of devices.
    """
    devices = find_devices() if devices is None else devices
    count = len(devices)
    sizes = list(shape)
    if sizes.count(-1) > 1:
        raise ValueError(f"{shape}: at most one axis may be -1")
    if -1 in sizes:
        rest = max(1, -math.prod(sizes))
        sizes[sizes.index(-1)] = count // rest
    if math.prod(sizes) != count or min(sizes) < 1:
        raise ValueError(f"{shape} does not multiply to the {count} devices present")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(
    names: tuple[str | None, ...], shape: tuple[int, ...], sizes: Mapping[str, int]
) -> PartitionSpec:
    """Returns the partition spec of an array.

    Args:
        names: logical name of each axis; None: replicated.
        shape: shape of the array.
        sizes: size of each mesh axis.

    Raises:
        KeyError: a name is not in `RULES`.
    """
    parts: list[tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        on = () if name is None else tuple(a for a in RULES[name] if sizes[a] > 1)
        parts.append(on if on and size % math.prod(sizes[a] for a in on) == 0 else None)
    return PartitionSpec(*parts)


def placed(tree, mesh: jax.sharding.Mesh):
    """Returns abstract variables with the shardings of their axis names.

    Other leaves are replicated.

    Args:
        tree: `nnx.Variable`s and plain leaves that hold `jax.ShapeDtypeStruct`s: the state of a
            model, or of an optimizer, whose moments have the axis names of their parameters.
        mesh: mesh of the shardings.
    """

    def place(leaf):
        names = leaf.get_metadata().get("out_sharding") if isinstance(leaf, nnx.Variable) else None

        def one(x):
            own = names if names and len(names) == len(x.shape) else (None,) * len(x.shape)
            sharding = NamedSharding(mesh, spec(own, x.shape, mesh.shape))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(one, leaf)

    return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def abstract_model(build: Callable[[nnx.Rngs], nnx.Module], mesh: jax.sharding.Mesh) -> nnx.Module:
    """Returns a model whose variables are shapes with shardings, without computing anything."""
    return placed(jax.eval_shape(lambda key: build(nnx.Rngs(key)), jax.random.key(0)), mesh)


def shardings(tree):
    """Returns the shardings of a tree of arrays, or of shapes with shardings."""
    return jax.tree.map(lambda x: x.sharding, tree)


def constrain(x: Array, *names: str | None) -> jax.Array:
    """Shards an activation by its axis names if a mesh is active (`jax.set_mesh`)."""
    x = jnp.asarray(x)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jnp.asarray(x)
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh.shape))


def by_scenes(function: Callable, *arrays: Array):
    """Returns `function(*arrays)`; if a mesh is active, each device computes its own scenes.

    Use it for loops with a data-dependent end. If the compiler shards such a loop, every iteration
    exchanges the condition among all devices.

    Args:
        function: treats each scene independently.
        *arrays: [S, ...] each, as are the results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    own = PartitionSpec() if mesh.empty else spec(("batch",), arrays[0].shape[:1], mesh.shape)
    if not any(own):
        return function(*arrays)
    # The check must be off: the first carry of a loop is a constant, which does not vary.
    return jax.shard_map(function, in_specs=own, out_specs=own, check_vma=False)(*arrays)


def platform() -> str:
    """Returns the platform of the active mesh, which may be abstract, or else JAX's default."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds, so every process can fetch it."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh, scenes: int) -> NamedSharding:
    """Returns the sharding of arrays [S, ...]: over data x fsdp if these divide S."""
    return NamedSharding(mesh, spec(("batch",), (scenes,), mesh.shape))


def rows_of_process(mesh: jax.sharding.Mesh, scenes: int) -> slice:
    """Returns the rows of a batch of `scenes` scenes that this process's devices hold."""
    indices = batch_sharding(mesh, scenes).addressable_devices_indices_map((scenes,))
    parts = [index[0].indices(scenes)[:2] for index in indices.values() if index is not None]
    return slice(min(start for start, _ in parts), max(stop for _, stop in parts))


def shard_batch(batch, mesh: jax.sharding.Mesh, scenes: int):
    """Returns global arrays of a batch, of which each process passes the rows of `rows_of_process`.

    Args:
        batch: tree of host arrays [rows, ...].
        mesh: the arrays are sharded over its axes data and fsdp.
        scenes: S of the whole batch.
    """
    sharding, first = batch_sharding(mesh, scenes), rows_of_process(mesh, scenes).start

    def place(x: np.ndarray) -> jax.Array:
        def part(index):
            start, stop, _ = index[0].indices(scenes)
            return x[start - first : stop - first]

        return jax.make_array_from_callback((scenes, *x.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)
