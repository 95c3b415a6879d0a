"""Describes absent devices to the compilers: a TPU slice, or nodes of GPUs.

`libtpu` from the package index compiles without a TPU. The CUDA plugin compiles without a GPU for
the description of one, `targets/*.txtpb`.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

from geode_jax.errors import UserError
from geode_jax.exports.files import read_text
from geode_jax.measure.chips import CHIPS, Chip

TARGETS = Path(__file__).parent / "targets"
ALIASES = {"a100": "a100-80"}
_PACKAGES = {
    "tpu": ("libtpu", "pip install -e '.[plan]' in the checkout"),
    "cuda": (
        "jax_cuda13_plugin",
        "pip install --no-deps jax-cuda13-plugin=={0} jax-cuda13-pjrt=={0}".format(
            importlib.metadata.version("jax")
        ),
    ),
}
_OFFLINE_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # otherwise libtpu queries the cloud's metadata server
    "TPU_WORKER_HOSTNAMES": "localhost",  # without the query libtpu needs these two
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # otherwise the plugin needs a driver
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice, or nodes of GPUs.

    Attributes:
        name: as on the command line, such as `v5p:4x4x4` or `h100:2x8`.
        chip: the chip of every device.
        shape: chips along the axes of a TPU slice; (nodes, GPUs of each node).
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)


def parse_topology(text: str) -> Topology:
    """Parses `CHIP:SHAPE`, such as `v5e:4x4`, `v5p:4x4x4` or `h100:2x8` (nodes x GPUs).

    Raises:
        UserError: an unknown chip, or a shape that the chip does not come in.
    """
    name, _, shape = text.partition(":")
    chip = CHIPS.get(ALIASES.get(name, name))
    if chip is None:
        raise UserError(f"--topology: {name}: no such chip; there are {', '.join(CHIPS)}")
    if not re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8})*", shape):
        raise UserError(f"--topology: {text}: no shape; as in v5e:4x4, v5p:4x4x4, h100:2x8")
    sizes = tuple(int(size) for size in shape.split("x"))
    axes = chip.torus_axes or 2
    if len(sizes) != axes:
        of = "nodes x GPUs" if chip.platform == "cuda" else f"{axes} axes"
        raise UserError(f"--topology: {text}: a shape of {name} has {of}")
    most = chip.group
    if chip.platform == "cuda" and sizes[1] > most:
        raise UserError(f"--topology: {text}: a node has at most {most} of them")
    if chip.platform == "tpu" and math.prod(sizes) > most:
        raise UserError(f"--topology: {text}: a pod has at most {most} of them")
    return Topology(text, chip, sizes)


def devices_of(topology: Topology) -> list:
    """Returns the devices for `sharding.make_mesh`; JAX itself stays on the CPU.

    Raises:
        UserError: the optional package is missing, or the compiler refuses the shape.
    """
    platform = topology.chip.platform
    module, remedy = _PACKAGES[platform]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"plan: {topology.name} needs the package {module}: {remedy}")
    for name, value in _OFFLINE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    shape = "x".join(str(size) for size in topology.shape)
    try:
        if platform == "cuda":
            nodes, gpus = topology.shape
            target = read_text(TARGETS / f"{topology.chip.name}.txtpb")
            found = topologies.get_topology_desc(
                platform="cuda", target_config=target, topology=f"{nodes}x1x{gpus}"
            )
        else:
            options: dict[str, Any] = {}
            if topology.size == 1:  # a part of a host, so libtpu needs the host's shape
                options["chips_per_host_bounds"] = (1, 1, 1)
            if topology.chip.name == "v4":  # the two cores of a chip as one device
                options["chip_config_name"] = "megacore"
            found = topologies.get_topology_desc(
                f"{topology.chip.name}:{shape}", platform="tpu", **options
            )
    except Exception as error:  # plugins raise errors of several types
        reason = str(error).strip().splitlines()[0]
        if "lockfile" in reason:
            reason = "another process is using libtpu, which serves one process at a time"
        raise UserError(f"plan: {topology.name}: the compiler refuses it: {reason}") from None
    return list(found.devices)
