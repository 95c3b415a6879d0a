"""Greedy decoding with a KV cache: one prefill, one compiled loop that stops early."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from geode_jax.models.decoder import Decoder, KeyValues, fan_out
from geode_jax.ops.attention import Intervals, causal
from geode_jax.shapes import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """Answers to the Q questions of S scenes.

    Attributes:
        tokens_SQA: generated ids; from the end token on, `eos_id`.
        hidden_SQAD: last hidden state at the position of each generated token.
    """

    tokens_SQA: Array
    hidden_SQAD: Array


def generate(
    decoder: Decoder,
    prefix: list[KeyValues],
    prompt_SQL: Array,
    prompt_length_SQ: Array,
    *,
    max_new_tokens: int,
    eos_id: int,
    prefix_length_S: Array | None = None,
    prompt_prefix: int | None = None,
    seen: list[KeyValues | None] | None = None,
    seen_length_S: Array | None = None,
) -> Generated:
    """Greedy answers to left-padded prompts that share their scene's prefix.

    Args:
        decoder: the trunk.
        prefix: keys and values of the prefix embeddings, from `Decoder.run_prefix`.
        prompt_SQL: ids, left-padded.
        prompt_length_SQ: real ids of each prompt.
        max_new_tokens: A.
        eos_id: ends an answer.
        prefix_length_S: valid columns of the prefix, the others stand behind them; None = all.
        prompt_prefix: columns of the prefix that the prompt sees; its last token, which opens the
            answer, and the answer see all that are valid. None: the prompt does too.
        seen: result of `Decoder.see`.
        seen_length_S: valid vision tokens.
    """
    S, Q, L = prompt_SQL.shape
    B, A = S * Q, max_new_tokens
    P = prefix[0].k.shape[2]
    pad = L - jnp.asarray(prompt_length_SQ).reshape(B)
    before = jnp.full(B, P) if prefix_length_S is None else jnp.repeat(prefix_length_S, Q)
    before = before[:, None].astype(jnp.int32)
    vision = {"seen": seen, "seen_length_S": seen_length_S}
    opens = jnp.arange(L) == L - 1
    own = causal(B, L, start=pad, prefix_end=P)
    hidden, cache = decoder.run(
        decoder.embed(jnp.asarray(prompt_SQL).reshape(B, L)),
        before + text_positions(pad, L),
        own._replace(
            prefix_end=jnp.where(opens, before, before if prompt_prefix is None else prompt_prefix)
        ),
        cache=fan_out(prefix, Q, L + A),
        offset=P,
        **vision,
    )

    def advance(carry):
        i, last, done, cache, tokens, states = carry
        token = jnp.argmax(decoder.logits(last), axis=-1).astype(jnp.int32)
        token = jnp.where(done, eos_id, token)
        column = P + L + i
        hidden, cache = decoder.run(
            decoder.embed(token[:, None]),
            before + (L + i - pad)[:, None],
            Intervals(before, P + pad[:, None], jnp.full((B, 1), column + 1)),
            cache=cache,
            offset=column,
            **vision,
        )
        last = hidden[:, 0]
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, i, axis=1)
        states = jax.lax.dynamic_update_index_in_dim(states, last, i, axis=1)
        return i + 1, last, done | (token == eos_id), cache, tokens, states

    def going(carry):
        return (carry[0] < A) & ~jnp.all(carry[2])

    last = hidden[:, -1]
    # A padding question (length 0) is done before it starts.
    done = jnp.asarray(prompt_length_SQ).reshape(B) == 0
    tokens = jnp.full((B, A), eos_id, jnp.int32)
    states = jnp.zeros((B, A, last.shape[-1]), last.dtype)
    carry = (jnp.zeros((), jnp.int32), last, done, cache, tokens, states)
    _, _, _, _, tokens, states = jax.lax.while_loop(going, advance, carry)
    return Generated(tokens.reshape(S, Q, A), states.reshape(S, Q, A, -1))


def text_positions(pad_B: Array, columns: int) -> jax.Array:
    """Positions [B, columns] of left-padded rows, 0 for the first real token and before it."""
    column = jnp.arange(columns, dtype=jnp.int32)
    return jnp.maximum(column - pad_B[:, None], 0)


def before_end(tokens_A: np.ndarray, eos_id: int) -> list[int]:
    """The ids before the first end token."""
    ids = [int(i) for i in tokens_A]
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
