"""What a question is about, in space: the targets of `task_heads.SpatialHead`."""

import jax
import jax.numpy as jnp

from geode_jax import losses
from geode_jax.boxes import encode_boxes
from geode_jax.models.task_heads import GAP_FLOOR, SpatialOutput
from geode_jax.shapes import Array, Batch
from geode_jax.train_step import Terms


def relative_angle(boxes_O7: Array) -> jax.Array:
    """(sin, cos) of the bearing of object 2 for one who stands at object 0 and faces object 1.

    Seen from above (z up), counter-clockwise positive: sin > 0 is to the left. [..., O, 7] to
    [..., 2]; zero-length directions give (0, 1).
    """
    facing = boxes_O7[..., 1, :2] - boxes_O7[..., 0, :2]
    towards = boxes_O7[..., 2, :2] - boxes_O7[..., 0, :2]
    cross = facing[..., 0] * towards[..., 1] - facing[..., 1] * towards[..., 0]
    dot = jnp.sum(facing * towards, axis=-1)
    angle = jnp.arctan2(cross, jnp.where((cross == 0) & (dot == 0), 1.0, dot))
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def asked_terms(spatial: SpatialOutput, batch: Batch) -> Terms:
    """Relations, boxes of the named objects, their places, gaps and bearing, the number asked."""
    known_SQO = jnp.asarray(batch.objects_mask_SQO)
    boxes_SQO7 = jnp.where(known_SQO[..., None], batch.objects_SQO7, 1.0)
    found_SQO = known_SQO & (jnp.asarray(batch.object_column_SQO) >= 0)
    three_SQ = jnp.all(found_SQO[..., :3], axis=-1)
    value_SQ = jnp.where(batch.value_mask_SQ, batch.value_SQ, 1.0)
    return {
        "relations": losses.binary_kl(
            spatial.relations_SQR, batch.relations_SQR, batch.relations_mask_SQR
        ),
        "objects": huber(spatial.objects_SQOb, encode_boxes(boxes_SQO7), found_SQO),
        "places": huber(spatial.places_SQO3, boxes_SQO7[..., :3], known_SQO),
        "gaps": huber(
            spatial.log_gaps_SQO[..., 1:, None],
            jnp.log(jnp.asarray(batch.gaps_SQO) + GAP_FLOOR)[..., 1:, None],
            known_SQO[..., :1] & known_SQO[..., 1:],
        ),
        "angle": huber(spatial.angle_SQ2, relative_angle(boxes_SQO7), three_SQ),
        "value": huber(
            spatial.log_value_SQ[..., None],
            jnp.log(value_SQ)[..., None],
            batch.value_mask_SQ,
        ),
    }


def huber(prediction: Array, target: Array, mask: Array) -> losses.Pair:
    """Huber loss (delta 1) summed over the last axis; count = masked entries [...]."""
    mask = jnp.asarray(mask)
    error = jnp.where(mask[..., None], prediction - target, 0.0)
    size = jnp.abs(error)
    loss = jnp.where(size < 1, 0.5 * error**2, size - 0.5)
    return jnp.sum(loss), jnp.sum(mask, dtype=jnp.float32)
