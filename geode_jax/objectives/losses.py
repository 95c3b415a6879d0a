"""The losses of the Hidden-CoT paper (Sec. III-D) as pure functions, each with its source.

Every loss returns `(sum, count)`, two float32 scalars. Both are added up over microbatches and
devices; `objectives.totals` takes their means and the weighted total. Masked values change neither
the loss nor a gradient, even if they are NaN. An example without a target is not counted; a count
of 0 comes with a sum of 0.

Masks are bool, True = counted, and may lack trailing axes: a mask [S] holds for whole scenes.
`*axes` in a shape stands for any leading axes; the other letters are those of `geode_jax.shapes`.
Sizes beside those: n any number of entries, 8 the numbers of an encoded box.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp, xlogy
from jaxtyping import Bool, Float, Float32, Int, Int32, Num, Shaped
from optax.assignment import hungarian_algorithm

from geode_jax import targets
from geode_jax.geometry.boxes import encode_boxes, generalized_iou, nearer_code, other_code
from geode_jax.geometry.correspondence import gather_views, reprojection
from geode_jax.objectives.base import Pair
from geode_jax.ops.cross_entropy import Scores
from geode_jax.shapes import Array
from geode_jax.sharding import by_scenes

TERMS = (
    "text", "depth_ce", "depth_reg", "depth_kl", "detection", "spatial", "multiview", "feature",
)  # fmt: skip
"""The terms i of eq. 2."""

BOX_L1_WEIGHT, BOX_GIOU_WEIGHT, BOX_CLASS_WEIGHT = 1.0, 2.0, 2.0
"""Weights in the detection term and in its matching cost, of the order of DETR's (2005.12872)."""

Mask = Bool[Array, "..."] | bool
"""True = counted; may lack trailing axes, down to one bool for all entries."""


def masked_sum(loss: Float[Array, "*axes"], mask: Bool[Array, "*axes"]) -> Pair:
    """Returns the sum of the entries where the mask is True, and their count."""
    return jnp.sum(jnp.where(mask, loss, 0.0)), jnp.sum(mask, dtype=jnp.float32)


def _weighted_sum(
    loss: Float[Array, "*axes"], mask: Bool[Array, "*axes"], weight: Float[Array, "*axes"] | None
) -> Pair:
    """Returns the weighted sum of the entries where the mask is True, and the sum of weights."""
    if weight is None:
        return masked_sum(loss, mask)
    weight = keep(weight, mask)
    return jnp.sum(jnp.where(mask, weight * loss, 0.0)), jnp.sum(weight)


def keep(
    value: Num[Array, "*axes"], mask: Bool[Array, "..."], fill: float = 0.0
) -> Float32[jax.Array, "*axes"]:
    """Returns the values as float32, with `fill` where the mask, which may lack axes, is False.

    Masking the loss alone is not enough: in the gradient, 0 * NaN is NaN.
    """
    value = jnp.asarray(value).astype(jnp.float32)
    mask = mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
    return jnp.where(mask, value, fill)


def _mask(mask: Mask, shape: tuple[int, ...]) -> jax.Array:
    mask = jnp.asarray(mask, bool)
    return jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)


# Text (Sec. III-D.1)


def cross_entropy(
    logits_X: Float[Array, "*axes X"], labels: Int[Array, "*axes"], mask: Mask
) -> Pair:
    """Token cross-entropy, Sec. III-D.1; count = tokens.

    Args:
        logits_X: any float dtype; the log-sum-exp runs in float32.
        labels: negative labels (-100 by convention) are not counted.
    """
    mask = _mask(mask, labels.shape) & (labels >= 0)
    logits_X = keep(logits_X, mask)
    labels = jnp.where(mask, labels, 0)
    picked = jnp.take_along_axis(logits_X, labels[..., None], axis=-1)[..., 0]
    return masked_sum(logsumexp(logits_X, axis=-1) - picked, mask)


