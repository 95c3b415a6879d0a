"""The private parts of JAX that this package uses, so that one file follows JAX's releases.

A release that moves them breaks neither the import of the package nor a run of one process; what
needs them raises a `UserError`.
"""

import glob
from typing import Any, NamedTuple

import jax

from geode_jax.errors import UserError

try:
    # The public barrier is a collective of devices, which times out long before an export is made.
    from jax._src.distributed import global_state as _state
except ImportError:
    _state = None

try:
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster, GkeTpuCluster
except ImportError:
    _TPU_CLUSTERS = None
else:
    _TPU_CLUSTERS = (GceTpuCluster, GkeTpuCluster)

TPU_DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


class ProcessGroup(NamedTuple):
    """The processes that `jax.distributed.initialize` has joined.

    Attributes:
        client: of JAX's coordination service; None in a run of one process.
        process: number of this one.
        count: how many there are.
    """

    client: Any
    process: int
    count: int


def check_process_group() -> None:
    """Raises a UserError if this release of JAX does not have what `process_group` reads."""
    if _state is None:
        raise UserError(
            f"processes: jax {jax.__version__} has no jax._src.distributed.global_state, which a "
            "run of several processes needs; install a release that geode_jax is tested with"
        )


def process_group() -> ProcessGroup:
    """Returns the processes of this run.

    Raises:
        UserError: there are several, and this release of JAX does not show them.
    """
    if not jax.distributed.is_initialized():
        return ProcessGroup(None, 0, 1)
    check_process_group()
    assert _state is not None
    return ProcessGroup(_state.client, _state.process_id, _state.num_processes)


def on_tpu_cluster() -> bool:
    """Returns whether this host belongs to a TPU slice whose hosts JAX finds by itself.

    Raises:
        UserError: the host has TPU chips, and this release of JAX does not have the test.
    """
    if _TPU_CLUSTERS is not None:
        return any(cluster.is_env_present() for cluster in _TPU_CLUSTERS)
    if any(glob.glob(pattern) for pattern in TPU_DEVICES):
        raise UserError(
            f"processes: jax {jax.__version__} has no jax._src.clusters.cloud_tpu_cluster, which "
            "finds the hosts of a TPU slice; give --coordinator_address, --num_processes and "
            "--process_id"
        )
    return False
