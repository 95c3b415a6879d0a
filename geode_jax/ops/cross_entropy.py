"""What cross-entropy and distillation read of a vocabulary's logits, without all of the logits.

Both need of a token's logits z, one for each of X entries, only

    listed[k] = z[id_k]      lse = log sum exp z      rest = log sum exp of z without the listed

whose gradient in z is, for cotangents a, b, c: b softmax(z) + c softmax(z without the listed), and
a[k] added at id_k. So logits exist for a tile of tokens at a time, forward and again backward, as
in "Cut Your Losses" [2411.09009] but with the whole vocabulary in a tile. Tokens that nobody pays
come last, and tiles of none but such are not computed. Sums run in float32, whatever the logits are
made of.

On many devices each works on its own scenes, and on its own part of the vocabulary where that is
spread: of each token it tells the others the three numbers. The matrix is gathered, and its
gradient summed over the devices, once for all tiles.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from geode_jax import sharding
from geode_jax.shapes import Array

TILE_BYTES = 2**28
"""Of a tile's logits."""

TILE_ROWS = 512
"""At least so many tokens in a tile, where there are so many: the matrix's gradient is read and
written once a tile."""

PARTS = 8
"""At least so many tiles where rows allow it, so that padding can be left out."""


RECOMPUTED = "recomputed"
"""Named scope of what the backward pass computes a second time; see `flops.model_flops`."""


class Scores(NamedTuple):
    """Of each token; anything where nobody pays."""

    listed_STk: Array  # logits of the listed ids
    lse_ST: Array
    rest_ST: Array | None  # without the listed; -inf where they are all there are


def scores(
    hidden_STD: Array,
    matrix: Array,
    ids_STk: Array,
    paid_ST: Array,
    *,
    tied: bool,
    rest: int | None = None,
) -> Scores:
    """See the module's docstring.

    Args:
        hidden_STD: normed states of the T answer tokens of S scenes.
        matrix: of the language-model head, [D, X], or the embedding [X, D] where `tied`.
        ids_STk: int; a negative one is padding: its score is 0, whatever the state.
        paid_ST: bool, which tokens are read at all.
        tied: see `matrix`.
        rest: `Scores.rest_ST` is of all but the ids from this one on; None: not wanted.
    """
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1 or mesh.manual_axes
    spread = _Spread() if alone else _spread(mesh, hidden_STD.shape, matrix.shape, tied)
    how = _How(tied, rest, None if alone else mesh, spread)
    return _scores(how, hidden_STD, matrix, ids_STk, paid_ST)


class _Spread(NamedTuple):
    """Static: how scenes and vocabulary lie on a mesh."""

    rows: PartitionSpec = PartitionSpec()  # of arrays [S, ...]
    matrix: PartitionSpec = PartitionSpec()
    gradient: PartitionSpec = PartitionSpec()  # of the matrix
    vocabulary: str | None = None  # mesh axis
    scatter: int | None = None  # axis of the gradient that fsdp divides as it sums
    sums: tuple[str, ...] = ()  # other mesh axes over which it is summed


class _How(NamedTuple):
    """Static arguments, see `scores`."""

    tied: bool
    rest: int | None
    mesh: jax.sharding.AbstractMesh | None
    spread: _Spread


def _spread(mesh, hidden: tuple[int, ...], matrix: tuple[int, ...], tied: bool) -> _Spread:
    names = ("vocab", "embed") if tied else ("embed", "vocab")
    own = sharding.spec(names, matrix, mesh.shape)
    (rows,) = sharding.spec(("batch",), hidden[:1], mesh.shape)
    gathered = [None if name == "embed" else part for name, part in zip(names, own, strict=True)]
    over = () if rows is None else sharding.RULES["batch"]
    summed = tuple(axis for axis in over if mesh.shape[axis] > 1)
    embed = names.index("embed")
    scatter = embed if own[embed] is not None and "fsdp" in summed else None
    return _Spread(
        rows=PartitionSpec(rows),
        matrix=PartitionSpec(*gathered),
        gradient=PartitionSpec(*gathered) if scatter is None else own,
        vocabulary="model" if own[1 - embed] is not None else None,
        scatter=scatter,
        sums=tuple(axis for axis in summed if scatter is None or axis != "fsdp"),
    )