def token_cross_entropy(scores: Scores, mask: Bool[Array, " n"]) -> Float[Array, ""]:
    """`cross_entropy` for `ops.cross_entropy.token_loss`: the sum alone, of n tokens.

    Args:
        scores: whose first listed id is the label.
    """
    return jnp.sum(keep(scores.lse_n - scores.listed_nk[:, 0], jnp.asarray(mask)))


def distillation(
    score_k: Float[Array, "*axes k"],
    rest: Float[Array, "*axes"],
    topk_id_k: Int[Array, "*axes k"],
    topk_logprob_k: Float[Array, "*axes k"],
    mask: Mask,
    temperature: float = 1.0,
) -> Pair:
    """Distillation of the teacher's top-k logits, Sec. III-D.1 and Hinton et al. [12].

    P and Q are the total probabilities that teacher and student give to the k listed tokens at
    temperature 1; p and q are their distributions over these tokens alone at temperature T. A
    position's loss is

        P T^2 KL(p || q) + P log(P / Q) + (1 - P) log((1 - P) / (1 - Q))

    T^2 keeps the size of the first part's gradient. The other parts hold the student's probability
    of unlisted tokens to the teacher's. They are at temperature 1, since at another they would
    depend on the teacher's unlisted logits, which are not stored. At every T the loss is 0 exactly
    where teacher and student agree on every listed token. At T = 1 it is the KL over the listed
    tokens and one bucket for the rest, a lower bound of the full KL; for k = X it is T^2 times the
    full KL at T. The paper writes cross-entropy, which has the same gradient.

    Args:
        score_k: the student's logits of the listed tokens, of `ops.cross_entropy`.
        rest: log-sum-exp of the unlisted logits, -inf where there are none.
        topk_id_k: distinct; an entry with a negative id or log-probability -inf is
            padding.
        topk_logprob_k: normalised over the whole vocabulary at temperature 1.
        mask: positions without any entry are not counted.
        temperature: T > 0, a Python number.

    Returns:
        The sum; count = positions.
    """
    mask = _mask(mask, rest.shape)
    entry = mask[..., None] & (topk_id_k >= 0) & jnp.isfinite(topk_logprob_k)
    mask = jnp.any(entry, axis=-1)
    score_k, logprob_k = keep(score_k, entry), keep(topk_logprob_k, entry)
    # Finite, so that a row without entries stays finite too.
    teacher_k = jax.nn.log_softmax(jnp.where(entry, logprob_k / temperature, -1e30))
    student_k = jax.nn.log_softmax(jnp.where(entry, score_k / temperature, -1e30))
    kl = jnp.sum(jnp.where(entry, jnp.exp(teacher_k) * (teacher_k - student_k), 0.0), axis=-1)
    # Rounded (float16) probabilities may add up to more than 1, or to less where all are listed.
    has_rest = mask & (rest > -jnp.inf)
    listed = jnp.sum(jnp.where(entry, jnp.exp(logprob_k), 0.0), axis=-1)
    listed = jnp.where(has_rest, jnp.minimum(listed, 1.0), 1.0)
    # log Q and log(1 - Q) from the odds Q / (1 - Q): exact also where they are close to 0.
    log_odds = logsumexp(jnp.where(entry, score_k, -1e30), axis=-1) - keep(rest, has_rest)
    log_odds = jnp.where(has_rest, log_odds, 0.0)
    mass = xlogy(listed, listed) + listed * jax.nn.softplus(-log_odds)
    mass += xlogy(1.0 - listed, 1.0 - listed) + (1.0 - listed) * jax.nn.softplus(log_odds)
    mass = jnp.where(has_rest, mass, 0.0)
    return masked_sum(listed * temperature**2 * kl + mass, mask)


# Depth (Sec. III-D.2)


