"""GEODE's stages: who learns, what is paid, what stands before the text, what an answer says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.scipy.special import logsumexp
from PIL import Image

from geode_jax.errors import UserError
from geode_jax.exports import units
from geode_jax.geometry.boxes import decode_boxes, encode_boxes
from geode_jax.models.drh import decode_values
from geode_jax.models.drm import DrmConfig
from geode_jax.models.geode import GeodeConfig, nearest_patches
from geode_jax.models.internvl import InternVLConfig
from geode_jax.models.layout import layout_facts
from geode_jax.models.packed import pick
from geode_jax.models.vit import VitConfig
from geode_jax.objectives.geode import (
    LEARNS,
    GeodeStage,
    GeodeStageConfig,
    box_regression,
    layout_alignment,
    value_regression,
)
from geode_jax.training.optimizer import OptimizerConfig, make_optimizer
from geode_jax.training.step import TrainState, make_train_step
from tests.helpers.tiny_models import EOS_ID, PAD_ID, STUDENT, VIEWS, materialize, tiny_batch

REG_ID, BOX_ID = 21, 22
POINTS = 6
MODEL = GeodeConfig(
    vlm=InternVLConfig(
        vision=VitConfig(8, 4, width=8, layers=1, heads=2, mlp_width=12),
        decoder=dataclasses.replace(STUDENT.decoder, cross_layers=(), layers=2, tied_head=True),
    ),
    drm=DrmConfig(
        width=8, heads=2, layers=1, slots=3, bands=2,
        visual_width=8, point_width=4, llm_width=16, max_frames=VIEWS,
    ),
    drh_width=8,
    patch_grid=(2, 2),
    categories=3,
    views=VIEWS,
)  # fmt: skip
WEIGHTS = {"layout_weight": 2.0, "rationale_weight": 0.5, "patch_weight": 3.0}


def stage(name: str, **changes) -> GeodeStage:
    fields = dict(model=MODEL, stage=name, controls=(REG_ID, BOX_ID)) | WEIGHTS | changes
    return GeodeStage(GeodeStageConfig(**fields))


@pytest.fixture(scope="module")
def model():
    return materialize(stage("joint").build)


@pytest.fixture(scope="module")
def batch():
    """`tiny_batch` with pictures and points; the first answers are a value and a box."""
    made, random = tiny_batch(seed=2), np.random.default_rng(5)
    S, Q = made.answer_length_SQ.shape
    answer, length = made.answer_SQA.copy(), made.answer_length_SQ.copy()
    answer[:, 0, :2], answer[:, 0, 2:], length[:, 0] = (REG_ID, EOS_ID), PAD_ID, 2
    answer[:, 1, :2], answer[:, 1, 2:], length[:, 1] = (BOX_ID, EOS_ID), PAD_ID, 2
    tokens = made.packed_SWT.reshape(S, -1).copy()
    for slot, token in ((0, REG_ID), (1, BOX_ID)):
        tokens[np.arange(S), made.answer_column_SQA[:, slot, 0] + 1] = token
    column = made.answer_column_SQA.copy()
    column[:, :2, 1] = column[:, :2, 0] + 1
    boxes = random.uniform(0.3, 2, (S, Q, 7)).astype(np.float32)
    known = np.arange(Q) == np.array([[0], [1]])
    return dataclasses.replace(
        made,
        image_SVhw3=random.integers(0, 256, (S, VIEWS, 8, 8, 3), np.uint8),
        point_SJC=random.normal(size=(S, POINTS, 4)).astype(np.float32),
        coord_SJ3=random.normal(size=(S, POINTS, 3)).astype(np.float32),
        point_frame_SJ=np.broadcast_to(np.arange(POINTS) % VIEWS, (S, POINTS)).astype(np.int32),
        point_mask_SJ=np.arange(POINTS) < np.array([[6], [4]]),
        answer_SQA=answer,
        answer_length_SQ=length,
        packed_SWT=tokens.reshape(made.packed_SWT.shape),
        answer_column_SQA=column,
        value_mask_SQ=np.broadcast_to(known[:1], (S, Q)),
        box_SQ7=boxes,
        box_mask_SQ=np.broadcast_to(known[1:], (S, Q)),
    )


# --- What learns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(LEARNS))
def test_a_step_moves_the_stages_parts_and_nothing_else(name, batch):
    objective = stage(name)
    graph, params, frozen = nnx.split(materialize(objective.build), objective.trainable, ...)
    config = OptimizerConfig("muon", 0.1, weight_decay=0.1, warmup_steps=0, steps=10)
    optimizer = make_optimizer(config, params)
    state = TrainState(jnp.zeros((), jnp.int32), params, frozen, optimizer.init(params))
    # No optimizer memory of what is frozen (and 3 coefficients of Muon's).
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments <= 3 + 2 * sum(x.size for x in jax.tree.leaves(params))
    before = jax.tree.map(np.array, (params, frozen))
    after, metrics = make_train_step(objective, graph, optimizer, state, 1)(state, batch)
    for (path, old), (_, new) in zip(
        nnx.to_flat_state(before[0]), nnx.to_flat_state(after.params), strict=True
    ):
        assert not LEARNS[name] or {*path} & {*LEARNS[name]}, path
        assert (np.asarray(new[...]) != old[...]).any(), path
    for (path, old), (_, new) in zip(
        nnx.to_flat_state(before[1]), nnx.to_flat_state(after.frozen), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(new[...]), old[...], err_msg=str(path))
    assert np.isfinite(metrics["loss"])


# --- What stands before the text ------------------------------------------------------------------


read = jax.jit(
    lambda model, batch, parts, slots: model.read(batch, model.prefix(batch, parts, slots)),
    static_argnums=(2, 3),
)


def test_padding_views_and_points_are_nobodys_word(model, batch):
    parts = ("spatio", "visual")
    image, coord = batch.image_SVhw3.copy(), batch.coord_SJ3.copy()
    image[-1, 1] = 255 - image[-1, 1]
    coord[1, 4:] += 3
    other = dataclasses.replace(batch, image_SVhw3=image, coord_SJ3=coord)
    seen = read(model, batch, parts, None)
    np.testing.assert_allclose(read(model, other, parts, None), seen, atol=1e-5)
    image[-1, 0] = 255 - image[-1, 0]
    assert np.abs(read(model, other, parts, None) - seen)[-1].max() > 1e-3


def test_text_behind_a_short_prefix_is_as_if_nothing_stood_behind_it(model, batch):
    """The second scene has one view: its text must not see, nor count, the columns of another."""
    one = jax.tree.map(lambda x: x[1:], batch)
    cut = dataclasses.replace(
        one,
        image_SVhw3=one.image_SVhw3[:, :1],
        view_mask_SV=one.view_mask_SV[:, :1],
        extrinsic_SV34=one.extrinsic_SV34[:, :1],
        points_SVP3=one.points_SVP3[:, :1],
        points_mask_SVP=one.points_mask_SVP[:, :1],
    )
    parts = ("spatio", "visual")
    own = np.asarray(read(model, cut, parts, None))
    np.testing.assert_allclose(read(model, batch, parts, None)[1:], own, atol=1e-5)


def test_without_views_nothing_stands_before_the_text(model, batch):
    blind = dataclasses.replace(batch, view_mask_SV=np.zeros_like(batch.view_mask_SV))
    alone = read(model, batch, (), None)
    np.testing.assert_allclose(read(model, blind, ("spatio", "visual"), None), alone, atol=1e-5)
    assert stage("joint", vision=False).prefix_parts() == ()


def test_fewer_rationale_tokens_are_the_first_ones(model, batch):
    prefix = jax.jit(lambda m, b, n: m.prefix(b, ("spatio",), n), static_argnums=2)
    few, all_ = prefix(model, batch, 2), prefix(model, batch, None)
    np.testing.assert_allclose(few.spatio_SRD, all_.spatio_SRD[:, :2], atol=1e-6)
    assert few.length_S.tolist() == [2, 2] and all_.length_S.tolist() == [3, 3]


def test_points_and_cameras_of_some_frames_alone(model, batch):
    """Table 2: what the other frames give in 3D is nobody's word; the ViT's frames stay."""
    some = dataclasses.replace(MODEL, drm=dataclasses.replace(MODEL.drm, frames=1))
    graph, state = nnx.split(model)
    one = nnx.merge(graph, state)
    one.config = some
    spatio = jax.jit(lambda m, b: m.prefix(b, ("spatio",)).spatio_SRD)
    before = np.asarray(spatio(one, batch))

    def changed(name, index, by):
        value = np.array(getattr(batch, name))
        value[index] = value[index] + by
        other = dataclasses.replace(batch, **{name: value})
        return np.abs(np.asarray(spatio(one, other)) - before)[0].max()

    unseen = batch.point_frame_SJ[0] == 1
    for name, index in (
        ("coord_SJ3", (0, unseen)), ("point_SJC", (0, unseen)),
        ("extrinsic_SV34", (0, 1)), ("points_SVP3", (0, 1)),
    ):  # fmt: skip
        assert changed(name, index, 1) < 1e-6, name
    assert changed("coord_SJ3", (0, ~unseen), 1) > 1e-4
    assert changed("image_SVhw3", (0, 1, slice(None), 0), np.uint8(99)) > 1e-4


def test_conditioned_on_the_scenes_question(batch):
    asked = dataclasses.replace(MODEL.drm, condition_on_question=True)
    model = materialize(stage("drm", model=dataclasses.replace(MODEL, drm=asked)).build)
    spatio = jax.jit(lambda m, b: m.prefix(b, ("spatio",)).spatio_SRD)
    before = np.asarray(spatio(model, batch))
    question = np.array(batch.question_SQL)
    question[0, 0, : question.shape[2] - batch.question_length_SQ[0, 0]] += 1  # padding
    question[0, 1] += 1  # another question
    question[1, 0, -1] += 1
    moved = np.abs(spatio(model, dataclasses.replace(batch, question_SQL=question)) - before)
    assert moved[0].max() < 1e-6 < 1e-4 < moved[1].max()


def test_frames_are_squeezed_to_the_encoders_square(model, batch):
    """Pillow's bicubic filter is another hand's."""
    S, V, size = *batch.image_SVhw3.shape[:2], (12, 20)
    wide = np.random.default_rng(0).integers(60, 190, (S, V, *size, 3), np.uint8)
    channels = [
        Image.fromarray(channel.astype(np.float32)).resize((8, 8), Image.Resampling.BICUBIC)
        for channel in wide.transpose(0, 1, 4, 2, 3).reshape(-1, *size)
    ]
    square = np.stack([np.asarray(c) for c in channels]).reshape(S, V, 3, 8, 8)
    square = square.transpose(0, 1, 3, 4, 2)
    expected = model.features(dataclasses.replace(batch, image_SVhw3=square))
    found = model.features(dataclasses.replace(batch, image_SVhw3=wide))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_patches_of_another_size_take_the_export_patch_at_their_centre():
    assert nearest_patches(2, (2, 2)).tolist() == [0, 1, 2, 3]
    assert nearest_patches(1, (3, 5)).tolist() == [1 * 5 + 2]
    assert nearest_patches(4, (2, 1)).tolist() == [0] * 8 + [1] * 8


def test_without_the_module_only_visual_tokens_stand_there():
    without = dataclasses.replace(MODEL, drm=None)
    assert stage("joint", model=without).prefix_parts() == ("visual",)
    assert stage("joint").prefix_parts() == ("spatio", "visual")


def test_positions_before_a_question_are_those_of_all_parts():
    assert stage("drm").prefix_length(VIEWS) == 3 + 3 + VIEWS * 1
    without = dataclasses.replace(MODEL, drm=None)
    assert stage("drm", model=without).prefix_length(VIEWS) == 3 + VIEWS


def test_an_objective_of_fewer_rationale_tokens():
    assert stage("joint").with_slots(2) == stage("joint", slots=2)
    with pytest.raises(UserError, match="slots: 4 of 3 rationale tokens"):
        stage("joint").with_slots(4)


# --- What is paid ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def terms(model, batch):
    def of(name, **changes):
        made = jax.jit(stage(name, **changes).terms)(model, batch)
        return {term: (float(part), float(count)) for term, (part, count) in made.items()}

    return of


def test_every_stage_pays_its_own_terms(terms, batch):
    words = float(batch.answer_length_SQ.sum())
    assert terms("align")["text"][1] == words
    found = terms("pretrain")
    asked = ("relations", "objects", "places", "gaps", "angle", "value")
    assert set(found) == {"text", "patches", *(f"spatial/{name}" for name in asked)}
    assert found["patches"][1] == (batch.target_segmentation_SVP > -2).sum()
    assert set(terms("drm")) == {"text", "layout", "rationale_alignment"}
    assert set(terms("drm", layout_weight=0.0, rationale_weight=0.0)) == {"text"}
    found = terms("joint")
    assert set(found) == {"text", "values", "boxes"}
    assert found["values"][1] == found["boxes"][1] == 2
    assert set(terms("joint", model=dataclasses.replace(MODEL, drh_width=0))) == {
        "text", "values", "boxes"
    }  # fmt: skip


def test_patches_of_no_category_are_the_last_class(model, batch):
    part, _ = jax.jit(stage("pretrain").terms)(model, batch)["patches"]
    logits = np.asarray(model.patch_logits(batch))
    label = np.where(
        batch.target_segmentation_SVP == -1, MODEL.categories, batch.target_segmentation_SVP
    )
    own = np.take_along_axis(logits, np.maximum(label, 0)[..., None], -1)[..., 0]
    expected = np.where(label >= 0, logsumexp(logits, axis=-1) - own, 0).sum()
    np.testing.assert_allclose(part, expected, rtol=1e-5)


def test_a_value_is_read_where_its_control_token_is_the_input(model, batch):
    """What training reads at an answer's first token is what the head says of a generated one."""
    objective = stage("joint")
    out = jax.jit(lambda m, b: objective.answer(m, objective.encode_scene(m, b), b, EOS_ID))(
        model, batch
    )
    # The same tokens as if they were the answers.
    packed = batch.packed_SWT.reshape(2, -1).copy()
    column = batch.answer_column_SQA[:, :2, 1]
    np.put_along_axis(packed, column, np.asarray(out["tokens"][:, :2, 0]), axis=1)
    forced = dataclasses.replace(batch, packed_SWT=packed.reshape(batch.packed_SWT.shape))
    state = pick(read(model, forced, objective.prefix_parts(), None), column)
    np.testing.assert_allclose(out["values"][:, :2, 0], model.drh.values(state), atol=1e-4)
    boxes = decode_boxes(model.drh.boxes(state))
    np.testing.assert_allclose(out["boxes"][:, :2, 0], boxes, rtol=1e-3, atol=1e-4)


