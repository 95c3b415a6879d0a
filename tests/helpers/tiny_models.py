"""A tiny student and a batch with every target, for the tests of models and training."""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from geode_jax.data.packing import lay_out, pack
from geode_jax.models.decoder import DecoderConfig
from geode_jax.models.student import StudentConfig
from geode_jax.models.task_heads import HeadsConfig
from geode_jax.shapes import Batch
from geode_jax.sharding import abstract_model, make_mesh

STUDENT = StudentConfig(
    decoder=DecoderConfig(
        vocab_size=23,
        width=16,
        layers=3,
        heads=4,
        kv_heads=2,
        head_width=4,
        mlp_width=24,
        cross_layers=(1,),
    ),
    heads=HeadsConfig(
        width=8,
        depth_bins=6,
        depth_cells=2,
        queries=4,
        detection_layers=1,
        categories=3,
        teacher_width=7,
    ),
    vision_width=5,
    camera_width=5,
    patch_grid=(2, 2),
    max_views=3,
    projector_width=16,
    thinking_tokens=2,
    vision_prefix=1,
    category_ids=((4,), (5, 6), (7,)),
)
VIEWS, QUESTION, ANSWER, ROWS, COLUMNS = 2, 5, 4, 3, 20
PAD_ID, EOS_ID = 0, 1


def materialize(build, seed: int = 0) -> nnx.Module:
    """Returns a model with random parameters, also norms and biases, so that each has an effect.

    It does so without compilation, which takes most of the time of creating a model.

    Args:
        build: function that makes the model from `nnx.Rngs`.
        seed: seed of the parameters.
    """
    graph, state = nnx.split(abstract_model(build, make_mesh()))
    random = np.random.default_rng(seed)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        metadata = variable.get_metadata()
        first = int(metadata["out_sharding"][:1] == ("layer",))
        fan_in = math.prod(variable.shape[first : first + metadata["contracted"]])
        size = {"bias": 0.2, "scale": 0.2}.get(path[-1], fan_in**-0.5)
        value = size * random.standard_normal(variable.shape, np.float32) + (path[-1] == "scale")
        flat.append((path, variable.replace(jnp.asarray(value, np.float32))))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def tiny_batch(scenes: int = 2, questions: int = 3, seed: int = 0) -> Batch:
    """Returns random scenes with targets of every loss.

    The last scene has one view, the last question of every scene is padding, and every second
    answer token has the teacher's logits.
    """
    random = np.random.default_rng(seed)
    S, Q, V, (gh, gw), heads = scenes, questions, VIEWS, STUDENT.patch_grid, STUDENT.heads
    P, F, Z, X = gh * gw, heads.teacher_width, heads.depth_bins, STUDENT.decoder.vocab_size

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    real = np.arange(Q) < Q - 1  # the last question is padding

    def mask(*shape):
        return (random.random((S, Q, *shape)) < 0.7) & real[:, None]

    def probabilities(*shape):
        return random.dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32)

    view_mask = np.ones((S, V), bool)
    view_mask[-1, 1:] = False
    boxes = random.uniform(0.3, 2, (S, 3, 7)).astype(np.float32)
    return Batch(
        vision_SVPC=normal(S, V, P, STUDENT.vision_width),
        view_mask_SV=view_mask,
        camera_SVC=normal(S, V, STUDENT.camera_width),
        camera_mask_S=np.arange(S) > 0,
        target_boxes_SN7=boxes,
        target_labels_SN=np.tile(np.array([0, 2, -1], np.int32), (S, 1)),
        boxes_known_S=np.ones(S, bool),
        target_depth_SVhw=random.uniform(0.5, 5, (S, V, 2 * gh, 2 * gw)).astype(np.float32),
        target_depth_weight_SVhw=np.ones((S, V, 2 * gh, 2 * gw), np.float32),
        target_segmentation_SVP=random.integers(-2, 3, (S, V, P)).astype(np.int32),
        teacher_features_SVPF=normal(S, V, P, F),
        teacher_features_mask_S=np.ones(S, bool),
        teacher_depth_bins_SVPZ=probabilities(S, V, P, Z),
        teacher_depth_bins_mask_S=np.ones(S, bool),
        teacher_detection_SNc=probabilities(S, 3, heads.categories),
        teacher_detection_mask_S=np.ones(S, bool),
        objects_SQO7=random.uniform(0.3, 2, (S, Q, 5, 7)).astype(np.float32),
        objects_mask_SQO=np.broadcast_to(real[:, None], (S, Q, 5)),
        gaps_SQO=random.uniform(0, 3, (S, Q, 5)).astype(np.float32),
        angle_SQ2=np.tile(np.float32([0.6, -0.8]), (S, Q, 1)),
        angle_mask_SQ=np.broadcast_to(real, (S, Q)),
        relations_SQr=random.random((S, Q, 6)).astype(np.float32),
        relations_mask_SQr=mask(6),
        teacher_relations_SQr=random.random((S, Q, 6)).astype(np.float32),
        teacher_relations_mask_SQr=mask(6),
        value_SQ=random.uniform(0.5, 9, (S, Q)).astype(np.float32),
        value_mask_SQ=np.broadcast_to(real, (S, Q)),
        base_unit_SQ=np.ones((S, Q), np.float32),
        box_SQ7=np.zeros((S, Q, 7), np.float32),
        box_mask_SQ=np.zeros((S, Q), bool),
        image_SVhw3=np.zeros((S, V, 0, 0, 3), np.uint8),
        point_SJC=np.zeros((S, 0, 0), np.float32),
        coord_SJ3=np.zeros((S, 0, 3), np.float32),
        point_frame_SJ=np.zeros((S, 0), np.int32),
        point_mask_SJ=np.zeros((S, 0), bool),
        topk_id_SQAk=random.permuted(np.tile(np.arange(X), (S, Q, ANSWER, 1)), axis=-1)[
            ..., :3
        ].astype(np.int32),
        topk_logprob_SQAk=np.log(probabilities(S, Q, ANSWER, 4)[..., :3]),
        topk_mask_SQA=np.broadcast_to(np.arange(ANSWER) % 2 == 1, (S, Q, ANSWER)),
        **_geometry(S),
        **_text(S, Q, random),
    )


