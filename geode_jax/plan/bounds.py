"""What a step cannot be faster than: arithmetic, memory traffic, network, each on its own.

All three are lower bounds by the data sheets, with nothing else in the way: a plan's times and its
utilisation are ceilings, not predictions.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from geode_jax.plan.hlo import Collective
from geode_jax.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds of a step; `binding` is which of them is the longest."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """The step's lower bound: the three overlap at best."""
        return max(self.compute, self.memory, self.network)

    @property
    def binding(self) -> str:
        """`compute`, `memory` or `network`."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def network_seconds(
    collectives: Sequence[Collective], topology: Topology, devices: Sequence
) -> float:
    """The least time that the links need for a step's collectives.

    TPU: a group that lies along some axes of the torus uses the links along them, two an axis where
    the torus closes in a ring and the group takes all of it, else one (an end has no other). Work
    on different axes overlaps. GPU: within a node the switch's bandwidth; of a group over several
    nodes, what must come from the others, by the network cards of its GPUs there.

    Args:
        collectives: of one device.
        topology: theirs.
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
    """Whether a slice's torus closes along an axis: of 4, 8, ... where it has three, else of 16."""
    size = topology.shape[axis]
    return size % 4 == 0 if topology.chip.torus_axes == 3 else size == 16


def _switched(sent: float, group: Sequence, topology: Topology) -> dict[object, float]:
    nodes = len({device.process_index for device in group})
    inside = len(group) // nodes
    seconds = {}
    if inside > 1:
        seconds["node"] = sent / topology.chip.link_bandwidth
    if nodes > 1:
        # Of what a device gets in all, (nodes - 1) / nodes is from elsewhere, shared by the cards.
        remote = sent * len(group) / (len(group) - 1) * (nodes - 1) / nodes / inside
        seconds["network"] = remote / topology.chip.network_bandwidth
    return seconds
