"""A scene's layout as rationale tokens: the laptop's stand-in for a frozen text encoder.

GEODE's Sec. 2.1.2 embeds rationales with a pretrained text encoder, and stage 1 trusts a frozen
LLM to read what stands before its text. Nothing is pretrained on a laptop, so `geode_pretrain`
teaches its decoder to answer behind these c columns, one for each category of the export:

    column m = embedding of slot m + W facts of category m

Numbers enter by value [xVal, Golkar et al. 2023] and not as digits, which one column could not
hold apart.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from geode_jax.geometry.boxes import encode_boxes, other_code
from geode_jax.models.layers import Projection, param
from geode_jax.shapes import Array, Batch
from geode_jax.targets import MOST_PLACE

_CODE = slice(2, 10)
"""Where the facts of a category hold its box code."""


def _box_codes(batch: Batch) -> jax.Array:
    """Codes [S, N, 8] of the boxes; of padding, those of any box."""
    known = jnp.asarray(batch.target_labels_SN) >= 0
    return encode_boxes(jnp.where(known[..., None], batch.target_boxes_SN7, 1.0))


def layout_facts(batch: Batch, categories: int) -> jax.Array:
    """Facts [S, c, 14 + V] of every category, about 1 in size.

    Whether it is there; how many / 3; mean box code of its boxes (`boxes.encode_boxes`); in
    each view the share of the patches that show it, times 8, at most 1; and, the same for all
    categories, the extent of what is seen, its largest and smallest x and y / 4.
    """
    label = jnp.asarray(batch.target_labels_SN)
    is_SNc = jax.nn.one_hot(label, categories)
    count_Sc = jnp.sum(is_SNc, axis=1)
    code = jnp.einsum("snc,snb->scb", is_SNc, _box_codes(batch))
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
        """Columns [S, c, D] of the scenes' known boxes."""
        return self.facts(layout_facts(batch, len(self.slots[...]))) + self.slots[...]

    def distance(self, spatio_SRD: Array, batch: Batch) -> jax.Array:
        """Mean squared difference [S, R] of states [S, R, D] and the first R of the columns.

        Of a category with boxes it is the mean over them of that to a column which has the box's
        own code for the mean code: as far as the state goes, a constant more than the difference
        to the column itself. So it can be told of every box which of its two codes is meant
        (`geometry.boxes.nearer_code`), or the difference would jump where a box turns through 45
        degrees.

        The columns that the decoder learned to read are of the code that `encode_boxes` gives, and
        away from 45 degrees they alone are meant: to the difference to the column of the other
        code is added, times the squared cosine of the doubled yaw, that of the two columns.
        """
        categories = len(self.slots[...])
        both = min(categories, spatio_SRD.shape[1])
        label = jnp.asarray(batch.target_labels_SN)
        facts_Scf = layout_facts(batch, categories)
        columns_ScD = self.facts(facts_Scf) + self.slots[...]
        whole = _mean_square(spatio_SRD[:, :both] - columns_ScD[:, :both])
        own = (label >= 0) & (label < both)
        row = jnp.where(own, label, 0)[..., None]
        facts_SNf = jnp.take_along_axis(facts_Scf, row, axis=1)
        code = _box_codes(batch)
        of_code, of_other = (
            self.facts(facts_SNf.at[..., _CODE].set(c)) + self.slots[...][row[..., 0]]
            for c in (code, other_code(code))
        )
        state_SND = jnp.take_along_axis(spatio_SRD, row, axis=1)
        sure = jnp.square(code[..., -1]) * _mean_square(of_other - of_code)
        box_SN = jnp.minimum(
            _mean_square(state_SND - of_code), _mean_square(state_SND - of_other) + sure
        )
        is_SNc = jax.nn.one_hot(jnp.where(own, label, -1), both)
        count_Sc = jnp.sum(is_SNc, axis=1)
        mean_Sc = jnp.einsum("snc,sn->sc", is_SNc, box_SN) / jnp.maximum(count_Sc, 1)
        return jnp.where(count_Sc > 0, mean_Sc, whole)


def _mean_square(x: Array) -> jax.Array:
    return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1)