# The derivative is of the whole, outside of `shard_map`, as in `ops.attention`.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(how: _How, hidden, matrix, ids, paid) -> Scores:
    return _forward(how, hidden, matrix, ids, paid)[0]


def _forward(how: _How, hidden, matrix, ids, paid):
    function, rows = functools.partial(_own_scores, how), how.spread.rows
    if how.mesh is not None:
        function = jax.shard_map(
            function,
            mesh=how.mesh,
            in_specs=(rows, how.spread.matrix, rows, rows),
            out_specs=rows,
            check_vma=False,
        )
    out = function(hidden, matrix.astype(hidden.dtype), ids, paid)
    return out, (hidden, matrix, ids, paid, out)


def _backward(how: _How, saved, slopes: Scores):
    hidden, matrix, ids, paid, out = saved
    function, rows = functools.partial(_own_gradients, how), how.spread.rows
    if how.mesh is not None:
        function = jax.shard_map(
            function,
            mesh=how.mesh,
            in_specs=(rows, how.spread.matrix, rows, rows, rows, rows),
            out_specs=(rows, how.spread.gradient),
            check_vma=False,
        )
    dx, dw = function(hidden, matrix.astype(hidden.dtype), ids, paid, out, slopes)
    return dx, dw.astype(matrix.dtype), None, None


_scores.defvjp(_forward, _backward)


# --- On each device: its scenes, its part of the vocabulary ---------------------------------------


