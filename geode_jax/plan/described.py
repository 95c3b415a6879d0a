"""Describes the data of a run that has no data yet, such as the export of a `full` configuration.

The shapes of a model and of a batch follow from an export, a tokenizer and a pipeline. `Described`
replaces all three (`runs.systems.make_objective`). Its sizes are those of the upstream models, or
are stated as assumptions here.
"""

import dataclasses
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from geode_jax.data.question_arrays import add_teacher_logits, lay_out_questions, stack_questions
from geode_jax.data.scene_arrays import SceneShapes, empty_rows
from geode_jax.runs import systems
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
        question_length, answer_length: Lq and La, if the configuration leaves them to the data.
        scenes: number of scenes of the training split, each read once an epoch.
    """

    shapes: SceneShapes
    categories: Sequence[str]
    vocab_size: int
    question_length: int
    answer_length: int
    scenes: int

    # The part of a tokenizer that `stack_questions` needs; no text is ever read.
    pad_id = bos_id = eos_id = 0

    def encode(self, text: str) -> list[int]:
        """Returns one token; most nouns of categories are one."""
        del text
        return [0]

    def encode_with_ends(self, texts: Sequence[str]) -> list:
        """Returns no tokens for each text."""
        return [([], []) for _ in texts]

    encode_answers = encode_with_ends

    def id_of(self, token: str) -> int:
        """Returns the id of a control token; these are the last two rows."""
        return self.vocab_size - 1 - (token == systems.BOX)


def describe(config: ml_collections.ConfigDict) -> Described:
    """Returns a description of the data of a configuration.

    Laptop sizes train on rooms, whose shapes are known. Others train on an export of real scenes,
    assumed to have eight views of a scene for the student (the default of `geode-jax prepare`) and
    sixteen for GEODE (Table 2); 20 categories (ScanNet's benchmark); the teacher's features and its
    64 best logits; 1,024 points. The student's questions and answers are as long as in its `small`
    (96 and 64 tokens); answers of VSI-Bench have at most 16 tokens. An epoch is the paper's 80 % of
    2,000 samples, or the 590,000 questions of VSI-590k at `data.questions_per_scene` a visit.
    """
    data, rooms = config.data, config.data.export == "rooms" or bool(config.data.rgbd)
    student = config.system == "hidden_cot"
    make = _rooms if rooms else _student if student else _geode
    shapes, vocabulary, categories = make(config)
    scenes = 1600 if student else -(-590_000 // data.questions_per_scene)
    return Described(
        shapes=shapes,
        categories=[f"category {i}" for i in range(categories)],
        vocab_size=vocabulary,
        question_length=data.question_length or (96 if student else 256),
        answer_length=data.answer_length or (64 if student else 16),
        scenes=data.rooms_scenes if rooms else scenes,
    )


def _student(config) -> tuple[SceneShapes, int, int]:
    data = config.data
    vggt = data.vision == "vggt/tokens"
    shapes = SceneShapes(
        views=8,
        grid=VGGT_GRID,
        token_width=VGGT_WIDTH if vggt else CLIP_WIDTH,
        camera_width=VGGT_WIDTH if vggt else 0,
        token_dtype="bfloat16" if vggt else "float32",
        depth_ratio=config.model.depth_cells,
        boxes=data.max_boxes,
        features=CLIP_WIDTH,
        topk=64 if config.loss.logits else 0,
        vision=data.vision,
    )
    return shapes, LLAMA_TOKENS, 20


def _geode(config) -> tuple[SceneShapes, int, int]:
    vision, tokens = config.model.vision, config.data.vision == "internvit/tokens"
    side = vision.image_size or 448
    shapes = SceneShapes(
        views=16,
        grid=VGGT_GRID,
        token_width=vision.width if tokens else 0,
        view_tokens=(side // vision.patch_size) ** 2 + 1 if tokens else 0,
        token_dtype="bfloat16" if tokens else "float32",
        depth_ratio=1,
        boxes=config.data.max_boxes,
        vision=config.data.vision,
        image=(0, 0) if tokens else (side, side),
        points=1024,
        point_width=SONATA_WIDTH,
        point_frames=True,
    )
    return shapes, QWEN_TOKENS + 2, 20


def _rooms(config) -> tuple[SceneShapes, int, int]:
    """Sizes of the exports of `sources.rooms`; their questions have some 300 words."""
    classes, side = len(CATEGORIES), config.data.rooms_images
    student = config.system == "hidden_cot"
    shapes = SceneShapes(
        views=VIEWS,
        grid=(GRID, GRID),
        token_width=TOKEN_WIDTH if student else 0,
        depth_ratio=config.model.get("depth_cells", 1),
        boxes=config.data.max_boxes,
        categories=classes,
        features=classes + 1,
        depth_bins=DEPTH_BINS,
        vision=config.data.vision,
        token_dtype="float16" if student else "float32",
        image=(0, 0) if student else (side, side),
        points=0 if student else 96,
        point_width=0 if student else 10,
        point_frames=not student,
    )
    return shapes, 300, classes


def abstract_batch(
    config: ml_collections.ConfigDict, data: Described, sharding: jax.sharding.Sharding
) -> Batch:
    """Returns the shapes of a batch of `data.scenes_per_batch` scenes with a sharding.

    The pipeline's own functions make them from an empty scene without questions.
    """
    own = config.data
    nothing = stack_questions([], data, data.question_length, data.answer_length, "answer")
    add_teacher_logits(nothing, {}, np.zeros(0, int), data.shapes.topk)
    columns = own.rows_per_scene, own.row_length
    rows = empty_rows(data.shapes) | lay_out_questions(
        nothing, [], {}, own.questions_per_scene, *columns, data.pad_id
    )

    def shape(row: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (own.scenes_per_batch, *row.shape), row.dtype, sharding=sharding
        )

    names = [field.name for field in dataclasses.fields(Batch)]
    scene = Batch(**{name: rows[name.rsplit("_", 1)[0]] for name in names})
    return jax.tree.map(shape, scene)