def depth_l1(
    depth: Float[Array, "*axes"],
    target: Float[Array, "*axes"],
    mask: Mask,
    weight: Float[Array, "*axes"] | None = None,
) -> Pair:
    """|depth - target| in metres over known pixels (target > 0), Sec. III-D.2; count = pixels.

    With weights of the pixels, the count is the sum of those of known pixels.
    """
    mask = _mask(mask, target.shape) & (target > 0)
    return _weighted_sum(jnp.abs(keep(depth, mask) - keep(target, mask)), mask, weight)


def depth_bin_centres(bins: int) -> Float32[jax.Array, " Z"]:
    """Returns the centres of the depth bins in metres, float32; see `targets.depth_bin_centres`."""
    return jnp.asarray(targets.depth_bin_centres(bins), jnp.float32)


def expected_depth(
    logits_Z: Float[Array, "*axes Z"], centres_Z: Float[Array, " Z"]
) -> Float32[jax.Array, "*axes"]:
    """Returns the depth in metres of a distribution over bins: exp of the mean log centre.

    In log depth the bins are even, so this inverts `assign_bins` exactly; a mean in metres would
    not. For probabilities pass their logarithm.
    """
    prob_Z = jax.nn.softmax(jnp.asarray(logits_Z).astype(jnp.float32), axis=-1)
    return jnp.exp(jnp.sum(prob_Z * jnp.log(centres_Z), axis=-1))


def assign_bins(
    depth: Float[Array, "*axes"], centres_Z: Float[Array, " Z"]
) -> Float[jax.Array, "*axes Z"]:
    """Returns the weights of the two centres nearest to a depth > 0, in log depth.

    A depth beyond the first or last centre has weight 1 on that centre.
    """
    bin_Z = jnp.arange(centres_Z.shape[0], dtype=jnp.float32)
    position = jnp.interp(jnp.log(depth), jnp.log(centres_Z), bin_Z)
    return jnp.maximum(1.0 - jnp.abs(position[..., None] - bin_Z), 0.0)


def depth_bin_ce(
    logits_Z: Float[Array, "*axes Z"],
    target: Float[Array, "*axes"],
    mask: Mask,
    centres_Z: Float[Array, " Z"],
    weight: Float[Array, "*axes"] | None = None,
) -> Pair:
    """Cross-entropy over depth bins, Sec. III-D.2; count = known pixels (target > 0).

    Args:
        logits_Z: of the bins.
        target: metres, turned into the weights of `assign_bins`.
        mask: pixels that count.
        centres_Z: increasing metres, of `depth_bin_centres`.
        weight: of the pixels; the count is then the sum of those of known pixels.
    """
    mask = _mask(mask, target.shape) & (target > 0)
    weight_Z = jax.lax.stop_gradient(assign_bins(keep(target, mask, 1.0), centres_Z))
    log_prob_Z = jax.nn.log_softmax(keep(logits_Z, mask), axis=-1)
    return _weighted_sum(-jnp.sum(weight_Z * log_prob_Z, axis=-1), mask, weight)


def depth_bin_kl(
    logits_Z: Float[Array, "*axes Z"],
    teacher_probs_Z: Float[Array, "*axes Z"],
    mask: Mask,
) -> Pair:
    """KL(teacher || student) over depth bins, Sec. III-D.2; count = pixels with a teacher.

    Args:
        teacher_probs_Z: normalised here because float16 rounds them; a row of zeros is no
            target.
    """
    mask = _mask(mask, teacher_probs_Z.shape[:-1])
    mask &= jnp.sum(keep(teacher_probs_Z, mask), axis=-1) > 0
    prob_Z = keep(teacher_probs_Z, mask, 1.0)
    prob_Z = jax.lax.stop_gradient(prob_Z / jnp.sum(prob_Z, axis=-1, keepdims=True))
    log_prob_Z = jax.nn.log_softmax(keep(logits_Z, mask), axis=-1)
    return masked_sum(jnp.sum(xlogy(prob_Z, prob_Z) - prob_Z * log_prob_Z, axis=-1), mask)


