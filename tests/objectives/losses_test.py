"""Every loss against float64 numpy / scipy, its masks by perturbation, and the totals of eq. 2."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize, special, stats

from geode_jax.geometry.boxes import decode_boxes, encode_boxes, generalized_iou
from geode_jax.objectives import losses
from geode_jax.ops import cross_entropy

detect = jax.jit(losses.detection)
match = jax.jit(losses.match)
overlap_of = jax.jit(generalized_iou)
CENTRES = losses.depth_bin_centres(6)


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def draw_probs(*shape, seed=0):
    return special.softmax(draw(*shape, seed=seed), axis=-1)


def draw_ids(high, *shape, seed=0):
    return np.random.default_rng([seed, *shape]).integers(0, high, shape).astype(np.int32)


def draw_boxes(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    parts = [rng.normal(size=(*shape, 3)), rng.uniform(0.2, 2.0, (*shape, 3))]
    return np.concatenate([*parts, rng.uniform(-0.75, 0.75, (*shape, 1))], -1).astype(np.float32)


def draw_topk(vocabulary, k, *shape, seed=0, temperature=1.0):
    """A full teacher distribution and its top k: log-probabilities [..., X], ids, [..., k]."""
    full = special.log_softmax(2.0 * draw(*shape, vocabulary, seed=seed + 1), axis=-1)
    ids = np.argsort(-full, axis=-1)[..., :k].astype(np.int32)
    return full, ids, np.take_along_axis(full, ids, -1)


def draw_mask(*shape, seed=0):
    mask = np.random.default_rng([seed, *shape]).random(shape) < 0.6
    mask.flat[0], mask.flat[-1] = True, False
    return mask


def align(part):
    """feature_alignment with one part, as a loss of (student, teacher, mask)."""
    return lambda *arrays: losses.feature_alignment(**{part: arrays})[part]


def distillation(logits_X, ids, logprobs, mask, temperature=1.0):
    """Of logits that a head which does nothing makes of themselves."""
    *between, X = logits_X.shape
    k = ids.shape[-1]
    paid = jnp.broadcast_to(
        jnp.asarray(mask).reshape(np.shape(mask) + (1,) * (len(between) - np.ndim(mask))), between
    )
    own = jnp.where(jnp.isfinite(logprobs), ids, -1).reshape(1, -1, k)
    rows = [x.reshape(1, -1, *x.shape[len(between) :]) for x in map(jnp.asarray, (ids, logprobs))]

    def part(index, scores, paid, ids, logprobs):
        return losses.distillation(
            scores.listed_nk, scores.rest_n, ids, logprobs, paid, temperature
        )[index]

    def summed(index):
        loss = functools.partial(part, index)
        states = jnp.reshape(logits_X, (1, -1, X))
        return cross_entropy.token_loss(
            loss, states, jnp.eye(X), own, paid.reshape(1, -1), *rows, tied=False, rest=0
        )

    return summed(0), summed(1)


def text_cross_entropy(logits_X, labels, mask):
    """The same."""
    identity, paid = jnp.eye(logits_X.shape[-1]), jnp.asarray(mask)
    loss, own = losses.token_cross_entropy, labels[..., None]
    total = cross_entropy.token_loss(loss, logits_X, identity, own, paid, tied=True)
    return total, jnp.sum(paid, dtype=jnp.float32)


# name: (loss of (student, *targets, mask), student, targets), for masks [3, 5].
_full, _ids, _logprobs = draw_topk(9, 4, 3, 5)
MASKED = {
    "cross_entropy": (losses.cross_entropy, draw(3, 5, 9), [draw_ids(9, 3, 5)]),
    "token_cross_entropy": (text_cross_entropy, draw(3, 5, 9), [draw_ids(9, 3, 5)]),
    "distillation": (distillation, draw(3, 5, 9), [_ids, _logprobs]),
    "distillation at 2": (
        lambda *a: distillation(*a, temperature=2.0),
        draw(3, 5, 9),
        [_ids, _logprobs],
    ),
    "depth_l1": (losses.depth_l1, draw(3, 5), [np.exp(draw(3, 5, seed=1))]),
    "depth_bin_ce": (
        lambda *a: losses.depth_bin_ce(*a, CENTRES),
        draw(3, 5, 6),
        [np.exp(draw(3, 5, seed=1))],
    ),
    "depth_bin_kl": (losses.depth_bin_kl, draw(3, 5, 6), [draw_probs(3, 5, 6, seed=1)]),
    "box_loss": (losses.box_loss, draw(3, 5, 8), [draw_boxes(3, 5, seed=1)]),
    "spatial_features": (losses.spatial_features, draw(3, 5, 4), [draw(3, 5, 4, seed=1)]),
    "binary_kl": (losses.binary_kl, draw(3, 5), [draw_probs(3, 5, seed=1)]),
    "align detection": (align("detection"), draw_probs(3, 5, 4), [draw_probs(3, 5, 4, seed=1)]),
    "align spatial": (align("spatial"), draw_probs(3, 5), [draw_probs(3, 5, seed=1)]),
    "align depth": (align("depth"), np.exp(draw(3, 5)), [np.exp(draw(3, 5, seed=1))]),
}
masked_losses = pytest.mark.parametrize("case", MASKED.values(), ids=MASKED.keys())


@functools.cache  # one compilation for all tests of a loss
def compiled(loss):
    def total(*arrays):
        total, count = loss(*arrays)
        assert total.shape == count.shape == ()
        assert total.dtype == count.dtype == jnp.float32
        return total, count

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def value_and_grad(loss, *arrays):
    (total, count), grad = compiled(loss)(*arrays)
    return float(total), float(count), np.asarray(grad)


def spoil(array, mask, garbage):
    mask = mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
    if np.issubdtype(array.dtype, np.integer):
        garbage = {np.inf: -(2**31)}.get(garbage, 2**31 - 1)
    return np.where(mask, array, np.asarray(garbage, array.dtype))


@masked_losses
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 0.0])
def test_what_a_mask_leaves_out_changes_neither_value_nor_gradient(case, garbage):
    loss, student, targets = case
    mask = draw_mask(3, 5)
    expected = value_and_grad(loss, student, *targets, mask)
    spoiled = [spoil(array, mask, garbage) for array in (student, *targets)]
    total, count, grad = value_and_grad(loss, *spoiled, mask)
    assert total == pytest.approx(expected[0], rel=1e-6)
    assert count == expected[1] == mask.sum()
    np.testing.assert_allclose(grad, expected[2], rtol=1e-6, atol=1e-7)
    paid = np.any(grad.reshape(3, 5, -1) != 0, axis=-1)
    np.testing.assert_array_equal(paid, mask)


@masked_losses
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 0.0])
def test_an_empty_mask_gives_zero_and_no_gradient(case, garbage):
    loss, student, targets = case
    mask = np.zeros((3, 5), bool)
    spoiled = [spoil(array, mask, garbage) for array in (student, *targets)]
    total, count, grad = value_and_grad(loss, *spoiled, mask)
    assert (total, count) == (0.0, 0.0)
    np.testing.assert_array_equal(grad, 0.0)


@masked_losses
def test_sums_add_up_over_examples(case):
    loss, student, targets = case
    row = np.arange(3)[:, None].repeat(5, axis=1)
    total, count, _ = value_and_grad(loss, student, *targets, row != 1)
    rows = [value_and_grad(loss, student, *targets, row == i) for i in (0, 2)]
    assert total == pytest.approx(sum(row[0] for row in rows), rel=1e-5)
    assert count == sum(row[1] for row in rows) == 10


some_losses = pytest.mark.parametrize(
    "case", [MASKED[name] for name in ("cross_entropy", "depth_bin_kl", "spatial_features")]
)


@some_losses
def test_a_mask_may_hold_for_whole_examples(case):
    loss, student, targets = case
    mask = np.array([True, False, True])
    expected = loss(student, *targets, mask[:, None].repeat(5, axis=1))
    np.testing.assert_array_equal(loss(student, *targets, mask), expected)


@some_losses
def test_half_precision_students_are_summed_in_float32(case):
    loss, student, targets = case
    half = jnp.asarray(student, jnp.bfloat16)
    total, count = loss(half, *targets, True)
    exact, _ = loss(half.astype(jnp.float32), *targets, True)
    assert total.dtype == count.dtype == jnp.float32
    assert float(total) == pytest.approx(float(exact), rel=1e-6)


# Text


def test_cross_entropy_is_the_negative_log_softmax_of_the_label():
    logits, labels, mask = 30 * draw(3, 5, 9), draw_ids(9, 3, 5), draw_mask(3, 5)
    log_prob = special.log_softmax(logits.astype(np.float64), axis=-1)
    expected = -np.take_along_axis(log_prob, labels[..., None], -1)[..., 0][mask].sum()
    total, count = losses.cross_entropy(logits, labels, mask)
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert count == mask.sum()


def test_cross_entropy_never_pays_a_negative_label():
    logits, labels = draw(1, 4, 9), np.array([[-100, 3, -1, 2]], np.int32)
    expected = losses.cross_entropy(logits, labels, labels >= 0)
    np.testing.assert_array_equal(losses.cross_entropy(logits, labels, True), expected)
    assert expected[1] == 2


def test_distillation_at_temperature_1_is_the_kl_with_one_bucket_for_the_tail():
    full, ids, logprobs = draw_topk(9, 4, 3, 5)
    logits, mask = draw(3, 5, 9), draw_mask(3, 5)
    q = special.softmax(logits.astype(np.float64), axis=-1)
    p_k, q_k = np.exp(logprobs.astype(np.float64)), np.take_along_axis(q, ids, -1)
    p = np.concatenate([p_k, 1 - p_k.sum(-1, keepdims=True)], -1)
    q = np.concatenate([q_k, 1 - q_k.sum(-1, keepdims=True)], -1)
    total, _ = distillation(logits, ids, logprobs, mask)
    assert float(total) == pytest.approx(stats.entropy(p[mask], q[mask], axis=-1).sum(), rel=1e-5)
    whole = stats.entropy(np.exp(full[mask]), special.softmax(logits[mask], axis=-1), axis=-1).sum()
    assert float(total) < whole


def test_distillation_over_the_whole_vocabulary_is_the_full_kl_at_every_temperature():
    full, ids, logprobs = draw_topk(9, 9, 3, 5)
    logits = draw(3, 5, 9)
    for temperature in (1.0, 2.0, 0.5):
        p = special.softmax(full / temperature, axis=-1)
        q = special.softmax(logits / temperature, axis=-1)
        expected = temperature**2 * stats.entropy(p, q, axis=-1).sum()
        total, grad_count, grad = value_and_grad(
            lambda logits, t=temperature: distillation(logits, ids, logprobs, True, t),
            logits,
        )
        assert total == pytest.approx(expected, rel=1e-5)
        assert grad_count == 15
        # Hinton et al.: T^2 / T * (softmax(logits / T) - teacher).
        np.testing.assert_allclose(grad, temperature * (q - p), atol=2e-6)


def distillation_in_float64(logits, ids, logprobs, temperature):
    """`objectives.losses.distillation` of all positions as its docstring has it, numpy float64."""
    logits, logprobs = logits.astype(np.float64), logprobs.astype(np.float64)
    p = special.softmax(logprobs / temperature, axis=-1)
    q = special.softmax(np.take_along_axis(logits, ids, -1) / temperature, axis=-1)
    P = np.exp(logprobs).sum(-1)
    Q = np.take_along_axis(special.softmax(logits, axis=-1), ids, -1).sum(-1)
    mass = special.rel_entr(P, Q) + special.rel_entr(1 - P, 1 - Q)
    return np.sum(P * temperature**2 * special.rel_entr(p, q).sum(-1) + mass)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_distillation_and_its_gradient_against_finite_differences(temperature):
    _, ids, logprobs = draw_topk(9, 4, 2, 3)
    logits = draw(2, 3, 9)
    total, _, grad = value_and_grad(
        lambda x: distillation(x, ids, logprobs, True, temperature), logits
    )
    expected = distillation_in_float64(logits, ids, logprobs, temperature)
    assert total == pytest.approx(expected, rel=1e-5)
    steps = 1e-5 * np.eye(logits.size).reshape(-1, *logits.shape)
    slopes = [
        distillation_in_float64(logits + step, ids, logprobs, temperature)
        - distillation_in_float64(logits - step, ids, logprobs, temperature)
        for step in steps
    ]
    np.testing.assert_allclose(grad.ravel(), np.array(slopes) / 2e-5, atol=3e-6)
    unlisted = np.ones(grad.shape, bool)
    np.put_along_axis(unlisted, ids, False, axis=-1)
    assert np.all(grad[unlisted] != 0)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_a_student_of_the_top_k_says_what_its_teacher_says(temperature):
    """Trained to the end: the greedy token and what the listed tokens hold together.

    Free logits of 512 positions, which begin at random.
    """
    full = special.log_softmax(3.0 * draw(512, 200), axis=-1)
    ids = np.argsort(-full, axis=-1)[:, :8].astype(np.int32)
    logprobs = np.take_along_axis(full, ids, -1)
    optimizer = optax.adam(0.1)

    def loss(logits):
        return distillation(logits, ids, logprobs, True, temperature)[0]

    def step(carry, _):
        logits, state = carry
        value, gradient = jax.value_and_grad(loss)(logits)
        updates, state = optimizer.update(gradient, state)
        return (logits + updates, state), value

    start = jnp.asarray(draw(512, 200, seed=1))
    train = jax.jit(lambda start: jax.lax.scan(step, (start, optimizer.init(start)), length=400))
    (logits, _), values = train(start)
    assert values[0] / 512 > 1 and values[-1] / 512 < 1e-3
    student = special.softmax(np.asarray(logits, np.float64), axis=-1)
    assert np.mean(student.argmax(-1) == full.argmax(-1)) >= 0.99
    held = np.take_along_axis(student, ids, -1)
    np.testing.assert_allclose(held.sum(-1), np.exp(logprobs).sum(-1), atol=0.01)
    np.testing.assert_allclose(held, np.exp(logprobs), atol=0.01)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_zero_with_zero_gradient_at_the_teacher(temperature):
    full, ids, logprobs = draw_topk(9, 4, 3, 5)
    total, _, grad = value_and_grad(
        lambda x: distillation(x, ids, logprobs, True, temperature), full
    )
    assert total == pytest.approx(0.0, abs=1e-5)
    np.testing.assert_allclose(grad, 0.0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_ignores_padded_entries_and_positions_without_entries(temperature):
    _, ids, logprobs = draw_topk(9, 4, 3, 5)
    logits = draw(3, 5, 9)
    short = distillation(logits, ids[..., :2], logprobs[..., :2], True, temperature)
    ids_, logprobs_ = ids.copy(), logprobs.copy()
    ids_[..., 2], logprobs_[..., 3], ids_[..., 3] = -1, -np.inf, 0
    padded = distillation(logits, ids_, logprobs_, True, temperature)
    np.testing.assert_allclose(padded, short, rtol=1e-6)
    ids_[1] = -1
    assert distillation(logits, ids_, logprobs_, True, temperature)[1] == 10


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_distillation_from_a_float16_cache_agrees_with_torch_in_float64(temperature):
    """What an exporter stores: logits less their logsumexp, in float16; value and gradient.

    The ratios of the k tokens at the temperature, and at 1 the k together and one for the rest.
    """
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    teacher = torch.tensor(3 * random.normal(size=(2, 5, 40)))
    kept = torch.topk(teacher - torch.logsumexp(teacher, -1, keepdim=True), 6)
    cache, ids = kept.values.half(), kept.indices
    mask = torch.tensor(random.random((2, 5)) < 0.7)
    logits = torch.tensor(random.normal(size=(2, 5, 40)), requires_grad=True)
    wanted = cache.double()

    def kl(student, wanted):
        both = student.log_softmax(-1), wanted.log_softmax(-1)
        return torch.nn.functional.kl_div(*both, log_target=True, reduction="none").sum(-1)

    others = torch.ones_like(logits, dtype=torch.bool).scatter(-1, ids, False)
    rest = torch.logsumexp(logits.masked_fill(~others, -torch.inf), -1)
    listed = logits.gather(-1, ids)
    held = wanted.logsumexp(-1)
    rows = held.exp() * temperature**2 * kl(listed / temperature, wanted / temperature)
    rows += kl(
        torch.stack([listed.logsumexp(-1), rest], -1),
        torch.stack([held, torch.log1p(-held.exp())], -1),
    )
    if temperature == 1.0:  # the same as k + 1 classes
        classes = torch.cat([wanted, torch.log1p(-held.exp())[..., None]], -1)
        torch.testing.assert_close(rows, kl(torch.cat([listed, rest[..., None]], -1), classes))
    expected = rows[mask].sum()
    expected.backward()
    total, count, grad = value_and_grad(
        lambda x: distillation(x, ids.numpy(), cache.numpy(), mask.numpy(), temperature),
        logits.detach().numpy().astype(np.float32),
    )
    assert count == int(mask.sum())
    assert total == pytest.approx(expected.item(), rel=2e-5)
    np.testing.assert_allclose(grad, logits.grad, atol=2e-6)


def test_distillation_of_rounded_probabilities_stays_a_divergence():
    # float16 log-probabilities whose sum is above 1 must not give a negative loss.
    logprobs = np.log(np.array([0.6, 0.41], np.float32))
    logits = np.log(np.array([0.6, 0.41, 1e-9], np.float32))
    total, _ = distillation(logits[None], np.array([[0, 1]]), logprobs[None], True)
    assert 0.0 <= float(total) < 1e-5
    # Nor may one below 1 where there is nothing else.
    logprobs = np.log(np.array([0.6, 0.39], np.float32))
    total, _ = distillation(logprobs[None], np.array([[0, 1]]), logprobs[None], True)
    assert float(total) == pytest.approx(0.0, abs=1e-6)


# Depth


def test_depth_l1_counts_known_pixels_only():
    depth, target = np.array([1.0, 2.0, 3.0]), np.array([1.5, 0.0, 1.0])
    np.testing.assert_allclose(losses.depth_l1(depth, target, True), (2.5, 2))


def test_depth_bins_are_even_in_log_depth():
    np.testing.assert_allclose((CENTRES[0], CENTRES[-1]), (0.3, 10.0), rtol=1e-6)
    assert np.ptp(np.diff(np.log(CENTRES))) < 1e-5


def test_depth_bin_ce_splits_a_target_between_its_two_neighbours():
    logits = draw(4, 6)
    between = float(CENTRES[2] ** 0.25 * CENTRES[3] ** 0.75)
    target = np.array([0.1, between, float(CENTRES[4]), 50.0], np.float32)
    weights = np.zeros((4, 6))
    weights[0, 0], weights[1, 2:4], weights[2, 4], weights[3, 5] = 1.0, (0.25, 0.75), 1.0, 1.0
    expected = -(weights * special.log_softmax(logits, axis=-1)).sum()
    total, count = losses.depth_bin_ce(logits, target, True, CENTRES)
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert count == 4


def test_expected_depth_inverts_the_assignment_to_bins():
    depth = np.linspace(0.3, 10.0, 50, dtype=np.float32)
    with np.errstate(divide="ignore"):
        logits = np.log(np.asarray(losses.assign_bins(depth, CENTRES)))
    np.testing.assert_allclose(losses.expected_depth(logits, CENTRES), depth, rtol=1e-4)


def test_depth_bin_kl_normalises_the_teacher_and_skips_unknown_cells():
    logits, probs = draw(3, 5, 6), draw_probs(3, 5, 6, seed=1)
    probs[0, 0] = (0, 0, 0.5, 0.5, 0, 0)  # 0 log 0 = 0
    expected = stats.entropy(probs, special.softmax(logits, axis=-1), axis=-1)
    total, count, grad = value_and_grad(losses.depth_bin_kl, logits, 0.9 * probs, True)
    assert total == pytest.approx(expected.sum(), rel=1e-5)
    assert count == 15
    assert np.all(np.isfinite(grad))
    probs[1, 2] = 0.0
    total, count = losses.depth_bin_kl(logits, probs, True)
    assert float(total) == pytest.approx(expected.sum() - expected[1, 2], rel=1e-5)
    assert count == 14


# Detection


@pytest.mark.parametrize(("boxes", "queries"), [(12, 16), (7, 7), (9, 5), (1, 4)])
def test_match_costs_what_scipy_finds(boxes, queries):
    rng = np.random.default_rng(boxes)
    cost = rng.normal(scale=5.0, size=(8, boxes, queries)).astype(np.float32)
    mask = rng.random((8, boxes)) < 0.7
    mask[0], mask[1] = True, False
    matched = np.asarray(match(cost, mask))
    assert matched.dtype == np.int32
    for cost_NM, mask_N, query_N in zip(cost, mask, matched, strict=True):
        row, column = optimize.linear_sum_assignment(cost_NM[mask_N])
        found = np.flatnonzero(query_N >= 0)
        assert not np.any(query_N[~mask_N] >= 0)
        assert len(found) == len(row)
        assert len(set(query_N[found])) == len(found)
        best = cost_NM[mask_N][row, column].sum()
        assert cost_NM[found, query_N[found]].sum() == pytest.approx(best, abs=1e-4)


def test_match_survives_costs_that_are_not_finite():
    cost = np.full((3, 4), np.nan, np.float32)
    cost[0, 2], cost[1], cost[1, 0] = 1.0, np.inf, -2.0
    query = np.asarray(match(cost, np.ones(3, bool)))
    assert tuple(query[:2]) == (2, 0)
    assert query[2] in (1, 3)


def focal_reference(logits, positive, alpha=0.25, gamma=2.0):
    p = special.expit(logits.astype(np.float64))
    return np.where(
        positive,
        -alpha * (1 - p) ** gamma * np.log(p),
        -(1 - alpha) * p**gamma * np.log1p(-p),
    )


def test_focal_loss_and_its_count_of_objects():
    logits = 3 * draw(3, 4, 5)
    target = np.array([[0, -1, 4, -1], [-1, -1, -1, -1], [1, 1, 1, 1]])
    known = np.array([True, True, False])
    expected = focal_reference(logits, target[..., None] == np.arange(5))[:2].sum()
    logits[2] = np.nan
    total, count, grad = value_and_grad(losses.focal_loss, logits, target, known)
    assert total == pytest.approx(expected, rel=1e-5)
    assert count == 2 + 1  # an empty known room counts 1
    assert np.all(np.isfinite(grad)) and np.all(grad[:2] != 0) and np.all(grad[2] == 0)


def test_focal_loss_of_extreme_logits_is_finite():
    logits = np.array([[[1e4, -1e4]]], np.float32)
    for target in (0, 1, -1):
        total, _, grad = value_and_grad(losses.focal_loss, logits, np.array([[target]]), True)
        assert np.isfinite(total) and np.all(np.isfinite(grad))


def box_reference(code, box):
    """To the nearer name of the box; the overlap has its own oracle in boxes_test.py."""

    def named(yaw, length, width):
        size = np.log([length, width, box[5]])
        return np.concatenate([box[:3], size, [np.sin(2 * yaw), np.cos(2 * yaw)]])

    def swapped(code):
        return np.concatenate([code[[0, 1, 2, 4, 3, 5]], -code[6:]])

    costs = []
    for target in (named(box[6], *box[3:5]), named(box[6] + np.pi / 2, *box[4:2:-1])):
        straight = np.cos(0.5 * np.arctan2(target[6], target[7])) ** 2
        overlap = straight * float(overlap_of(code, target))
        overlap += (1 - straight) * float(overlap_of(swapped(code), swapped(target)))
        costs.append(np.abs(code - target).sum() + 2.0 * (1 - overlap))
    return min(costs)


def test_box_loss():
    code, boxes = draw(3, 5, 8), draw_boxes(3, 5, seed=1)
    expected = sum(box_reference(code[i], boxes[i]) for i in np.ndindex(3, 5))
    total, count = losses.box_loss(code, boxes, True)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert count == 15


def test_box_loss_leads_a_box_home():
    target = draw_boxes(1)
    code = jnp.asarray(encode_boxes(target)) + draw(1, 8)
    step = jax.jit(jax.grad(lambda code: losses.box_loss(code, target, True)[0]))
    for i in range(300):
        code -= 0.1 * 0.98**i * step(code)
    np.testing.assert_allclose(decode_boxes(code), target, atol=0.02)


def detection_inputs():
    logits, code = draw(3, 6, 4), draw(3, 6, 8)
    boxes, labels = draw_boxes(3, 5, seed=1), draw_ids(4, 3, 5)
    labels[0, 3:], labels[1] = -1, -1
    return logits, code, boxes, labels


def test_detection_pays_the_cheapest_assignment():
    logits, code, boxes, labels = detection_inputs()
    classes, box, query = detect(logits, code, boxes, labels, True)
    focal, distance = 0.0, 0.0
    for s in range(3):
        real = np.flatnonzero(labels[s] >= 0)
        yes = focal_reference(logits[s], np.ones_like(logits[s], bool))
        no = focal_reference(logits[s], np.zeros_like(logits[s], bool))
        cost = np.array(
            [
                [box_reference(code[s, m], boxes[s, n]) + 2.0 * (yes - no)[m, labels[s, n]]
                 for m in range(6)]
                for n in real
            ]
        ).reshape(-1, 6)  # fmt: skip
        best = min(
            itertools.permutations(range(6), len(real)),
            key=lambda choice: sum(cost[i, m] for i, m in enumerate(choice)),
        )
        np.testing.assert_array_equal(np.asarray(query)[s, real], best)
        positive = np.zeros((6, 4), bool)
        for n, m in zip(real, best, strict=True):
            positive[m, labels[s, n]] = True
            distance += box_reference(code[s, m], boxes[s, n])
        focal += focal_reference(logits[s], positive).sum()
    np.testing.assert_allclose(classes, (focal, 3 + 1 + 5), rtol=1e-5)
    np.testing.assert_allclose(box, (distance, 8), rtol=1e-5)


def test_detection_ignores_unknown_scenes_and_padding():
    known = np.array([True, True, False])

    def total(predictions, boxes, labels):
        classes, box, _ = losses.detection(*predictions, boxes, labels, known)
        return losses.mean(classes) + losses.mean(box), (classes, box)

    grad = jax.jit(jax.grad(total, has_aux=True))
    for garbage in (np.nan, np.inf, 0.0):
        check_detection_ignores(garbage, grad, known)


def check_detection_ignores(garbage, grad, known):
    logits, code, boxes, labels = detection_inputs()
    expected, pairs = grad((logits, code), boxes, labels)
    spoiled = [spoil(x, known, garbage) for x in (logits, code)]
    boxes = spoil(boxes, known[:, None] & (labels >= 0), garbage)
    found, found_pairs = grad(tuple(spoiled), boxes, spoil(labels, known, np.nan))
    np.testing.assert_allclose(np.array(found_pairs), np.array(pairs), rtol=1e-6)
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-6, atol=1e-7)
        assert np.any(np.asarray(f[0]) != 0) and np.all(np.asarray(f[2]) == 0)


@pytest.mark.parametrize(("boxes", "known"), [(5, False), (0, True)])
def test_detection_without_any_box(boxes, known):
    logits, code, target, labels = detection_inputs()
    target, labels = target[:, :boxes], labels[:, :boxes]
    classes, box, query = detect(logits, code, target, labels, known)
    assert box == (0.0, 0.0)
    assert classes[1] == (3 if known else 0)
    assert (classes[0] > 0) == known
    assert np.all(np.asarray(query) == -1)


def test_take_matched_reorders_queries_to_boxes():
    value = draw(2, 4, 3)
    query = np.array([[2, 0, -1], [3, 1, 2]], np.int32)
    found = np.asarray(losses.take_matched(value, query))
    np.testing.assert_array_equal(found[0, :2], value[0, [2, 0]])
    np.testing.assert_array_equal(found[1], value[1, [3, 1, 2]])


# Spatial, multi-view, feature alignment (the geometry itself: correspondence_test.py)


def test_spatial_features_is_the_first_term_of_eq_1():
    student, teacher = draw(2, 3, 4, 5), draw(2, 3, 4, 5, seed=1)
    expected = sum(np.linalg.norm(d.astype(np.float64)) ** 2
                   for d in (student - teacher).reshape(-1, 5))  # fmt: skip
    np.testing.assert_allclose(
        losses.spatial_features(student, teacher, True), (expected, 24), rtol=1e-5
    )


def test_teachers_receive_no_gradient():
    x, y = draw(3, 4), draw_probs(3, 4, seed=1)
    for loss in (losses.spatial_features, losses.depth_bin_kl):
        assert not np.any(jax.grad(lambda t, f=loss: f(x, t, True)[0])(y))
    assert not np.any(jax.grad(lambda t: losses.binary_kl(x, t, True)[0])(y))


def test_binary_kl():
    logit, prob = 4 * draw(3, 5), draw_probs(3, 5, seed=1).astype(np.float64)
    q = special.expit(logit.astype(np.float64))
    expected = (special.rel_entr(prob, q) + special.rel_entr(1 - prob, 1 - q)).sum()
    total, count = losses.binary_kl(logit, prob, True)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert count == 15


def test_binary_kl_of_hard_targets_is_cross_entropy_and_finite():
    logit, prob = np.float32([3.0, -2.0, 200.0, 200.0]), np.float32([1.0, 1.0, 1.0, 0.0])
    total, _, grad = value_and_grad(losses.binary_kl, logit, prob, True)
    assert total == pytest.approx(np.log1p(np.exp(-3)) + np.log1p(np.exp(2)) + 200.0, rel=1e-6)
    np.testing.assert_allclose(grad, special.expit(logit) - prob, atol=1e-6)


def test_feature_alignment_parts():
    probs, teacher = draw_probs(2, 3, 4), draw_probs(2, 3, 4, seed=1)
    depth, hint = np.exp(draw(2, 3)), np.exp(draw(2, 3, seed=1))
    hint[0, 0] = 0.0  # unknown
    mask = np.array([True, False])
    parts = losses.feature_alignment(
        detection=(probs, teacher, mask),
        spatial=(probs, teacher, mask),
        depth=(depth, hint, True),
    )
    square = ((probs - teacher)[0] ** 2).sum()
    np.testing.assert_allclose(parts["detection"], (square, 3), rtol=1e-5)
    np.testing.assert_allclose(parts["spatial"], (square, 12), rtol=1e-5)
    log_ratio = np.log(depth.ravel()[1:] / hint.ravel()[1:])
    np.testing.assert_allclose(parts["depth"], ((log_ratio**2).sum(), 5), rtol=1e-5)
    assert losses.feature_alignment() == {}


# Totals


def test_means_are_taken_after_the_sums_are_added():
    assert losses.mean((6.0, 4.0)) == 1.5
    assert losses.mean((np.nan, 0.0)) == 0.0
    assert losses.combine([(6.0, 4.0), (3.0, 1.0)], [1.0, 0.5]) == (3.0, 1.0)
    assert losses.combine([(6.0, 4.0), (0.0, 0.0)]) == (1.5, 1.0)
    assert losses.combine([(0.0, 0.0), (0.0, 0.0)]) == (0.0, 0.0)


def terms_and_parameters():
    terms = {name: (jnp.float32(i + 1.0), jnp.float32(2.0)) for i, name in enumerate(losses.TERMS)}
    terms["detection"] = (jnp.float32(0.0), jnp.float32(0.0))
    s = dict(zip(losses.TERMS, draw(len(losses.TERMS)), strict=True))
    return terms, s


def test_uncertainty_total_is_eq_2():
    terms, s = terms_and_parameters()
    total, weights = losses.uncertainty_total(terms, s)
    expected = 0.0
    for name, (value, count) in terms.items():
        sigma = np.sqrt(np.exp(np.float64(s[name])))
        assert float(weights[name]) == pytest.approx(1 / (2 * sigma**2), rel=1e-5)
        if count:
            expected += value / count / (2 * sigma**2) + np.log(sigma)
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    assert set(weights) == set(losses.TERMS)


def test_uncertainty_gradients_are_the_analytic_ones_and_absent_terms_pay_nothing():
    terms, s = terms_and_parameters()

    def total(s, means):
        pairs = {name: (means[name] * terms[name][1], terms[name][1]) for name in terms}
        return losses.uncertainty_total(pairs, s)[0]

    means = {name: losses.mean(pair) for name, pair in terms.items()}
    grad_s, grad_mean = jax.grad(total, (0, 1))(s, means)
    for name in losses.TERMS:
        present = name != "detection"
        weight = 0.5 * np.exp(-s[name])
        assert float(grad_mean[name]) == pytest.approx(present * weight, rel=1e-5)
        expected = present * (0.5 - weight * means[name])
        assert float(grad_s[name]) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    assert grad_s["detection"] == 0.0


def test_absent_terms_with_garbage_in_them_do_no_harm():
    terms = {"text": (jnp.float32(1.0), jnp.float32(1.0)), "spatial": (jnp.nan, jnp.float32(0.0))}
    s = {"text": jnp.float32(0.0), "spatial": jnp.float32(0.0)}
    total, grad = jax.value_and_grad(lambda s: losses.uncertainty_total(terms, s)[0])(s)
    assert total == 0.5
    assert grad == {"text": 0.0, "spatial": 0.0}


@pytest.mark.parametrize("start", [-9.0, -3.0, 0.0, 3.0, 9.0])
@pytest.mark.parametrize("loss", [0.5, 1e-6, 1e6])
def test_log_variance_finds_its_optimum_within_bounds_from_anywhere(start, loss):
    terms = {"text": (jnp.float32(loss), jnp.float32(1.0))}
    low, high = -3.0, 3.0

    def total(s):
        return losses.uncertainty_total(terms, {"text": s}, (low, high))[0]

    step = jax.jit(lambda s: s - jnp.clip(jax.grad(total)(s), -1.0, 1.0) * 0.2)
    s = jnp.float32(start)
    for _ in range(400):
        s = step(s)
    # Eq. 2 is least at sigma^2 = L.
    optimum = np.clip(np.log(loss), low, high)
    assert float(jnp.clip(s, low, high)) == pytest.approx(optimum, abs=0.01)
    # Never far out: a push outwards ends at the bound, it does not pile up behind it.
    if low <= start <= high:
        assert low - 0.21 <= float(s) <= high + 0.21
    weight = losses.uncertainty_total(terms, {"text": s}, (low, high))[1]["text"]
    assert 0.5 * np.exp(-high) * 0.999 <= float(weight) <= 0.5 * np.exp(-low) * 1.001


def test_static_total():
    terms, _ = terms_and_parameters()
    weights = {name: 0.5 * i for i, name in enumerate(losses.TERMS)}
    total, used = losses.static_total(terms, weights)
    expected = sum(weights[n] * v / c for n, (v, c) in terms.items() if c)
    assert float(total) == pytest.approx(float(expected))
    assert {name: float(w) for name, w in used.items()} == weights


@pytest.mark.parametrize("total", [losses.uncertainty_total, losses.static_total])
def test_a_term_without_a_weight_is_an_error(total):
    with pytest.raises(KeyError, match="spatial"):
        total({"spatial": (1.0, 1.0)}, {"text": 0.0})


def test_losses_agree_with_torch():
    torch = pytest.importorskip("torch", reason="parity with torch.nn.functional needs torch")
    F = torch.nn.functional
    logits, labels = draw(15, 9), draw_ids(9, 15)
    probs, depth = draw_probs(15, 9, seed=1), np.abs(draw(15, 9, seed=2)) + 0.1
    t = [torch.from_numpy(np.asarray(x)) for x in (logits, labels, probs, depth)]
    expected = {
        "ce": F.cross_entropy(t[0], t[1].long(), reduction="sum"),
        "kl": F.kl_div(F.log_softmax(t[0], -1), t[2], reduction="sum"),
        "bce": F.binary_cross_entropy_with_logits(t[0], (t[2] > 0.1).float(), reduction="sum"),
        "l1": F.l1_loss(t[0], t[3], reduction="sum"),
        "l2": F.mse_loss(t[0], t[3], reduction="sum"),
    }
    found = {
        "ce": losses.cross_entropy(logits, labels, True),
        "kl": losses.depth_bin_kl(logits, probs, True),
        "bce": losses.binary_kl(logits, probs > 0.1, True),
        "l1": losses.depth_l1(logits, depth, True),
        "l2": losses.spatial_features(logits, depth, True),
    }
    for name, value in expected.items():
        assert float(found[name][0]) == pytest.approx(float(value), rel=1e-5), name
