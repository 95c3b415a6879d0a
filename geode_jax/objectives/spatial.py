"""What a question is about, in space: the targets of `task_heads.SpatialHead`."""

import jax
import jax.numpy as jnp

from geode_jax.geometry.boxes import encode_boxes, nearer_code
from geode_jax.models.task_heads import GAP_FLOOR, SpatialOutput
from geode_jax.objectives import losses
from geode_jax.objectives.base import Terms
from geode_jax.shapes import Array, Batch


def asked_terms(spatial: SpatialOutput, batch: Batch) -> Terms:
    """Relations, boxes of the named objects, their places, gaps and turn, the number asked."""
    known_SQO = jnp.asarray(batch.objects_mask_SQO)
    boxes_SQO7 = jnp.where(known_SQO[..., None], batch.objects_SQO7, 1.0)
    found_SQO = known_SQO & (jnp.asarray(batch.object_column_SQO) >= 0)
    value_SQ = jnp.where(batch.value_mask_SQ, batch.value_SQ, 1.0)
    return {
        "relations": losses.binary_kl(
            spatial.relations_SQr, batch.relations_SQr, batch.relations_mask_SQr
        ),
        "objects": huber_box(spatial.objects_SQOb, boxes_SQO7, found_SQO),
        "places": huber(spatial.places_SQO3, boxes_SQO7[..., :3], known_SQO),
        "gaps": huber(
            spatial.log_gaps_SQO[..., 1:, None],
            jnp.log(jnp.asarray(batch.gaps_SQO) + GAP_FLOOR)[..., 1:, None],
            known_SQO[..., :1] & known_SQO[..., 1:],
        ),
        "angle": huber(spatial.angle_SQ2, batch.angle_SQ2, batch.angle_mask_SQ),
        "value": huber(
            spatial.log_value_SQ[..., None],
            jnp.log(value_SQ)[..., None],
            batch.value_mask_SQ,
        ),
    }


def huber(prediction: Array, target: Array, mask: Array) -> losses.Pair:
    """Huber loss (delta 1) summed over the last axis; count = masked entries [...]."""
    mask = jnp.asarray(mask)
    loss = _huber(jnp.where(mask[..., None], prediction - target, 0.0))
    return jnp.sum(loss), jnp.sum(mask, dtype=jnp.float32)


def huber_box(codes_8: Array, boxes_7: Array, mask: Array) -> losses.Pair:
    """`huber` of box codes to the nearer code of boxes of positive size (`boxes.nearer_code`)."""
    mask = jnp.asarray(mask)
    codes_8 = jnp.where(mask[..., None], codes_8, 0.0)
    loss = nearer_code(lambda code: _huber(codes_8 - code), encode_boxes(boxes_7))
    return jnp.sum(jnp.where(mask, loss, 0.0)), jnp.sum(mask, dtype=jnp.float32)


def _huber(error: Array) -> jax.Array:
    size = jnp.abs(error)
    return jnp.sum(jnp.where(size < 1, 0.5 * error**2, size - 0.5), axis=-1)
