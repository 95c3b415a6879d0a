"""Batches of training: their order, their arrays, and which questions are in them."""

import hashlib
import json
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pytest

from geode_jax.data.pipeline import Pipeline
from geode_jax.errors import UserError
from geode_jax.exports import RELATIONS, Export, ExportError, ExportWriter
from geode_jax.exports.prompts import prompt
from geode_jax.geometry.upright_boxes import box_gaps
from tests.helpers.batches import FIELDS, asked, changed, check_packing, digest, scenes_of
from tests.helpers.exports import HEADER, tiny_questions, tiny_scene, write_tiny_export

# --- The order ------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_step_only(tiny_export, tokenizer, config, pipeline):
    forward = [digest(pipeline.batch(step)) for step in range(6)]
    other = Pipeline(tiny_export, tokenizer, config, "train")
    backward = [digest(other.batch(step)) for step in reversed(range(6))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 6
    reseeded = Pipeline(tiny_export, tokenizer, changed(config, seed=6), "train")
    assert digest(reseeded.batch(0)) != forward[0]


def test_an_epoch_sees_every_scene_once(tiny_export, tokenizer, config):
    pipeline = Pipeline(tiny_export, tokenizer, changed(config, scenes_per_batch=1), "train")
    assert pipeline.steps_per_epoch == 7
    epochs = []
    for epoch in range(2):
        batches = [pipeline.batch(epoch * 7 + i) for i in range(7)]
        epochs.append([scenes_of(batch, tiny_export)[0] for batch in batches])
        assert sorted(epochs[-1]) == tiny_export.scene_ids("train")
    assert epochs[0] != epochs[1]


def test_more_scenes_in_a_batch_than_there_are_goes_on_with_other_questions(
    tiny_export, tokenizer, config
):
    wide = changed(config, scenes_per_batch=9, questions_per_scene=3)
    pipeline = Pipeline(tiny_export, tokenizer, wide, "val")
    assert pipeline.steps_per_epoch == 1
    batch = pipeline.batch(0)
    ids = scenes_of(batch, tiny_export)
    assert ids[:3] * 3 == ids and sorted(ids[:3]) == tiny_export.scene_ids("val")
    counts = Counter(q["scene_id"] for q in tiny_export.questions())
    for scene in range(3):
        rounds = [batch.question_SQL[scene + 3 * i] for i in range(3)]
        answers = [batch.answer_SQA[scene + 3 * i] for i in range(3)]
        pairs = {
            (q.tobytes(), a.tobytes())
            for qs, als in zip(rounds, answers, strict=True)
            for q, a in zip(qs, als, strict=True)
        }
        assert len(pairs) >= min(9, counts[ids[scene]]) - 1  # two questions may be alike


@pytest.mark.parametrize("most", [4, 40])
def test_questions_are_drawn_without_replacement_and_differ_by_epoch(
    tiny_export, tokenizer, config, most
):
    """Four of a scene's questions, and more than any scene has: then these are all of them."""
    own = {scene_id: Counter() for scene_id in tiny_export.scene_ids("train")}
    for q in tiny_export.questions():
        if q["scene_id"] in own:
            own[q["scene_id"]][prompt(q), q["answer"]] += 1
    config = changed(config, scenes_per_batch=1, questions_per_scene=most, rows_per_scene=most)
    pipeline = Pipeline(tiny_export, tokenizer, config, "train")
    drawn = {scene_id: [] for scene_id in own}
    for step in range(pipeline.steps_per_epoch * 8):
        batch = pipeline.batch(step)
        ((scene_id,), (questions,)) = scenes_of(batch, tiny_export), asked(batch, tokenizer)
        assert len(questions) == min(most, own[scene_id].total())
        assert Counter(questions) <= own[scene_id]
        drawn[scene_id].append(tuple(questions))
    assert all(len(draws) == 8 and len(set(draws)) > 4 for draws in drawn.values())


def test_rows_are_a_part_of_the_global_batch(pipeline):
    whole, parts = (
        pipeline.batch(1),
        [pipeline.batch(1, slice(0, 1)), pipeline.batch(1, slice(1, 3))],
    )
    for name in FIELDS:
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, name))


