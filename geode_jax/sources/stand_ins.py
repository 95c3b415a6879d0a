"""Stand-ins for the tokens of VGGT: a fixed function of true geometry and colour."""

import numpy as np

FREQUENCIES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Cycles per metre of the Fourier features."""


TOKEN_WIDTH = 4 * 13 + 3 * len(FREQUENCIES) * 2


def patch_tokens(
    point: np.ndarray,
    depth: np.ndarray,
    normal: np.ndarray,
    colour: np.ndarray,
    contrast: np.ndarray,
    slopes: np.ndarray,
    centre: np.ndarray,
) -> np.ndarray:
    """The stand-in for `vggt/tokens` [V, gh * gw, TOKEN_WIDTH], see the module's docstring.

    Args:
        point, normal: [V, 2 gh, 2 gw, 3] at the cells' centres, world frame.
        depth: [V, 2 gh, 2 gw].
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
