"""bfloat16 as its 16 bits, where numpy has no such type."""

from __future__ import annotations

import numpy as np


def float32_of_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bfloat16_of_float32(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16 (ties to even) of finite values; too large becomes infinite."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (bits >> np.uint32(16)).astype(np.uint16)
