"""Describes the data of a run that has no data yet, such as the export of a `full` configuration.

The shapes of a model and of a batch follow from an export, a tokenizer and a pipeline. `Described`
replaces all three (`runs.settings.System.make_objective`). Its sizes are those of the upstream
models, or are stated as assumptions here.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from geode_jax.data.control import BOX
from geode_jax.data.question_arrays import add_teacher_logits, lay_out_questions, stack_questions
from geode_jax.data.scene_arrays import GEODE_VISION, SceneShapes, empty_rows
from geode_jax.data.tokens import Tokenizer
from geode_jax.runs.geode import GeodeSettings
from geode_jax.runs.settings import Settings
from geode_jax.runs.student import StudentSettings
from geode_jax.shapes import Batch
from geode_jax.sources.rooms.arrays import DEPTH_BINS
from geode_jax.sources.rooms.layout import CATEGORIES, VIEWS
from geode_jax.sources.rooms.scene import GRID
from geode_jax.sources.stand_ins import TOKEN_WIDTH

VGGT_GRID, VGGT_WIDTH = (37, 37), 2048
"""Grid and width of VGGT-1B's tokens of a view, a square of 518 pixels in patches of 14."""
CLIP_WIDTH = 1024
"""Width of LLaVA-3D's patch features (CLIP ViT-L/14)."""
SONATA_WIDTH = 512
"""Width of the features of Sonata's coarsest stage."""
LLAMA_TOKENS, QWEN_TOKENS = 32_000, 151_665
"""Sizes of the tokenizers of LLaVA-3D, which the student shares, and of Qwen2.5."""


@dataclasses.dataclass(frozen=True)
class Described:
    """The parts of an export, its tokenizer and its pipeline on which shapes depend.

    Attributes:
        shapes: shapes of the scenes of a batch.
        categories: names, as many as the export would have.
        vocab_size: size of the tokenizer.
        question_length, answer_length: L and A, if the configuration leaves them to the data.
        scenes: number of scenes of the training split, each read once an epoch.
    """

    shapes: SceneShapes
    categories: Sequence[str]
    vocab_size: int
    question_length: int
    answer_length: int
    scenes: int

    eos_id = 0

    def encode(self, text: str) -> list[int]:
        """Returns one token; most nouns of categories are one."""
        del text
        return [0]

    def id_of(self, token: str) -> int:
        """The last rows are the control tokens'."""
        return self.vocab_size - 1 - (token == BOX)


class _NoText(Tokenizer):
    """The tokenizer of a batch without questions: it never reads a text."""

    pad_id = bos_id = eos_id = 0

    def __init__(self):
        pass

    def encode_with_ends(self, texts: Sequence[str]) -> list:
        """Returns no tokens for each text."""
        return [([], []) for _ in texts]

    encode_answers = encode_with_ends


class Assumed(NamedTuple):
    """What is assumed of the real scenes that a system trains on.

    Attributes:
        shapes: of a batch's scenes.
        vocab_size: tokens of the tokenizer.
        question_length, answer_length: tokens, where the configuration leaves them to the data.
        scenes: of the training split.
    """

    shapes: SceneShapes
    vocab_size: int
    question_length: int
    answer_length: int
    scenes: int


REAL_CATEGORIES = 20
"""ScanNet's benchmark."""


def describe(settings: Settings) -> Described:
    """Returns a description of the data of a configuration.

    Laptop sizes train on rooms, whose shapes are known. Others train on an export of real scenes,
    assumed to have eight views of a scene for the student (the default of `geode-jax prepare`) and
    sixteen for GEODE (Table 2); 20 categories (ScanNet's benchmark); the teacher's features and its
    64 best logits; 1,024 points. The student's questions and answers are as long as in its `small`
    (96 and 64 tokens); answers of VSI-Bench have at most 16 tokens. An epoch is the paper's 80 % of
    2,000 samples, or the 590,000 questions of VSI-590k at `data.questions_per_scene` a visit.
    """
    data, assumed = settings.data, _ASSUMED[type(settings)](settings)
    shapes, vocabulary, categories = assumed.shapes, assumed.vocab_size, REAL_CATEGORIES
    rooms = data.export == "rooms" or bool(data.rgbd)
    if rooms:
        shapes, vocabulary, categories = _rooms(settings)
    return Described(
        shapes=shapes,
        categories=[f"category {i}" for i in range(categories)],
        vocab_size=vocabulary,
        question_length=data.question_length or assumed.question_length,
        answer_length=data.answer_length or assumed.answer_length,
        scenes=data.rooms_scenes if rooms else assumed.scenes,
    )


