"""The code in which models predict boxes, and the overlap of two boxes.

A box [7] is centre xyz, size xyz (metres, world frame) and yaw about z (radians); its code [8] is
centre, log size, sin 2 yaw, cos 2 yaw. Any leading axes.

A box turned by 180 degrees is the same box; so is a box turned by 90 degrees with length and width
swapped. A box thus has four descriptions [7] and, since the code contains the doubled angle, two
codes. Both decode to the box, so losses take the distance to the nearer code (`nearer_code`). A
loss on a fixed one of the two would jump where a small rotation changes which of them
`encode_boxes` returns.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from geode_jax.shapes import Array
from geode_jax.targets import LOG_EDGES


def encode_boxes(boxes_7: Float[Array, "*axes 7"]) -> Float[jax.Array, "*axes 8"]:
    """Returns codes [..., 8] of boxes [..., 7]: centre, log size, sin 2 yaw, cos 2 yaw.

    Of the two codes of a box this is the one for a yaw within 45 degrees, whose length and width
    lie nearly along the world's x and y. Boxes must satisfy `targets.held_boxes`.
    """
    quarter = jnp.round(boxes_7[..., 6:7] / (0.5 * jnp.pi))
    odd = quarter % 2 == 1
    double = 2.0 * boxes_7[..., 6:7] - quarter * jnp.pi
    length, width = boxes_7[..., 3:4], boxes_7[..., 4:5]
    size = (jnp.where(odd, width, length), jnp.where(odd, length, width), boxes_7[..., 5:6])
    parts = (boxes_7[..., :3], *(jnp.log(edge) for edge in size), jnp.sin(double), jnp.cos(double))
    return jnp.concatenate(parts, axis=-1)


def other_code(boxes_8: Float[Array, "*axes 8"]) -> Float[jax.Array, "*axes 8"]:
    """Returns the other code [..., 8]: turned by 90 degrees, length and width swapped."""
    x, y = boxes_8[..., 3:4], boxes_8[..., 4:5]
    return jnp.concatenate([boxes_8[..., :3], y, x, boxes_8[..., 5:6], -boxes_8[..., 6:]], axis=-1)


def nearer_code(
    distance: Callable[[Array], Array], boxes_8: Float[Array, "*axes 8"]
) -> Float[jax.Array, "..."]:
    """Returns the smaller `distance(code)` of the two codes of boxes [..., 8].

    The result has the shape of the distance, which may broadcast the code with others. It is
    continuous in the boxes if the distance is continuous in the code, and equal for all
    descriptions of a box.
    """
    one, other = distance(boxes_8), distance(other_code(boxes_8))
    return jnp.where(one <= other, one, other)


def decode_boxes(boxes_8: Float[Array, "*axes 8"]) -> Float[jax.Array, "*axes 7"]:
    """Inverts `encode_boxes`; yaw is in (-pi/2, pi/2], log sizes are within `LOG_EDGES`."""
    yaw = 0.5 * jnp.arctan2(boxes_8[..., 6:7], boxes_8[..., 7:8])
    return jnp.concatenate([boxes_8[..., :3], _size(boxes_8), yaw], axis=-1)


def _size(boxes_8: Array) -> jax.Array:
    # Clipped, so that volumes of early predictions do not overflow.
    return jnp.exp(jnp.clip(boxes_8[..., 3:6], *LOG_EDGES))


def _volume(size_3: jax.Array) -> jax.Array:
    return size_3[..., 0] * size_3[..., 1] * size_3[..., 2]


def generalized_iou(
    a_8: Float[Array, "*#axes 8"], b_8: Float[Array, "*#axes 8"]
) -> Float[jax.Array, "*#axes"]:
    """Returns the generalized IoU [1902.09630] [...] of encoded boxes [..., 8] *with yaw 0*.

    The intersection of two rotated boxes is a polyhedron. The axis-aligned form has a useful
    gradient in position and size even without overlap, is exact for boxes of yaw 0, and is 1 only
    for equal centres and sizes. The L1 loss teaches the yaw.
    """
    size_a, size_b = _size(a_8), _size(b_8)
    low_a, high_a = a_8[..., :3] - size_a / 2, a_8[..., :3] + size_a / 2
    low_b, high_b = b_8[..., :3] - size_b / 2, b_8[..., :3] + size_b / 2
    overlap = jnp.maximum(jnp.minimum(high_a, high_b) - jnp.maximum(low_a, low_b), 0.0)
    intersection = _volume(overlap)
    union = _volume(size_a) + _volume(size_b) - intersection
    hull = _volume(jnp.maximum(high_a, high_b) - jnp.minimum(low_a, low_b))
    return intersection / union - (hull - union) / hull
