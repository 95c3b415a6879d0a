"""Depth, detection and spatial heads (Hidden-CoT Sec. III-C "Multi-task Heads").

The depth and detection heads read the vision features. The spatial head reads question states
that have not seen the thinking tokens, since the paper trains those from the answer loss alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from geode_jax import ranges
from geode_jax.exports import RELATIONS
from geode_jax.models.layers import LayerNorm, Mlp, Projection, param
from geode_jax.ops.attention import Intervals, attention
from geode_jax.shapes import MAX_OBJECTS, Array

BOX_CODE = 8
"""b, the width of an encoded box; see `geometry.boxes.encode_boxes`."""
GAP_FLOOR = 0.1
"""Metres added to a gap before the logarithm, so that contact (gap 0) has a finite target."""


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """Sizes of the heads.

    Attributes:
        width: inner width of every head.
        depth_bins: Z, log-spaced.
        depth_cells: r; every patch predicts r x r depth values.
        queries: Y, object queries of the detection head.
        detection_layers: rounds of query attention.
        categories: c, object classes.
        teacher_width: F, width of the teacher's patch features; 0: no teacher features.
    """

    width: int
    depth_bins: int
    depth_cells: int
    queries: int
    detection_layers: int
    categories: int
    teacher_width: int

    def __post_init__(self):
        sizes = {"width depth_cells queries categories": ranges.whole(1)}
        sizes |= {"teacher_width": ranges.whole(0), "depth_bins": ranges.whole(2)}
        sizes |= {"detection_layers": ranges.whole(0, ranges.MOST_BLOCKS)}
        ranges.check(self, sizes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DetectionOutput:
    """Predictions of the Y object queries of each scene."""

    class_logits_SYc: Array  # one sigmoid per category
    boxes_SYb: Array  # codes, see `geometry.boxes.encode_boxes`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpatialOutput:
    """Predictions of the spatial head for each question."""

    relations_SQr: Array  # logits of the first alternative, in the order of `RELATIONS`
    objects_SQOb: Array  # box codes of the named objects, from the states at their names
    places_SQO3: Array  # their centres, world frame, metres, from the question's encoding
    log_gaps_SQO: Array  # log(gap + GAP_FLOOR) from the first object to each
    angle_SQ2: Array  # (sin, cos) of the turn, left positive
    log_value_SQ: Array  # log of the numeric answer, in the question's unit


class DepthHead(nnx.Module):
    """Logits of log-depth bins for the r x r cells of every patch."""

    def __init__(self, width: int, config: HeadsConfig, *, rngs: nnx.Rngs):
        self.cells, self.bins = config.depth_cells, config.depth_bins
        out = self.cells**2 * self.bins
        self.mlp = Mlp(width, config.width, out, rngs=rngs)

    def __call__(
        self, z_SVPD: Float[Array, "S V P D"], grid: tuple[int, int]
    ) -> Float[jax.Array, "S V h w Z"]:
        """Returns bin logits of features, with (h, w) = r * grid."""
        S, V = z_SVPD.shape[:2]
        r = self.cells
        x = self.mlp(z_SVPD).reshape(S, V, *grid, r, r, self.bins)
        x = x.transpose(0, 1, 2, 4, 3, 5, 6)
        return x.reshape(S, V, grid[0] * r, grid[1] * r, self.bins)


class QueryLayer(nnx.Module):
    """Object queries attend to the scene's features, then to each other; an MLP follows.

    Checkpoints contain the names: `look` is the cross-attention, `talk` the self-attention.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        names = ("embed", "heads", "head_dim")
        shape = (heads, width // heads)

        def project(bias=False):
            return Projection((width,), shape, names, bias=bias, rngs=rngs)

        def merge():
            return Projection(shape, (width,), ("heads", "head_dim", "embed"), bias=True, rngs=rngs)

        self.look, self.look_keys, self.look_values, self.look_out = (
            project(),
            project(),
            project(),
            merge(),
        )
        self.talk, self.talk_keys, self.talk_values, self.talk_out = (
            project(),
            project(),
            project(),
            merge(),
        )
        self.mlp = Mlp(width, 2 * width, width, rngs=rngs)
        self.norms = nnx.List(LayerNorm(width) for _ in range(3))

    def __call__(
        self,
        x_SYD: Float[jax.Array, "S Y D"],
        place_YD: Float[jax.Array, "Y D"],
        z_SMD: Float[jax.Array, "S M D"],
        seen: Intervals,
        everyone: Intervals,
    ) -> Float[jax.Array, "S Y D"]:
        y = self.norms[0](x_SYD) + place_YD
        x_SYD = x_SYD + self.look_out(
            attention(self.look(y), self.look_keys(z_SMD), self.look_values(z_SMD), seen)
        )
        y = self.norms[1](x_SYD)
        x_SYD = x_SYD + self.talk_out(
            attention(self.talk(y + place_YD), self.talk_keys(y), self.talk_values(y), everyone)
        )
        return x_SYD + self.mlp(self.norms[2](x_SYD))


class DetectionHead(nnx.Module):
    """Set prediction of oriented boxes by learned object queries (DETR [2005.12872])."""

    HEADS = 4

    def __init__(self, width: int, config: HeadsConfig, *, rngs: nnx.Rngs):
        w = config.width
        self.reduce = Projection((width,), (w,), ("embed", None), bias=True, rngs=rngs)
        self.places = param(jax.random.normal(rngs.params(), (config.queries, w)), None, None)
        self.layers = nnx.List(
            QueryLayer(w, self.HEADS, rngs=rngs) for _ in range(config.detection_layers)
        )
        self.norm = LayerNorm(w)
        self.classes = Projection((w,), (config.categories,), (None, None), bias=True, rngs=rngs)
        # The focal loss starts from rare positives, p = 0.05 [Lin et al. 2017, Sec. 3.3].
        assert self.classes.bias is not None
        self.classes.bias[...] = jnp.full((config.categories,), -2.94, jnp.float32)
        self.boxes = Mlp(w, w, BOX_CODE, rngs=rngs)

    def __call__(
        self, z_SMD: Float[Array, "S M D"], seen_length_S: Int[Array, " S"]
    ) -> DetectionOutput:
        z = self.reduce(z_SMD)
        S, (Y, w) = z.shape[0], self.places.shape
        zero = jnp.zeros((S, Y), jnp.int32)
        seen = Intervals(zero, zero, jnp.broadcast_to(seen_length_S[:, None], (S, Y)))
        everyone = Intervals(zero, zero, zero + Y)
        places = self.places[...].astype(z.dtype)
        x = jnp.zeros((S, Y, w), z.dtype)
        for layer in self.layers:
            x = layer(x, places, z, seen, everyone)
        x = self.norm(x)
        return DetectionOutput(
            self.classes(x).astype(jnp.float32), self.boxes(x).astype(jnp.float32)
        )


class SpatialHead(nnx.Module):
    """Predicts boxes from the states at the objects' names, the rest from the question's encoding.

    The head is linear, so the trunk must represent these quantities in a form that the linear
    language-model head can also read. Learning follows the outputs: a name finds its object, the
    end of the question collects the places, and then relations between them become predictable.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        def read(size):
            return Projection((width,), (size,), ("embed", None), bias=True, rngs=rngs)

        self.objects = read(BOX_CODE)
        self.places, self.gaps = read(MAX_OBJECTS * 3), read(MAX_OBJECTS)
        self.relations, self.angle, self.value = read(len(RELATIONS)), read(2), read(1)

    def __call__(
        self, question_SQD: Float[Array, "S Q D"], names_SQOD: Float[Array, "S Q O D"]
    ) -> SpatialOutput:
        question, names = question_SQD.astype(jnp.float32), names_SQOD.astype(jnp.float32)
        return SpatialOutput(
            relations_SQr=self.relations(question),
            objects_SQOb=self.objects(names),
            places_SQO3=self.places(question).reshape(*question.shape[:2], MAX_OBJECTS, 3),
            log_gaps_SQO=self.gaps(question),
            angle_SQ2=self.angle(question),
            log_value_SQ=self.value(question)[..., 0],
        )
