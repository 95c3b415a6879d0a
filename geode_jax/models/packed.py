"""Runs a scene's packed questions behind their shared prefix; see `data.packing`."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from geode_jax.models.decoder import Decoder, KeyValues, fan_out
from geode_jax.ops.attention import Intervals
from geode_jax.shapes import Array, Batch
from geode_jax.sharding import constrain


def read_packed(
    decoder: Decoder,
    batch: Batch,
    prefix: list[KeyValues],
    prefix_length_S: Int[Array, " S"],
    sees_SWT: Int[Array, "S W T"],
    *,
    seen: list[KeyValues | None] | None = None,
    seen_length_S: Int[Array, " S"] | None = None,
) -> Float[jax.Array, "S W*T D"]:
    """Returns hidden states of all questions of the scenes with their answers.

    Args:
        decoder: the trunk.
        batch: holds the packed text.
        prefix: keys and values of the prefix embeddings, from `Decoder.run_prefix`.
        prefix_length_S: valid columns of the prefix; the text's positions follow them.
        sees_SWT: number of prefix columns that each token sees.
        seen: result of `Decoder.cross_keys`.
        seen_length_S: valid vision tokens.
    """
    S, W, T = batch.packed_SWT.shape
    columns = prefix[0].k.shape[2]
    tokens, position, start, sees = (
        jnp.asarray(x).reshape(S * W, T)
        for x in (
            batch.packed_SWT,
            batch.packed_position_SWT,
            batch.packed_start_SWT,
            sees_SWT,
        )
    )
    end = jnp.broadcast_to(columns + 1 + jnp.arange(T, dtype=jnp.int32), tokens.shape)
    hidden, _ = decoder.run(
        decoder.embed(tokens),
        jnp.repeat(prefix_length_S, W)[:, None] + position,
        Intervals(sees, columns + start, end),
        cache=fan_out(prefix, W),
        offset=columns,
        seen=seen,
        seen_length_S=seen_length_S,
    )
    return constrain(hidden.reshape(S, W * T, -1), "batch", "length", "width")


def pick(
    hidden_SLD: Float[Array, "S L D"], column: Int[Array, " S *places"]
) -> Float[jax.Array, "S *places D"]:
    """Returns states at flat columns of a scene's rows; -1 gives any state."""
    flat = jnp.maximum(jnp.asarray(column), 0).reshape(len(column), -1, 1)
    taken = jnp.take_along_axis(hidden_SLD, flat, axis=1)
    taken = constrain(taken, "batch", "length", "width")
    return taken.reshape(*column.shape, hidden_SLD.shape[-1])
