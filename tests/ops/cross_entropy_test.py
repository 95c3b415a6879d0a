"""Losses of logits against float64; tiles that are left out; memory; many devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from geode_jax.ops import cross_entropy
from geode_jax.ops.cross_entropy import Scores, token_loss
from tests.helpers.own_process import output_of

S, T, D, X, K = 2, 11, 6, 13, 4


def draw(paid=None, ids=None, seed: int = 0) -> tuple:
    """hidden, matrix [D, X], ids (the second listed one is padding now and then), paid."""
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((S, T, D)).astype(np.float32)
    matrix = random.standard_normal((D, X)).astype(np.float32)
    if ids is None:
        ids = np.argsort(random.random((S, T, X)), axis=-1)[..., :K].astype(np.int32)
        ids[:, ::3, 2] = -1
    paid = random.random((S, T)) < 0.6 if paid is None else paid
    return hidden, matrix, ids, paid


def weighted(scores: Scores, paid, of_listed, of_lse, of_rest) -> jax.Array:
    """A loss with given derivatives, other for every token; without `rest` where it is -inf."""
    total = jnp.sum(of_listed * scores.listed_nk, axis=-1) + of_lse * scores.lse_n
    if scores.rest_n is not None:
        total += jnp.where(scores.rest_n > -jnp.inf, of_rest * scores.rest_n, 0)
    return jnp.sum(jnp.where(paid, total, 0))


def oracle(hidden, matrix, ids, paid, slopes, rest: int) -> tuple:
    """The sum of `weighted`, and the gradients of hidden and matrix, in float64."""
    hidden, matrix = (np.asarray(x, np.float64) for x in (hidden, matrix))
    of_listed, of_lse, of_rest = slopes
    logits = hidden @ matrix
    lse = logsumexp(logits, axis=-1)
    total, others = of_lse * lse, logits.copy()
    for at in np.ndindex(*ids.shape):
        if ids[at] >= 0:
            total[at[:2]] += of_listed[at] * logits[at[:2]][ids[at]]
            if at[2] >= rest:
                others[at[:2]][ids[at]] = -np.inf
    with np.errstate(divide="ignore"):
        rests = logsumexp(others, axis=-1)
    finite = np.where(np.isfinite(rests), rests, 0)
    total += of_rest * finite
    slope = of_lse[..., None] * np.exp(logits - lse[..., None])
    slope += of_rest[..., None] * np.exp(others - finite[..., None])
    for at in np.ndindex(*ids.shape):
        if ids[at] >= 0:
            slope[at[:2]][ids[at]] += of_listed[at]
    slope[~paid] = 0
    gradients = slope @ matrix.T, np.einsum("std,stx->dx", hidden, slope)
    return total[paid].sum(), gradients


def slopes_like(ids, seed: int = 1) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = ids.shape, ids.shape[:2], ids.shape[:2]
    return [random.standard_normal(s).astype(np.float32) for s in shapes]


def differentiated(hidden, matrix, ids, paid, slopes, *, tied: bool, rest: int | None = 1):
    """Sum and gradients, compiled anew: the sizes of tiles are no argument."""

    @jax.jit
    def both(hidden, matrix):
        def f(h, m):
            return token_loss(weighted, h, m, ids, paid, *slopes, tied=tied, rest=rest)

        value, gradients = jax.value_and_grad(lambda *a: 3 * f(*a), (0, 1))(hidden, matrix)
        plain = f(hidden, matrix)  # as without a gradient
        return plain, value / 3, jax.tree.map(lambda x: x / 3, gradients)

    plain, value, (dx, dw) = both(hidden, matrix.T if tied else matrix)
    np.testing.assert_allclose(plain, value, rtol=1e-6, atol=1e-6)
    return value, (dx, dw.T if tied else dw)


def compare(case, tied: bool, atol: float = 2e-5) -> None:
    slopes = slopes_like(case[2])
    want, wanted = oracle(*case, slopes, rest=1)
    got, gradients = differentiated(*case, slopes, tied=tied)
    np.testing.assert_allclose(got, want, atol=5 * atol)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [128, 2], ids=["one tile", "many tiles"])
def test_sum_and_gradients_are_those_of_all_logits(tied, rows, monkeypatch):
    monkeypatch.setattr(cross_entropy, "TILE_ROWS", rows)
    compare(draw(), tied)


def test_every_score_is_that_of_all_logits():
    """One at a time, so that no two errors make up for each other."""
    hidden, matrix, ids, paid = draw(paid=np.ones((S, T), bool))
    for part, at in ((0, (1, 3, 0)), (0, (0, 3, 2)), (1, (0, 10)), (2, (1, 5))):
        slopes = [np.zeros_like(x) for x in slopes_like(ids)]
        slopes[part][at] = 1
        want, wanted = oracle(hidden, matrix, ids, paid, slopes, rest=1)
        got, gradients = _jitted(hidden, matrix, ids, paid, slopes)
        np.testing.assert_allclose(got, want, atol=1e-5)
        for a, b in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_where_all_entries_are_listed_nothing_is_left():
    ids = np.argsort(np.random.default_rng(3).random((S, T, X)), axis=-1).astype(np.int32)
    ids = np.concatenate([ids[..., :1], ids], axis=-1)  # a label, and all of the vocabulary
    compare(draw(ids=ids), tied=False)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=S * T, max_size=S * T))
def test_any_tokens_may_be_paid(bits):
    case = draw(paid=np.array(bits).reshape(S, T))
    want, wanted = oracle(*case, slopes_like(case[2]), rest=1)
    got, gradients = _jitted(*case, slopes_like(case[2]))
    np.testing.assert_allclose(got, want, atol=1e-4)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@jax.jit
def _jitted(hidden, matrix, ids, paid, slopes):
    return jax.value_and_grad(
        lambda h, m: token_loss(weighted, h, m, ids, paid, *slopes, tied=False, rest=1), (0, 1)
    )(hidden, matrix)


def test_what_nobody_pays_is_not_read():
    hidden, matrix, ids, paid = draw()
    slopes = slopes_like(ids)
    want = _jitted(hidden, matrix, ids, paid, slopes)
    spoiled = np.where(paid[..., None], hidden, np.nan)
    got = _jitted(spoiled, matrix, np.where(paid[..., None], ids, 2**30), paid, slopes)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_half_precision_states_are_summed_in_float32():
    hidden, matrix, ids, paid = draw()
    half = jnp.asarray(hidden, jnp.bfloat16)
    rounded = np.asarray(jnp.asarray(matrix, jnp.bfloat16), np.float32)
    slopes = slopes_like(ids)
    got, (dx, dw) = differentiated(half, jnp.asarray(matrix), ids, paid, slopes, tied=False)
    exact = np.asarray(half, np.float32)
    want, (want_dx, want_dw) = oracle(exact, rounded, ids, paid, slopes, rest=1)
    assert got.dtype == dw.dtype == jnp.float32
    assert dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_allclose(dw, want_dw, atol=0.02 * np.abs(want_dw).max())
    np.testing.assert_allclose(dx.astype(np.float32), want_dx, atol=0.02 * np.abs(want_dx).max())


def tiles_run(paid: np.ndarray) -> int:
    """Tiles that are computed for sum and gradients, counted as they run."""
    seen = []

    def counted(*args):
        jax.debug.callback(lambda: seen.append(1))
        return weighted(*args)

    hidden, matrix, ids, paid = draw(paid=paid)
    slopes = slopes_like(ids)

    def f(h):
        return token_loss(counted, h, matrix, ids, paid, *slopes, tied=False, rest=1)

    jax.block_until_ready(jax.jit(jax.value_and_grad(f))(hidden))
    jax.effects_barrier()
    return len(seen)


def test_masked_tiles_are_skipped_and_no_tile_runs_twice(monkeypatch):
    monkeypatch.setattr(cross_entropy, "TILE_ROWS", 2)  # tiles of two tokens of each scene
    assert tiles_run(np.ones((S, T), bool)) == 6
    assert tiles_run(np.zeros((S, T), bool)) == 0
    one = np.zeros((S, T), bool)
    one[0, [1, 5, 9]] = True  # three tokens of one scene: two tiles
    assert tiles_run(one) == 2


def test_memory_is_that_of_a_tile():
    """4,096 answer tokens and 32,000 entries, compiled and not run."""
    tokens, entries, width = 4096, 32_000, 64
    shape = jax.ShapeDtypeStruct
    hidden, matrix = shape((1, tokens, width), jnp.float32), shape((width, entries), jnp.float32)
    labels, paid = shape((1, tokens), jnp.int32), shape((1, tokens), jnp.bool_)

    def pay(scores, paid):
        return jnp.sum(jnp.where(paid, scores.lse_n - scores.listed_nk[:, 0], 0))

    def ours(hidden, matrix, labels, paid):
        return token_loss(pay, hidden, matrix, labels[..., None], paid, tied=False)

    def dense(hidden, matrix, labels, paid):
        logits = hidden @ matrix
        label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(paid, jax.nn.logsumexp(logits, axis=-1) - label, 0))

    sizes = []
    for f in (ours, dense):
        compiled = jax.jit(jax.grad(f, (0, 1))).lower(hidden, matrix, labels, paid).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[0] <= sizes[1] / 5
    assert sizes[1] >= 4 * tokens * entries


@pytest.mark.slow
def test_many_devices_agree_with_one_and_sum_once():
    found = json.loads(output_of("tests.ops.cross_entropy_mesh_run", devices=8))
    assert len(found) == 20
    for name, of in found.items():
        assert of["difference"] < 2e-5, name
        assert of["largest in a loop"] < of["matrix"] / 8, name
        if not name.startswith("1x1x8"):  # scenes are spread: so is the matrix's gradient summed
            assert of["largest collective"] >= of["matrix"] / 8, name
