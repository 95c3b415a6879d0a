"""Losses that read a few numbers of a token's logits, without all logits in memory.

Of a token's logits z, one for each of X entries, cross-entropy and distillation need only

    listed[k] = z[id_k]      lse = log sum exp z      rest = log sum exp of z without the listed

So a loss is a function of these. If its derivatives in them are a, b, c, its gradient in z is
b softmax(z) + c softmax(z without the listed), plus a[k] at id_k.

Logits exist for one tile of tokens at a time, as in "Cut Your Losses" [2411.09009] but with the
whole vocabulary in a tile. No tile is computed twice: the sum of a loss is one number, so the
forward pass also computes the gradients of the states and the matrix, as in Liger [2410.10989], and
the backward pass only scales them. Masked tokens are sorted last; fully masked tiles are skipped.
Sums are float32 for every dtype of the states.

On a mesh each device computes its own scenes and, if the vocabulary is spread, its own part of the
vocabulary; devices exchange the three numbers of each token. The matrix is gathered once, and its
gradient is summed over the devices once, for all tiles.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Float32, Int, Shaped

from geode_jax import sharding
from geode_jax.shapes import Array

TILE_BYTES = 2**28
"""Size of a tile's logits."""

TILE_ROWS = 512
"""Fewest tokens of a tile, if there are so many: every tile reads and writes the matrix's gradient
once."""

PARTS = 8
"""Fewest tiles, if `TILE_ROWS` allows it, so that fully masked tiles exist and are skipped."""


class Scores(NamedTuple):
    """What a loss reads of the logits of n tokens; the logits of masked tokens are 0.

    Attributes:
        listed_nk: logits of the listed ids.
        lse_n: log-sum-exp of all logits.
        rest_n: log-sum-exp of the logits that are not listed; -inf if all are listed. None unless
            `token_loss` has `rest`.
    """

    listed_nk: Array
    lse_n: Array
    rest_n: Array | None


def token_loss(
    loss: Callable[..., Array],
    hidden_SLD: Float[Array, "S L D"],
    matrix: Float[Array, "_ _"],
    ids_SLk: Int[Array, "S L k"],
    mask_SL: Bool[Array, "S L"],
    *targets_SL: Shaped[Array, "S L ..."],
    tied: bool,
    rest: int | None = None,
) -> Float32[jax.Array, ""]:
    """Returns the sum of a loss over all unmasked tokens, float32; see the module's docstring.

    Args:
        loss: `loss(scores, mask, *targets)` returns the sum over n tokens; masked tokens must add
            nothing.
        hidden_SLD: normed states of the L answer tokens of S scenes.
        matrix: matrix [D, X] of the language-model head, or the embedding [X, D] if `tied`.
        ids_SLk: int, the listed ids of each token; a negative id is padding, with score 0.
        mask_SL: bool, False = masked token.
        *targets_SL: other inputs of the loss, [S, L, ...], without gradients.
        tied: see `matrix`.
        rest: `Scores.rest_n` leaves out the listed ids from this one on; None: no `rest_n`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1 or mesh.manual_axes
    spread = _Spread() if alone else _spread(mesh, hidden_SLD.shape, matrix.shape, tied)
    how = _How(loss, tied, rest, None if alone else mesh, spread)
    return _token_loss(how, hidden_SLD, matrix, ids_SLk, mask_SL, targets_SL)


class _Spread(NamedTuple):
    """Static: the mesh axes over which scenes and vocabulary are spread."""

    rows: PartitionSpec = PartitionSpec()  # of arrays [S, ...]
    over: tuple[str, ...] = ()  # mesh axes over which the rows are spread
    matrix: PartitionSpec = PartitionSpec()
    gradient: PartitionSpec = PartitionSpec()  # of the matrix
    vocabulary: str | None = None  # mesh axis
    scatter: int | None = None  # axis of the gradient that is scattered over fsdp as it is summed


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


# The derivative is defined outside of `shard_map`, as in `ops.attention`.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_loss(how: _How, hidden, matrix, ids, mask, targets) -> jax.Array:
    return _on_devices(_own_loss, how, PartitionSpec(), hidden, matrix, ids, mask, targets)


def _forward(how: _How, hidden, matrix, ids, mask, targets):
    specs = PartitionSpec(), (how.spread.rows, how.spread.gradient)
    value, (dx, dw) = _on_devices(_own_gradients, how, specs, hidden, matrix, ids, mask, targets)
    return value, (dx, dw.astype(matrix.dtype))


def _backward(how: _How, gradients, slope):
    dx, dw = ((slope * x).astype(x.dtype) for x in gradients)
    return dx, dw, None, None, None


_token_loss.defvjp(_forward, _backward)


def _on_devices(function, how: _How, out_specs, hidden, matrix, *of_tokens):
    """Runs `function(how, ...)` on each device's scenes."""
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


