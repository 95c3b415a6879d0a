"""Lower bounds of a step's time by arithmetic, memory traffic and network, from data sheets.

A real step is slower: the times and the utilisation of a plan are ceilings, not predictions.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from geode_jax.plan.hlo import Collective
from geode_jax.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds that a step needs at least for each resource."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """Lower bound of the step, in which the three overlap."""
        return max(self.compute, self.memory, self.network)

    @property
    def binding(self) -> str:
        """Name of the longest of them: `compute`, `memory` or `network`."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def network_seconds(
    collectives: Sequence[Collective], topology: Topology, devices: Sequence
) -> float:
    """Returns the least time in seconds that the links need for a step's collectives.

    TPU: a group along some axes of the torus uses the links of these axes: two for each axis if the
    torus closes to a ring there and the group covers the ring, else one (the end of a line has one
    neighbour). Exchanges along different axes overlap. GPU: inside a node, the switch's bandwidth;
    for a group over several nodes, the bytes that come from other nodes pass the network cards of
    the group's GPUs in the node.

    Args:
        collectives: those of one device.
        topology: the topology of the devices.
        devices: in the mesh's order, with `coords` (TPU) or `process_index` (GPU).
    """
    busy: dict[object, float] = defaultdict(float)
    for one in collectives:
        group = [devices[i] for i in one.group]
        uses = _torus if topology.chip.platform == "tpu" else _switched
        for link, seconds in uses(one.bytes, group, topology).items():
            busy[link] += seconds
    return max(busy.values(), default=0.0)


def _torus(sent: float, group: Sequence, topology: Topology) -> dict[object, float]:
    links: dict[object, int] = {}
    for axis in range(topology.chip.torus_axes):
        places = len({device.coords[axis] for device in group})
        if places > 1:
            whole = places == topology.shape[axis]
            links[axis] = 2 if whole and closes(topology, axis) else 1
    if not links:
        return {}
    seconds = sent / (sum(links.values()) * topology.chip.link_bandwidth)
    return dict.fromkeys(links, seconds)


def closes(topology: Topology, axis: int) -> bool:
    """True if a slice's torus closes to a ring: multiples of 4 on three axes, 16 on two axes."""
    size = topology.shape[axis]
    return size % 4 == 0 if topology.chip.torus_axes == 3 else size == 16


def _switched(sent: float, group: Sequence, topology: Topology) -> dict[object, float]:
    nodes = len({device.process_index for device in group})
    inside = len(group) // nodes
    seconds = {}
    if inside > 1:
        seconds["node"] = sent / topology.chip.link_bandwidth
    if nodes > 1:
        # (nodes - 1) / nodes of the bytes that a device gets come from other nodes, and the cards
        # of the group's GPUs in the node share them.
        remote = sent * len(group) / (len(group) - 1) * (nodes - 1) / nodes / inside
        seconds["network"] = remote / topology.chip.network_bandwidth
    return seconds