def test_the_layouts_columns_are_what_the_first_slots_should_be(model, batch):
    """One box a category: the difference to its column, of scenes whose boxes are known."""
    columns = np.asarray(model.layout(batch))
    batch = dataclasses.replace(batch, boxes_known_S=np.array([True, False]))
    for slots in (2, 3, 5):
        spatio = np.random.default_rng(0).normal(size=(2, slots, 16)).astype(np.float32)
        both = min(slots, 3)
        spatio[:, :both] = columns[:, :both] + 0.1 * spatio[:, :both]
        part, count = layout_alignment(spatio, model.layout, batch)
        assert count == both
        expected = np.square(spatio[0, :both] - columns[0, :both]).mean(-1).sum()
        np.testing.assert_allclose(part, expected, rtol=1e-4)
    assert layout_alignment(columns, model.layout, batch)[0] < 1e-10


def test_the_layouts_columns_pull_alike_as_boxes_turn(model, batch):
    """No jump at 45 degrees, one value for all names, and elsewhere the column that is read."""
    rng = np.random.default_rng(1)
    spatio = rng.normal(size=(2, 3, 16)).astype(np.float32)

    @jax.vmap
    def pull(boxes):
        # Two boxes of one category and one of another.
        turned = dataclasses.replace(
            batch, target_boxes_SN7=boxes, target_labels_SN=np.array([[0, 0, 2]] * 2)
        )
        loss, gradient = jax.value_and_grad(lambda x: layout_alignment(x, model.layout, turned)[0])(
            spatio
        )
        return loss, gradient, model.layout(turned)

    degrees = np.concatenate([np.arange(-180.0, 361), 45 + 0.01 * np.arange(-3, 4)])
    boxes = np.tile(batch.target_boxes_SN7, (len(degrees), 1, 1, 1))
    boxes[..., 6] = [0.1, -0.2, 0.0]
    boxes[:, :, 0, 6] = np.radians(degrees)[:, None]
    loss, gradient, columns = (np.asarray(x, np.float64) for x in pull(boxes))
    assert np.isfinite(gradient).all()
    # The columns jump; the loss is as smooth there as elsewhere.
    jump = np.abs(np.diff(columns[-7:], axis=0)).max()
    assert jump > 0.1 and np.abs(np.diff(loss[-7:])).max() < 1e-3 * loss.mean()
    step = np.abs(np.diff(loss[:541]))
    assert step.max() < 5 * np.median(step[step > 0]) + 0.01 * loss.mean()
    names = boxes[[0, 90, 200, 300]].copy()
    names[..., [3, 4]] = names[..., [4, 3]]
    names[..., 6] += np.pi / 2
    other = pull(names)
    np.testing.assert_allclose(other[0], loss[[0, 90, 200, 300]], rtol=1e-4)
    # Away from 45 degrees it pulls to the mean of the boxes' columns, which is the category's.
    spatio = (columns[180] + 0.1 * spatio).astype(np.float32)
    gradient = pull(boxes[180:181])[1][0]
    np.testing.assert_allclose(gradient, 2 * (spatio - columns[180]) / 16, rtol=1e-3, atol=1e-5)


