"""The code in which the detection head predicts boxes, and the overlap of two boxes.

A box [7] is centre xyz, size xyz (metres, world frame) and yaw about z (radians); its code [8] is
centre, log size, sin 2 yaw, cos 2 yaw. Any leading axes.

A box turned by 180 degrees is the same box, and so is one turned by 90 degrees whose length and
width are swapped: it has four names and, since the code is of the doubled angle, two codes. Either
decodes to the box, so a prediction is as far from a box as from the nearer of its codes
(`nearer_code`): to insist on one of them would make a loss jump where a box turned a little more
has the other.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from geode_jax.shapes import Array
from geode_jax.targets import LOG_EDGES


def encode_boxes(boxes_7: Array) -> jax.Array:
    """Boxes [..., 7] of `targets.held_boxes` as [..., 8]: centre, log size, sin 2 yaw, cos 2 yaw.

    Of the two codes of a box it is that of the name whose yaw is within 45 degrees, so its sizes
    are those along (nearly) the world's x and y.
    """
    quarter = jnp.round(boxes_7[..., 6:7] / (0.5 * jnp.pi))
    odd = quarter % 2 == 1
    double = 2.0 * boxes_7[..., 6:7] - quarter * jnp.pi
    length, width = boxes_7[..., 3:4], boxes_7[..., 4:5]
    size = (jnp.where(odd, width, length), jnp.where(odd, length, width), boxes_7[..., 5:6])
    parts = (boxes_7[..., :3], *(jnp.log(edge) for edge in size), jnp.sin(double), jnp.cos(double))
    return jnp.concatenate(parts, axis=-1)


def other_code(boxes_8: Array) -> jax.Array:
    """The other code of the same boxes: turned by 90 degrees, length and width swapped."""
    x, y = boxes_8[..., 3:4], boxes_8[..., 4:5]
    return jnp.concatenate([boxes_8[..., :3], y, x, boxes_8[..., 5:6], -boxes_8[..., 6:]], axis=-1)


def nearer_code(distance: Callable[[Array], Array], boxes_8: Array) -> jax.Array:
    """`distance(code)` [...] for the one of the two codes of boxes [..., 8] that is nearer.

    Continuous in the boxes, if the distance is in the code, and the same for each of their names.
    """
    one, other = distance(boxes_8), distance(other_code(boxes_8))
    return jnp.where(one <= other, one, other)


def decode_boxes(boxes_8: Array) -> jax.Array:
    """The inverse of `encode_boxes`; yaw in (-pi/2, pi/2], sizes within `LOG_EDGES`."""
    yaw = 0.5 * jnp.arctan2(boxes_8[..., 6:7], boxes_8[..., 7:8])
    return jnp.concatenate([boxes_8[..., :3], _size(boxes_8), yaw], axis=-1)


def _size(boxes_8: Array) -> jax.Array:
    # Bounded: an early prediction must not overflow a volume.
    return jnp.exp(jnp.clip(boxes_8[..., 3:6], *LOG_EDGES))


def _volume(size_3: jax.Array) -> jax.Array:
    return size_3[..., 0] * size_3[..., 1] * size_3[..., 2]


def generalized_iou(a_8: Array, b_8: Array) -> jax.Array:
    """Generalized IoU (1902.09630) [...] of encoded boxes [..., 8] *with their yaw taken as 0*.

    The volumes of two turned boxes meet in a polyhedron; the axis-aligned form keeps the useful
    gradient (position and size pull together even without overlap), is exact for equal yaw 0, and
    is 1 exactly for equal centres and sizes. The yaw itself is learned from the L1 part.
    """
    size_a, size_b = _size(a_8), _size(b_8)
    low_a, high_a = a_8[..., :3] - size_a / 2, a_8[..., :3] + size_a / 2
    low_b, high_b = b_8[..., :3] - size_b / 2, b_8[..., :3] + size_b / 2
    overlap = jnp.maximum(jnp.minimum(high_a, high_b) - jnp.maximum(low_a, low_b), 0.0)
    intersection = _volume(overlap)
    union = _volume(size_a) + _volume(size_b) - intersection
    hull = _volume(jnp.maximum(high_a, high_b) - jnp.minimum(low_a, low_b))
    return intersection / union - (hull - union) / hull