def test_iterating_gives_the_same_batches_from_any_step(pipeline):
    expected = [digest(pipeline.batch(step)) for step in range(7)]
    assert [(s, digest(b)) for s, b in pipeline.iterate(0, 7)] == list(enumerate(expected))
    assert [digest(b) for _, b in pipeline.iterate(4, 3)] == expected[4:]
    part = [b.view_mask_SV.shape[0] for _, b in pipeline.iterate(0, 2, slice(0, 2))]
    assert part == [2, 2]


@pytest.mark.parametrize(("workers", "on_bad_scene"), [(1, "skip"), (3, "skip"), (3, "stop")])
def test_the_order_is_the_same_for_any_number_of_workers(
    tiny_export, tokenizer, config, workers, on_bad_scene, tmp_path
):
    export = Export(shutil.copytree(tiny_export.folder, tmp_path / "export"))
    one = changed(config, on_bad_scene=on_bad_scene, scenes_per_batch=1, workers=workers)
    pipeline, parallel = (Pipeline(export, tokenizer, one, "train") for _ in range(2))
    (bad,) = scenes_of(pipeline.batch(4), export)
    (export.folder / "scenes" / f"{bad}.safetensors").unlink()
    found = []
    if on_bad_scene == "stop":
        with pytest.raises(ExportError, match=f"scene {bad}: .*{bad}.safetensors is missing"):
            found.extend(digest(batch) for _, batch in parallel.iterate(1, 7))
    else:
        found.extend(digest(batch) for _, batch in parallel.iterate(1, 7))
        assert parallel.dropped == {"bad scene": 1}
        assert list(parallel.bad_scenes) == [bad]
    assert found == [digest(pipeline.batch(step)) for step in range(1, 1 + len(found))]
    assert len(found) == {"stop": 3, "skip": 7}[on_bad_scene]


def test_iterating_ends_its_threads(tiny_export, tokenizer, config):
    before = {*threading.enumerate()}
    batches = Pipeline(tiny_export, tokenizer, changed(config, workers=3), "train").iterate(0, 100)
    next(batches)
    started = {*threading.enumerate()} - before
    assert started
    batches.close()
    deadline = time.monotonic() + 60
    while started & {*threading.enumerate()}:  # which has threads that are about to start, too
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- What is in a batch ---------------------------------------------------------------------------


def test_shapes_and_dtypes_are_those_of_the_key(pipeline):
    batch = pipeline.batch(0)
    sizes = dict(S=3, Q=4, V=3, P=6, C=5, L=24, A=12, N=6, O=5, F=7, Z=6, c=5, k=0, J=0, r=6)
    sizes |= dict(W=4, T=60)
    for name in FIELDS:
        letters = name.rsplit("_", 1)[1]
        # No scene has camera tokens; images and points are not what the student sees.
        sizes["C"] = 0 if name.startswith(("camera", "point")) else 5
        sizes |= dict(h=0, w=0) if name.startswith("image") else dict(h=4, w=6)
        expected = [int(x) if x.isdigit() else sizes[x] for x in letters]
        array = getattr(batch, name)
        assert list(array.shape) == expected, name
        kind = "b" if "mask" in name or "known" in name else "f"
        ids = ("question", "answer", "topk_id", "packed", "encoding", "object_column")
        if name.startswith((*ids, "point_frame")) or "labels" in name or "segm" in name:
            kind = "b" if name.startswith("packed_answer") else "i"
        kind = "u" if name.startswith("image") else kind
        assert array.dtype == {"u": np.uint8, "b": bool, "f": np.float32, "i": np.int32}[kind], name
    assert all(digest(pipeline.batch(s)) != digest(batch) for s in (1, 2))


