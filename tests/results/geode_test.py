"""The columns beside the scores of a finished GEODE run."""

import json
from types import SimpleNamespace

import pytest

from geode_jax.results import geode
from geode_jax.runs.summary import PREDICTIONS


def record(own, answer="3", prediction="3", **more):
    kind = {"kind": "object_counting", "question": "How many chairs?"}
    return {"id": own, "scene_id": "s", **kind, "answer": answer, "prediction": prediction, **more}


def answers(folder, asked, told=None):
    """`_answers` of a model that answered these questions, beside a blind run that told others."""
    blind = folder / "blind"
    if told is not None:
        blind.mkdir()
        (blind / PREDICTIONS).write_text("".join(json.dumps(r) + "\n" for r in told))
    evaluator = SimpleNamespace(run=lambda *_, **__: SimpleNamespace(predictions=asked))
    settings = SimpleNamespace(
        eval=SimpleNamespace(test_scenes=1, blind=str(blind)), loss=SimpleNamespace(vision=True)
    )
    run = SimpleNamespace(
        pipelines={"test": None},
        settings=settings,
        evaluator=evaluator,
        train_records=lambda: asked,
    )
    return geode._answers(run, None, folder, lambda: None)


ASKED = [record("a"), record("b")]


def test_a_blind_run_that_answered_the_same_questions_is_a_column(tmp_path, capsys):
    told = [record("c"), record("b"), record("a", prediction="9")]
    found = answers(tmp_path, ASKED, told)
    assert found["scores"]["blind"]["object_counting"] == 0.5
    assert "vision_removed" not in found["scores"] and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("told", "count"),
    [
        ([record("c")], 0),
        ([record("a")], 1),
        ([record("a"), record("b", answer="7")], 1),
        ([record("a"), record("b", question="How many beds?")], 1),
    ],
)
def test_a_blind_run_of_other_questions_is_left_out_and_said(tmp_path, capsys, told, count):
    found = answers(tmp_path, ASKED, told)
    assert list(found["scores"]) == list(found["vsi"]) == ["model", "vision_removed", "frequency"]
    said = f"has answers to {count} of these 2 questions"
    assert said in capsys.readouterr().out


def test_an_export_that_asks_for_boxes_alone_has_scores(tmp_path):
    box = [0, 0, 0, 1, 1, 1, 0]
    asked = [record("a", kind="object_box", answer="box", box=box, predicted_box=box)]
    found = answers(tmp_path, asked)
    assert found["scores"]["model"]["box_iou"] == pytest.approx(1)
