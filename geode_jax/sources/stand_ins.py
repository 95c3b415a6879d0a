"""Stand-ins for the tokens of VGGT: a fixed function of geometry and colour.

A patch has 2 x 2 cells. Each gives, in row-major order, 13 numbers:

    point / 4 (world), depth / 4, normal (world), mean colour, contrast, two texture slopes

Point, depth and normal are those at the cell's centre. Colour in [0, 1], contrast (the standard
deviation of the luminance) and slopes (means of those of `raycast.shade`) are over the cell's
pixels. Then come sin and cos of 2 pi f p for the point p at the patch's centre and f in
`FREQUENCIES`, [3 axes, 4 frequencies, (sin, cos)].
"""

import numpy as np

FREQUENCIES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Cycles per metre of the Fourier features."""
TOKEN_WIDTH = 4 * 13 + 3 * len(FREQUENCIES) * 2
"""Numbers of a token."""


def patch_tokens(
    point: np.ndarray,
    depth: np.ndarray,
    normal: np.ndarray,
    colour: np.ndarray,
    contrast: np.ndarray,
    slopes: np.ndarray,
    centre: np.ndarray,
) -> np.ndarray:
    """Returns a stand-in for `vggt/tokens` [V, gh * gw, TOKEN_WIDTH] float16, see the module.

    Args:
        point, normal: [V, 2 gh, 2 gw, 3] at the cells' centres, world frame, metres.
        depth: [V, 2 gh, 2 gw] metres.
        colour: [V, 2 gh, 2 gw, 3] mean in [0, 1].
        contrast: [V, 2 gh, 2 gw] standard deviation of the luminance.
        slopes: [V, 2 gh, 2 gw, 2] mean texture slopes.
        centre: [V, gh, gw, 3] points at the patches' centres.
    """
    cells = np.concatenate(
        [point / 4, depth[..., None] / 4, normal, colour, contrast[..., None], slopes], axis=-1
    )
    v, gh, gw, _ = centre.shape
    cells = cells.reshape(v, gh, 2, gw, 2, -1).swapaxes(2, 3).reshape(v, gh * gw, -1)
    angle = 2 * np.pi * centre[..., None] * np.array(FREQUENCIES)
    waves = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(v, gh * gw, -1)
    return np.concatenate([cells, waves], -1).astype(np.float16)