def test_questions_arrive_with_their_supervision(tiny_export, tokenizer, config):
    pipeline = Pipeline(tiny_export, tokenizer, changed(config, questions_per_scene=12), "train")
    records = {}
    for record in tiny_export.questions():
        records[record["scene_id"], prompt(record), record["answer"]] = record
    seen = Counter()
    for step in range(2):
        batch = pipeline.batch(step)
        for s, scene_id in enumerate(scenes_of(batch, tiny_export)):
            tensors = tiny_export.read_scene(scene_id)
            for q, pair in enumerate(asked(batch, tokenizer)[s]):
                record = records[scene_id, *pair]
                check_question(batch, s, q, record, tensors, tokenizer)
                seen[record["kind"]] += 1
            empty = batch.answer_length_SQ[s] == 0
            assert empty.sum() == 12 - len(asked(batch, tokenizer)[s])
            for name in ("objects_mask_SQO", "relations_mask_SQr", "value_mask_SQ"):
                assert not getattr(batch, name)[s][empty].any()
            assert not batch.teacher_relations_mask_SQr[s][empty].any()
            assert (batch.question_SQL[s][empty] == tokenizer.pad_id).all()
    assert len(seen) == 5


def check_question(batch, s, q, record, tensors, tokenizer):
    length, answer_length = batch.question_length_SQ[s, q], batch.answer_length_SQ[s, q]
    ids = [*tokenizer.encode(prompt(record)), tokenizer.bos_id]
    assert batch.question_SQL[s, q].tolist() == [tokenizer.pad_id] * (24 - length) + ids
    ids = [*tokenizer.encode(" " + record["answer"]), tokenizer.eos_id]
    assert batch.answer_SQA[s, q].tolist() == ids + [tokenizer.pad_id] * (12 - answer_length)
    assert batch.value_mask_SQ[s, q] == ("value" in record)
    assert batch.value_SQ[s, q] == np.float32(record.get("value", 0))
    objects = record.get("objects", [])
    assert batch.objects_mask_SQO[s, q].sum() == len(objects)
    first = batch.encoding_column_SQ[s, q] + 2 - length
    for o, item in enumerate(objects):
        np.testing.assert_array_equal(batch.objects_SQO7[s, q, o], np.float32(item["box"]))
        boxes = np.array([objects[0]["box"], item["box"]])
        assert batch.gaps_SQO[s, q, o] == np.float32(box_gaps(boxes, boxes)[0, 1])
        column, text = batch.object_column_SQO[s, q, o], prompt(record)
        label = tensors["target/labels"][item["index"]]
        shared = (tensors["target/labels"] == label).sum() > 1
        if item["name"] in text and not shared:
            # The text up to and with the token at its column ends with the name.
            read = batch.packed_SWT[s].reshape(-1)[first : column + 1]
            assert text.startswith(tokenizer.decode(read))
            assert tokenizer.decode(read).endswith(item["name"])
            assert text.count(item["name"], 0, len(tokenizer.decode(read))) == 1
        else:
            assert column == -1
    assert (batch.object_column_SQO[s, q, len(objects) :] == -1).all()
    relation = dict(zip(RELATIONS, batch.relations_SQr[s, q], strict=True))
    mask = dict(zip(RELATIONS, batch.relations_mask_SQr[s, q], strict=True))
    assert {name for name in mask if mask[name]} == set(record.get("relation", {}))
    assert all(relation[n] == np.float32(p) for n, p in record.get("relation", {}).items())
    teacher = dict(zip(RELATIONS, batch.teacher_relations_SQr[s, q], strict=True))
    mask = dict(zip(RELATIONS, batch.teacher_relations_mask_SQr[s, q], strict=True))
    if objects and "teacher/relations" in tensors:
        i, j = objects[0]["index"], objects[1]["index"]
        n = len(tensors["target/boxes"])
        row = tensors["teacher/relations"].reshape(n, n, 4)[i, j]
        assert (teacher["left_right"], teacher["above_below"]) == (row[0], row[2])
        assert {name for name in mask if mask[name]} == {"left_right", "above_below"}
    else:
        assert not any(mask.values())