class _Tiles:
    """Tokens of [S, T, ...] in tiles [n, S, t, ...], those that are paid first."""

    def __init__(self, paid_ST: Array, vocabulary: int):
        S, T = paid_ST.shape
        most = max(TILE_ROWS, TILE_BYTES // (4 * vocabulary)) // S
        parts = max(-(-T // PARTS), -(-TILE_ROWS // S))
        self.size = max(1, min(most, parts, T))
        self.tiles = -(-T // self.size)
        self.order_ST = jnp.argsort(~paid_ST, axis=1, stable=True)

    def split(self, x_ST: Array) -> jax.Array:
        """[S, T, ...] -> [n, S, t, ...]; zeros at the end."""
        order = self.order_ST.reshape(*self.order_ST.shape, *(1,) * (x_ST.ndim - 2))
        x = jnp.take_along_axis(x_ST, order, axis=1)
        S, T, *rest = x.shape
        x = jnp.pad(x, [(0, 0), (0, self.tiles * self.size - T), *((0, 0),) * len(rest)])
        return jnp.moveaxis(x.reshape(S, self.tiles, self.size, *rest), 1, 0)

    def join(self, x_nSt: Array) -> jax.Array:
        """The inverse of `split`."""
        x = jnp.moveaxis(x_nSt, 0, 1)
        S, T = self.order_ST.shape
        x = x.reshape(S, -1, *x.shape[3:])[:, :T]
        place = jnp.argsort(self.order_ST, axis=1).reshape(S, T, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, place, axis=1)

    def run(self, compute, carry, paid_ST: Array, *arrays):
        """`carry, out = compute(carry, paid, *arrays)` for each tile that anybody pays.

        Returns:
            The last carry, and the results in the order of the tokens; zeros of the other tiles.
        """

        def tile(carry, parts):
            shapes = jax.eval_shape(compute, carry, *parts)[1]
            none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return jax.lax.cond(
                jnp.any(parts[0]),
                lambda: compute(carry, *parts),
                lambda: (carry, none),
            )

        if self.tiles == 1:  # in a plain program XLA need not make the logits again
            return compute(carry, paid_ST, *arrays)
        carry, out = jax.lax.scan(tile, carry, jax.tree.map(self.split, (paid_ST, *arrays)))
        return carry, jax.tree.map(self.join, out)


def _logits(how: _How, x_StD: Array, matrix: Array, paid_St: Array) -> jax.Array:
    """[S, t, X] in float32; of zeros where nobody pays, whatever stands there."""
    x = jnp.where(paid_St[..., None], x_StD, 0)
    form = "std,xd->stx" if how.tied else "std,dx->stx"
    return jnp.einsum(form, x, matrix, preferred_element_type=jnp.float32)


def _places(how: _How, ids_Stk: Array, entries: int) -> jax.Array:
    """Where the ids stand in a device's own part of the vocabulary; `entries`: nowhere."""
    first = 0
    if how.spread.vocabulary:
        first = jax.lax.axis_index(how.spread.vocabulary) * entries
    place = ids_Stk - first
    return jnp.where((ids_Stk >= 0) & (place >= 0) & (place < entries), place, entries)


def _without(logits: Array, place_Stk: Array) -> jax.Array:
    """The logits, -inf at the places."""
    return jnp.put_along_axis(logits, place_Stk, -jnp.inf, -1, inplace=False, mode="drop")


def _added(slope: Array, place_Stk: Array, listed_Stk: Array) -> jax.Array:
    """Slopes [S, t, X] and those of the listed entries, at their places."""
    # The first, in most losses the only one, by comparing: a scatter would be a pass of its own.
    is_first = place_Stk[..., :1] == jnp.arange(slope.shape[-1])
    slope += jnp.where(is_first, listed_Stk[..., :1], 0.0)
    S, t, k = place_Stk.shape
    if k == 1:
        return slope
    at = jnp.arange(S)[:, None, None], jnp.arange(t)[:, None], place_Stk[..., 1:]
    return slope.at[at].add(listed_Stk[..., 1:], mode="drop")


def _sum_exp(how: _How, logits: Array) -> jax.Array:
    """log sum exp [S, t] over the whole vocabulary; -inf where all are."""
    axis = how.spread.vocabulary
    peak = jnp.max(logits, axis=-1)
    peak = jax.lax.pmax(peak, axis) if axis else peak
    peak = jnp.where(peak > -jnp.inf, peak, 0.0)
    total = jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1)
    return peak + jnp.log(jax.lax.psum(total, axis) if axis else total)


def _own_scores(how: _How, hidden, matrix, ids, paid) -> Scores:
    entries = matrix.shape[0 if how.tied else 1]
    tiles = _Tiles(paid, entries)

    def compute(_, paid, x, ids):
        logits, place = _logits(how, x, matrix, paid), _places(how, ids, entries)
        listed = jnp.take_along_axis(logits, jnp.minimum(place, entries - 1), axis=-1)
        listed = jnp.where(place < entries, listed, 0.0)
        if how.spread.vocabulary:
            listed = jax.lax.psum(listed, how.spread.vocabulary)
        lse, rest = _sum_exp(how, logits), None
        if how.rest is not None:
            rest = _sum_exp(how, _without(logits, place[..., how.rest :]))
        return None, Scores(listed, lse, rest)

    return tiles.run(compute, None, paid, hidden, ids)[1]


def _own_gradients(how: _How, hidden, matrix, ids, paid, out: Scores, slopes: Scores):
    entries = matrix.shape[0 if how.tied else 1]
    tiles = _Tiles(paid, entries)

    def compute(dw, paid, x, ids, out, slopes):
        with jax.named_scope(RECOMPUTED):
            logits = _logits(how, x, matrix, paid)
        place = _places(how, ids, entries)
        lse = jnp.where(paid, slopes.lse_ST, 0.0)[..., None]
        slope = lse * jnp.exp(logits - out.lse_ST[..., None])
        if how.rest is not None:
            some = paid & (out.rest_ST > -jnp.inf)
            rest = jnp.where(some, slopes.rest_ST, 0.0)[..., None]
            others = _without(logits, place[..., how.rest :])
            slope += rest * jnp.exp(others - jnp.where(some, out.rest_ST, 0.0)[..., None])
        listed = jnp.where(paid[..., None], slopes.listed_STk, 0.0)
        slope = _added(slope, place, listed).astype(x.dtype)
        x = jnp.where(paid[..., None], x, 0)
        forms = ("stx,xd->std", "stx,std->xd") if how.tied else ("stx,dx->std", "stx,std->dx")
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        return dw + product(forms[1], slope, x), product(forms[0], slope, matrix)

    zero = jnp.zeros(matrix.shape, jnp.float32)
    dw, dx = tiles.run(compute, zero, paid, hidden, ids, out, slopes)
    spread = how.spread
    if spread.vocabulary:
        dx = jax.lax.psum(dx, spread.vocabulary)
    if spread.scatter is not None:
        dw = jax.lax.psum_scatter(dw, "fsdp", scatter_dimension=spread.scatter, tiled=True)
    dw = jax.lax.psum(dw, spread.sums) if spread.sums else dw
    return dx.astype(hidden.dtype), dw
