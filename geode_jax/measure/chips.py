"""Data sheets of accelerators: the upper limits of a plan and of a run."""

import dataclasses
from typing import Protocol

GB, GIB, TFLOPS = 10**9, 2**30, 10**12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, which is one device of JAX.

    Attributes:
        name: its name in `--topology`.
        flops: dense bfloat16 FLOP/s with float32 accumulation.
        hbm_bytes: size of its memory.
        hbm_bandwidth: bytes/s of its memory.
        torus_axes: axes of a TPU's torus, with two links of a chip along each; 0: a switch.
        link_bandwidth: bytes/s of one link in one direction: one of a TPU's links, or from a GPU
            into its node's switch.
        group: maximum number of chips that these links join: a pod, or a node.
        network_bandwidth: bytes/s of one chip in one direction beyond its group.
        device_kinds: its values of `jax.Device.device_kind`.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    torus_axes: int
    link_bandwidth: float
    group: int
    network_bandwidth: float
    device_kinds: tuple[str, ...]

    @property
    def platform(self) -> str:
        """JAX's name of the plugin: `tpu` or `cuda`."""
        return "tpu" if self.torus_axes else "cuda"


# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: flops, memory and its bandwidth; links from
# jax-ml/scaling-book, tpus.md, one way. A TPU's "GB" are 2^30 bytes, as its compiler counts them.
# Beyond the pod: a host's network cards (v5e 2 x 100 Gb/s, v6e 4 x 200 Gb/s for 8 chips, v4 and v5p
# 200 Gb/s for 4) over its chips.
# GPU: nvidia.com data sheets of H100 SXM, H200 SXM and A100 SXM (half of what is with sparsity),
# the GA102 white paper. NVLink is given for both directions together: half of it. Beyond the node:
# one network card a GPU, 400 Gb/s (200 for A100), as in NVIDIA's DGX.
# The paper names no GPU of 10 GB, only "10GB GPUs"; the RTX 3080 is one.
_CHIPS = (
    Chip("v4", 275 * TFLOPS, 32 * GIB, 1228 * GB, 3, 45 * GB, 4096, 6.25 * GB, ("TPU v4",)),
    Chip(
        "v5e", 197 * TFLOPS, 16 * GIB, 819 * GB, 2, 50 * GB, 256, 3.125 * GB,
        ("TPU v5 lite", "TPU v5e"),
    ),
    Chip(
        "v5p", 459 * TFLOPS, 95 * GIB, 2765 * GB, 3, 100 * GB, 8960, 6.25 * GB,
        ("TPU v5", "TPU v5p"),
    ),
    Chip(
        "v6e", 918 * TFLOPS, 32 * GIB, 1638 * GB, 2, 100 * GB, 256, 12.5 * GB,
        ("TPU v6 lite", "TPU v6e"),
    ),
    Chip(
        "h100", 989 * TFLOPS, 80 * GB, 3350 * GB, 0, 450 * GB, 8, 50 * GB,
        ("NVIDIA H100 80GB HBM3",),
    ),
    Chip("h200", 989 * TFLOPS, 141 * GB, 4800 * GB, 0, 450 * GB, 8, 50 * GB, ("NVIDIA H200",)),
    Chip(
        "a100-80", 312 * TFLOPS, 80 * GB, 2039 * GB, 0, 300 * GB, 8, 25 * GB,
        ("NVIDIA A100-SXM4-80GB",),
    ),
    Chip(
        "a100-40", 312 * TFLOPS, 40 * GB, 1555 * GB, 0, 300 * GB, 8, 25 * GB,
        ("NVIDIA A100-SXM4-40GB",),
    ),
    Chip(
        "rtx3080", 59.5 * TFLOPS, 10 * GB, 760 * GB, 0, 32 * GB, 1, 0.125 * GB,
        ("NVIDIA GeForce RTX 3080",),
    ),
)  # fmt: skip

CHIPS = {chip.name: chip for chip in _CHIPS}
"""Name -> chip."""


class Device(Protocol):
    """The part of a `jax.Device` that is read here."""

    @property
    def device_kind(self) -> str: ...


def chip_of(device: Device) -> Chip | None:
    """Returns the data sheet of a device; None: not known (a CPU, another accelerator)."""
    for chip in _CHIPS:
        if device.device_kind in chip.device_kinds:
            return chip
    return None
