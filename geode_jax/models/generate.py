"""Autoregressive decoding with a KV cache: one prefill, then one loop that stops early."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int

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
        tokens_SQA: generated ids, `eos_id` from the end token on.
        hidden_SQAD: final hidden state at the position of each generated token before the end
            token; None unless `generate` has `states`.
    """

    tokens_SQA: Array
    hidden_SQAD: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are sampled; without a `Sampling`, answers are greedy.

    The settings compose as in transformers: temperature, then `top_k`, then `top_p` of the
    remaining tokens. Ties are broken by the lower id.

    Attributes:
        key: random key (`jax.random.key`).
        temperature: > 0, divides the logits.
        top_k: number of most likely tokens to sample from; 0: all.
        top_p: sample from the fewest most likely tokens whose probabilities sum to at least this
            (nucleus sampling [1904.09751]); 0 < p <= 1.

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

    def draw(
        self, logits_BX: Float[Array, "B X"], step: Int[Array, ""] | int
    ) -> Int[jax.Array, " B"]:
        """Samples ids for token number `step` of the answers."""
        return jax.random.categorical(jax.random.fold_in(self.key, step), self.allowed(logits_BX))

    def allowed(self, logits_BX: Float[Array, "B X"]) -> Float32[jax.Array, "B X"]:
        """Returns logits at the temperature, minus each row's maximum; -inf if excluded."""
        logits = jnp.asarray(logits_BX, jnp.float32)
        logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / self.temperature
        X = logits.shape[-1]
        k = min(self.top_k, X) or X
        if k == X and self.top_p == 1:
            return logits
        best, ids = jax.lax.top_k(logits, k)  # ties: the lower id first
        share = jax.nn.softmax(best)
        # The first token is always kept: the cumulative probability before it is 0.
        kept = jnp.cumsum(share, axis=-1) - share < self.top_p
        rows = jnp.arange(len(logits))[:, None]
        return jnp.full_like(logits, -jnp.inf).at[rows, ids].set(jnp.where(kept, best, -jnp.inf))


def generate(
    decoder: Decoder,
    prefix: list,
    prompt_SQL: Int[Array, "S Q L"],
    prompt_length_SQ: Int[Array, "S Q"],
    *,
    max_new_tokens: int,
    eos_id: Int[Array, ""] | int,
    states: bool = False,
    prefix_length_S: Int[Array, " S"] | None = None,
    prompt_prefix: int | None = None,
    seen: list[KeyValues | None] | None = None,
    seen_length_S: Int[Array, " S"] | None = None,
    sampling: Sampling | None = None,
) -> Generated:
    """Generates answers to left-padded prompts that share their scene's prefix.

    Args:
        decoder: the decoder, prepared by `for_decoding` or not.
        prefix: keys and values of the prefix embeddings, from `Decoder.run_prefix`.
        prompt_SQL: ids, left-padded.
        prompt_length_SQ: number of ids of each prompt; 0 = padding question.
        max_new_tokens: A.
        eos_id: end token.
        states: if True, the result has `hidden_SQAD`, and the last token also runs through the
            decoder.
        prefix_length_S: valid columns of the prefix, which come first; None: all.
        prompt_prefix: number of prefix columns that the prompt sees. Its last token, which starts
            the answer, and the answer see all valid columns. None: the prompt sees them too.
        seen: result of `Decoder.cross_keys`.
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

    def next_token(hidden_BD, i, done, tokens):
        """Writes token i of the answers, given the state before it; drops tokens from A on."""
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
        token, done, tokens = next_token(state[:, 0], i + 1, done, tokens)
        return i + 1, token, done, cache, tokens, hidden

    def going(carry):
        return (carry[0] < read) & ~jnp.all(carry[2])

    # A padding question (length 0) is done from the start.
    done = jnp.asarray(prompt_length_SQ).reshape(B) == 0
    tokens = jnp.full((B, A), eos_id, jnp.int32)
    start = jnp.zeros((), jnp.int32)
    token, done, tokens = next_token(prompt[:, -1], start, done, tokens)
    hidden = jnp.zeros((B, A, prompt.shape[-1]), prompt.dtype) if states else None
    carry = (start, token, done, cache, tokens, hidden)
    *_, tokens, hidden = jax.lax.while_loop(going, advance, carry)
    hidden = None if hidden is None else hidden.reshape(S, Q, A, -1)
    return Generated(tokens.reshape(S, Q, A), hidden)


def text_positions(pad_B: Int[Array, " B"], columns: int) -> Int[jax.Array, "B {columns}"]:
    """Returns positions of left-padded rows; padding has position 0."""
    column = jnp.arange(columns, dtype=jnp.int32)
    return jnp.maximum(column - pad_B[:, None], 0)


def before_end(tokens_A: Int[np.ndarray, " A"], eos_id: int) -> list[int]:
    """Returns the ids before the first end token."""
    ids = [int(i) for i in tokens_A]
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
