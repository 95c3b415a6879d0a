"""The mesh, and the one table that maps logical axis names to mesh axes.

Every parameter names its axes where it is created (`models.layers.param`), every block's boundary
names those of its activations (`constrain`). RULES says on which mesh axes a name is spread; the
compiler does the rest. An axis that its mesh axes do not divide is left whole.
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
"""Logical axis -> the mesh axes it is spread on; a name that is missing here is a KeyError."""


def make_mesh(
    shape: tuple[int, int, int] = (1, -1, 1), devices: list | None = None
) -> jax.sharding.Mesh:
    """A mesh with axes data, fsdp, model; one size may be -1 (the rest).

    Axes are `Auto`: the compiler propagates shardings from the parameters' and the activations'
    annotations, which keeps gathers and reshapes of the vision side free of annotations.

    Args:
        shape: sizes of the axes.
        devices: None: all there are, of all processes.

    Raises:
        UserError: there are none.
        ValueError: the sizes do not multiply to the number of devices.
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
    """How an array is spread.

    Args:
        names: logical name of each axis, None: whole.
        shape: of the array.
        sizes: of the mesh's axes.
    """
    parts: list[tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        on = () if name is None else tuple(a for a in RULES[name] if sizes[a] > 1)
        parts.append(on if on and size % math.prod(sizes[a] for a in on) == 0 else None)
    return PartitionSpec(*parts)


def placed(tree, mesh: jax.sharding.Mesh):
    """Abstract variables with the shardings that their axes' names say; other leaves are whole.

    Args:
        tree: of `nnx.Variable`s and plain leaves that hold `jax.ShapeDtypeStruct`s: a model's
            state, or an optimizer's, whose moments bear the names of their parameters.
        mesh: of the shardings.
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
    """A model whose variables are shapes with shardings: nothing is computed."""
    return placed(jax.eval_shape(lambda key: build(nnx.Rngs(key)), jax.random.key(0)), mesh)


def shardings(tree):
    """The shardings of a tree of arrays, or of shapes with shardings."""
    return jax.tree.map(lambda x: x.sharding, tree)


def constrain(x: Array, *names: str | None) -> jax.Array:
    """Spreads an activation as its axes' names say, where a mesh is active (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jnp.asarray(x)
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh.shape))


def by_scenes(function: Callable, *arrays: Array):
    """`function(*arrays)`, on every device for its own scenes where a mesh is active.

    For loops that go on until they are done: left to the compiler, every pass asks all devices
    whether one of them is not.

    Args:
        function: of scenes that have nothing to do with each other.
        arrays: [S, ...] each, as are the results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    own = PartitionSpec() if mesh.empty else spec(("batch",), arrays[0].shape[:1], mesh.shape)
    if not any(own):
        return function(*arrays)
    # Without the check of what varies: a loop's first carry is a constant.
    return jax.shard_map(function, in_specs=own, out_specs=own, check_vma=False)(*arrays)


def platform() -> str:
    """Of the mesh's devices, which may not be there; without a mesh, of those that are."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Whole on every device, so that every process can fetch it."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh, scenes: int) -> NamedSharding:
    """Of a batch's arrays [S, ...]: over data x fsdp, or whole where these do not divide S."""
    return NamedSharding(mesh, spec(("batch",), (scenes,), mesh.shape))


def rows_of_process(mesh: jax.sharding.Mesh, scenes: int) -> slice:
    """The rows of a batch of so many scenes that this process's devices hold."""
    indices = batch_sharding(mesh, scenes).addressable_devices_indices_map((scenes,))
    parts = [index[0].indices(scenes)[:2] for index in indices.values() if index]
    return slice(min(start for start, _ in parts), max(stop for _, stop in parts))


def shard_batch(batch, mesh: jax.sharding.Mesh, scenes: int):
    """Host arrays, of the rows that `rows_of_process` names, as arrays of the whole batch.

    Args:
        batch: tree of arrays [rows, ...].
        mesh: over whose data x fsdp they are spread.
        scenes: S of the whole batch.
    """
    sharding, first = batch_sharding(mesh, scenes), rows_of_process(mesh, scenes).start

    def place(x: np.ndarray) -> jax.Array:
        def part(index):
            start, stop, _ = index[0].indices(scenes)
            return x[start - first : stop - first]

        return jax.make_array_from_callback((scenes, *x.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)