def write_with_logits(folder, tokenizer_sha256: str, encode) -> Export:
    """Three scenes; the teacher answered every question but the first of a scene.

    Its answers are the stored ones, except that of every scene's last question.
    """
    random = np.random.default_rng(0)
    with ExportWriter(folder, teacher_tokenizer=tokenizer_sha256, **HEADER) as writer:
        for i in range(3):
            scene_id = f"scene{i}"
            arrays, _ = tiny_scene(random, 2, 4)
            questions = tiny_questions(random, scene_id, arrays["target/boxes"])
            said = [encode(" " + q["answer"]) for q in questions]
            said[-1] = said[-1][::-1] + [5, 6]
            rows = [[row] * len(ids) for row, ids in enumerate(said) if row]
            ids = np.concatenate(said[1:]).astype(np.int32)
            teacher = {
                "answer_question": np.concatenate(rows).astype(np.int32),
                "answer_id": ids,
                "topk_id": np.stack([ids, ids + 1], -1),
                "topk_logprob": (-1 - random.random((len(ids), 2))).astype(np.float16),
            }
            split = "train" if i < 2 else "val"
            writer.add_scene(scene_id, arrays, split=split, teacher=teacher)
            writer.add_questions(questions)
    return Export(folder)


def test_the_teachers_logits_stand_at_its_answers_tokens(tmp_path, tokenizer, config):
    def encode(text):
        return [*tokenizer.encode(text), tokenizer.eos_id]

    export = write_with_logits(tmp_path / "export", tokenizer.sha256, encode)
    wide = changed(
        config, scenes_per_batch=2, questions_per_scene=12, kind_weights={"proximity": 2}
    )
    pipeline = Pipeline(export, tokenizer, wide, "train")
    batch, records = pipeline.batch(0), list(export.questions())
    assert batch.topk_id_SQAk.shape[-1] == 2
    found = 0
    for s, scene_id in enumerate(scenes_of(batch, export)):
        own = [r for r in records if r["scene_id"] == scene_id]
        tensors = export.read_scene(scene_id)
        for q, pair in enumerate(asked(batch, tokenizer)[s]):
            row = [(prompt(r), r["answer"]) for r in own].index(pair)
            n, mask = batch.answer_length_SQ[s, q], batch.topk_mask_SQA[s, q]
            if row in (0, len(own) - 1):
                assert not mask.any()
                continue
            assert mask.tolist() == [True] * n + [False] * (len(mask) - n)
            ids = batch.answer_SQA[s, q, :n]
            assert batch.topk_id_SQAk[s, q, :n].tolist() == np.stack([ids, ids + 1], -1).tolist()
            at = tensors["teacher/answer_question"] == row
            np.testing.assert_array_equal(
                batch.topk_logprob_SQAk[s, q, :n], tensors["teacher/topk_logprob"][at]
            )
            found += 1
    assert found > 6


def test_logits_over_another_vocabulary_are_refused(tmp_path, tokenizer, config):
    export = write_with_logits(tmp_path / "export", "0" * 64, tokenizer.encode)
    with pytest.raises(UserError, match="the teacher's logits are over another vocabulary"):
        Pipeline(export, tokenizer, config, "train")
    batch = Pipeline(export, tokenizer, changed(config, logits=False), "train").batch(0)
    assert batch.topk_id_SQAk.shape[-1] == 0 and not batch.topk_mask_SQA.any()


def test_logits_are_refused_where_questions_were_skipped(tmp_path, tokenizer, config):
    """The logits name a question by its number, which is lost when one before it is skipped."""
    export = write_with_logits(tmp_path / "export", tokenizer.sha256, tokenizer.encode)
    scene = export.folder / "scenes" / "scene1.safetensors"
    scene.write_bytes(scene.read_bytes()[:50])
    skip = changed(config, on_bad_scene="skip")
    with pytest.raises(UserError, match="skipped bad questions have shifted"):
        Pipeline(Export(export.folder), tokenizer, skip, "train")