# Detection (Sec. III-D.2)


def match(
    cost_NY: Float[Array, "*axes N Y"], mask_N: Bool[Array, "*axes N"]
) -> Int32[jax.Array, "*axes N"]:
    """Assigns boxes to queries one to one at the lowest total cost (Hungarian algorithm).

    Args:
        cost_NY: entries that are not finite are replaced by 1e4.
        mask_N: False = padding. Padding costs more than any real difference, so that it
            takes no query from a box where boxes outnumber queries.

    Returns:
        The query of each box; -1 for padding and for boxes left over when N > Y.
    """
    N = cost_NY.shape[-2]
    mask_NY = jnp.broadcast_to(jnp.asarray(mask_N, bool)[..., None], cost_NY.shape)
    # The algorithm does not end on infinities; huge costs would round real differences away.
    cost = jnp.where(mask_NY & jnp.isfinite(cost_NY), cost_NY, 1e4).astype(jnp.float32)
    cost = jnp.clip(cost, -1e4, 1e4)
    low = jnp.min(cost, axis=(-2, -1), keepdims=True, where=mask_NY, initial=1e4)
    high = jnp.max(cost, axis=(-2, -1), keepdims=True, where=mask_NY, initial=-1e4)
    padding = N * jnp.maximum(high - low, 0.0) + 1.0
    cost = jax.lax.stop_gradient(jnp.where(mask_NY, cost - low, padding))

    def assign(cost_NY, mask_N):
        box, query = hungarian_algorithm(cost_NY)
        query_N = jnp.full(N, -1, jnp.int32).at[box].set(query.astype(jnp.int32))
        return jnp.where(mask_N, query_N, -1)

    for _ in cost_NY.shape[:-2]:
        assign = jax.vmap(assign)
    return assign(cost, mask_NY[..., 0])


def _focal(logits: jax.Array, target: jax.Array | float, alpha: float, gamma: float) -> jax.Array:
    """Sigmoid focal loss of each logit, -alpha_t (1 - p_t)^gamma log p_t (1708.02002, eq. 5)."""
    signed = jnp.where(jnp.asarray(target) > 0, logits, -logits)
    weight = jnp.where(jnp.asarray(target) > 0, alpha, 1.0 - alpha)
    log_prob = jax.nn.log_sigmoid(signed)
    return -weight * jnp.exp(gamma * jax.nn.log_sigmoid(-signed)) * log_prob


