"""Arithmetic on views, shared by the exporters; needs only Python 3.9 and numpy.

Pixel centres are at integers, as everywhere in the array contract.
"""

from __future__ import annotations

import numpy as np


def nearest(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns images [V, h, w, ...] resized by nearest pixels, which does not average depths."""
    pairs = zip(size, image.shape[1:])
    rows, columns = (((np.arange(n) + 0.5) * old / n).astype(int) for n, old in pairs)
    return image[:, rows[:, None], columns]


def resized_intrinsic(
    intrinsic: np.ndarray, old: tuple[int, int], new: tuple[int, int]
) -> np.ndarray:
    """Returns intrinsics [V, 3, 3] for another size (h, w): u' = (u + 1/2) w' / w - 1/2."""
    (h, w), (new_h, new_w) = old, new
    move = np.diag([new_w / w, new_h / h, 1.0])
    move[:2, 2] = 0.5 * new_w / w - 0.5, 0.5 * new_h / h - 0.5
    return (move @ intrinsic).astype(np.float32)


def area_mean(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Returns means [V, gh, gw, C] over equal areas, so of 2 x 2 tokens if the grid is halved."""
    for axis, size in ((1, grid[0]), (2, grid[1])):
        old = tokens.shape[axis]
        edges = np.arange(size + 1)[:, None] * old / size
        start, end = (
            np.maximum(edges[:-1], np.arange(old)),
            np.minimum(edges[1:], np.arange(old) + 1),
        )
        share = np.maximum(end - start, 0) * size / old
        tokens = np.moveaxis(np.tensordot(share.astype(np.float32), tokens, (1, axis)), 0, axis)
    return tokens


def unprojected(depth: np.ndarray, intrinsic: np.ndarray, extrinsic: np.ndarray) -> np.ndarray:
    """Returns the world points of depth maps, float64.

    A camera-from-world pose takes world x to camera R x + t, so world = R^T (camera - t).

    Args:
        depth: [V, h, w].
        intrinsic: [V, 3, 3], pixels of (h, w).
        extrinsic: [V, 3, 4], camera-from-world.

    Returns:
        [V, h, w, 3].
    """
    _, h, w = depth.shape
    pixel = np.stack([*np.meshgrid(np.arange(w), np.arange(h)), np.ones((h, w))], -1)
    rays = np.einsum("vij,hwj->vhwi", np.linalg.inv(intrinsic.astype(np.float64)), pixel)
    seen = rays * depth[..., None] - extrinsic[:, None, None, :, 3]
    return np.einsum("vji,vhwj->vhwi", extrinsic[:, :, :3].astype(np.float64), seen)
