"""A pipeline of the tiny export."""

import pytest

from geode_jax.data.pipeline import Pipeline
from geode_jax.data.settings import PipelineConfig
from geode_jax.data.tokens import Tokenizer, train_tokenizer
from geode_jax.exports.prompts import prompt
from tests.helpers.exports import CATEGORIES


@pytest.fixture(scope="session")
def tokenizer(tiny_export) -> Tokenizer:
    questions = list(tiny_export.questions())
    texts = [prompt(q) for q in questions] + [f" {q['answer']}" for q in questions]
    texts += [f" {q['teacher_answer']}" for q in questions if "teacher_answer" in q]
    return train_tokenizer(texts, CATEGORIES, min_count=2)


@pytest.fixture(scope="session")
def config(tiny_export) -> PipelineConfig:
    return PipelineConfig(
        export=str(tiny_export.folder),
        scenes_per_batch=3,
        questions_per_scene=4,
        question_length=24,
        answer_length=12,
        max_boxes=6,
        rows_per_scene=4,
        row_length=60,  # any four questions fit
        seed=5,
    )


@pytest.fixture
def pipeline(tiny_export, tokenizer, config) -> Pipeline:
    return Pipeline(tiny_export, tokenizer, config, "train")
