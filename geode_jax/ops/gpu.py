"""Whether kernels for GPUs are taken; no Pallas here, whose import takes most of a second."""

import os

GPU_KERNELS = "GEODE_JAX_GPU_KERNELS"
"""Environment variable: 1 takes the kernels for GPUs, which no GPU has run yet."""

PLATFORMS = ("gpu", "cuda")
"""What jax calls them."""


def kernels_wanted(platform: str) -> bool:
    """Whether these devices are GPUs, and `GPU_KERNELS` asks for the kernels."""
    return platform in PLATFORMS and os.environ.get(GPU_KERNELS) == "1"
