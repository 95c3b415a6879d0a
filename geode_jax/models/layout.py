"""A scene's layout as rationale tokens, which replaces a frozen text encoder on small machines.

GEODE's Sec. 2.1.2 embeds rationales with a pretrained text encoder, and stage 1 relies on a frozen
LLM to read a prefix of embeddings. Without pretrained parts, `geode_pretrain` trains its decoder to
answer after these c columns, one for each category of the export:

    column m = embedding of slot m + projection of the facts of category m

Numbers enter by value [xVal, Golkar et al. 2023] and not as digits, which would need several
columns. Sizes beside those of `shapes`: f facts of a category.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32

from geode_jax.geometry.boxes import encode_boxes, other_code
from geode_jax.models.layers import Projection, param
from geode_jax.shapes import Array, Batch
from geode_jax.targets import MOST_PLACE

_CODE = slice(2, 10)
"""The part of a category's facts that is its box code."""


def _box_codes(batch: Batch) -> jax.Array:
    """Returns codes [S, N, 8] of the boxes; padding gets the code of an arbitrary box."""
    known = jnp.asarray(batch.target_labels_SN) >= 0
    return encode_boxes(jnp.where(known[..., None], batch.target_boxes_SN7, 1.0))


def layout_facts(batch: Batch, categories: int) -> Float[jax.Array, "S {categories} _"]:
    """Returns facts [S, c, 14 + V] of every category, scaled to about 1.

    The facts are: presence; number of boxes / 3; mean box code (`boxes.encode_boxes`); in each view
    the share of the patches that show the category, times 8, at most 1; and, equal for all
    categories, the extent of the known points, largest and smallest x and y / 4.
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
    """The layout encoder; see the file's docstring."""

    def __init__(self, categories: int, views: int, width: int, *, rngs: nnx.Rngs):
        self.slots = param(jax.random.normal(rngs.params(), (categories, width)), None, "embed")
        self.facts = Projection((14 + views,), (width,), (None, "embed"), bias=True, rngs=rngs)

    def __call__(self, batch: Batch) -> Float[jax.Array, "S c D"]:
        """Returns columns of the scenes' known boxes."""
        return self.facts(layout_facts(batch, len(self.slots[...]))) + self.slots[...]

    def distance(
        self, spatio_SRD: Float[Array, "S R D"], batch: Batch
    ) -> Float32[jax.Array, "S _"]:
        """Returns mean squared differences [S, min(R, c)] of the first states and columns.

        For a category with boxes, the column's mean code is replaced by each box's own code, and
        the differences are averaged over the boxes. This differs from the difference to the column
        itself by a constant, but allows each box to use the nearer of its two codes
        (`geometry.boxes.nearer_code`); otherwise the difference would jump where a box turns
        through 45 degrees.

        The decoder has learned to read columns with the code of `encode_boxes`, so away from 45
        degrees only that code is right. Therefore the difference to the other code's column has a
        penalty: the squared difference of the two columns times the squared cosine of the doubled
        yaw.
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
