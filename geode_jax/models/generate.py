"""Decoding with a KV cache: one prefill, one compiled loop that stops early."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from geode_jax.errors import UserError
from geode_jax.models.decoder import Decoder, KeyValues, fan_out
from geode_jax.models.decoding import by_layer, for_decoding
from geode_jax.ops.attention import Intervals, cache_columns, causal
from geode_jax.shapes import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """Answers to the Q questions of S scenes.

    Attributes:
        tokens_SQA: generated ids; from the end token on, `eos_id`.
        hidden_SQAD: last hidden state at the position of each generated token before the end one;
            None unless asked for.
    """

    tokens_SQA: Array
    hidden_SQAD: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Tokens drawn from the model's distribution instead of its most likely one.

    The settings compose as in transformers: temperature, then `top_k`, then `top_p` of what that
    leaves. Of equally likely tokens those with lower ids come first.

    Attributes:
        key: of the random numbers (`jax.random.key`).
        temperature: divides the logits; > 0. Greedy answers are those without a `Sampling`.
        top_k: of exactly so many most likely tokens; 0: of all.
        top_p: of the fewest most likely tokens that have this probability together [1904.09751];
            0 < p <= 1.

    Raises:
        UserError: a setting is out of its range.
    """

    key: Array
    temperature: float = dataclasses.field(default=1.0, metadata={"static": True})
    top_k: int = dataclasses.field(default=0, metadata={"static": True})
    top_p: float = dataclasses.field(default=1.0, metadata={"static": True})

    def __post_init__(self):
        tiny = float(np.finfo(np.float32).tiny)
        if not tiny <= self.temperature < math.inf:
            raise UserError(
                f"temperature {self.temperature} is no number above 0; without a Sampling answers "
                "are greedy"
            )
        if type(self.top_k) is not int or self.top_k < 0:
            raise UserError(f"top_k {self.top_k} is no whole number from 0 on")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is not above 0 and at most 1")

    def draw(self, logits_BX: Array, step: Array) -> jax.Array:
        """Ids [B] of the answers' token number `step`."""
        return jax.random.categorical(jax.random.fold_in(self.key, step), self.allowed(logits_BX))

    def allowed(self, logits_BX: Array) -> jax.Array:
        """Logits [B, X] at the temperature, less the row's largest; -inf where none is drawn."""
        logits = jnp.asarray(logits_BX, jnp.float32)
        logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / self.temperature
        X = logits.shape[-1]
        k = min(self.top_k, X) or X
        if k == X and self.top_p == 1:
            return logits
        best, ids = jax.lax.top_k(logits, k)  # of equal ones the lower id first
        share = jax.nn.softmax(best)
        # The first is always kept: the probability before it is 0.
        kept = jnp.cumsum(share, axis=-1) - share < self.top_p
        rows = jnp.arange(len(logits))[:, None]
        return jnp.full_like(logits, -jnp.inf).at[rows, ids].set(jnp.where(kept, best, -jnp.inf))


def generate(
    decoder: Decoder,
    prefix: list,
    prompt_SQL: Array,
    prompt_length_SQ: Array,
    *,
    max_new_tokens: int,
    eos_id: int,
    states: bool = False,
    prefix_length_S: Array | None = None,
    prompt_prefix: int | None = None,
    seen: list[KeyValues | None] | None = None,
    seen_length_S: Array | None = None,
    sampling: Sampling | None = None,
) -> Generated:
    """Answers to left-padded prompts that share their scene's prefix.

    Args:
        decoder: the trunk; as of `for_decoding` it is read as it is.
        prefix: keys and values of the prefix embeddings, from `Decoder.run_prefix`.
        prompt_SQL: ids, left-padded.
        prompt_length_SQ: real ids of each prompt.
        max_new_tokens: A.
        eos_id: ends an answer.
        states: whether the result has `hidden_SQAD`; the last token then goes through the decoder,
            too.
        prefix_length_S: valid columns of the prefix, the others stand behind them; None = all.
        prompt_prefix: columns of the prefix that the prompt sees; its last token, which opens the
            answer, and the answer see all that are valid. None: the prompt does too.
        seen: result of `Decoder.see`.
        seen_length_S: valid vision tokens.
        sampling: None: greedy.
    """
    decoder, prefix = for_decoding(decoder), by_layer(prefix)
    S, Q, L = prompt_SQL.shape
    B, A = S * Q, max_new_tokens
    read = A if states else A - 1
    columns = prefix[0][0].k.shape[1]
    pad = L - jnp.asarray(prompt_length_SQ).reshape(B)
    before = jnp.full(B, columns) if prefix_length_S is None else jnp.repeat(prefix_length_S, Q)
    before = before[:, None].astype(jnp.int32)
    vision = {"seen": seen, "seen_length_S": seen_length_S}
    opens = jnp.arange(L) == L - 1
    own = causal(B, L, start=pad, prefix_end=columns)
    prompt, cache = decoder.run(
        decoder.embed(jnp.asarray(prompt_SQL).reshape(B, L)),
        before + text_positions(pad, L),
        own._replace(
            prefix_end=jnp.where(opens, before, before if prompt_prefix is None else prompt_prefix)
        ),
        cache=fan_out(prefix, Q, cache_columns(columns + L + read) - columns),
        offset=columns,
        **vision,
    )

    def said(hidden_BD, i, done, tokens):
        """Token i of the answers, after the state before it; none is wanted behind the last."""
        logits = decoder.logits(hidden_BD)
        token = jnp.argmax(logits, axis=-1) if sampling is None else sampling.draw(logits, i)
        token = jnp.where(done, eos_id, token.astype(jnp.int32))
        return token, done | (token == eos_id), tokens.at[:, i].set(token, mode="drop")

    def advance(carry):
        i, token, done, cache, tokens, hidden = carry
        column = columns + L + i
        state, cache = decoder.run(
            decoder.embed(token[:, None]),
            before + (L + i - pad)[:, None],
            Intervals(before, columns + pad[:, None], jnp.full((B, 1), column + 1)),
            cache=cache,
            offset=column,
            **vision,
        )
        if states:
            hidden = jax.lax.dynamic_update_slice_in_dim(hidden, state, i, axis=1)
        token, done, tokens = said(state[:, 0], i + 1, done, tokens)
        return i + 1, token, done, cache, tokens, hidden

    def going(carry):
        return (carry[0] < read) & ~jnp.all(carry[2])

    # A padding question (length 0) is done before it starts.
    done = jnp.asarray(prompt_length_SQ).reshape(B) == 0
    tokens = jnp.full((B, A), eos_id, jnp.int32)
    start = jnp.zeros((), jnp.int32)
    token, done, tokens = said(prompt[:, -1], start, done, tokens)
    hidden = jnp.zeros((B, A, prompt.shape[-1]), prompt.dtype) if states else None
    carry = (start, token, done, cache, tokens, hidden)
    *_, tokens, hidden = jax.lax.while_loop(going, advance, carry)
    shaped = None if hidden is None else hidden.reshape(S, Q, A, -1)
    return Generated(tokens.reshape(S, Q, A), shaped)


def text_positions(pad_B: Array, columns: int) -> jax.Array:
    """Positions [B, columns] of left-padded rows, 0 for the first real token and before it."""
    column = jnp.arange(columns, dtype=jnp.int32)
    return jnp.maximum(column - pad_B[:, None], 0)


def before_end(tokens_A: np.ndarray, eos_id: int) -> list[int]:
    """The ids before the first end token."""
    ids = [int(i) for i in tokens_A]
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
