"""What the student's parts may see of each other, and packed rows against rows of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geode_jax.models.decoder import fan_out
from geode_jax.models.generate import text_positions
from geode_jax.objectives.hidden_cot import HiddenCoT, HiddenCoTConfig, term_of
from geode_jax.objectives.losses import TERMS
from geode_jax.ops.attention import causal
from tests.helpers.tiny_models import (
    ANSWER,
    COLUMNS,
    PAD_ID,
    QUESTION,
    STUDENT,
    materialize,
    tiny_batch,
)

OBJECTIVE = HiddenCoT(HiddenCoTConfig(STUDENT))
VOCABULARY = STUDENT.decoder.vocab_size


@pytest.fixture(scope="module")
def model():
    return materialize(OBJECTIVE.build)


@pytest.fixture(scope="module")
def batch():
    return tiny_batch()


@jax.jit
def compute(model, batch):
    """All outputs and all losses."""
    return model.student(batch), OBJECTIVE.terms(model, batch)


@pytest.fixture(scope="module")
def before(model, batch):
    return compute(model, batch)


@pytest.mark.parametrize("sees", [False, True])
def test_a_question_sees_the_thinking_tokens_if_it_may(batch, sees):
    config = dataclasses.replace(STUDENT, question_sees_thinking=sees)
    model = materialize(HiddenCoT(HiddenCoTConfig(config)).build).student

    @jax.jit
    def states(model, batch):
        return model.read(model.encode_scene(batch), batch)

    answers, encoding, _ = states(model, batch)
    model.thinking[...] = jnp.flip(model.thinking[...], axis=-1)
    others = states(model, batch)
    asks = asked(batch)
    assert not np.allclose(answers[paid(batch)], others[0][paid(batch)], atol=1e-3)
    assert np.allclose(encoding[asks], others[1][asks], atol=1e-6) != sees


def test_eq_1_alone_can_be_left_out(model, batch):
    names = [
        set(jax.eval_shape(HiddenCoT(HiddenCoTConfig(STUDENT, eq_1=eq_1)).terms, model, batch))
        for eq_1 in (True, False)
    ]
    assert names[0] - names[1] == {"spatial/features", "spatial/cross_view"}
    assert names[1] < names[0]


def changed(batch, **changes):
    return dataclasses.replace(batch, **changes)


def same(before, after) -> bool:
    """Whether two trees are equal, bit by bit."""
    return all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)
    )


def paid(batch) -> np.ndarray:
    """[S, Q, A]: answer tokens."""
    return np.arange(ANSWER) < batch.answer_length_SQ[..., None]


def taught(batch, spatial) -> list[np.ndarray]:
    """What the spatial head says of questions that are asked, and of names that they contain."""
    named = asked(batch)[..., None] & (batch.object_column_SQO >= 0)
    assert 0 < named.sum() < named.size
    values = {f.name: getattr(spatial, f.name) for f in dataclasses.fields(spatial)}
    objects = values.pop("objects_SQOb")
    return [objects[named], *(value[asked(batch)] for value in values.values())]


def asked(batch) -> np.ndarray:
    """[S, Q]: questions that are no padding."""
    return batch.answer_length_SQ > 0


def other(ids, where):
    """Different ids at the marked places."""
    return np.where(where, (ids + 7) % VOCABULARY, ids)


# --- Packing --------------------------------------------------------------------------------------


@jax.jit
def unpacked(student, batch):
    """As `student.read`, every question and its answer in rows of its own, padded on the left."""
    scene = student.encode_scene(batch)
    S, Q, L = batch.question_SQL.shape
    text = jnp.concatenate([batch.question_SQL, batch.answer_SQA[..., :-1]], axis=-1)
    pad = L - jnp.asarray(batch.question_length_SQ).reshape(-1)
    rows = student.decoder.embed(text.reshape(S * Q, -1))
    columns, prefix = rows.shape[1], STUDENT.prefix_length
    own = causal(S * Q, columns, start=pad, prefix_end=prefix)
    asks = jnp.arange(columns) < L - 1  # before bos
    states, _ = student.decoder.run(
        rows,
        prefix + text_positions(pad, columns),
        own._replace(prefix_end=jnp.where(asks, STUDENT.vision_prefix, own.prefix_end)),
        cache=fan_out(scene.prefix, Q, columns),
        offset=prefix,
        seen=scene.seen,
        seen_length_S=scene.seen_length_S,
    )
    states = states.reshape(S, Q, columns, -1)
    # Counted from the end: rows here are padded on the left, and a question ends before its bos.
    back = batch.encoding_column_SQ[..., None] - jnp.maximum(batch.object_column_SQO, 0)
    place = jnp.clip(L - 2 - back, 0, L - 2)
    names = jnp.take_along_axis(states, place.reshape(S, Q, -1, 1), axis=2)
    return states[:, :, L - 1 :], student.spatial_head(states[:, :, L - 2], names)


def test_packed_questions_equal_questions_in_rows_of_their_own(model, batch, before):
    out, _ = before
    states, spatial = unpacked(model.student, batch)
    where = paid(batch)
    assert 0 < where.sum() < where.size
    np.testing.assert_allclose(out.answer_hidden_SQAD[where], states[where], atol=1e-5)
    for got, want in zip(taught(batch, out.spatial), taught(batch, spatial), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_camera_token_moves_the_features_of_its_view(model, batch, before):
    """And only where the scene has one: the first has none."""
    camera = batch.camera_SVC + 1.0
    camera[:, 0, 0] -= 5.0
    z = [
        jax.jit(lambda model, batch: model.student.encode_scene(batch).z_SVPD)(model, b)
        for b in (batch, changed(batch, camera_SVC=camera))
    ]
    assert np.array_equal(z[0][0], z[1][0])
    assert not np.array_equal(z[0][1, 0], z[1][1, 0])


def test_a_question_never_hears_its_neighbours(model, batch, before):
    """Another question in the same row changes, the others' states and encodings do not."""
    out, _ = before
    text = batch.answer_column_SQA[0, 0, 0] + 1 - QUESTION  # the first question is full length
    columns = np.arange(batch.packed_SWT[0].size)
    own = (columns >= text) & (columns < text + QUESTION + ANSWER - 1)
    rows = set(columns[own] // COLUMNS)
    assert rows & set(batch.answer_column_SQA[0, 1, :1] // COLUMNS)  # they share a row
    where = np.zeros(batch.packed_SWT.shape, bool)
    where[0] = own.reshape(where.shape[1:])
    after, _ = compute(model, changed(batch, packed_SWT=other(batch.packed_SWT, where)))
    rest = paid(batch)
    rest[0, 0] = False
    for got, want in (
        (after.answer_hidden_SQAD[rest], out.answer_hidden_SQAD[rest]),
        (after.spatial.relations_SQr[0, 1], out.spatial.relations_SQr[0, 1]),
        (after.spatial.relations_SQr[1], out.spatial.relations_SQr[1]),
    ):
        np.testing.assert_array_equal(got, want)
    # All that depends on it does change.
    assert (np.abs(after.answer_hidden_SQAD - out.answer_hidden_SQAD)[0, 0] > 0).any(-1).all()
    assert not np.array_equal(after.spatial.relations_SQr[0, 0], out.spatial.relations_SQr[0, 0])


def test_padding_columns_are_seen_by_nobody(model, batch, before):
    out, terms = before
    column = np.arange(COLUMNS)
    padding = batch.packed_start_SWT > column
    assert padding.any() and (batch.packed_SWT[padding] == PAD_ID).all()
    packed = other(batch.packed_SWT, padding)
    after, after_terms = compute(model, changed(batch, packed_SWT=packed))
    where = paid(batch)
    np.testing.assert_array_equal(after.answer_hidden_SQAD[where], out.answer_hidden_SQAD[where])
    assert same(after_terms, terms)


# --- Who pays, and for what -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradients(model, batch):
    """Of every loss by the thinking tokens, [K, D] each."""
    graph, thinking, rest = nnx.split(model, nnx.PathContains("thinking"), ...)

    @jax.jit
    def by_thinking(thinking, rest, batch):
        def sums(thinking):
            terms = OBJECTIVE.terms(nnx.merge(graph, thinking, rest), batch)
            return {name: part for name, (part, _) in terms.items()}

        values, vjp = jax.vjp(sums, thinking)
        names = list(values)
        found = jax.lax.map(
            lambda row: jax.tree.leaves(vjp(dict(zip(names, row, strict=True))))[0],
            jnp.eye(len(names)),
        )
        return dict(zip(names, found[:, 0], strict=True))

    return by_thinking(thinking, rest, batch)


def test_thinking_tokens_learn_from_the_answers_alone(gradients, before):
    _, terms = before
    assert {term_of(name) for name in gradients} == set(TERMS)
    for name, gradient in gradients.items():
        assert float(terms[name][1]) > 0 and float(terms[name][0]) != 0, f"{name} is not tested"
        if name == "text":
            assert (np.abs(gradient).max(axis=-1) > 1e-6).all()  # each of the K
        else:
            assert (np.asarray(gradient) == 0).all(), name


def test_heads_do_not_see_the_thinking_tokens(model, batch, before):
    out, _ = before
    thinking = model.student.thinking[...]
    try:
        model.student.thinking[...] = thinking + 1
        after, _ = compute(model, batch)
    finally:
        model.student.thinking[...] = thinking
    for got, want in zip(taught(batch, after.spatial), taught(batch, out.spatial), strict=True):
        np.testing.assert_array_equal(got, want)
    for name in ("depth_logits_SVhwZ", "patch_logits_SVPc", "detection", "features_SVPF"):
        assert same(getattr(after, name), getattr(out, name)), name
    difference = np.abs(after.answer_hidden_SQAD - out.answer_hidden_SQAD)[paid(batch)]
    assert (difference.max(-1) > 0).all()


def test_the_dense_heads_do_not_see_v(model, batch, before):
    """Whom the depth hint, which V alone is told, must not reach: it would tell them depth."""
    out, _ = before
    hinted, _ = compute(model, changed(batch, depth_hint_SVP=batch.depth_hint_SVP * 3))
    for name in ("depth_logits_SVhwZ", "patch_logits_SVPc", "detection", "features_SVPF"):
        assert same(getattr(hinted, name), getattr(out, name)), name
    for part in ("answer_hidden_SQAD", "spatial"):
        assert not same(getattr(hinted, part), getattr(out, part)), part


def test_only_answer_tokens_are_paid(model, batch, before):
    _, terms = before
    assert float(terms["text"][1]) == batch.answer_length_SQ.sum()
    unpaid = other(batch.answer_SQA, ~paid(batch))
    # Training reads the packed rows; these serve generation.
    questions = other(batch.question_SQL, np.ones(batch.question_SQL.shape, bool))
    beyond = changed(batch, answer_SQA=unpaid, question_SQL=questions)
    assert same(compute(model, beyond)[1], terms)
    s, q = 0, 1
    labels = batch.answer_SQA.copy()
    labels[s, q, 0] = (labels[s, q, 0] + 1) % VOCABULARY  # the first has no teacher's logits
    _, after = compute(model, changed(batch, answer_SQA=labels))
    assert float(after["text"][0]) != float(terms["text"][0])
    assert same({n: t for n, t in after.items() if n != "text"},
                {n: t for n, t in terms.items() if n != "text"})  # fmt: skip


def test_a_later_answer_token_never_changes_an_earlier_state(model, batch, before):
    out, _ = before
    s, q = 0, 0
    first = batch.answer_column_SQA[s, q, 0]  # bos; answers follow it
    assert batch.answer_length_SQ[s, q] == ANSWER
    for token in range(1, ANSWER):  # which predicts answer token `token`
        packed = batch.packed_SWT.copy().reshape(batch.packed_SWT.shape[0], -1)
        packed[s, first + token] = (packed[s, first + token] + 1) % VOCABULARY
        after, _ = compute(model, changed(batch, packed_SWT=packed.reshape(batch.packed_SWT.shape)))
        difference = np.abs(after.answer_hidden_SQAD - out.answer_hidden_SQAD)[s, q].max(-1)
        assert (difference[:token] == 0).all() and (difference[token:] > 0).all()


# --- Vision ---------------------------------------------------------------------------------------


def test_without_a_view_nothing_of_the_vision_remains(model, batch, before):
    nothing = changed(batch, view_mask_SV=np.zeros_like(batch.view_mask_SV))
    out, _ = compute(model, nothing)
    other_vision = changed(
        nothing, vision_SVPC=batch.vision_SVPC[::-1] + 1, depth_hint_SVP=batch.depth_hint_SVP * 3
    )
    assert same(compute(model, other_vision)[0], out)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))
    blind, _ = compute(model, HiddenCoT(HiddenCoTConfig(STUDENT, vision=False)).prepare(batch))
    assert same(blind, out)
    seeing, _ = before
    assert not np.array_equal(seeing.answer_hidden_SQAD, out.answer_hidden_SQAD)


def test_padding_views_are_not_seen(model, batch, before):
    _, terms = before
    assert batch.view_mask_SV.tolist() == [[True, True], [True, False]]
    vision, hint = batch.vision_SVPC.copy(), batch.depth_hint_SVP.copy()
    vision[1, 1] += 1
    hint[1, 1] = 0  # what the pipeline leaves there
    _, after = compute(model, changed(batch, vision_SVPC=vision, depth_hint_SVP=hint))
    for name in terms:
        if term_of(name) not in ("multiview", "spatial"):
            assert same(after[name], terms[name]), name


def test_scenes_do_not_hear_each_other(model, batch, before):
    out, _ = before
    vision = batch.vision_SVPC.copy()
    vision[1] += 1
    after, _ = compute(model, changed(batch, vision_SVPC=vision))
    assert same(*(jax.tree.map(lambda x: x[0], o) for o in (out, after)))
    assert not np.array_equal(out.answer_hidden_SQAD[1], after.answer_hidden_SQAD[1])
