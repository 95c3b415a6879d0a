"""Cross-entropy and distillation against float64 SciPy and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

from geode_jax.objectives import losses
from tests.helpers.losses import (
    distillation,
    draw,
    draw_ids,
    draw_mask,
    draw_topk,
    value_and_grad,
)


def test_cross_entropy_is_the_negative_log_softmax_of_the_label():
    logits, labels, mask = 30 * draw(3, 5, 9), draw_ids(9, 3, 5), draw_mask(3, 5)
    log_prob = special.log_softmax(logits.astype(np.float64), axis=-1)
    expected = -np.take_along_axis(log_prob, labels[..., None], -1)[..., 0][mask].sum()
    total, count = losses.cross_entropy(logits, labels, mask)
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert count == mask.sum()


def test_cross_entropy_does_not_count_a_negative_label():
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
def test_a_student_of_the_top_k_learns_its_teachers_probabilities(temperature):
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