def test_rationales_are_embedded_with_nothing_before_them(model, batch):
    part, count = jax.jit(stage("drm").terms)(model, batch)["rationale_alignment"]
    states = np.asarray(pick(read(model, batch, (), None), batch.answer_column_SQA))
    spatio = np.asarray(model.prefix(batch, ("spatio",)).spatio_SRD).mean(1)
    expected = 0.0
    for s in range(2):
        length = batch.answer_length_SQ[s]
        own = np.concatenate([x[:n] for x, n in zip(states[s], length, strict=True)]).mean(0)
        cosine = own @ spatio[s] / np.linalg.norm(own) / np.linalg.norm(spatio[s])
        expected += 1 - cosine
    assert count == 2
    np.testing.assert_allclose(part, expected, rtol=1e-4)


def test_layout_facts(batch):
    facts = np.asarray(layout_facts(batch, MODEL.categories))
    assert facts.shape == (2, 3, 14 + VIEWS)
    there, count = facts[..., 0], facts[..., 1]
    np.testing.assert_array_equal(there, [[1, 0, 1], [1, 0, 1]])
    np.testing.assert_allclose(count, there / 3)
    np.testing.assert_allclose(facts[:, 0, 2:5], batch.target_boxes_SN7[:, 0, :3], rtol=1e-6)
    share = (batch.target_segmentation_SVP == 0).mean(-1)
    np.testing.assert_allclose(facts[:, 0, 10:12], np.minimum(8 * share, 1), rtol=1e-6)
    assert not facts[:, 1, :-4].any()
    extent = batch.points_SVP3[..., :2]
    np.testing.assert_allclose(facts[0, 1, -4:-2], extent[0].max((0, 1)) / 4, rtol=1e-5)
    np.testing.assert_allclose(facts[0, 1, -2:], extent[0].min((0, 1)) / 4, rtol=1e-5)