def test_a_number_in_words_of_the_answer_is_the_value(tmp_path, tokenizer, config):
    export = write_tiny_export(tmp_path / "export", train=3, val=0)
    text = (export.folder / "questions.jsonl").read_text().replace('"value": 1.0', '"box": null')
    records = [json.loads(line) for line in text.splitlines()]
    for record in records:
        record.pop("box", None)
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (export.folder / "questions.jsonl").write_bytes(lines)
    manifest = export.manifest | {
        "questions": {"count": len(records), "sha256": hashlib.sha256(lines).hexdigest()}
    }
    (export.folder / "manifest.json").write_text(json.dumps(manifest))
    pipeline = Pipeline(
        Export(export.folder), tokenizer, config, "train", kinds=["object_counting"]
    )
    batch = pipeline.batch(0)
    ones = [i for i, a in enumerate(asked(batch, tokenizer)) if ("1" in {x for _, x in a})]
    assert ones
    for s in ones:
        q = [answer for _, answer in asked(batch, tokenizer)[s]].index("1")
        assert batch.value_mask_SQ[s, q] and batch.value_SQ[s, q] == 1


# --- Which questions ------------------------------------------------------------------------------


def test_kinds_and_weights_choose(tiny_export, tokenizer, config):
    wanted = ["proximity", "object_counting"]
    only = Pipeline(tiny_export, tokenizer, config, "train", kinds=wanted)
    kinds = Counter(q["kind"] for q in tiny_export.questions() if q["scene_id"] < "scene007")
    assert only.dropped == {
        f"kind {kind}": n
        for kind, n in kinds.items()
        if kind not in ("proximity", "object_counting")
    }
    weights = {kind: 0 for kind in kinds} | {"proximity": 1}
    none = Pipeline(tiny_export, tokenizer, changed(config, kind_weights=weights), "train")
    questions = [q for rows, _ in none.eval_batches() for row in rows for q in row]
    assert Counter(q["kind"] for q in questions) == {"proximity": kinds["proximity"]}
    heavy = changed(config, questions_per_scene=1, kind_weights={"object_counting": 1e6})
    batches = [Pipeline(tiny_export, tokenizer, heavy, "train").batch(step) for step in range(2)]
    texts = [scene[0][0] for batch in batches for scene in asked(batch, tokenizer)]
    assert all("How many" in text for text in texts)


def test_what_is_too_long_is_left_out_and_counted(tiny_export, tokenizer, config):
    questions = [q for q in tiny_export.questions() if q["scene_id"] < "scene007"]
    length = {q["id"]: len(tokenizer.encode(prompt(q))) + 1 for q in questions}
    answer = {q["id"]: len(tokenizer.encode(" " + q["answer"])) + 1 for q in questions}
    limits = changed(config, question_length=8, answer_length=3, min_learned=0)
    pipeline = Pipeline(tiny_export, tokenizer, limits, "train")
    too_long = {i for i in length if length[i] > 8}
    also = {i for i in answer if answer[i] > 3} - too_long
    assert too_long and also
    assert pipeline.dropped == {"question too long": len(too_long), "answer too long": len(also)}
    assert pipeline.max_question_length == max(length.values())
    assert pipeline.max_answer_length == max(answer.values())
    found = [record for rows, _ in pipeline.eval_batches() for row in rows for record in row]
    assert {record["id"] for record in found} == set(length) - too_long - also


def test_a_data_set_of_which_little_can_be_learned_is_refused(tmp_path, tokenizer, config):
    """A stage that learns rationales would else lose a data set without them in silence."""
    random = np.random.default_rng(0)
    with ExportWriter(tmp_path / "mixed", **HEADER) as writer:
        for i in range(4):
            arrays, _ = tiny_scene(random, 1, 3)
            writer.add_scene(f"scene{i}", arrays, split="train" if i < 3 else "val")
            for record in tiny_questions(random, f"scene{i}", arrays["target/boxes"]):
                own = {"source": "vsi590k"}
                if i % 2:
                    own = {"source": "vica322k", "rationale": record["answer"]}
                writer.add_questions([record | own])
    export = Export(tmp_path / "mixed")
    rationales = changed(config, answer_field="rationale")
    with pytest.raises(UserError, match=r"vsi590k: only 0 of \d+ training .*no rationale"):
        Pipeline(export, tokenizer, rationales, "train")
    for chosen in ({"source_weights": {"vsi590k": 0}}, {"min_learned": 0.0}):
        pipeline = Pipeline(export, tokenizer, changed(rationales, **chosen), "train")
        found = [record for rows, _ in pipeline.eval_batches() for row in rows for record in row]
        assert {record["source"] for record in found} == {"vica322k"}
    Pipeline(export, tokenizer, rationales, "val")  # an evaluation asks what can be asked