def focal_loss(
    class_logits_SYc: Float[Array, "S Y c"],
    target_SY: Int[Array, "S Y"],
    known_S: Mask,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Pair:
    """Sigmoid focal loss (1708.02002) over queries and categories, Sec. III-D.2.

    Args:
        class_logits_SYc: one binary decision per category; no object = all of them negative.
        target_SY: category of each query, -1 = no object.
        known_S: scenes whose boxes are all known; the others are not counted.
        alpha: weight of the positive decisions.
        gamma: exponent that reduces the weight of decisions that are already right.

    Returns:
        The sum over all decisions; count = objects, at least 1 per scene, so that an empty room
        counts too.
    """
    known = _mask(known_S, target_SY.shape[:1])
    one_hot = jax.nn.one_hot(target_SY, class_logits_SYc.shape[-1])
    loss_SYc = _focal(keep(class_logits_SYc, known), one_hot, alpha, gamma)
    total, _ = masked_sum(jnp.sum(loss_SYc, axis=(1, 2)), known)
    objects = jnp.maximum(jnp.sum(target_SY >= 0, axis=1), 1)
    return total, jnp.sum(jnp.where(known, objects, 0), dtype=jnp.float32)


def _box_distance(boxes_8: jax.Array, target_8: jax.Array) -> jax.Array:
    """The sum of `box_loss` for each pair of encoded boxes."""

    def to_code(code_8):
        l1 = jnp.sum(jnp.abs(boxes_8 - code_8), axis=-1)
        straight = 0.5 + 0.5 * code_8[..., 7]  # cos^2 of the yaw, which the overlap leaves out
        overlap = straight * generalized_iou(boxes_8, code_8)
        overlap += (1.0 - straight) * generalized_iou(other_code(boxes_8), other_code(code_8))
        return BOX_L1_WEIGHT * l1 + BOX_GIOU_WEIGHT * (1.0 - overlap)

    return nearer_code(to_code, target_8)


def _encode_known(target_boxes_N7: Array, mask_N: jax.Array) -> jax.Array:
    # Padding is zeros, whose log size is -inf; a box of ones has finite codes.
    return encode_boxes(keep(target_boxes_N7, mask_N, 1.0))


def box_loss(
    boxes_N8: Float[Array, "*axes N 8"],
    target_boxes_N7: Float[Array, "*axes N 7"],
    mask_N: Mask,
) -> Pair:
    """Localisation loss of matched boxes, Sec. III-D.2; count = boxes.

        BOX_L1_WEIGHT |box - target|_1 + BOX_GIOU_WEIGHT (1 - GIoU(box, target))

    L1 is over the codes of `encode_boxes` (metres, log size, doubled angle); the nearer of the
    target's two codes counts (`geometry.boxes.nearer_code`). GIoU is that of the boxes without
    their yaw (`generalized_iou`): a mean of both ways to lay a box's length along the world's axes,
    weighted by the squared cosine of the yaw that is left out. So the loss is continuous where a
    box turns, and both codes of a prediction cost the same.

    Args:
        boxes_N8: predictions, encoded.
        target_boxes_N7: in the order of the predictions.
    """
    mask = _mask(mask_N, target_boxes_N7.shape[:-1])
    target = _encode_known(target_boxes_N7, mask)
    return masked_sum(_box_distance(keep(boxes_N8, mask), target), mask)


class Detection(NamedTuple):
    """The two losses, and the query of each box (int32, -1 for none)."""

    classes: Pair
    boxes: Pair
    query_SN: jax.Array


def detection(
    class_logits_SYc: Float[Array, "S Y c"],
    boxes_SY8: Float[Array, "S Y 8"],
    target_boxes_SN7: Float[Array, "S N 7"],
    target_labels_SN: Int[Array, "S N"],
    known_S: Mask,
) -> Detection:
    """Set prediction of 3D boxes, Sec. III-D.2: Hungarian matching, focal and box loss.

    The matching cost is the box loss plus BOX_CLASS_WEIGHT times the difference that the box makes
    to the focal loss of its category (Deformable DETR, 2010.04159). It gets no gradient.

    Args:
        class_logits_SYc: of the queries.
        boxes_SY8: encoded boxes of the queries.
        target_boxes_SN7: world frame, metres.
        target_labels_SN: category, -1 = no box.
        known_S: scenes whose boxes are all known; the others are not counted.
    """
    known = _mask(known_S, target_labels_SN.shape[:1])
    mask_SN = known[:, None] & (target_labels_SN >= 0)
    boxes_SY8, logits_SYc = keep(boxes_SY8, known), keep(class_logits_SYc, known)
    target_SN8 = _encode_known(target_boxes_SN7, mask_SN)
    label_SN = jnp.where(mask_SN, target_labels_SN, 0)
    logits_SYN = jnp.take_along_axis(logits_SYc, label_SN[:, None, :], axis=2, mode="clip")
    difference_SYN = _focal(logits_SYN, 1.0, 0.25, 2.0) - _focal(logits_SYN, 0.0, 0.25, 2.0)
    cost_SNY = _box_distance(boxes_SY8[:, None], target_SN8[:, :, None])
    cost_SNY += BOX_CLASS_WEIGHT * jnp.swapaxes(difference_SYN, 1, 2)
    query_SN = by_scenes(match, cost_SNY, mask_SN)
    matched = query_SN >= 0
    # Unmatched boxes write to a column past the end, which is dropped.
    S, Y = class_logits_SYc.shape[:2]
    column = jnp.where(matched, query_SN, Y)
    target_SY = jnp.full((S, Y), -1, jnp.int32)
    target_SY = target_SY.at[jnp.arange(S)[:, None], column].set(label_SN, mode="drop")
    return Detection(
        classes=focal_loss(logits_SYc, target_SY, known),
        boxes=box_loss(take_matched(boxes_SY8, query_SN), target_boxes_SN7, matched),
        query_SN=query_SN,
    )


def take_matched(
    value_SY: Shaped[Array, "S Y *rest"], query_SN: Int[Array, "S N"]
) -> Shaped[jax.Array, "S N *rest"]:
    """Returns the matched query's value for each box (query 0 where there is none)."""
    return jax.vmap(lambda value, query: value[query])(value_SY, jnp.maximum(query_SN, 0))


# Spatial and multi-view terms (Sec. III-D.2 and III-D.3)


def squared_distance(
    student_F: Float[Array, "*axes F"], teacher_F: Float[Array, "*axes F"], mask: Mask
) -> Pair:
    """|student - teacher|^2 over the last axis; count = True entries of the mask.

    With features F_s and F_t of cells (v, i, j) it is the first term of eq. 1; with probabilities
    the "feature-alignment of detector probabilities, spatial distributions", Sec. III-D.2.

    Args:
        teacher_F: which gets no gradient.
    """
    mask = _mask(mask, student_F.shape[:-1])
    teacher_F = jax.lax.stop_gradient(keep(teacher_F, mask))
    return masked_sum(jnp.sum(jnp.square(keep(student_F, mask) - teacher_F), axis=-1), mask)


def log_depth_distance(
    student: Float[Array, "*axes"], teacher: Float[Array, "*axes"], mask: Mask
) -> Pair:
    """Squared difference of log depths, Sec. III-D.2's alignment of "depth hints"; count = cells.

    Args:
        student: metres > 0, such as `expected_depth` of bins.
        teacher: metres, 0 where unknown, which gets no gradient.
    """
    mask = _mask(mask, student.shape) & (teacher > 0)
    student, teacher = (jnp.log(keep(x, mask, 1.0))[..., None] for x in (student, teacher))
    return squared_distance(student, teacher, mask)


def _inverse_norm(x_F: jax.Array) -> jax.Array:
    # The bound keeps the gradient of a zero vector finite.
    return jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x_F), axis=-1), 1e-8))


