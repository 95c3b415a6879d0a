"""Batches for GEODE: images, points, rationales, control tokens."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from geode_jax.data.control import BOX, REG, control_of
from geode_jax.data.pipeline import Pipeline
from geode_jax.data.settings import PipelineConfig, measure_lengths
from geode_jax.data.tokens import Tokenizer, train_tokenizer
from geode_jax.errors import UserError
from geode_jax.exports import Export, ExportError, ExportWriter, write_scene
from geode_jax.exports.prompts import prompt
from tests.helpers.batches import asked, changed, check_packing, digest
from tests.helpers.exports import (
    CATEGORIES,
    HEADER,
    IMAGE,
    POINT_WIDTH,
    tiny_scene,
    write_geode_export,
)


@pytest.fixture(scope="module")
def tokenizer(geode_export) -> Tokenizer:
    questions = list(geode_export.questions())
    texts = [prompt(q) for q in questions]
    texts += [" " + q[name] for q in questions for name in ("answer", "rationale") if name in q]
    return train_tokenizer(texts, CATEGORIES, min_count=2).with_tokens([REG, BOX])


@pytest.fixture(scope="module")
def config(geode_export, tokenizer) -> PipelineConfig:
    return PipelineConfig(
        export=str(geode_export.folder),
        scenes_per_batch=4,
        questions_per_scene=16,
        question_length=64,
        answer_length=48,
        max_boxes=6,
        rows_per_scene=16,
        row_length=96,
        vision="images",
        controls=(tokenizer.id_of(REG), tokenizer.id_of(BOX)),
    )


def test_images_and_points_come_with_the_batch(geode_export, tokenizer, config):
    pipeline = Pipeline(geode_export, tokenizer, config, "train")
    batch = pipeline.batch(0)
    assert batch.vision_SVPC.shape == (4, 3, 6, 0)
    assert batch.image_SVhw3.shape == (4, 3, *IMAGE, 3) and batch.image_SVhw3.dtype == np.uint8
    assert batch.point_SJC.shape == (4, 6, POINT_WIDTH) and batch.coord_SJ3.shape == (4, 6, 3)
    found = set()
    for scene_id in geode_export.scene_ids("train"):
        tensors = geode_export.read_scene(scene_id, ["images", "sonata/features", "sonata/coord"])
        views, points = len(tensors["images"]), len(tensors.get("sonata/coord", ()))
        for s in range(4):
            if np.array_equal(batch.image_SVhw3[s, :views], tensors["images"]):
                assert batch.view_mask_SV[s].sum() == views
                assert batch.point_mask_SJ[s].sum() == points
                if points:
                    np.testing.assert_array_equal(
                        batch.coord_SJ3[s, :points], tensors["sonata/coord"]
                    )
                found.add(scene_id)
    assert found == set(geode_export.scene_ids("train"))
    ((_, again),) = pipeline.iterate(0, 1)
    assert digest(again) == digest(batch)
    ((records, last),) = Pipeline(geode_export, tokenizer, config, "val").eval_batches()
    assert [bool(row) for row in records] == [True, True, False, False]
    assert not last.image_SVhw3[2:].any() and not last.point_mask_SJ[2:].any()


def test_pictures_smaller_than_others_are_scaled_up(tmp_path, tokenizer, config):
    import jax

    random, stored = np.random.default_rng(0), {}
    with ExportWriter(tmp_path / "export", **HEADER) as writer:
        for scene, size in (("large", (12, 16)), ("small", (6, 10)), ("tall", (14, 4))):
            # Far from black and white, where the overshoot of the kernel is cut off between axes.
            stored[scene] = random.integers(96, 160, (2, *size, 3), np.uint8)
            writer.add_scene(scene, {"images": stored[scene]}, split="train")
            question = {"kind": "contact", "question": "Is it?", "answer": "yes"}
            writer.add_questions([{"id": scene, "scene_id": scene} | question])
    pipeline = Pipeline(Export(tmp_path / "export"), tokenizer, config, "train")
    assert pipeline.shapes.image == (14, 16)
    batch = pipeline.batch(0)
    wanted = [
        np.asarray(jax.image.resize(i / 255.0, (2, 14, 16, 3), "cubic", antialias=True))
        for i in stored.values()
    ]
    for found in batch.image_SVhw3[:3]:
        # Both interpolate with Keys' kernel of a = -1/2; only the rounding differs.
        off = [np.abs(found[:2] - 255 * w.clip(0, 1)).max() for w in wanted]
        wanted.pop(int(np.argmin(off)))
        assert min(off) <= 1
    assert not wanted


def test_a_scene_without_images_is_bad(tmp_path, tokenizer, config):
    export = write_geode_export(tmp_path / "export", train=2, val=0)
    arrays, _ = tiny_scene(np.random.default_rng(0), 2, 3)
    entry = write_scene(export.folder, "other", arrays, split="train", manifest=export.manifest)
    question = {"id": "other_0", "scene_id": "other", "kind": "contact", "answer": "yes"}
    lines = (export.folder / "questions.jsonl").read_bytes()
    lines += json.dumps(question | {"question": "Is it?"}).encode() + b"\n"
    (export.folder / "questions.jsonl").write_bytes(lines)
    count, sha256 = lines.count(b"\n"), hashlib.sha256(lines).hexdigest()
    manifest = export.manifest | {
        "scenes": [*export.manifest["scenes"], entry],
        "questions": {"count": count, "sha256": sha256},
    }
    (export.folder / "manifest.json").write_text(json.dumps(manifest))
    pipeline = Pipeline(Export(export.folder), tokenizer, config, "train")
    with pytest.raises(ExportError, match="scene other: tensor images: missing"):
        pipeline.batch(0)


def test_numbers_and_boxes_are_answered_by_control_tokens(geode_export, tokenizer, config):
    pipeline = Pipeline(geode_export, tokenizer, config, "train")
    assert not pipeline.dropped
    token, seen = dict(zip((REG, BOX), config.controls, strict=True)), Counter()
    for records, batch in pipeline.eval_batches():
        assert check_packing(batch) == sum(map(len, records))
        for s, row in enumerate(records):
            for q, record in enumerate(row):
                answer = tokenizer.encode(" " + record["answer"])
                if control_of(record):
                    answer = [token[control_of(record)]]
                ids = batch.answer_SQA[s, q, : batch.answer_length_SQ[s, q]].tolist()
                assert ids == [*answer, tokenizer.eos_id]
                assert batch.box_mask_SQ[s, q] == ("box" in record)
                box = np.float32(record.get("box", np.zeros(7)))
                np.testing.assert_array_equal(batch.box_SQ7[s, q], box)
                assert batch.value_mask_SQ[s, q] == ("value" in record)
                unit = {"cm": 0.01}.get(record.get("unit"), 1)
                assert batch.base_unit_SQ[s, q] == np.float32(unit)
                seen[control_of(record), unit] += 1
            assert (batch.base_unit_SQ[s, len(row) :] == 1).all()
            assert not batch.box_mask_SQ[s, len(row) :].any()
    assert set(seen) == {("", 1), (REG, 1), (REG, 0.01), (BOX, 1)}
    for kinds, longest in ((["object_box", "object_size_estimation"], 2), (None, None)):
        measured = measure_lengths(geode_export, tokenizer, kinds=kinds, controls=config.controls)
        assert measured.answer == (longest or pipeline.max_answer_length)


def test_without_control_tokens_no_box_is_asked_for(geode_export, tokenizer, config):
    pipeline = Pipeline(geode_export, tokenizer, changed(config, controls=None), "train")
    assert pipeline.dropped == {"kind object_box": 4}
    for records, batch in pipeline.eval_batches():
        for row, scene in zip(records, asked(batch, tokenizer), strict=True):
            assert not any("box" in record for record in row)
            assert [(prompt(r), r["answer"]) for r in row] == scene
        assert not batch.box_mask_SQ.any() and np.float32(0.01) in batch.base_unit_SQ
    assert measure_lengths(geode_export, tokenizer, kinds=["object_box"]) is None
    assert measure_lengths(geode_export, tokenizer).answer == pipeline.max_answer_length


def test_rationales_can_be_learned(geode_export, tokenizer, config):
    stage1 = changed(config, answer_field="rationale", min_learned=0)
    pipeline = Pipeline(geode_export, tokenizer, stage1, "train")
    train = set(geode_export.scene_ids("train"))
    questions = [q for q in geode_export.questions() if q["scene_id"] in train]
    explained = [q for q in questions if "rationale" in q]
    assert pipeline.dropped == {"no rationale": len(questions) - len(explained)}
    found = []
    for records, batch in pipeline.eval_batches():
        for row, scene in zip(records, asked(batch, tokenizer), strict=True):
            assert [(prompt(r), r["rationale"]) for r in row] == scene
            found += [record["id"] for record in row]
    assert sorted(found) == sorted(q["id"] for q in explained)
    longest = max(len(tokenizer.encode(" " + q["rationale"])) + 1 for q in explained)
    measured = measure_lengths(
        geode_export, tokenizer, answer_field="rationale", controls=config.controls
    )
    assert measured.answer == pipeline.max_answer_length == longest


def test_a_rationale_may_come_without_its_question(geode_export, tokenizer, config):
    """Eq. 4 as printed: nothing but the bos stands before the rationale."""
    short = changed(config, answer_field="rationale", min_learned=0, question_length=1)
    assert Pipeline(geode_export, tokenizer, changed(short, asks_rationales=False), "train")
    with pytest.raises(UserError, match="no question to use"):
        Pipeline(geode_export, tokenizer, short, "train")
    stage1 = changed(config, answer_field="rationale", min_learned=0, asks_rationales=False)
    pipeline = Pipeline(geode_export, tokenizer, stage1, "train")
    for records, batch in pipeline.eval_batches():
        for row, scene in zip(records, asked(batch, tokenizer), strict=True):
            assert [("", r["rationale"]) for r in row] == scene
        counted = batch.answer_length_SQ > 0
        assert (batch.question_length_SQ[counted] == 1).all()
        assert (batch.question_SQL[..., -1][counted] == tokenizer.bos_id).all()
    # Answers always have their questions.
    answers = Pipeline(geode_export, tokenizer, changed(config, asks_rationales=False), "train")
    assert (answers.batch(0).question_length_SQ.max()) > 1


@pytest.mark.parametrize("field", ["answer", "rationale"])
def test_a_question_to_be_answered_holds_no_control_token(geode_export, tokenizer, config, field):
    settings = changed(config, answer_field=field, min_learned=0)
    pipeline = Pipeline(geode_export, tokenizer, settings, "train")
    record = {"scene_id": "scene004", "kind": "object_size_estimation", "question": "How long?"}
    batch = pipeline.one_question(record | {"unit": "cm"}, pipeline.one_scene("scene004"))
    assert batch.image_SVhw3.shape == (1, 3, *IMAGE, 3)
    assert not {*config.controls} & {*batch.answer_SQA.flat, *batch.packed_SWT.flat}
    assert not batch.value_mask_SQ.any()


BOX_7 = [1.0, 2.0, 0.5, 0.6, 0.4, 1.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"unit": "furlongs"}, "its unit is unknown or not regressed"),
        ({"question": "How long in cm?", "unit": "m"}, "its unit is not the one that"),
        ({"answer": "0", "value": 0.0}, "the value is zero or negative"),
        ({"answer": "9" * 30, "value": 1e30}, "the value is not from 0.01"),
        ({"box": [*BOX_7[:3], 1e-30, *BOX_7[4:]]}, "the box cannot be encoded"),
        ({"box": [1e20, *BOX_7[1:]]}, "the box cannot be encoded"),
    ],
)
def test_what_cannot_be_regressed_is_left_out_and_counted(tmp_path, tokenizer, config, fields, why):
    good = {"question": "How long?", "kind": "length", "answer": "3", "value": 3.0, "unit": "feet"}
    with ExportWriter(tmp_path / "export", **HEADER) as writer:
        arrays = {"images": np.ones((1, *IMAGE, 3), np.uint8)}
        writer.add_scene("scene", arrays, split="train")
        writer.add_questions([{"id": "good", "scene_id": "scene"} | good])
        writer.add_questions([{"id": "bad", "scene_id": "scene"} | good | fields])
        writer.add_scene("test", arrays, split="test")
        writer.add_questions([{"id": "asked", "scene_id": "test"} | good | fields])
    export = Export(tmp_path / "export")
    pipeline = Pipeline(export, tokenizer, config, "train")
    batch = pipeline.batch(0)
    (count,) = (n for key, n in pipeline.dropped.items() if f"nothing to regress: {why}" in key)
    assert count == 1 and batch.value_mask_SQ[0].sum() == 1
    np.testing.assert_allclose(batch.base_unit_SQ[0, 0], 0.3048)
    asked = Pipeline(export, tokenizer, config, "test")
    assert asked.dropped.total() == 0 and not asked.batch(0).value_mask_SQ.any()
    if "box" not in fields:  # a box cannot be answered in words
        plain = Pipeline(export, tokenizer, changed(config, controls=None), "train")
        words = plain.batch(0)
        (count,) = (n for key, n in plain.dropped.items() if "value not regressed" in key and n)
        assert count == 1 and words.value_mask_SQ[0].sum() == 1
        assert (words.question_length_SQ[0] > 0).sum() == 2