def test_what_no_packed_row_holds_is_left_out_and_counted(tiny_export, tokenizer, config):
    lengths = {}
    for q in tiny_export.questions():
        if q["scene_id"] < "scene007":
            a, b = (len(tokenizer.encode(text)) + 1 for text in (prompt(q), " " + q["answer"]))
            lengths[q["id"]] = a + b - 1
    limit = sorted(lengths.values())[len(lengths) // 2]
    few = changed(config, rows_per_scene=1, row_length=limit, min_learned=0)
    pipeline = Pipeline(tiny_export, tokenizer, few, "train")
    fits = {i for i in lengths if lengths[i] <= limit}
    assert pipeline.dropped == {"longer than a packed row": len(lengths) - len(fits)}
    found = [record for rows, _ in pipeline.eval_batches() for row in rows for record in row]
    assert sorted(record["id"] for record in found) == sorted(fits)


def test_weights_of_kinds_that_are_not_there_are_told_once(tiny_export, tokenizer, config, capsys):
    weights = {"proximity": 2, "space_size": 0.5, "route_planning": 0.0}
    Pipeline(tiny_export, tokenizer, changed(config, kind_weights=weights), "train")
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and line.endswith("of these kinds: route_planning, space_size\n")


def test_boxes_beyond_the_limit_are_counted(tiny_export, tokenizer, config):
    pipeline = Pipeline(tiny_export, tokenizer, changed(config, max_boxes=4), "train")
    counts = [len(tiny_export.read_scene(i).get("target/boxes", ())) for i in
              tiny_export.scene_ids("train")]  # fmt: skip
    assert pipeline.dropped == {"boxes beyond max_boxes": sum(max(n - 4, 0) for n in counts)}


def test_the_teachers_answers_can_be_the_reference(tiny_export, tokenizer, config):
    teacher = changed(config, answer_field="teacher_answer", answer_length=20, min_learned=0)
    pipeline = Pipeline(tiny_export, tokenizer, teacher, "train")
    texts = [a for scene in asked(pipeline.batch(0), tokenizer) for _, a in scene]
    assert texts and all(text.startswith("I see") for text in texts)
    assert pipeline.dropped["no teacher_answer"] > 0


@pytest.mark.parametrize(
    ("changes", "kinds", "said"),
    [
        ({}, ["no such kind"], "no question to use in split train"),
        ({"question_length": 1}, None, "question too long"),
        ({"seed": -1}, None, "seed: -1"),
        ({"scenes_per_batch": 0}, None, "scenes_per_batch: 0"),
        ({"on_bad_scene": "ignore"}, None, "on_bad_scene: 'ignore'"),
        ({"kind_weights": {"proximity": -1.0}}, None, "proximity: -1.0"),
        ({"kind_weights": {"proximity": "2"}}, None, "proximity: 2 is no weight"),
        ({"kind_weights": {"proximty": 2.0}}, None, "proximty: .*did you mean proximity"),
        ({"kind_weights": {"zzz": 0.0}}, None, "zzz: no kind of question; there are "),
        ({"rows_per_scene": 0}, None, "rows_per_scene: 0"),
        ({"row_length": 2}, None, "longer than a packed row"),
        ({"vision": "sonata/features"}, None, "vision: 'sonata/features'"),
        ({"vision": "images"}, None, "no scene has images to train on"),
        ({"controls": (5, 5)}, None, r"controls: \(5, 5\)"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(
    tiny_export, tokenizer, config, changes, kinds, said
):
    with pytest.raises(UserError, match=said) as error:
        Pipeline(tiny_export, tokenizer, changed(config, **changes), "train", kinds)
    assert "\n" not in str(error.value)


# --- Packed rows ----------------------------------------------------------------------------------


def test_packed_rows_hold_the_questions_of_the_batch(tiny_export, tokenizer, config, pipeline):
    assert check_packing(pipeline.batch(0)) == 12
    tight = changed(config, questions_per_scene=8, rows_per_scene=2, row_length=40)
    pipeline = Pipeline(tiny_export, tokenizer, tight, "train")
    counts = [check_packing(pipeline.batch(step)) for step in range(4)]
    assert min(counts) > 0 and max(counts) < 24  # some did not fit


def test_scenes_can_be_seen_through_the_teachers_features(tmp_path, tokenizer, config):
    export = write_tiny_export(tmp_path / "export", train=6, val=1)  # 1 and 4 have a teacher
    features = changed(config, vision="teacher/features", on_bad_scene="skip")
    pipeline = Pipeline(export, tokenizer, features, "train")
    batch = pipeline.batch(0)
    assert batch.vision_SVPC.shape == (3, 3, 6, 7)
    np.testing.assert_array_equal(batch.vision_SVPC, batch.teacher_features_SVPF)
    assert np.abs(batch.vision_SVPC).sum(axis=(2, 3)).astype(bool).tolist() == (
        batch.view_mask_SV.tolist()
    )
    with pytest.raises(ExportError, match="tensor teacher/features: missing"):
        strict = changed(features, on_bad_scene="stop", scenes_per_batch=5)
        Pipeline(export, tokenizer, strict, "train").batch(0)
    # A row that holds no scene has no teacher either.
    wide = changed(features, questions_per_scene=20, scenes_per_batch=4, rows_per_scene=20)
    ((records, batch),) = Pipeline(export, tokenizer, wide, "train").eval_batches()
    assert batch.teacher_features_mask_S.tolist() == [bool(row) for row in records]
    assert [bool(row) for row in records] == [True, True, False, False]


def test_only_exports_with_a_teacher_have_its_features(tmp_path, tokenizer, config):
    export = write_tiny_export(tmp_path / "export", train=1, val=0)
    with pytest.raises(UserError, match="no scene has teacher/features to train on"):
        Pipeline(export, tokenizer, changed(config, vision="teacher/features"), "train")


# --- Bad scenes -----------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path, tokenizer, config):
    """An export whose scene002 was damaged after its questions were read."""
    export = write_tiny_export(tmp_path / "export", train=4, val=1)
    Pipeline(export, tokenizer, config, "train")
    path = export.folder / "scenes" / "scene002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    return Export(export.folder)


def test_a_bad_scene_stops(damaged, tokenizer, config):
    pipeline = Pipeline(damaged, tokenizer, changed(config, scenes_per_batch=4), "train")
    with pytest.raises(ExportError, match="scene002"):
        pipeline.batch(0)
    with pytest.raises(ExportError, match="scene002"):
        list(pipeline.iterate(0, 1))


def test_a_bad_scene_is_skipped_and_counted(damaged, tokenizer, config):
    skip = changed(config, scenes_per_batch=4, on_bad_scene="skip")
    pipeline = Pipeline(damaged, tokenizer, skip, "train")
    ids = Counter(scenes_of(pipeline.batch(0), write_good(damaged)))
    assert set(ids) == {"scene000", "scene001", "scene003"} and sum(ids.values()) == 4
    assert pipeline.dropped["bad scene"] == 1 and "sha256" in pipeline.bad_scenes["scene002"]
    again = Pipeline(damaged, tokenizer, skip, "train")
    assert digest(again.batch(1)) == digest(pipeline.batch(1))
    rows = [row for rows, _ in pipeline.eval_batches() for row in rows if row]
    assert {row[0]["scene_id"] for row in rows} == {"scene000", "scene001", "scene003"}


def write_good(damaged: Export) -> Export:
    """The same export, undamaged."""
    return write_tiny_export(damaged.folder.parent / "good", train=4, val=1)


def test_only_bad_scenes_is_an_error(damaged, tokenizer, config):
    for path in (damaged.folder / "scenes").iterdir():
        path.write_bytes(b"")
    pipeline = Pipeline(damaged, tokenizer, changed(config, on_bad_scene="skip"), "train")
    with pytest.raises(UserError, match="every scene of split train is bad"):
        pipeline.batch(0)
