"""The kernels for Hopper as far as they can be proven without one.

Their arithmetic by a simulator of the tiles; all of them, with a watch for races, in jax's
interpreter, where it has one; and that they lower for CUDA.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from geode_jax.ops import attention_gpu as gpu
from geode_jax.ops.attention import Intervals, attention, visible
from geode_jax.ops.attention_plan import by_tile, per_query, tile_classes
from tests.ops.attention_test import check, few_questions, oracle

SCALE = gpu.LOG2_E


def pairs(visits: gpu.Visits, at: int, columns: int):
    """(column, whether a mask is needed) of what a row of tiles visits."""
    n, interior = int(visits.some[at]), int(visits.interior[at])
    columns = np.asarray(visits.column)[at * columns :][:n]
    return [(int(j), t >= interior) for t, j in enumerate(columns)]


def simulate(q, k, v, intervals, g):
    """What the kernels do, tile after tile, of one head: q, g [B, L, E], k, v [B, M, E]."""
    T, (B, L, E), M = gpu.TILE, q.shape, k.shape[1]
    intervals = per_query(intervals, (B, L), M)
    rows = [x.reshape(B, -1) for x in by_tile(intervals, T)]
    classes = tile_classes(intervals, M, T, T)
    q, k, v, g = (np.pad(x, ((0, 0), (0, -x.shape[1] % T), (0, 0))) for x in (q, k, v, g))
    by_query, by_key = gpu.visits(classes), gpu.visits(classes.swapaxes(1, 2))
    query_tiles, columns = classes.shape[1:]
    out, lse = np.zeros_like(q), np.zeros(q.shape[:2], np.float32)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)

    def logits(b, i, j, masked):
        s = jnp.asarray(q[b, i] @ k[b, j].T) * (E**-0.5 * SCALE)
        key = np.arange(j.start, j.stop)[None] + np.zeros(s.shape, np.int32)
        return gpu.hide(s, key, Intervals(*(x[b, i] for x in rows)), 0) if masked else s

    def tile(i):
        return slice(i * T, (i + 1) * T)

    for b, n in np.ndindex(B, query_tiles):
        i, peak, total = tile(n), np.full(T, gpu.MASKED, np.float32), np.zeros(T, np.float32)
        sums = np.zeros((T, E), np.float32)
        for j, masked in pairs(by_query, b * query_tiles + n, columns):
            s = logits(b, i, tile(j), masked)
            weights, decay, peak, total = gpu.online_softmax(s, peak, total)
            sums = sums * decay[:, None] + weights @ v[b, tile(j)]
        out[b, i], lse[b, i] = gpu.finish(sums, peak, total)
    delta = (out * g).sum(-1)
    for b, n in np.ndindex(B, query_tiles):
        i = tile(n)
        for j, masked in pairs(by_query, b * query_tiles + n, columns):
            s, of_weights = logits(b, i, tile(j), masked), g[b, i] @ v[b, tile(j)].T
            _, slopes = gpu.weights_and_slopes(s, of_weights, lse[b, i], delta[b, i], 0)
            dq[b, i] += slopes @ k[b, tile(j)] * E**-0.5
    for b, n in np.ndindex(B, columns):
        j = tile(n)
        for m, masked in pairs(by_key, b * columns + n, query_tiles):
            i = tile(m)
            s, of_weights = logits(b, i, j, masked).T, v[b, j] @ g[b, i].T
            weights, slopes = gpu.weights_and_slopes(s, of_weights, lse[b, i], delta[b, i], 1)
            dv[b, j] += weights @ g[b, i]
            dk[b, j] += slopes @ q[b, i] * E**-0.5
    return out[:, :L], (dq[:, :L], dk[:, :M], dv[:, :M])


B, L, M, E = 2, 11, 13, 6
column = st.integers(0, M)
rows = st.lists(st.tuples(column, column, column), min_size=B * 3, max_size=B * 3).map(
    lambda few: [few[3 * b + min(2, i // 4)] for b in range(B) for i in range(L)]
)


@given(rows)
@settings(max_examples=15)
def test_the_arithmetic_of_the_tiles(triples):
    intervals = Intervals(*np.array(triples, np.int32).reshape(B, L, 3).transpose(2, 0, 1))
    random = np.random.default_rng(0)
    q, k, v, g = (random.normal(size=(B, n, E)).astype(np.float32) for n in (L, M, M, L))
    mask = np.asarray(visible(intervals, M))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "TILE", 4)
        out, gradients = simulate(q, k, v, intervals, g)
    want, wanted = oracle(*(x[:, :, None] for x in (q, k, v)), mask, g[:, :, None])
    expected = want[:, :, 0], tuple(x[:, :, 0] for x in wanted)
    check(out, gradients, expected, mask, 1e-5)


def arrays(rows, queries, keys, heads, kv_heads, width):
    random = np.random.default_rng(0)
    shapes = [(rows, n, h, width) for n, h in ((queries, heads), (keys, kv_heads))]
    q, g = (jnp.asarray(random.normal(size=shapes[0]), jnp.bfloat16) for _ in range(2))
    k, v = (jnp.asarray(random.normal(size=shapes[1]), jnp.bfloat16) for _ in range(2))
    return q, k, v, g


def both(q, k, v, intervals, g):
    """Output and gradients by the kernels."""

    def f(q, k, v):
        return attention(q, k, v, intervals, implementation="gpu")

    out, vjp = jax.vjp(f, q, k, v)
    return out, vjp(g)


def matmul_add(sums, a, b):
    """For the interpreter, which knows no product whose left side is in registers.

    It reads shared memory as no matrix instruction does, and has to be fenced off from the next
    copy into it.
    """
    sums = sums + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    plgpu.commit_smem()
    return sums


ONE = (3, 1, 600, 6, 2, 64)
"""Of a step of decoding: 5 tiles of keys; rows that see two runs of keys, few, and none."""
OF_ONE = Intervals(*np.array([[[300], [0], [0]], [[320], [70], [5]], [[580], [90], [5]]], np.int32))


def dense_forward(q, k, v, rows, classes):
    """What `gpu.forward_tiles` computes."""
    share = q.shape[2] // k.shape[2]
    q, k, v = (np.asarray(x, np.float32) for x in (q, k, v))
    s = np.einsum("blhe,bmhe->bhlm", q, np.repeat(k, share, 2)) * (q.shape[-1] ** -0.5 * SCALE)
    of_tile = np.asarray(classes).repeat(gpu.TILE, 1).repeat(gpu.TILE, 2) != gpu.SKIP
    mask = (np.asarray(visible(rows, k.shape[1])) & of_tile)[:, None]
    weights = np.where(mask, np.exp2(s), 0)
    total = weights.sum(-1)
    count = np.where(total > 0, total, 1)
    out = np.einsum("bhlm,bmhe->blhe", weights / count[..., None], np.repeat(v, share, 2))
    return jnp.asarray(out), jnp.asarray(np.log2(count))


@pytest.mark.parametrize("parts", [1, 2, 3, 16])
def test_the_keys_of_a_single_query_in_parts(parts, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "forward_tiles", dense_forward)
    q, k, v, g = (x.astype(jnp.float32) for x in arrays(*ONE))
    mask = np.asarray(visible(OF_ONE, ONE[2]))
    out, lse = gpu.forward(q, k, v, OF_ONE)
    want, _ = oracle(q, k, v, mask, g)
    np.testing.assert_allclose(out, want, atol=1e-5)
    s = np.einsum("blhe,bmhe->bhlm", q, np.repeat(k, 3, 2)) / 8
    total = np.where(mask[:, None], np.exp(s.astype(np.float64)), 0).sum(-1)
    total[2] = 1  # blind
    assert lse.shape == (3, 6, gpu.TILE)
    np.testing.assert_allclose(lse[..., 0], np.log2(total)[..., 0], atol=1e-5)


@pytest.mark.skipif(not hasattr(plgpu, "force_gpu_interpret_mode"), reason="jax is too old")
def test_a_single_query_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(gpu, "matmul_add", matmul_add)
    monkeypatch.setattr(gpu, "PARTS", 2)
    q, k, v, g = arrays(*ONE)
    mask = np.asarray(visible(OF_ONE, ONE[2]))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        out = attention(q, k, v, OF_ONE, implementation="gpu")
    np.testing.assert_allclose(out, oracle(q, k, v, mask, g)[0], atol=0.03)


@pytest.mark.skipif(not hasattr(plgpu, "force_gpu_interpret_mode"), reason="jax is too old")
@pytest.mark.parametrize("shape", [(1, 200, 300, 2, 1, 64), (1, 130, 260, 1, 1, 128)])
def test_the_kernels_in_the_interpreter(shape, monkeypatch):
    monkeypatch.setattr(gpu, "matmul_add", matmul_add)
    intervals = few_questions(np.random.default_rng(0), *shape[:3])
    intervals = intervals._replace(
        prefix_end=np.where(np.arange(shape[1]) < 128, shape[2], 0)[None]
    )
    q, k, v, g = arrays(*shape)
    mask = np.asarray(visible(intervals, shape[2]))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        out, gradients = both(q, k, v, intervals, g)
    assert {x.dtype for x in (out, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    check(out, gradients, oracle(q, k, v, mask, g), mask, 0.03)


@pytest.mark.parametrize("shape", [(2, 1000, 1033, 4, 4, 128), (1, 300, 700, 6, 2, 64)])
def test_the_kernels_lower_for_cuda(shape):
    q, k, v, g = jax.eval_shape(lambda: arrays(*shape))
    row = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    traced = jax.jit(both).trace(q, k, v, Intervals(row, row, row), g)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 3


def test_a_single_query_lowers_for_cuda():
    q, k, v, _ = jax.eval_shape(lambda: arrays(1, 1, 4096, 12, 2, 128))
    row = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def f(*args):
        return attention(*args, implementation="gpu")

    traced = jax.jit(f).trace(q, k, v, Intervals(row, row, row))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
