"""Losses that read a few numbers of a vocabulary's logits, without all of the logits.

Cross-entropy and distillation need of a token's logits z, one for each of X entries, only

    listed[k] = z[id_k]      lse = log sum exp z      rest = log sum exp of z without the listed

so a loss of tokens is a function of those, and its gradient in z is, for its derivatives a, b, c:
b softmax(z) + c softmax(z without the listed), and a[k] added at id_k. Logits exist for a tile of
tokens at a time, as in "Cut Your Losses" [2411.09009] but with the whole vocabulary in a tile, and
no tile is computed twice: since the sum of a loss is one number, the gradients of states and matrix
are made beside it, as in Liger [2410.10989], and the backward pass only scales them. Tokens that
nobody pays come last, and tiles of none but such are not computed. Sums run in float32, whatever
the logits are made of.

On many devices each works on its own scenes, and on its own part of the vocabulary where that is
spread: of each token it tells the others the three numbers. The matrix is gathered, and its
gradient summed over the devices, once for all tiles.
"""

import functools
from collections.abc import Callable
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


class Scores(NamedTuple):
    """Of n tokens; of logits 0 where nobody pays."""

    listed_nk: Array  # logits of the listed ids
    lse_n: Array
    rest_n: Array | None  # without the listed; -inf where they are all there are


def token_loss(
    loss: Callable[..., Array],
    hidden_STD: Array,
    matrix: Array,
    ids_STk: Array,
    paid_ST: Array,
    *targets_ST: Array,
    tied: bool,
    rest: int | None = None,
) -> jax.Array:
    """The sum, float32, of a loss over all paid tokens; see the module's docstring.

    Args:
        loss: `loss(scores, paid, *targets)`, the sum over n tokens, to which those that are not
            paid add nothing.
        hidden_STD: normed states of the T answer tokens of S scenes.
        matrix: of the language-model head, [D, X], or the embedding [X, D] where `tied`.
        ids_STk: int; a negative one is padding: its score is 0, whatever the state.
        paid_ST: bool, which tokens are read at all.
        *targets_ST: what else the loss reads, [S, T, ...]; it has no gradient in them.
        tied: see `matrix`.
        rest: `Scores.rest_n` is of all but the ids from this one on; None: not wanted.
    """
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1 or mesh.manual_axes
    spread = _Spread() if alone else _spread(mesh, hidden_STD.shape, matrix.shape, tied)
    how = _How(loss, tied, rest, None if alone else mesh, spread)
    return _token_loss(how, hidden_STD, matrix, ids_STk, paid_ST, targets_ST)


class _Spread(NamedTuple):
    """Static: how scenes and vocabulary lie on a mesh."""

    rows: PartitionSpec = PartitionSpec()  # of arrays [S, ...]
    over: tuple[str, ...] = ()  # mesh axes that divide the rows
    matrix: PartitionSpec = PartitionSpec()
    gradient: PartitionSpec = PartitionSpec()  # of the matrix
    vocabulary: str | None = None  # mesh axis
    scatter: int | None = None  # axis of the gradient that fsdp divides as it sums


class _How(NamedTuple):
    """Static arguments, see `token_loss`."""

    loss: Callable[..., Array]
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
    over = tuple(axis for axis in over if mesh.shape[axis] > 1)
    embed = names.index("embed")
    scatter = embed if own[embed] is not None and "fsdp" in over else None
    return _Spread(
        rows=PartitionSpec(rows),
        over=over,
        matrix=PartitionSpec(*gathered),
        gradient=PartitionSpec(*gathered) if scatter is None else own,
        vocabulary="model" if own[1 - embed] is not None else None,
        scatter=scatter,
    )


# The derivative is of the whole, outside of `shard_map`, as in `ops.attention`.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_loss(how: _How, hidden, matrix, ids, paid, targets) -> jax.Array:
    return _on_devices(_own_loss, how, PartitionSpec(), hidden, matrix, ids, paid, targets)


def _forward(how: _How, hidden, matrix, ids, paid, targets):
    specs = PartitionSpec(), (how.spread.rows, how.spread.gradient)
    value, (dx, dw) = _on_devices(_own_gradients, how, specs, hidden, matrix, ids, paid, targets)
    return value, (dx, dw.astype(matrix.dtype))


def _backward(how: _How, gradients, slope):
    dx, dw = ((slope * x).astype(x.dtype) for x in gradients)
    return dx, dw, None, None, None


