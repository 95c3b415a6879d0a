"""Batches of evaluation, and the lengths that are measured before training."""

import pytest

from geode_jax.data.pipeline import Pipeline
from geode_jax.data.settings import measure_lengths
from geode_jax.exports.prompts import prompt
from tests.helpers.batches import asked, changed, check_packing, digest


@pytest.mark.parametrize("row", [(4, 60), (2, 36), (1, 60)])
def test_eval_batches_ask_every_question_once_in_order(tiny_export, tokenizer, config, row):
    rows = changed(config, rows_per_scene=row[0], row_length=row[1])
    pipeline = Pipeline(tiny_export, tokenizer, rows, "train")
    assert pipeline.dropped == {}
    found = []
    for records, batch in pipeline.eval_batches():
        assert len(records) == batch.vision_SVPC.shape[0] == 3
        texts = asked(batch, tokenizer)
        for row, scene in zip(records, texts, strict=True):
            assert [(prompt(r), r["answer"]) for r in row] == scene
        assert check_packing(batch) == sum(map(len, records))
        found += [record for row in records for record in row]
    assert found == [q for q in tiny_export.questions() if q["scene_id"] < "scene007"]
    again = [digest(batch) for _, batch in pipeline.eval_batches()]
    assert again == [digest(batch) for _, batch in pipeline.eval_batches()]


def test_shuffled_questions_stand_beside_the_scene_before(tiny_export, tokenizer, config):
    rows = changed(config, questions_per_scene=3)  # so that a scene needs several rows
    pipeline = Pipeline(tiny_export, tokenizer, rows, "train")

    def seen(shuffled):
        views, asked_of = {}, []
        for records, batch in pipeline.eval_batches(4, shuffled=shuffled):
            for row, text, vision in zip(
                records, asked(batch, tokenizer), batch.vision_SVPC, strict=True
            ):
                assert [(prompt(r), r["answer"]) for r in row] == text
                if row:
                    asked_of += [(row[0]["scene_id"], len(row))]
                    views.setdefault(row[0]["scene_id"], set()).add(vision.tobytes())
        return asked_of, [vision for (vision,) in views.values()]

    (questions, own), (same_questions, others) = seen(False), seen(True)
    assert questions == same_questions and len(questions) > len(own) == len(set(own)) == 4
    assert others == [own[-1], *own[:-1]]


def test_eval_batches_of_some_scenes(pipeline):
    def scenes(**kwargs):
        rows = [row for rows, _ in pipeline.eval_batches(**kwargs) for row in rows if row]
        return list(dict.fromkeys(row[0]["scene_id"] for row in rows))

    assert scenes(max_scenes=2) == ["scene000", "scene001"]
    assert len(scenes(max_scenes=3, seed=1)) == 3
    assert scenes(max_scenes=3, seed=1) == scenes(max_scenes=3, seed=1)
    assert len({tuple(scenes(max_scenes=3, seed=seed)) for seed in range(5)}) > 1


def test_measured_lengths_against_counting(tiny_export, tokenizer):
    questions = [q for q in tiny_export.questions() if q["scene_id"] < "scene007"]
    for kinds in (["proximity"], None):
        chosen = [q for q in questions if kinds is None or q["kind"] in kinds]
        measured = measure_lengths(tiny_export, tokenizer, "train", kinds=kinds)
        assert measured.question == max(len(tokenizer.encode(prompt(q))) + 1 for q in chosen)
        assert measured.answer == max(len(tokenizer.encode(" " + q["answer"])) + 1 for q in chosen)
    assert measure_lengths(tiny_export, tokenizer, "test") is None