def _student(settings: StudentSettings) -> Assumed:
    data = settings.data
    vggt = data.vision == "vggt/tokens"
    shapes = SceneShapes(
        views=8,
        grid=VGGT_GRID,
        token_width=VGGT_WIDTH if vggt else CLIP_WIDTH,
        camera_width=VGGT_WIDTH if vggt else 0,
        token_dtype="bfloat16" if vggt else "float32",
        depth_ratio=settings.depth_ratio,
        boxes=data.max_boxes,
        features=CLIP_WIDTH,
        topk=64 if settings.teacher_logits else 0,
        vision=data.vision,
    )
    return Assumed(shapes, LLAMA_TOKENS, question_length=96, answer_length=64, scenes=1600)


def _geode(settings: GeodeSettings) -> Assumed:
    data, vision = settings.data, settings.model.vision
    tokens = data.vision == "internvit/tokens"
    side = vision.image_size or 448
    shapes = SceneShapes(
        views=16,
        grid=VGGT_GRID,
        token_width=vision.width if tokens else 0,
        view_tokens=(side // vision.patch_size) ** 2 + 1 if tokens else 0,
        token_dtype="bfloat16" if tokens else "float32",
        depth_ratio=1,
        boxes=data.max_boxes,
        vision=data.vision,
        image=(0, 0) if tokens else (side, side),
        points=1024,
        point_width=SONATA_WIDTH,
        point_frames=True,
    )
    visits = -(-590_000 // data.questions_per_scene)
    return Assumed(shapes, QWEN_TOKENS + 2, question_length=256, answer_length=16, scenes=visits)


_ASSUMED: Mapping[type[Settings], Callable[[Any], Assumed]] = {
    StudentSettings: _student,
    GeodeSettings: _geode,
}
"""The class of a system's settings -> the real scenes that it trains on."""


def _rooms(settings: Settings) -> tuple[SceneShapes, int, int]:
    """Returns shapes as `sources.rooms.export` makes them, some 300 words, and the categories."""
    data, classes = settings.data, len(CATEGORIES)
    pictures = data.vision in GEODE_VISION
    shapes = SceneShapes(
        views=VIEWS,
        grid=(GRID, GRID),
        token_width=0 if pictures else TOKEN_WIDTH,
        depth_ratio=settings.depth_ratio,
        boxes=data.max_boxes,
        categories=classes,
        features=classes + 1,
        depth_bins=DEPTH_BINS,
        vision=data.vision,
        token_dtype="float32" if pictures else "float16",
        image=(data.rooms_images, data.rooms_images) if pictures else (0, 0),
        points=96 if pictures else 0,
        point_width=10 if pictures else 0,
        point_frames=pictures,
    )
    return shapes, 300, classes


def abstract_batch(settings: Settings, data: Described, sharding: jax.sharding.Sharding) -> Batch:
    """Returns the shapes of a batch of `data.scenes_per_batch` scenes, laid out by `sharding`.

    The pipeline's own functions make them from an empty scene without questions.
    """
    own = settings.data
    nothing = stack_questions([], _NoText(), data.question_length, data.answer_length, "answer")
    add_teacher_logits(nothing, {}, np.zeros(0, int), data.shapes.topk)
    columns = own.rows_per_scene, own.row_length
    rows = empty_rows(data.shapes) | lay_out_questions(
        nothing, [], {}, own.questions_per_scene, *columns, _NoText.pad_id
    )

    def shape(row: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (own.scenes_per_batch, *row.shape), row.dtype, sharding=sharding
        )

    return jax.tree.map(shape, Batch(**rows))
