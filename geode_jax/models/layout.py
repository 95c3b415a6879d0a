"""A scene's layout as rationale tokens: the laptop's stand-in for a frozen text encoder.

GEODE's Sec. 2.1.2 embeds rationales with a pretrained text encoder, and stage 1 trusts a frozen
LLM to read what stands before its text. Nothing is pretrained on a laptop, so `geode_pretrain`
teaches its decoder to answer behind these M columns, one for each category of the export:

    column m = embedding of slot m + W facts of category m

Numbers enter by value [xVal, Golkar et al. 2023] and not as digits, which one column could not
hold apart.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from geode_jax.boxes import encode_boxes
from geode_jax.data.targets import MOST_PLACE
from geode_jax.models.layers import Projection, param
from geode_jax.shapes import Batch


def layout_facts(batch: Batch, categories: int) -> jax.Array:
    """Facts [S, c, 14 + V] of every category, about 1 in size.

    Whether it is there; how many / 3; mean box code of its boxes (`boxes.encode_boxes`); in each
    view the share of the patches that show it, times 8, at most 1; and, the same for all
    categories, the extent of what is seen, its largest and smallest x and y / 4.
    """
    label = jnp.asarray(batch.target_labels_SN)
    is_SNc = jax.nn.one_hot(label, categories)
    count_Sc = jnp.sum(is_SNc, axis=1)
    boxes = jnp.where((label >= 0)[..., None], batch.target_boxes_SN7, 1.0)
    code = jnp.einsum("snc,snb->scb", is_SNc, encode_boxes(boxes))
    code = code / jnp.maximum(count_Sc, 1)[..., None]
    shows = jnp.asarray(batch.target_segmentation_SVP)[..., None] == np.arange(categories)
    share_ScV = jnp.swapaxes(jnp.mean(shows, axis=2), 1, 2)
    known = jnp.asarray(batch.points_mask_SVP)[..., None]
    x_y = jnp.asarray(batch.points_SVP3)[..., :2]
    largest = jnp.max(x_y, axis=(1, 2), where=known, initial=-MOST_PLACE)
    smallest = jnp.min(x_y, axis=(1, 2), where=known, initial=MOST_PLACE)
    extent_S4 = jnp.concatenate([largest, smallest], axis=-1) / 4
    extent_S4 = jnp.where(jnp.any(known, axis=(1, 2)), extent_S4, 0)
    there = (count_Sc > 0)[..., None]
    own = jnp.concatenate(
        [
            jnp.ones_like(code[..., :1]),
            count_Sc[..., None] / 3,
            code,
            jnp.minimum(8 * share_ScV, 1),
        ],
        axis=-1,
    )
    extent = jnp.broadcast_to(extent_S4[:, None], (*count_Sc.shape, 4))
    return jnp.concatenate([jnp.where(there, own, 0), extent], axis=-1)


class LayoutEncoder(nnx.Module):
    """See the module's docstring."""

    def __init__(self, categories: int, views: int, width: int, *, rngs: nnx.Rngs):
        self.slots = param(jax.random.normal(rngs.params(), (categories, width)), None, "embed")
        self.facts = Projection((14 + views,), (width,), (None, "embed"), bias=True, rngs=rngs)

    def __call__(self, batch: Batch) -> jax.Array:
        """Columns [S, M, D] of the scenes' known boxes."""
        return self.facts(layout_facts(batch, len(self.slots[...]))) + self.slots[...]