def cross_view(
    student_SVPF: Float[Array, "S V P F"],
    index_SVVP: Int[Array, "S V V P"],
    mask_SVVP: Bool[Array, "S V V P"],
    *,
    literal_sign: bool = False,
) -> Pair:
    """Second term of eq. 1, cross-view consistency of the student's features; count = pairs.

    The paper adds lambda * sim(F^(v1), F^(v2)) over pairs of views, which "enforces cross-view
    consistency". Minimising a similarity does the opposite, and cells at equal (i, j) of two views
    show different places. So this is 1 - cosine over the cells that show the same place.

    Args:
        student_SVPF: the student's projected features.
        index_SVVP, mask_SVVP: of `correspondences`.
        literal_sign: + cosine over the same pairs, the sign that the paper prints.
    """

    # All pairs of views at once would need V times the features' memory. So one target view at a
    # time, and its gathered features are recomputed for the gradient.
    @jax.checkpoint
    def to_view(total, b):
        feature_SPF, index_SVP, mask_SVP = b
        there = jax.vmap(lambda f, i: f.at[i].get(mode="clip"))(feature_SPF, index_SVP)
        here, there = keep(student_SVPF, mask_SVP), keep(there, mask_SVP)
        scale = _inverse_norm(here) * _inverse_norm(there)
        cosine = jnp.sum(here * there, axis=-1) * scale
        loss, _ = masked_sum(cosine if literal_sign else 1.0 - cosine, mask_SVP)
        return total + loss, None

    mask_SVVP = jnp.asarray(mask_SVVP, bool)
    views = (
        jnp.moveaxis(jnp.asarray(student_SVPF), 1, 0),
        jnp.moveaxis(jnp.asarray(index_SVVP), 2, 0),
        jnp.moveaxis(mask_SVVP, 2, 0),
    )
    total, _ = jax.lax.scan(to_view, jnp.zeros((), jnp.float32), views)
    return total, jnp.sum(mask_SVVP, dtype=jnp.float32)


