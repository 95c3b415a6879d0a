"""Greedy decoding with a cache against whole forward passes without one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geode_jax.models.student import Student
from geode_jax.objectives.hidden_cot import generate_answers
from geode_jax.ops.attention import Intervals
from tests.tiny_models import ANSWER, QUESTION, STUDENT, materialize, tiny_batch

NEVER = -1
"""An end token that no model says."""


@dataclasses.dataclass
class Case:
    """A student, questions of several lengths, and what it answers when nothing ends an answer."""

    student: Student
    batch: object
    tokens: np.ndarray
    hidden: np.ndarray
    thinking: np.ndarray


@jax.jit
def answer_until(student, batch, eos_id):
    generated, thinking = generate_answers(student, batch, eos_id=eos_id)
    return generated.tokens_SQA, generated.hidden_SQAD, thinking


@functools.cache
def case(thinking_tokens: int) -> Case:
    config = dataclasses.replace(STUDENT, thinking_tokens=thinking_tokens)
    student = materialize(lambda rngs: Student(config, rngs=rngs))
    batch = tiny_batch()
    return Case(student, batch, *map(np.asarray, answer_until(student, batch, NEVER)))


@jax.jit
def forward(student, batch, text_SQL):
    """Hidden states and logits of [V][T][text] in one pass, text padded on the right."""
    z, seen_length = student._project(batch)
    S, Q = text_SQL.shape[:2]
    z = z.reshape(S, -1, z.shape[-1])
    prefix = student._vision_prefix(batch, z, seen_length)
    if student.thinking is not None:
        thinking = jnp.broadcast_to(student.thinking[...], (S, *student.thinking.shape[1:]))
        prefix = jnp.concatenate([prefix, thinking], axis=1)
    prefix = jnp.repeat(prefix[:, None], Q, axis=1)
    rows = jnp.concatenate([prefix, student.decoder.embed(text_SQL)], axis=2)
    rows = rows.reshape(S * Q, *rows.shape[2:])
    column, P = jnp.arange(rows.shape[1]), student.config.prefix_length
    positions = jnp.broadcast_to(column, rows.shape[:2])
    # Causal, but for the question up to its bos, which does not see T.
    bos = P + jnp.asarray(batch.question_length_SQ).reshape(-1, 1) - 1
    asks = (column >= P) & (column < bos)
    intervals = Intervals(
        prefix_end=jnp.where(asks, student.config.vision_prefix, 0),
        start=jnp.where(asks, P, 0),
        end=positions + 1,
    )
    hidden, _ = student.decoder.run(
        rows,
        positions,
        intervals,
        seen=student.decoder.see(z),
        seen_length_S=seen_length,
    )
    hidden = hidden.reshape(S, Q, *hidden.shape[1:])
    return hidden, student.decoder.logits(hidden)


@pytest.mark.parametrize("thinking_tokens", [2, 0])
def test_greedy_answers_equal_those_of_whole_forward_passes(thinking_tokens):
    c = case(thinking_tokens)
    S, Q = c.batch.question_length_SQ.shape
    length = c.batch.question_length_SQ
    assert len(set(length[length > 0])) > 1  # ragged
    prefix = STUDENT.vision_prefix + thinking_tokens
    text = np.zeros((S, Q, QUESTION + ANSWER), np.int32)
    asked = [(s, q) for s, q in np.ndindex(S, Q) if length[s, q]]
    for s, q in asked:
        text[s, q, : length[s, q]] = c.batch.question_SQL[s, q, QUESTION - length[s, q] :]
    for i in range(ANSWER):
        _, logits = map(np.asarray, forward(c.student, c.batch, text))
        for s, q in asked:
            last = length[s, q] + i - 1
            text[s, q, last + 1] = logits[s, q, prefix + last].argmax()
            assert text[s, q, last + 1] == c.tokens[s, q, i]
    assert len(np.unique(c.tokens)) > 2  # no degenerate model
    hidden, logits = map(np.asarray, forward(c.student, c.batch, text))
    for s, q in asked:
        own = slice(prefix + length[s, q], prefix + length[s, q] + ANSWER)
        np.testing.assert_allclose(c.hidden[s, q], hidden[s, q, own], atol=1e-5)
    # The diagnostic mode: what the vocabulary says at the thinking positions.
    expected = logits[:, 0, STUDENT.vision_prefix : prefix].argmax(-1)
    assert c.thinking.shape == (S, thinking_tokens)
    np.testing.assert_array_equal(c.thinking, expected)


def test_an_answer_ends_with_the_end_token():
    c = case(2)
    length = c.batch.question_length_SQ
    asked = c.tokens[length > 0]
    # A token that ends some answers at once, others later or never.
    firsts = [{int(np.argmax(row == eos)) if eos in row else None for row in asked}
              for eos in range(STUDENT.decoder.vocab_size)]  # fmt: skip
    eos = max(range(len(firsts)), key=lambda token: len(firsts[token]))
    assert len(firsts[eos]) > 1
    tokens, _, _ = map(np.asarray, answer_until(c.student, c.batch, eos))
    for before, after in zip(asked, tokens[length > 0], strict=True):
        end = list(before).index(eos) if eos in before else ANSWER
        np.testing.assert_array_equal(after[:end], before[:end])
        assert (after[end:] == eos).all()
    assert (tokens[length == 0] == eos).all()  # a padding question has nothing to say


def test_generation_stops_when_all_have_ended():
    c = case(2)
    loud = jax.tree.map(lambda x: x, c.student)  # a copy
    eos = 3
    # The end token wins wherever the last norm adds its bias.
    loud.decoder.norm.bias[...] = jnp.full(STUDENT.decoder.width, 10.0)
    loud.decoder.head.kernel[...] = loud.decoder.head.kernel[...].at[:, eos].set(10.0)
    tokens, hidden, _ = map(np.asarray, answer_until(loud, c.batch, eos))
    assert (tokens == eos).all()
    # The states of steps that were never run are zeros.
    assert (hidden[:, :, 0] != 0).any() and (hidden[:, :, 1:] == 0).all()
    _, hidden, _ = map(np.asarray, answer_until(loud, c.batch, NEVER))
    assert (hidden != 0).any(axis=-1).all()