# --- What an answer says --------------------------------------------------------------------------


class Words:
    """A tokenizer whose ids are their own names."""

    eos_id = EOS_ID

    def decode(self, ids):
        return "".join(f" w{i}" for i in ids)


def test_values_stand_for_their_control_tokens():
    tokens = np.full((1, 2, 5), EOS_ID)
    tokens[0, 0, :4] = 5, REG_ID, 6, BOX_ID
    out = {
        "tokens": tokens,
        "values": np.full((1, 2, 5), np.log(1.234)),
        "boxes": np.arange(70.0).reshape(1, 2, 5, 7),
    }
    said = stage("joint").decode_answer(out, (0, 0), {"kind": "x", "unit": "cm"}, Words())
    assert said["prediction"].startswith("w5 123 w6 21.00 22.00")
    assert said["predicted_box"] == [21, 22, 23, 24, 25, 26, 27]
    np.testing.assert_allclose(said["predicted_value"], 123.4, rtol=1e-5)
    assert stage("joint").decode_answer(out, (0, 1), {"kind": "x"}, Words()) == {"prediction": ""}
    words = {"tokens": tokens}
    text = stage("joint", controls=None).decode_answer(words, (0, 0), {"kind": "x"}, Words())
    assert text == {"prediction": "w5 w21 w6 w22"}


