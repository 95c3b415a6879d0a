"""Reads questions and scenes back from the arrays of a batch."""

import dataclasses
import hashlib

import numpy as np

from geode_jax.data.settings import PipelineConfig
from geode_jax.data.tokens import Tokenizer
from geode_jax.exports import Export
from geode_jax.shapes import Batch

FIELDS = [field.name for field in dataclasses.fields(Batch)]


def changed(config: PipelineConfig, **changes) -> PipelineConfig:
    return dataclasses.replace(config, **changes)


def asked(batch: Batch, tokenizer: Tokenizer) -> list[list[tuple[str, str]]]:
    """Returns the texts (prompt, answer) of every scene of a batch, without padding."""
    return [
        [
            (tokenizer.decode(q), tokenizer.decode(a).removeprefix(" "))
            for q, a, length in zip(*rows, strict=True)
            if length
        ]
        for rows in zip(batch.question_SQL, batch.answer_SQA, batch.answer_length_SQ, strict=True)
    ]


def scenes_of(batch: Batch, export: Export) -> list[str]:
    """Returns the ids of a batch's scenes, recognised by their tokens."""
    known = {}
    for scene_id in export.scene_ids():
        tokens = export.read_scene(scene_id, ["vggt/tokens"])["vggt/tokens"]
        known[tokens[0].tobytes()] = scene_id
    return [known[vision[0].tobytes()] for vision in batch.vision_SVPC]


def digest(batch: Batch) -> str:
    found = hashlib.sha256()
    for name in FIELDS:
        array = getattr(batch, name)
        found.update(f"{name}{array.shape}{array.dtype}".encode() + array.tobytes())
    return found.hexdigest()


def check_packing(batch: Batch) -> int:
    """Asserts that every question of a batch is packed correctly; returns their number."""
    length, found = batch.packed_SWT.shape[2], 0
    for s, q in np.argwhere(batch.answer_length_SQ > 0):
        a, n = batch.answer_length_SQ[s, q], batch.question_length_SQ[s, q]
        ids, position, start, of_answer = (
            getattr(batch, f"packed{name}_SWT")[s].reshape(-1)
            for name in ("", "_position", "_start", "_answer")
        )
        columns = batch.answer_column_SQA[s, q, :a]
        first, last = columns[0] + 1 - n, columns[-1]
        assert first // length == last // length
        own = slice(first, last + 1)
        answer = batch.answer_SQA[s, q, : a - 1].tolist()
        assert ids[own].tolist() == batch.question_SQL[s, q, -n:].tolist() + answer
        assert (start[own] == first % length).all()
        assert position[own].tolist() == list(range(n + a - 1))
        assert of_answer[own].tolist() == [False] * (n - 1) + [True] * a
        assert columns.tolist() == list(range(first + n - 1, last + 1))
        assert batch.encoding_column_SQ[s, q] == columns[0] - 1
        found += 1
    return found