# --- On each device: its scenes and its part of the vocabulary ------------------------------------


class _Tiles:
    """Tokens [S, L, ...] in tiles of n tokens, with the unmasked tokens of each scene first.

    The tokens of a tile are one axis: XLA's CPU compiler would otherwise write the gradient of the
    logits a second time, transposed, for the matrix's gradient, which sums over tokens.
    """

    def __init__(self, mask_SL: Array, vocabulary: int):
        S, L = mask_SL.shape
        most = max(TILE_ROWS, TILE_BYTES // (4 * vocabulary)) // S
        parts = max(-(-L // PARTS), -(-TILE_ROWS // S))
        self.size = max(1, min(most, parts, L))  # tokens of each scene in a tile
        self.tiles = -(-L // self.size)
        self.order_SL = jnp.argsort(~mask_SL, axis=1, stable=True)

    def split(self, x_SL: Array) -> jax.Array:
        """Returns [S, L, ...] as [tiles, n, ...], with zeros at the end."""
        order = self.order_SL.reshape(*self.order_SL.shape, *(1,) * (x_SL.ndim - 2))
        x = jnp.take_along_axis(x_SL, order, axis=1)
        S, L, *rest = x.shape
        x = jnp.pad(x, [(0, 0), (0, self.tiles * self.size - L), *((0, 0),) * len(rest)])
        x = jnp.moveaxis(x.reshape(S, self.tiles, self.size, *rest), 1, 0)
        return x.reshape(self.tiles, S * self.size, *rest)

    def join(self, x: Array) -> jax.Array:
        """Inverts `split`."""
        S, L = self.order_SL.shape
        x = x.reshape(self.tiles, S, self.size, *x.shape[2:])
        x = jnp.moveaxis(x, 0, 1).reshape(S, -1, *x.shape[3:])[:, :L]
        place = jnp.argsort(self.order_SL, axis=1).reshape(S, L, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, place, axis=1)

    def run(self, compute, carry, mask_SL: Array, *arrays):
        """Runs `carry, out = compute(carry, mask_n, *arrays_n)` on each tile with unmasked tokens.

        Returns:
            The last carry, and the results in the order of the tokens; zeros for skipped tiles.
        """

        def tile(carry, parts):
            shapes = jax.eval_shape(compute, carry, *parts)[1]
            none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return jax.lax.cond(
                jnp.any(parts[0]),
                lambda: compute(carry, *parts),
                lambda: (carry, none),
            )

        S, L = mask_SL.shape
        if self.tiles == 1:  # nothing to sort
            flat = jax.tree.map(lambda x: x.reshape(S * L, *x.shape[2:]), (mask_SL, *arrays))
            carry, out = compute(carry, *flat)
            return carry, jax.tree.map(lambda x: x.reshape(S, L, *x.shape[1:]), out)
        carry, out = jax.lax.scan(tile, carry, jax.tree.map(self.split, (mask_SL, *arrays)))
        return carry, jax.tree.map(self.join, out)


def _logits(how: _How, x_nD: Array, matrix: Array) -> jax.Array:
    """Returns logits [n, X] in float32."""
    form = "nd,xd->nx" if how.tied else "nd,dx->nx"
    return jnp.einsum(form, x_nD, matrix, preferred_element_type=jnp.float32)


def _places(how: _How, ids_nk: Array, entries: int) -> jax.Array:
    """Returns the ids' places in this device's part of the vocabulary; `entries` if elsewhere."""
    first = 0
    if how.spread.vocabulary:
        first = jax.lax.axis_index(how.spread.vocabulary) * entries
    place = ids_nk - first
    return jnp.where((ids_nk >= 0) & (place >= 0) & (place < entries), place, entries)


def _without(logits: jax.Array, place_nk: Array) -> jax.Array:
    """Returns the logits with -inf at the places."""
    return jnp.put_along_axis(logits, place_nk, -jnp.inf, -1, inplace=False, mode="drop")


def _added(slope: jax.Array, place_nk: jax.Array, listed_nk: Array) -> jax.Array:
    """Adds the gradients of the listed entries to the gradient [n, X], at their places."""
    # The first entry, in most losses the only one, is added by a comparison: a scatter would be a
    # separate pass over the gradient.
    is_first = place_nk[:, :1] == jnp.arange(slope.shape[1])
    slope = slope + jnp.where(is_first, listed_nk[:, :1], 0.0)
    n, k = place_nk.shape
    if k == 1:
        return slope
    return slope.at[jnp.arange(n)[:, None], place_nk[:, 1:]].add(listed_nk[:, 1:], mode="drop")


def _sum_exp(how: _How, logits: Array) -> jax.Array:
    """Returns log sum exp [n] over the whole vocabulary; -inf if all logits are."""
    axis = how.spread.vocabulary
    peak = jnp.max(logits, axis=-1)
    peak = jax.lax.pmax(peak, axis) if axis else peak
    peak = jnp.where(peak > -jnp.inf, peak, 0.0)
    total = jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1)
    return peak + jnp.log(jax.lax.psum(total, axis) if axis else total)


def _scores(how: _How, logits: jax.Array, place_nk: Array) -> Scores:
    """Returns the scores over the whole vocabulary."""
    entries, axis = logits.shape[-1], how.spread.vocabulary
    listed = jnp.take_along_axis(logits, jnp.minimum(place_nk, entries - 1), axis=-1)
    listed = jnp.where(place_nk < entries, listed, 0.0)
    listed = jax.lax.psum(listed, axis) if axis else listed
    rest = None
    if how.rest is not None:
        rest = _sum_exp(how, _without(logits, place_nk[:, how.rest :]))
    return Scores(listed, _sum_exp(how, logits), rest)


def _slope(
    how: _How, logits: jax.Array, place_nk: jax.Array, scores: Scores, slopes: Scores
) -> jax.Array:
    """Returns the gradient of the logits [n, X] from that of the scores."""
    weights = jnp.exp(logits - scores.lse_n[:, None])
    slope = jnp.asarray(slopes.lse_n)[:, None] * weights
    if scores.rest_n is not None and slopes.rest_n is not None:
        some = scores.rest_n > -jnp.inf
        of_rest = jnp.where(some, slopes.rest_n, 0.0)[:, None]
        others = _without(logits, place_nk[:, how.rest :])
        slope += of_rest * jnp.exp(others - jnp.where(some, scores.rest_n, 0.0)[:, None])
    return _added(slope, place_nk, slopes.listed_nk)


def _own_loss(how: _How, hidden, matrix, ids, mask, targets) -> jax.Array:
    entries = matrix.shape[0 if how.tied else 1]
    hidden = jnp.where(mask[..., None], hidden, 0)  # masked states may be NaN

    def compute(total, mask, x, ids, targets):
        logits, place = _logits(how, x, matrix), _places(how, ids, entries)
        return total + how.loss(_scores(how, logits, place), mask, *targets), None

    tiles = _Tiles(mask, entries)
    total, _ = tiles.run(compute, jnp.zeros(()), mask, hidden, ids, targets)
    return jax.lax.psum(total, how.spread.over) if how.spread.over else total


def _own_gradients(how: _How, hidden, matrix, ids, mask, targets):
    entries = matrix.shape[0 if how.tied else 1]
    forms = ("nx,xd->nd", "nx,nd->xd") if how.tied else ("nx,dx->nd", "nx,nd->dx")
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    hidden = jnp.where(mask[..., None], hidden, 0)

    def compute(carry, mask, x, ids, targets):
        total, dw = carry
        logits, place = _logits(how, x, matrix), _places(how, ids, entries)
        scores = _scores(how, logits, place)
        value, slopes = jax.value_and_grad(how.loss)(scores, mask, *targets)
        slope = _slope(how, logits, place, scores, slopes).astype(x.dtype)
        return (total + value, dw + product(forms[1], slope, x)), product(forms[0], slope, matrix)

    zero = jnp.zeros(()), jnp.zeros(matrix.shape, jnp.float32)
    tiles, spread = _Tiles(mask, entries), how.spread
    (total, dw), dx = tiles.run(compute, zero, mask, hidden, ids, targets)
    if spread.vocabulary:
        dx = jax.lax.psum(dx, spread.vocabulary)
    if spread.over:
        total = jax.lax.psum(total, spread.over)
    if spread.scatter is not None:
        dw = jax.lax.psum_scatter(dw, "fsdp", scatter_dimension=spread.scatter, tiled=True)
    others = tuple(axis for axis in spread.over if spread.scatter is None or axis != "fsdp")
    dw = jax.lax.psum(dw, others) if others else dw
    return total, (dx.astype(hidden.dtype), dw)
