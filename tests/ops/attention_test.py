"""Against dense attention in float64 with its gradient written out."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geode_jax.ops import attention as module
from geode_jax.ops import attention_chunked, attention_tpu
from geode_jax.ops.attention import IMPLEMENTATIONS, Intervals, attention, causal, choose, visible
from geode_jax.ops.gpu import use_kernels

B, L, M, H, E = 2, 5, 7, 4, 6


def dense_mask(intervals, keys: int) -> np.ndarray:
    """The contract, key by key."""
    prefix_end, start, end = (np.asarray(x) for x in intervals)
    mask = np.zeros((*start.shape, keys), bool)
    for b, i in np.ndindex(*start.shape):
        for key in range(keys):
            mask[b, i, key] = key < prefix_end[b, i] or start[b, i] <= key < end[b, i]
    return mask


def oracle(q, k, v, mask, g):
    """Output [B, L, H, E] for cotangent g, and the gradients of q, k and v, in float64."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    share = q.shape[2] // k.shape[2]
    keys, values = np.repeat(k, share, axis=2), np.repeat(v, share, axis=2)
    scale = q.shape[-1] ** -0.5
    logits = np.einsum("blhe,bmhe->bhlm", q, keys) * scale
    mask = np.broadcast_to(mask[:, None], logits.shape)
    weights = np.where(mask, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    weights /= np.where(mask.any(-1, keepdims=True), weights.sum(-1, keepdims=True), 1)
    out = np.einsum("bhlm,bmhe->blhe", weights, values)
    d_weights = np.einsum("blhe,bmhe->bhlm", g, values)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    d_q = np.einsum("bhlm,bmhe->blhe", d_logits, keys)
    d_k = np.einsum("bhlm,blhe->bmhe", d_logits, q)
    d_v = np.einsum("bhlm,blhe->bmhe", weights, g)
    grouped = (*k.shape[:3], share, k.shape[3])
    d_k, d_v = (x.reshape(grouped).sum(3) for x in (d_k, d_v))
    return out, (d_q, d_k, d_v)


@functools.partial(jax.jit, static_argnums=0)
def ours(implementation, q, k, v, intervals, g):
    def f(q, k, v):
        return attention(q, k, v, intervals, implementation=implementation)

    out, vjp = jax.vjp(f, q, k, v)
    return out, vjp(g)


@functools.cache
def arrays(kv_heads: int, shape: tuple = (B, L, M, H, E), dtype=np.float32):
    random = np.random.default_rng(kv_heads)
    rows, queries, keys, heads, width = shape
    q, k = (rows, queries, heads, width), (rows, keys, kv_heads, width)
    shapes = q, k, k, q
    return tuple((random.normal(size=shape) * 1.5).astype(dtype) for shape in shapes)


column = st.integers(0, M)
intervals_of_a_batch = st.lists(st.tuples(column, column, column), min_size=B * L, max_size=B * L)


@pytest.fixture
def small_tiles(monkeypatch):
    """Of 128 queries and keys, so that a few hundred are several tiles."""
    monkeypatch.setattr(attention_chunked, "BLOCK", 128)
    monkeypatch.setattr(attention_chunked, "ROWS", 128)
    monkeypatch.setattr(attention_tpu, "ROWS", 256)
    monkeypatch.setattr(attention_tpu, "KEYS", 128)


def few_questions(random, rows: int, queries: int, keys: int) -> Intervals:
    """Runs of queries that see a prefix and, causally, themselves; some see less, or nothing."""
    triples = np.zeros((3, rows, queries), np.int32)
    for i in range(rows):
        cuts = [0, *sorted(random.integers(0, queries, 3)), queries]
        for n, (first, stop) in enumerate(itertools.pairwise(cuts)):
            triples[0, i, first:stop] = random.integers(0, keys // 2) * (n != 1)
            triples[1, i, first:stop] = min(first + keys // 3, keys)
            triples[2, i, first:stop] = np.minimum(keys // 3 + 1 + np.arange(first, stop), keys)
            if n == 2:
                triples[:, i, first:stop] = 0
    return Intervals(*triples)


@pytest.mark.parametrize("implementation", [i for i in IMPLEMENTATIONS if i != "gpu"])
class TestEveryImplementation:
    """What each of them has to satisfy, on whatever platform the tests run."""

    @given(intervals_of_a_batch, st.sampled_from([4, 2, 1]))
    @settings(max_examples=25)
    def test_values_and_gradients_against_the_oracle(self, implementation, rows, kv_heads):
        intervals = Intervals(*np.array(rows, np.int32).reshape(B, L, 3).transpose(2, 0, 1))
        q, k, v, g = arrays(kv_heads)
        mask = dense_mask(intervals, M)
        np.testing.assert_array_equal(visible(intervals, M), mask)
        out, gradients = ours(implementation, q, k, v, intervals, g)
        check(out, gradients, oracle(q, k, v, mask, g), mask, 1e-5)

    # Several tiles, none of them full; the head widths of the two systems.
    @pytest.mark.parametrize(
        ("rows", "queries", "keys", "heads", "kv_heads", "width"),
        [(2, 300, 400, 2, 1, 64), (1, 257, 130, 2, 2, 128)],
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_several_tiles(
        self, implementation, rows, queries, keys, heads, kv_heads, width, dtype, small_tiles
    ):
        intervals = few_questions(np.random.default_rng(queries), rows, queries, keys)
        q, k, v, g = arrays(kv_heads, (rows, queries, keys, heads, width), jnp.dtype(dtype))
        mask = np.asarray(visible(intervals, keys))
        out, gradients = ours(implementation, q, k, v, intervals, g)
        assert {x.dtype for x in (out, *gradients)} == {jnp.dtype(dtype)}
        check(out, gradients, oracle(q, k, v, mask, g), mask, {"float32": 2e-5}.get(dtype, 0.03))

    def test_tiles_that_need_no_mask(self, implementation, small_tiles):
        q, k, v, g = arrays(1, (1, 300, 400, 2, 16))
        seen = Intervals(*(np.full((1, 1), x, np.int32) for x in (0, 3, 399)))
        mask = np.broadcast_to(visible(seen, 400), (1, 300, 400))
        out, gradients = ours(implementation, q, k, v, seen, g)
        check(out, gradients, oracle(q, k, v, mask, g), mask, 2e-5)

    @pytest.mark.parametrize("shared", [(0, 1, 5), (0, 0, 0)])
    def test_one_interval_for_all_queries_of_a_row(self, implementation, shared):
        q, k, v, g = arrays(2)
        short = Intervals(*(np.full((B, 1), x, np.int32) for x in shared))
        long = Intervals(*(np.broadcast_to(x, (B, L)) for x in short))
        results = (ours(implementation, q, k, v, i, g) for i in (short, long))
        for got, want in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_array_equal(got, want)

    def test_rows_without_keys_stay_finite_beside_huge_values(self, implementation):
        q, k, v, g = arrays(2)
        nothing = np.zeros((B, L), np.int32)
        intervals = Intervals(nothing, nothing + M, nothing)
        out, gradients = ours(implementation, q * 1e4, k * 1e4, v, intervals, g)
        assert (np.asarray(out) == 0).all()
        assert all((np.asarray(gradient) == 0).all() for gradient in gradients)

    def test_hidden_keys_may_hold_anything_finite(self, implementation):
        q, k, v, g = arrays(2)
        zero = np.zeros((B, L), np.int32)
        intervals = Intervals(zero + 1, zero + 3, zero + 5)  # keys 0, 3, 4
        out, gradients = ours(implementation, q, k, v, intervals, g)
        hidden = np.array([0, 1, 1, 0, 0, 1, 1], bool)[None, :, None, None]
        k, v = np.where(hidden, 1e6, k), np.where(hidden, -1e6, v)
        changed, changed_gradients = ours(implementation, q, k, v, intervals, g)
        np.testing.assert_array_equal(out, changed)
        for before, after in zip(gradients, changed_gradients, strict=True):
            np.testing.assert_array_equal(before, after)

    def test_queries_in_half_precision_of_keys_in_full(self, implementation):
        q, k, v, _ = arrays(2)
        whole = Intervals(*(np.full((B, 1), x, np.int32) for x in (0, 0, M)))
        out = attention(jnp.asarray(q, jnp.bfloat16), k, v, whole, implementation=implementation)
        assert out.dtype == jnp.bfloat16
        expected, _ = oracle(q, k, v, np.ones((B, L, M), bool), q)
        np.testing.assert_allclose(out.astype(np.float32), expected, atol=0.03)

    def test_logits_beyond_the_range_of_exp(self, implementation):
        q, k, v, g = arrays(4)
        whole = Intervals(*(np.full((B, L), x, np.int32) for x in (0, 0, M)))
        out, gradients = ours(implementation, q * 30, k * 30, v, whole, g)
        expected, _ = oracle(q * 30, k * 30, v, np.ones((B, L, M), bool), g)
        np.testing.assert_allclose(out, expected, atol=1e-3)
        assert all(np.isfinite(gradient).all() for gradient in gradients)

    def test_bfloat16_is_rounded_once_not_at_every_key(self, implementation):
        keys = 600
        random = np.random.default_rng(0)
        q, k, v = (
            jnp.asarray(random.normal(size=(1, n, 2, 8)), jnp.bfloat16) for n in (4, keys, keys)
        )
        whole = Intervals(*(np.full((1, 4), x, np.int32) for x in (0, 0, keys)))
        out = attention(q, k, v, whole, implementation=implementation)
        assert out.dtype == jnp.bfloat16
        expected, _ = oracle(q, k, v, np.ones((1, 4, keys), bool), np.zeros((1, 4, 2, 8)))
        # Values are near 0.05; a sum kept in bfloat16 would lose each weight of 1/600 beside 1.
        np.testing.assert_allclose(out.astype(np.float32), expected, atol=3e-3)


def check(out, gradients, expected, mask, tolerance: float) -> None:
    """Against the oracle, relative to the largest entry; exact where nothing is seen."""
    for name, got, want in zip("oqkv", (out, *gradients), (expected[0], *expected[1]), strict=True):
        scale = max(1.0, np.abs(want).max())
        got = np.asarray(got, np.float64) / scale
        np.testing.assert_allclose(got, want / scale, atol=tolerance, err_msg=name)
    # What sees nothing says nothing, and is told nothing: exactly, not nearly.
    blind, unseen = ~mask.any(-1), ~mask.any(1)
    assert (np.asarray(out)[blind] == 0).all() and (np.asarray(gradients[0])[blind] == 0).all()
    for gradient in gradients[1:]:
        assert (np.asarray(gradient)[unseen] == 0).all()


@pytest.mark.parametrize(("implementation", "growth"), [("dense", 4), ("chunked", 2)])
def test_memory_grows_with(implementation, growth):
    """Of forward and backward, when lengths double; compiled, not run."""

    def temporary(length: int) -> int:
        x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
        row = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = ours.lower(implementation, x, x, x, Intervals(row, row, row), x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ratio = temporary(8192) / temporary(4096)
    assert ratio == pytest.approx(growth, rel=0.15)


def test_the_choice_is_logged_once(caplog):
    queries, keys = 11, 13  # no other test has them
    q = np.ones((1, queries, 2, 4), np.float32)
    k = v = np.ones((1, keys, 2, 4), np.float32)
    whole = Intervals(*(np.full((1, 1), x, np.int32) for x in (0, 0, keys)))
    with caplog.at_level("INFO", logger=module.__name__):
        for _ in range(2):
            attention(q, k, v, whole)
    assert [r.getMessage() for r in caplog.records] == [
        "attention of 11 queries to 13 keys on cpu: dense"
    ]


def test_the_choice_by_platform_and_shape():
    kind, large = (64, jnp.bfloat16), (1024, 1033)
    assert {choose("tpu", 1, 8192, *kind), choose("cpu", 256, 300, *kind)} == {"dense"}
    platforms = {"tpu": "tpu", "gpu": "dense", "cuda": "dense", "cpu": "chunked"}
    assert {p: choose(p, *large, *kind) for p in platforms} == platforms
    with use_kernels(True):
        assert {choose(p, *large, *kind) for p in ("gpu", "cuda")} == {"gpu"}
        assert choose("gpu", 1, 1023, *kind) == choose("gpu", 2, 1024, *kind) == "dense"
        assert choose("gpu", 1, 1024, *kind) == "gpu"
        assert choose("gpu", *large, 80, jnp.bfloat16) == "dense"
        assert choose("gpu", *large, 64, jnp.float32) == "dense"


def test_an_implementation_that_does_not_exist():
    q, k, v, _ = arrays(2)
    whole = Intervals(*(np.full((B, 1), x, np.int32) for x in (0, 0, M)))
    with pytest.raises(ValueError, match="'flash' is none of dense, chunked"):
        attention(q, k, v, whole, implementation="flash")
    with pytest.raises(ValueError, match="no GPU kernel for heads of width 6 in float32"):
        attention(q, k, v, whole, implementation="gpu")


@pytest.mark.parametrize("prefix_end", [0, 2])
def test_causal_rows_padded_on_the_left(prefix_end):
    pad = np.array([0, 3])
    mask = np.asarray(visible(causal(2, 4, start=pad, prefix_end=prefix_end), prefix_end + 4))
    for b in range(2):
        for i in range(4):
            own = {prefix_end + j for j in range(4) if pad[b] <= j <= i}
            assert set(np.flatnonzero(mask[b, i])) == own | set(range(prefix_end))
    plain = np.asarray(visible(causal(1, 4), 4))[0]
    np.testing.assert_array_equal(plain, np.tril(np.ones((4, 4), bool)))
