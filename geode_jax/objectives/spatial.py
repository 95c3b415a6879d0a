"""The losses of `task_heads.SpatialHead`: what a question is about, in space."""

import jax.numpy as jnp

from geode_jax.models.task_heads import GAP_FLOOR, SpatialOutput
from geode_jax.objectives.base import Terms
from geode_jax.objectives.losses import binary_kl, huber, huber_box
from geode_jax.shapes import Batch


def spatial_head_terms(spatial: SpatialOutput, batch: Batch) -> Terms:
    """Returns the losses of a question's targets.

    `relations`; of the objects that the question names the boxes (`objects`), the centres
    (`places`) and the distances from the first of them to the others (`gaps`); `angle`, the turn
    that is asked for; `value`, the number that is asked for.
    """
    known_SQO = jnp.asarray(batch.objects_mask_SQO)
    boxes_SQO7 = jnp.where(known_SQO[..., None], batch.objects_SQO7, 1.0)
    found_SQO = known_SQO & (jnp.asarray(batch.object_column_SQO) >= 0)
    value_SQ = jnp.where(batch.value_mask_SQ, batch.value_SQ, 1.0)
    return {
        "relations": binary_kl(
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
