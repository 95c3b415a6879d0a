"""The arguments of configs/hidden_cot.py, from training to the scores (make test-slow)."""

import json

import numpy as np
import pytest

from geode_jax.results.predict import Predictor
from geode_jax.train import train_and_evaluate
from tests.helpers.runs import tiny_config, tiny_rooms


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return tiny_rooms(tmp_path_factory.mktemp("switches") / "rooms")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arg",
    [
        "thinking=0",
        "thinking=16,weights=static,drop=spatial",
        "only=feature",
        "encoder=teacher_features",
        "vision=off",
    ],
)
def test_a_switch_trains_saves_scores_and_answers(export, tmp_path, arg):
    config = tiny_config(export, arg)
    summary = train_and_evaluate(config, tmp_path)
    assert summary["train"]["steps"] == 3 and summary["train"]["skipped_steps"] == 0
    assert np.isfinite(summary["scores"]["model"]["spatial_accuracy"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    paid = {name.split("/")[1] for row in rows for name in row if name.startswith("loss/")}
    expected = {"text"} if arg == "vision=off" else set(config.loss.terms)
    assert paid == expected
    predictor = Predictor(tmp_path)
    scene = predictor.export.scene_ids("test")[0]
    answer = predictor.answer(scene, predictor.questions(scene)[0]["question"])
    assert len(answer.thinking_tokens) == config.model.thinking_tokens
