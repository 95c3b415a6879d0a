"""Text (Sec. III-D.1): labels on the answer A only; V, T, Q and padding are never paid."""

import jax.numpy as jnp

from geode_jax.models.decoder import Decoder
from geode_jax.objectives import losses
from geode_jax.shapes import Array, Batch


def text_term(
    decoder: Decoder, hidden_SQAD: Array, batch: Batch, temperature: float = 1.0
) -> losses.Pair:
    """Cross-entropy on the answers; `objectives.losses.distillation` where a teacher answered.

    Args:
        decoder: whose head speaks.
        hidden_SQAD: the states that predict the answers' tokens.
        batch: the answers.
        temperature: T of `objectives.losses.distillation`.
    """
    S, Q, A, _ = hidden_SQAD.shape
    topk_id, topk_logprob = map(jnp.asarray, (batch.topk_id_SQAk, batch.topk_logprob_SQAk))
    k = topk_id.shape[-1]
    topk_id = jnp.where(jnp.isfinite(topk_logprob), topk_id, -1)  # padding
    paid = jnp.arange(A) < jnp.asarray(batch.answer_length_SQ)[..., None]
    taught = paid & batch.topk_mask_SQA & (k > 0)
    paid &= ~taught | jnp.any(topk_id >= 0, axis=-1)
    ids = jnp.concatenate([batch.answer_SQA[..., None], topk_id], axis=-1)
    hidden, ids, paid, taught, topk_id, topk_logprob = (
        x.reshape(S, Q * A, *x.shape[3:])
        for x in (hidden_SQAD, ids, paid, taught, topk_id, topk_logprob)
    )

    def loss(scores, paid, taught, topk_id, topk_logprob):
        ce = losses.token_cross_entropy(scores, paid & ~taught)
        if not k:
            return ce
        teacher = topk_id, topk_logprob, paid & taught
        listed_nk = scores.listed_nk[:, 1:]
        return ce + losses.distillation(listed_nk, scores.rest_n, *teacher, temperature)[0]

    rest = 1 if k else None
    total = decoder.token_loss(loss, hidden, ids, paid, taught, topk_id, topk_logprob, rest=rest)
    # One mean over all answer tokens, whichever of the two a token pays.
    return total, jnp.sum(paid, dtype=jnp.float32)
