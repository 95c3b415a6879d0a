"""Scores and their gradients against float64; tiles that are left out; memory; many devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from geode_jax.ops import cross_entropy
from geode_jax.ops.cross_entropy import Scores, scores

REPOSITORY = Path(__file__).resolve().parent.parent.parent
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


def oracle(hidden, matrix, ids, paid, slopes, rest: int) -> tuple:
    """Scores, and the gradients of hidden and matrix, in float64."""
    hidden, matrix = (np.asarray(x, np.float64) for x in (hidden, matrix))
    logits = hidden @ matrix
    lse = logsumexp(logits, axis=-1)
    listed, others = np.zeros(ids.shape), logits.copy()
    for at in np.ndindex(*ids.shape):
        if ids[at] >= 0:
            listed[at] = logits[at[:2]][ids[at]]
            if at[2] >= rest:
                others[at[:2]][ids[at]] = -np.inf
    with np.errstate(divide="ignore"):
        rests = logsumexp(others, axis=-1)
    slope = slopes.lse_ST[..., None] * np.exp(logits - lse[..., None])
    finite = np.where(np.isfinite(rests), rests, 0)[..., None]
    slope += slopes.rest_ST[..., None] * np.exp(others - finite)
    for at in np.ndindex(*ids.shape):
        if ids[at] >= 0:
            slope[at[:2]][ids[at]] += slopes.listed_STk[at]
    slope[~paid] = 0
    gradients = slope @ matrix.T, np.einsum("std,stx->dx", hidden, slope)
    return Scores(listed, lse, rests), gradients


def slopes_like(ids, seed: int = 1) -> Scores:
    random = np.random.default_rng(seed)
    shapes = ids.shape, ids.shape[:2], ids.shape[:2]
    return Scores(*(random.standard_normal(s).astype(np.float32) for s in shapes))


def differentiated(hidden, matrix, ids, paid, slopes, *, tied: bool, rest: int | None = 1):
    """Scores and gradients, compiled anew: the sizes of tiles are no argument."""

    @jax.jit
    def both(hidden, matrix):
        out, vjp = jax.vjp(
            lambda h, m: scores(h, m, ids, paid, tied=tied, rest=rest), hidden, matrix
        )
        return out, vjp(jax.tree.map(lambda s, o: s.astype(o.dtype), slopes, out))

    return both(hidden, matrix.T if tied else matrix)


def compare(case, tied: bool, atol: float = 2e-5) -> None:
    hidden, matrix, ids, paid = case
    slopes = slopes_like(ids)
    want, (dx, dw) = oracle(hidden, matrix, ids, paid, slopes, rest=1)
    got, (our_dx, our_dw) = differentiated(*case, slopes, tied=tied)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a[paid], b[paid], atol=atol)
    np.testing.assert_allclose(our_dx, dx, atol=atol)
    np.testing.assert_allclose(our_dw.T if tied else our_dw, dw, atol=atol)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [128, 2], ids=["one tile", "many tiles"])
def test_scores_and_gradients_are_those_of_all_logits(tied, rows, monkeypatch):
    monkeypatch.setattr(cross_entropy, "TILE_ROWS", rows)
    compare(draw(), tied)


def test_where_all_entries_are_listed_nothing_is_left(monkeypatch):
    ids = np.argsort(np.random.default_rng(3).random((S, T, X)), axis=-1).astype(np.int32)
    ids = np.concatenate([ids[..., :1], ids], axis=-1)  # a label, and all of the vocabulary
    case = draw(ids=ids)
    out, (dx, dw) = differentiated(*case, slopes_like(ids), tied=False)
    assert (np.asarray(out.rest_ST)[case[3]] == -np.inf).all()
    assert np.isfinite(dx).all() and np.isfinite(dw).all()
    compare(case, tied=False)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=S * T, max_size=S * T))
def test_any_tokens_may_be_paid(bits):
    case = draw(paid=np.array(bits).reshape(S, T))
    out, (dx, dw) = _jitted(*case, slopes_like(case[2]))
    want, (want_dx, want_dw) = oracle(*case, slopes_like(case[2]), rest=1)
    np.testing.assert_allclose(out.lse_ST[case[3]], want.lse_ST[case[3]], atol=2e-5)
    np.testing.assert_allclose(dx, want_dx, atol=2e-5)
    np.testing.assert_allclose(dw, want_dw, atol=2e-5)


@jax.jit
def _jitted(hidden, matrix, ids, paid, slopes):
    out, vjp = jax.vjp(lambda h, m: scores(h, m, ids, paid, tied=False, rest=1), hidden, matrix)
    return out, vjp(slopes)


def test_what_nobody_pays_is_not_read():
    hidden, matrix, ids, paid = draw()
    slopes = slopes_like(ids)
    want = _jitted(hidden, matrix, ids, paid, slopes)
    spoiled = np.where(paid[..., None], hidden, np.nan)
    slopes = jax.tree.map(
        lambda s: np.where(paid.reshape(S, T, *[1] * (s.ndim - 2)), s, np.nan), slopes
    )
    got = _jitted(spoiled, matrix, np.where(paid[..., None], ids, 2**30), paid, slopes)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(got[0].lse_ST[paid], want[0].lse_ST[paid])


def test_half_precision_states_are_summed_in_float32():
    hidden, matrix, ids, paid = draw()
    half = jnp.asarray(hidden, jnp.bfloat16)
    rounded = np.asarray(jnp.asarray(matrix, jnp.bfloat16), np.float32)
    slopes = slopes_like(ids)
    got, (dx, dw) = differentiated(half, jnp.asarray(matrix), ids, paid, slopes, tied=False)
    exact = np.asarray(half, np.float32)
    want, (want_dx, want_dw) = oracle(exact, rounded, ids, paid, slopes, rest=1)
    assert got.lse_ST.dtype == got.listed_STk.dtype == dw.dtype == jnp.float32
    assert dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.lse_ST[paid], want.lse_ST[paid], atol=2e-5)
    np.testing.assert_allclose(dw, want_dw, atol=0.02 * np.abs(want_dw).max())
    np.testing.assert_allclose(dx.astype(np.float32), want_dx, atol=0.02 * np.abs(want_dx).max())


def flops_of(paid: np.ndarray) -> int:
    """Matrix products that run, counted as they run."""
    seen = []
    logits = cross_entropy._logits

    def counted(how, x, matrix, mask):
        jax.debug.callback(lambda: seen.append(1))
        return logits(how, x, matrix, mask)

    cross_entropy._logits = counted
    try:
        case = draw(paid=paid)
        jax.block_until_ready(differentiated(*case, slopes_like(case[2]), tied=False))
        jax.effects_barrier()
    finally:
        cross_entropy._logits = logits
    return len(seen)


def test_tiles_that_nobody_pays_are_left_out(monkeypatch):
    monkeypatch.setattr(cross_entropy, "TILE_ROWS", 2)  # tiles of two tokens of each scene
    assert flops_of(np.ones((S, T), bool)) == 2 * 6
    assert flops_of(np.zeros((S, T), bool)) == 0
    one = np.zeros((S, T), bool)
    one[0, [1, 5, 9]] = True  # three tokens of one scene: two tiles, forward and backward
    assert flops_of(one) == 2 * 2


def test_memory_is_that_of_a_tile():
    """4,096 answer tokens and 32,000 entries, compiled and not run."""
    tokens, entries, width = 4096, 32_000, 64
    shape = jax.ShapeDtypeStruct
    hidden, matrix = shape((1, tokens, width), jnp.float32), shape((width, entries), jnp.float32)
    labels, paid = shape((1, tokens), jnp.int32), shape((1, tokens), jnp.bool_)

    def ours(hidden, matrix, labels, paid):
        listed, lse, _ = scores(hidden, matrix, labels[..., None], paid, tied=False)
        return jnp.sum(jnp.where(paid, lse - listed[..., 0], 0))

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
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.cross_entropy_mesh_run"],
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PJRT_NPROC": "16",  # collectives wait for each other: a thread for each device
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        },
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 20
    for name, of in found.items():
        assert of["difference"] < 2e-5, name
        assert of["largest in a loop"] < of["matrix"] / 8, name
        if not name.startswith("1x1x8"):  # scenes are spread: so is the matrix's gradient summed
            assert of["largest collective"] >= of["matrix"] / 8, name