@pytest.mark.parametrize("slots", [2, 4])
def test_more_or_fewer_rationale_tokens_than_categories(slots, batch):
    drm = dataclasses.replace(MODEL.drm, slots=slots)
    objective = stage("drm", model=dataclasses.replace(MODEL, drm=drm))
    shapes = jax.eval_shape(objective.terms, materialize(objective.build), batch)
    assert shapes["layout"][0].shape == ()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(2.34, "m", "2.3"), (23.4, "cm", "23"), (2.6, "items", "3"), (18.26, "m2", "18.3")],
)
def test_numbers_are_written_as_answers_are(value, unit, text):
    assert units.write_number(value, unit) == text


def test_a_code_is_a_value_in_the_questions_unit():
    np.testing.assert_allclose(decode_values(jnp.log(1.5), jnp.float32(0.01)), 150, rtol=1e-5)


def test_raw_regression_is_the_squared_error_of_the_numbers_in_their_units():
    """Eq. 6 as printed, in float64, with what is masked out left without influence."""
    values, unit = np.array([2.5, 180.0, np.nan]), np.array([1.0, 0.01, 1.0])
    said, mask = np.array([3.0, 150.0, 7.0]), np.array([True, True, False])
    codes = jnp.asarray(np.log(said * unit), jnp.float32)
    total, count = value_regression(codes, values, jnp.asarray(unit, jnp.float32), mask, raw=True)
    assert float(total) == pytest.approx(0.5**2 + 30.0**2, rel=1e-5) and count == 2

    truth = np.array([[1, 2, 0.5, 2.0, 1.0, 1.0, 0.2], [0, 0, 0, 1, 1, 1, 1.5], np.full(7, np.nan)])
    found = truth + [[0.1, 0, -0.2, 0.3, 0, 0, 0.1], [0, 0, 0, 0, 0, 0, 0.3], [0] * 7]
    # The same as the first, described with length and width exchanged.
    found[0, 3:5], found[0, 6] = found[0, [4, 3]], found[0, 6] + np.pi / 2
    known = np.array([True, True, False])
    codes = encode_boxes(jnp.asarray(np.where(known[:, None], found, 1.0), jnp.float32))
    total, count = box_regression(codes, truth, known, raw=True)
    wanted = 0.1**2 + 0.2**2 + 0.3**2 + 0.1**2 + 0.3**2
    assert float(total) == pytest.approx(wanted, rel=1e-4) and count == 2
    slope = jax.grad(lambda c: box_regression(c, truth, known, raw=True)[0])(codes * 0)
    assert np.isfinite(slope[2]).all() and not slope[2].any()