def multi_view_consistency(
    depth_SVP: Float[Array, "S V P"],
    extrinsic_SV34: Float[Array, "S V 3 4"],
    intrinsic_SV33: Float[Array, "S V 3 3"],
    grid: tuple[int, int],
    index_SVVP: Int[Array, "S V V P"],
    mask_SVVP: Bool[Array, "S V V P"],
) -> Pair:
    """L2 "consistency of student predictions across views", Sec. III-D.2; count = pairs of cells.

    The depth predicted at a patch of view a is unprojected with camera a and moved into camera b.
    The loss is the squared difference, in m^2, of its z and the depth predicted at the patch of b
    that shows the same place. Both predictions get gradients.

    Args:
        depth_SVP: predicted metres.
        extrinsic_SV34: camera-from-world.
        intrinsic_SV33: pixels of the patch grid.
        grid: (gh, gw).
        index_SVVP, mask_SVVP: of `correspondences`, from known geometry.
    """
    mask = jnp.asarray(mask_SVVP, bool)
    slope, offset = reprojection(extrinsic_SV34, intrinsic_SV33, grid)
    here = keep(jnp.broadcast_to(depth_SVP[:, :, None, :], mask.shape), mask)
    moved = here * slope + offset[..., None]
    there = keep(gather_views(depth_SVP, index_SVVP), mask)
    return masked_sum(jnp.square(moved - there), mask)


def binary_kl(logit: Float[Array, "*axes"], prob: Float[Array, "*axes"], mask: Mask) -> Pair:
    """KL(Bernoulli(prob) || Bernoulli(sigmoid(logit))), Sec. III-D.2; count = entries.

    "KL on left/right and above/below distributions"; used for the four relations too. For a target
    of 0 or 1 this is the binary cross-entropy.
    """
    mask = _mask(mask, logit.shape)
    logit = keep(logit, mask)
    prob = jax.lax.stop_gradient(keep(prob, mask))
    negative_entropy = xlogy(prob, prob) + xlogy(1.0 - prob, 1.0 - prob)
    return masked_sum(negative_entropy + jax.nn.softplus(logit) - prob * logit, mask)


def huber(
    prediction_n: Float[Array, "*axes n"],
    target_n: Float[Array, "*axes n"],
    mask: Bool[Array, "*axes"],
) -> Pair:
    """Huber loss (delta 1) summed over the last axis; count = True entries of the mask."""
    mask = jnp.asarray(mask)
    loss = _huber(jnp.where(mask[..., None], prediction_n - target_n, 0.0))
    return jnp.sum(loss), jnp.sum(mask, dtype=jnp.float32)


def huber_box(
    boxes_8: Float[Array, "*axes 8"],
    target_boxes_7: Float[Array, "*axes 7"],
    mask: Bool[Array, "*axes"],
) -> Pair:
    """`huber` of encoded boxes to the nearer code (`geometry.boxes.nearer_code`) of the targets."""
    mask = jnp.asarray(mask)
    boxes_8, target_8 = keep(boxes_8, mask), encode_boxes(target_boxes_7)
    return masked_sum(nearer_code(lambda code_8: _huber(boxes_8 - code_8), target_8), mask)


def _huber(error_F: Array) -> jax.Array:
    size = jnp.abs(error_F)
    return jnp.sum(jnp.where(size < 1, 0.5 * error_F**2, size - 0.5), axis=-1)
