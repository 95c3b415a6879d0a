"""Greedy decoding with a cache against whole forward passes without one."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geode_jax.errors import UserError
from geode_jax.models import generate as module
from geode_jax.models.generate import Sampling, generate
from geode_jax.models.student import Student
from geode_jax.ops.attention import Intervals
from tests.helpers.tiny_models import ANSWER, QUESTION, STUDENT, materialize, tiny_batch

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


@functools.partial(jax.jit, static_argnames="states")
def answer_until(student, batch, eos_id, sampling=None, states=True):
    scene = student.encode_scene(batch)
    generated = generate(
        student.decoder,
        scene.prefix,
        batch.question_SQL,
        batch.question_length_SQ,
        max_new_tokens=ANSWER,
        eos_id=eos_id,
        states=states,
        prompt_prefix=student.config.vision_prefix,
        seen=scene.seen,
        seen_length_S=scene.seen_length_S,
        sampling=sampling,
    )
    thinking = jnp.argmax(student.thinking_logits(scene), axis=-1)
    return generated.tokens_SQA, generated.hidden_SQAD, thinking


@functools.cache
def case(thinking_tokens: int) -> Case:
    config = dataclasses.replace(STUDENT, thinking_tokens=thinking_tokens)
    student = materialize(lambda rngs: Student(config, rngs=rngs))
    batch = tiny_batch()
    return Case(student, batch, *map(np.asarray, answer_until(student, batch, NEVER)))


def vision_prefix(student, batch, z_SMD, seen_length_S):
    """V [S, N, D]: attention of N queries to the valid tokens of Z, plus the mean depth."""
    logits = jnp.einsum("nd,smd->snm", student.pool_query[...], z_SMD) / z_SMD.shape[-1] ** 0.5
    seen = jnp.arange(z_SMD.shape[1]) < seen_length_S[:, None, None]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)), 0)
    depth_SVD = student.depth_encoder(jnp.log1p(batch.depth_hint_SVP))
    views = jnp.asarray(batch.view_mask_SV)[..., None]
    depth = jnp.sum(depth_SVD * views, 1) / jnp.maximum(jnp.sum(views, 1), 1)
    return jnp.einsum("snm,smd->snd", weights, z_SMD) + depth[:, None]


@jax.jit
def forward(student, batch, text_SQL):
    """Hidden states and logits of [V][T][text] in one pass, text padded on the right."""
    scene = student.encode_scene(batch)
    S, Q = text_SQL.shape[:2]
    z, seen_length = scene.z_SVPD.reshape(S, -1, scene.z_SVPD.shape[-1]), scene.seen_length_S
    prefix = vision_prefix(student, batch, z, seen_length)
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
        seen=student.decoder.cross_keys(z),
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
    assert (hidden == 0).all()  # no step was run
    _, hidden, _ = map(np.asarray, answer_until(loud, c.batch, NEVER))
    assert (hidden != 0).any(axis=-1).all()


LOGITS = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))


def test_answers_are_the_same_where_no_states_are_wanted():
    c = case(2)
    tokens, hidden, _ = answer_until(c.student, c.batch, NEVER, states=False)
    assert hidden is None
    np.testing.assert_array_equal(tokens, c.tokens)


def test_a_cache_with_columns_to_spare(monkeypatch):
    asked = case(2)
    monkeypatch.setattr(module, "cache_columns", lambda keys: keys + 5)
    again = jax.jit(answer_until.__wrapped__)(asked.student, asked.batch, NEVER)
    np.testing.assert_array_equal(again[0], asked.tokens)
    np.testing.assert_allclose(again[1], asked.hidden, atol=1e-5)


def drawn(times: int = 4000, **options) -> np.ndarray:
    """How often each of four tokens is drawn, as a share."""
    draw = jax.jit(jax.vmap(lambda i: Sampling(jax.random.key(0), **options).draw(LOGITS, i)[0]))
    return np.bincount(np.asarray(draw(jnp.arange(times))), minlength=4) / times


def test_tokens_are_drawn_as_often_as_the_model_says():
    # Four standard deviations of a share of 0.5 in 4,000 draws are 0.032.
    np.testing.assert_allclose(drawn(), [0.5, 0.3, 0.15, 0.05], atol=0.032)
    np.testing.assert_allclose(drawn(top_k=2), [0.625, 0.375, 0, 0], atol=0.032)
    np.testing.assert_allclose(drawn(top_p=0.79), [0.625, 0.375, 0, 0], atol=0.032)
    np.testing.assert_allclose(drawn(top_p=0.81), [10 / 19, 6 / 19, 3 / 19, 0], atol=0.032)
    squares = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(drawn(temperature=0.5), squares / squares.sum(), atol=0.032)
    assert drawn(top_p=0.01)[0] == drawn(top_k=1)[0] == 1
    assert drawn(top_k=9)[3] > 0  # more than there are


def kept(logits, **options) -> list[list[int]]:
    """Ids that may be drawn, for each row."""
    allowed = np.asarray(Sampling(jax.random.key(0), **options).allowed(np.float32(logits)))
    return [list(np.flatnonzero(row > -np.inf)) for row in allowed]


def test_ties_leave_exactly_k_tokens_and_the_smallest_set_that_reaches_p():
    # Probabilities 0.512, 0.188, 0.188, 0.069, 0.025: 2 and one of the ones reach 0.6.
    ties = [[1, 2, 1, 0, -1], [3, 3, 3, 3, 3]]
    assert kept(ties, top_p=0.6) == [[0, 1], [0, 1, 2]]
    assert kept(ties, top_k=2) == [[0, 1], [0, 1]]
    assert kept(ties, top_k=3, top_p=0.6) == [[0, 1], [0, 1]]
    assert kept(ties, top_p=1e-9) == [[1], [0]]
    assert kept(ties) == kept(ties, top_k=99) == [[*range(5)]] * 2
    assert kept(ties, temperature=1e-37, top_p=0.6) == [[1], [0, 1, 2]]


def test_the_tokens_kept_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(0, 3, (64, 50)).astype(np.float32)
    for temperature, top_k, top_p in ((0.7, 50, 0.9), (1.5, 7, 1.0), (1.0, 12, 0.5), (2.0, 3, 0.1)):
        scores = torch.from_numpy(logits)
        for warp in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k)):
            scores = warp(None, scores)
        theirs = TopPLogitsWarper(top_p)(None, scores).numpy() > -np.inf
        ours = kept(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        assert ours == [list(np.flatnonzero(row)) for row in theirs]


@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": t} for t in (0, -1.0, math.nan, math.inf, 1e-40)),
        *({"top_k": k} for k in (-1, 1.5, True)),
        *({"top_p": p} for p in (0, -0.1, 1.01, math.nan)),
    ],
)
def test_settings_out_of_their_range_are_refused(options):
    (name,) = options
    with pytest.raises(UserError, match=name):
        Sampling(jax.random.key(0), **options)


def test_sampling_with_one_choice_is_greedy_and_a_key_gives_the_same_again():
    c = case(2)
    said = [answer_until(c.student, c.batch, NEVER, Sampling(jax.random.key(key), **how))[0]
            for key, how in ((0, {"top_k": 1}), (0, {}), (0, {}), (1, {}))]  # fmt: skip
    np.testing.assert_array_equal(said[0], c.tokens)
    np.testing.assert_array_equal(said[1], said[2])
    assert (said[1] != said[3]).any()
