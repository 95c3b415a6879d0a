"""The text loss (Sec. III-D.1), on the tokens of the answers A; V, T and Q have no labels."""

import jax.numpy as jnp
from jaxtyping import Float

from geode_jax.models.decoder import Decoder
from geode_jax.objectives import losses
from geode_jax.objectives.base import Pair
from geode_jax.shapes import Array, Batch


def text_term(
    decoder: Decoder,
    hidden_SQAD: Float[Array, "S Q A D"],
    batch: Batch,
    temperature: float = 1.0,
) -> Pair:
    """Cross-entropy on the answers, or `losses.distillation` where there are a teacher's logits.

    Args:
        decoder: whose head gives the logits.
        hidden_SQAD: the states that predict the answers' tokens.
        batch: the answers and the teacher's logits.
        temperature: T of `losses.distillation`.

    Returns:
        The sum; count = answer tokens.
    """
    S, Q, A, _ = hidden_SQAD.shape
    topk_id, topk_logprob = map(jnp.asarray, (batch.topk_id_SQAk, batch.topk_logprob_SQAk))
    k = topk_id.shape[-1]
    topk_id = jnp.where(jnp.isfinite(topk_logprob), topk_id, -1)  # padding
    counted = jnp.arange(A) < jnp.asarray(batch.answer_length_SQ)[..., None]
    taught = counted & batch.topk_mask_SQA & (k > 0)
    counted &= ~taught | jnp.any(topk_id >= 0, axis=-1)
    ids = jnp.concatenate([batch.answer_SQA[..., None], topk_id], axis=-1)
    hidden, ids, counted, taught, topk_id, topk_logprob = (
        x.reshape(S, Q * A, *x.shape[3:])
        for x in (hidden_SQAD, ids, counted, taught, topk_id, topk_logprob)
    )

    def loss(scores, counted, taught, topk_id, topk_logprob):
        ce = losses.token_cross_entropy(scores, counted & ~taught)
        if not k:
            return ce
        teacher = topk_id, topk_logprob, counted & taught
        listed_nk = scores.listed_nk[:, 1:]
        return ce + losses.distillation(listed_nk, scores.rest_n, *teacher, temperature)[0]

    rest = 1 if k else None
    total = decoder.token_loss(loss, hidden, ids, counted, taught, topk_id, topk_logprob, rest=rest)
    # One mean over all answer tokens, whichever of the two losses a token has.
    return total, jnp.sum(counted, dtype=jnp.float32)