def _geometry(S: int) -> dict[str, np.ndarray]:
    """Returns two cameras side by side that see the same wall 2 m away, so views correspond."""
    V, (gh, gw) = VIEWS, STUDENT.patch_grid
    extrinsic = np.tile(np.eye(3, 4, dtype=np.float32), (S, V, 1, 1))
    extrinsic[:, 1, 0, 3] = 0.1  # far less than a patch
    intrinsic = np.array([[1, 0, (gw - 1) / 2], [0, 1, (gh - 1) / 2], [0, 0, 1]], np.float32)
    u, v = np.meshgrid(np.arange(gw), np.arange(gh))
    rays = np.stack([u, v, np.ones_like(u)], -1).reshape(-1, 3) @ np.linalg.inv(intrinsic).T
    points = (2 * rays)[None, None] - extrinsic[:, :, None, :, 3]
    return dict(
        extrinsic_SV34=extrinsic,
        intrinsic_SV33=np.tile(intrinsic, (S, V, 1, 1)),
        points_SVP3=points.astype(np.float32),
        points_mask_SVP=np.ones((S, V, gh * gw), bool),
        depth_hint_SVP=np.full((S, V, gh * gw), 2, np.float32),
    )


def _text(S: int, Q: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns questions of 2 to 5 tokens and answers of 1 to 4, packed as by the pipeline."""
    question_length = random.integers(2, QUESTION + 1, (S, Q)).astype(np.int32)
    answer_length = random.integers(1, ANSWER + 1, (S, Q)).astype(np.int32)
    question_length[0, 0], answer_length[0, 0] = QUESTION, ANSWER
    question_length[:, -1] = answer_length[:, -1] = 0
    ids = random.integers(2, STUDENT.decoder.vocab_size, (S, Q, QUESTION + ANSWER), np.int32)
    question, answer = ids[..., :QUESTION].copy(), ids[..., QUESTION:].copy()
    question[np.arange(QUESTION) < QUESTION - question_length[..., None]] = PAD_ID
    answer[np.arange(ANSWER) >= answer_length[..., None]] = PAD_ID
    packed = []
    for s in range(S):
        lengths = question_length[s], answer_length[s]
        placed = pack(range(Q - 1), *lengths, ROWS, COLUMNS, Q)
        assert len(placed) == Q - 1
        packed.append(
            lay_out(
                placed, question[s], lengths[0], answer[s], lengths[1], ROWS, COLUMNS, Q, PAD_ID
            )
        )
    rows = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
    # Five names at random places in a question before its bos; the last one is not in its text.
    length = np.maximum(question_length - 1, 1)[..., None]
    back = (random.random((S, Q, 5)) * length).astype(np.int32)
    object_column = rows["encoding_column_SQ"][..., None] - back
    object_column[..., -1] = -1
    object_column[:, -1] = -1
    return rows | dict(
        object_column_SQO=object_column,
        question_SQL=question,
        question_length_SQ=question_length,
        answer_SQA=answer,
        answer_length_SQ=answer_length,
    )
