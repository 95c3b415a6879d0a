"""The mesh and the one table that maps logical axis names to mesh axes."""

import contextlib

import jax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "model")

RULES = (
    # activations
    ("batch", ("data", "fsdp")),
    ("length", None),
    # parameters
    ("embed", "fsdp"),
    ("heads", "model"),
    ("kv_heads", "model"),
    ("head_dim", None),
    ("mlp", "model"),
    ("inner", "model"),
    ("vocab", "model"),
    ("layer", None),
    ("feature", None),
)
"""Logical axis -> mesh axes. A name that is missing here raises where a parameter is created."""


def make_mesh(shape: tuple[int, int, int] = (1, -1, 1)) -> jax.sharding.Mesh:
    """A mesh over all devices with axes data, fsdp, model; one size may be -1 (the rest).

    Axes are `Auto`: the compiler propagates shardings from the parameters' and the batch's
    annotations, which keeps gathers and reshapes of the vision side free of annotations.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    sizes = list(shape)
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh {shape}: at most one axis may be -1")
    if -1 in sizes:
        known = -1
        for size in sizes:
            known *= size
        sizes[sizes.index(-1)] = devices // known
    total = sizes[0] * sizes[1] * sizes[2]
    if total != devices or min(sizes) < 1:
        raise ValueError(f"mesh {shape} does not multiply to the {devices} devices present")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


@contextlib.contextmanager
def activate(mesh: jax.sharding.Mesh):
    """Context in which annotated parameters can be created: the mesh and RULES."""
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        yield


def shard_batch(batch, mesh: jax.sharding.Mesh):
    """Host arrays [S, ...] of this process become global arrays split over data x fsdp.

    A leading axis that the batch axes do not divide (a single scene on many devices) is replicated.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def place(x):
        divisible = (x.shape[0] * jax.process_count()) % parts == 0
        spec = PartitionSpec(("data", "fsdp")) if divisible else PartitionSpec()
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x)

    return jax.tree.map(place, batch)
