"""Lower bounds of a step's time, by hand."""

import types

import pytest

from geode_jax.plan.bounds import Bounds, network_seconds
from geode_jax.plan.hlo import Collective
from geode_jax.plan.topology import parse_topology


def tpus(*sizes):
    places = [(x, y, z) for x in range(sizes[0]) for y in range(sizes[1]) for z in range(sizes[2])]
    return [types.SimpleNamespace(coords=place) for place in places]


def sending(size, group):
    return Collective("all-gather", "fsdp", 1, size, tuple(group), "")


def test_links_of_a_torus():
    cube = parse_topology("v5p:4x4x4")
    ring = sending(6 * 10**9, range(4))  # along z, which closes: two links of 100 GB/s
    assert network_seconds([ring], cube, tpus(4, 4, 4)) == pytest.approx(0.03)
    # Along all three axes six links, and rings on different axes overlap.
    assert network_seconds([sending(6 * 10**9, range(64))], cube, tpus(4, 4, 4)) == 0.01
    other = sending(6 * 10**9, range(0, 64, 16))
    assert network_seconds([ring, other], cube, tpus(4, 4, 4)) == pytest.approx(0.03)
    assert network_seconds([ring, ring], cube, tpus(4, 4, 4)) == pytest.approx(0.06)
    # Four chips of sixteen are no ring, and a v5e's ring has sixteen.
    square = parse_topology("v5e:4x4")
    ends = network_seconds([sending(10**9, (0, 1, 2, 3))], square, tpus(4, 4, 1))
    assert ends == pytest.approx(0.02)


def test_links_of_nodes():
    nodes = parse_topology("h100:2x8")
    gpus = [types.SimpleNamespace(process_index=i // 8) for i in range(16)]
    inside = sending(45 * 10**8, range(8))
    assert network_seconds([inside], nodes, gpus) == pytest.approx(0.01)
    # Two GPUs of two nodes: all that one sends goes through its card of 50 GB/s.
    between = sending(10**9, (0, 8))
    assert network_seconds([between], nodes, gpus) == pytest.approx(0.02)
    # All sixteen: half of the whole, 16/15 of what one sends, comes in through eight cards.
    everyone = sending(15 * 10**9, range(16))
    assert network_seconds([everyone], nodes, gpus) == pytest.approx(15 / 450)
    slow = sending(15 * 10**9, (0, 1, 8, 9))
    assert network_seconds([slow], nodes, gpus) == pytest.approx(15 * 4 / 3 / 2 / 2 / 50)
    assert network_seconds([], nodes, gpus) == 0


def test_the_longest_binds():
    assert Bounds(1.0, 3.0, 2.0).binding == "memory"
    assert Bounds(1.0, 3.0, 2.0).seconds == 3.0