_token_loss.defvjp(_forward, _backward)


def _on_devices(function, how: _How, out_specs, hidden, matrix, *of_tokens):
    """`function(how, ...)` of each device's scenes."""
    function, rows = functools.partial(function, how), how.spread.rows
    if how.mesh is not None:
        function = jax.shard_map(
            function,
            mesh=how.mesh,
            in_specs=(rows, how.spread.matrix, rows, rows, rows),
            out_specs=out_specs,
            check_vma=False,
        )
    return function(hidden, matrix.astype(hidden.dtype), *of_tokens)


# --- On each device: its scenes, its part of the vocabulary ---------------------------------------


class _Tiles:
    """Tokens of [S, T, ...] in tiles, those of each scene that are paid first.

    A tile's tokens are one axis n: for the matrix's gradient, which sums over them, XLA's CPU
    compiler would else write the slopes a second time, transposed.
    """

    def __init__(self, paid_ST: Array, vocabulary: int):
        S, T = paid_ST.shape
        most = max(TILE_ROWS, TILE_BYTES // (4 * vocabulary)) // S
        parts = max(-(-T // PARTS), -(-TILE_ROWS // S))
        self.size = max(1, min(most, parts, T))  # of a scene's tokens
        self.tiles = -(-T // self.size)
        self.order_ST = jnp.argsort(~paid_ST, axis=1, stable=True)

    def split(self, x_ST: Array) -> jax.Array:
        """[S, T, ...] -> [tiles, n, ...]; zeros at the end."""
        order = self.order_ST.reshape(*self.order_ST.shape, *(1,) * (x_ST.ndim - 2))
        x = jnp.take_along_axis(x_ST, order, axis=1)
        S, T, *rest = x.shape
        x = jnp.pad(x, [(0, 0), (0, self.tiles * self.size - T), *((0, 0),) * len(rest)])
        x = jnp.moveaxis(x.reshape(S, self.tiles, self.size, *rest), 1, 0)
        return x.reshape(self.tiles, S * self.size, *rest)

    def join(self, x: Array) -> jax.Array:
        """The inverse of `split`."""
        S, T = self.order_ST.shape
        x = x.reshape(self.tiles, S, self.size, *x.shape[2:])
        x = jnp.moveaxis(x, 0, 1).reshape(S, -1, *x.shape[3:])[:, :T]
        place = jnp.argsort(self.order_ST, axis=1).reshape(S, T, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, place, axis=1)

    def run(self, compute, carry, paid_ST: Array, *arrays):
        """`carry, out = compute(carry, paid_n, *arrays_n)` for each tile that anybody pays.

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

        S, T = paid_ST.shape
        if self.tiles == 1:  # nothing to sort
            flat = jax.tree.map(lambda x: x.reshape(S * T, *x.shape[2:]), (paid_ST, *arrays))
            carry, out = compute(carry, *flat)
            return carry, jax.tree.map(lambda x: x.reshape(S, T, *x.shape[1:]), out)
        carry, out = jax.lax.scan(tile, carry, jax.tree.map(self.split, (paid_ST, *arrays)))
        return carry, jax.tree.map(self.join, out)


def _logits(how: _How, x_nD: Array, matrix: Array) -> jax.Array:
    """[n, X] in float32."""
    form = "nd,xd->nx" if how.tied else "nd,dx->nx"
    return jnp.einsum(form, x_nD, matrix, preferred_element_type=jnp.float32)


def _places(how: _How, ids_nk: Array, entries: int) -> jax.Array:
    """Where the ids stand in a device's own part of the vocabulary; `entries`: nowhere."""
    first = 0
    if how.spread.vocabulary:
        first = jax.lax.axis_index(how.spread.vocabulary) * entries
    place = ids_nk - first
    return jnp.where((ids_nk >= 0) & (place >= 0) & (place < entries), place, entries)


def _without(logits: Array, place_nk: Array) -> jax.Array:
    """The logits, -inf at the places."""
    return jnp.put_along_axis(logits, place_nk, -jnp.inf, -1, inplace=False, mode="drop")


def _added(slope: Array, place_nk: Array, listed_nk: Array) -> jax.Array:
    """Slopes [n, X] and those of the listed entries, at their places."""
    # The first, in most losses the only one, by comparing: a scatter would be a pass of its own.
    is_first = place_nk[:, :1] == jnp.arange(slope.shape[1])
    slope += jnp.where(is_first, listed_nk[:, :1], 0.0)
    n, k = place_nk.shape
    if k == 1:
        return slope
    return slope.at[jnp.arange(n)[:, None], place_nk[:, 1:]].add(listed_nk[:, 1:], mode="drop")


def _sum_exp(how: _How, logits: Array) -> jax.Array:
    """log sum exp [n] over the whole vocabulary; -inf where all are."""
    axis = how.spread.vocabulary
    peak = jnp.max(logits, axis=-1)
    peak = jax.lax.pmax(peak, axis) if axis else peak
    peak = jnp.where(peak > -jnp.inf, peak, 0.0)
    total = jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1)
    return peak + jnp.log(jax.lax.psum(total, axis) if axis else total)


def _scores(how: _How, logits: Array, place_nk: Array) -> Scores:
    """Of the whole vocabulary."""
    entries, axis = logits.shape[-1], how.spread.vocabulary
    listed = jnp.take_along_axis(logits, jnp.minimum(place_nk, entries - 1), axis=-1)
    listed = jnp.where(place_nk < entries, listed, 0.0)
    listed = jax.lax.psum(listed, axis) if axis else listed
    rest = None
    if how.rest is not None:
        rest = _sum_exp(how, _without(logits, place_nk[:, how.rest :]))
    return Scores(listed, _sum_exp(how, logits), rest)


def _slope(how: _How, logits: Array, place_nk: Array, scores: Scores, slopes: Scores) -> jax.Array:
    """The gradient of the logits [n, X] for those of the scores."""
    slope = slopes.lse_n[:, None] * jnp.exp(logits - scores.lse_n[:, None])
    if how.rest is not None:
        some = scores.rest_n > -jnp.inf
        of_rest = jnp.where(some, slopes.rest_n, 0.0)[:, None]
        others = _without(logits, place_nk[:, how.rest :])
        slope += of_rest * jnp.exp(others - jnp.where(some, scores.rest_n, 0.0)[:, None])
    return _added(slope, place_nk, slopes.listed_nk)


def _own_loss(how: _How, hidden, matrix, ids, paid, targets) -> jax.Array:
    entries = matrix.shape[0 if how.tied else 1]
    hidden = jnp.where(paid[..., None], hidden, 0)  # whatever stands there

    def compute(total, paid, x, ids, targets):
        logits, place = _logits(how, x, matrix), _places(how, ids, entries)
        return total + how.loss(_scores(how, logits, place), paid, *targets), None

    tiles = _Tiles(paid, entries)
    total, _ = tiles.run(compute, jnp.zeros(()), paid, hidden, ids, targets)
    return jax.lax.psum(total, how.spread.over) if how.spread.over else total


def _own_gradients(how: _How, hidden, matrix, ids, paid, targets):
    entries = matrix.shape[0 if how.tied else 1]
    forms = ("nx,xd->nd", "nx,nd->xd") if how.tied else ("nx,dx->nd", "nx,nd->dx")
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    hidden = jnp.where(paid[..., None], hidden, 0)

    def compute(carry, paid, x, ids, targets):
        total, dw = carry
        logits, place = _logits(how, x, matrix), _places(how, ids, entries)
        scores = _scores(how, logits, place)
        value, slopes = jax.value_and_grad(how.loss)(scores, paid, *targets)
        slope = _slope(how, logits, place, scores, slopes).astype(x.dtype)
        return (total + value, dw + product(forms[1], slope, x)), product(forms[0], slope, matrix)

    zero = jnp.zeros(()), jnp.zeros(matrix.shape, jnp.float32)
    tiles, spread = _Tiles(paid, entries), how.spread
    (total, dw), dx = tiles.run(compute, zero, paid, hidden, ids, targets)
    if spread.vocabulary:
        dx = jax.lax.psum(dx, spread.vocabulary)
    if spread.over:
        total = jax.lax.psum(total, spread.over)
    if spread.scatter is not None:
        dw = jax.lax.psum_scatter(dw, "fsdp", scatter_dimension=spread.scatter, tiled=True)
    others = tuple(axis for axis in spread.over if spread.scatter is None or axis != "fsdp")
    dw = jax.lax.psum(dw, others) if others else dw
    return total, (dx.astype(hidden.dtype), dw)
