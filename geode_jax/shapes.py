"""The dimension key and the arrays that travel between data, models and objectives.

Dimension key (suffixes of names and letters of einsum strings):

| letter | meaning | letter | meaning |
|---|---|---|---|
| S | scenes in a batch | B | rows of any batch |
| Q | questions of a scene | L | length of a row; of a question |
| A | answer length | M | positions that an attention reads: keys, a scene's vision tokens |
| V | views (frames) of a scene | D | model width |
| P | patches of a view, row-major | H | attention heads |
| C | width of an input feature | G | key/value heads, a divisor of H |
| J | points of a scene | E | width of a head |
| N | boxes of a scene | X | vocabulary |
| Y | object queries of the detection head | K | thinking tokens of the student |
| O | objects that a question names | R | rationale tokens of GEODE |
| W | rows of a scene's packed text | I | inner channels of Mamba |
| T | columns of a packed row | U | states of a Mamba channel |
| F | width of a teacher's feature | Z | depth bins |

Lowercase letters are short or fixed axes: h, w pixels; c categories; b numbers of a box code; r
relations (`RELATIONS`); k most likely tokens. A file that needs other sizes names them, lowercase,
in its docstring. Digits are sizes: 7 numbers of a box, 34 and 33 matrices.

Frames: the world frame is the export's (metres, z up for rooms); cameras are camera-from-world with
OpenCV axes; a box is (centre xyz, size xyz, yaw about z).
"""

import dataclasses

import jax
import numpy as np

MAX_OBJECTS = 5
"""O, the most objects of a question that are targets of the spatial head: VSI-Bench's questions of
relative distance name five."""

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """S scenes with Q questions each. Optional supervision is masked, never a zero target.

    Question ids are left-padded to L, so that the last column always holds the question's last
    token; answers are right-padded to A.
    """

    # Inputs of a scene.
    vision_SVPC: Array  # `vggt/tokens` in their stored dtype; see SceneShapes.vision
    view_mask_SV: Array  # bool, False = padding view
    camera_SVC: Array  # `vggt/camera_tokens` in their stored dtype; C = 0 if absent
    camera_mask_S: Array  # bool
    depth_hint_SVP: Array  # float32 metres, `vggt/depth` averaged over the patch; 0 = unknown
    points_SVP3: Array  # float32 metres, world frame: the point at the patch centre
    points_mask_SVP: Array  # bool
    extrinsic_SV34: Array  # float32 camera-from-world
    intrinsic_SV33: Array  # float32 pixels of the patch grid (gh, gw), integer patch centres
    # Empty for the student. GEODE reads points and images (then vision_SVPC has C = 0), or instead
    # of images `internvit/tokens` in vision_SVPC, whose P is the number of tokens, not of patches.
    image_SVhw3: Array  # uint8, `images`; 0 in padding views
    point_SJC: Array  # float32, `sonata/features`
    coord_SJ3: Array  # float32 metres, `sonata/coord`
    point_frame_SJ: (
        Array  # int32 view that contributes most to the point, `sonata/frame`; -1 unknown
    )
    point_mask_SJ: Array  # bool, False = padding point

    # Dense and object supervision of a scene.
    target_depth_SVhw: Array  # float32 metres, 0 = unknown; (h, w) = (gh * r, gw * r)
    target_depth_weight_SVhw: Array  # float32 in [0, 1], of a depth in the losses; 1 = measured
    target_boxes_SN7: Array  # float32
    target_labels_SN: Array  # int32 category, -1 = no box
    boxes_known_S: Array  # bool: the boxes of this scene are complete
    target_segmentation_SVP: Array  # int32 majority category, -1 = none, -2 = unknown
    teacher_features_SVPF: Array  # float32
    teacher_features_mask_S: Array  # bool
    teacher_depth_bins_SVPZ: Array  # float32 probabilities
    teacher_depth_bins_mask_S: Array  # bool
    teacher_detection_SNc: Array  # float32 class probabilities of each box
    teacher_detection_mask_S: Array  # bool

    # Questions.
    question_SQL: Array  # int32, prompt + bos (which starts the answer), left-padded
    question_length_SQ: Array  # int32
    answer_SQA: Array  # int32, answer + eos, right-padded
    answer_length_SQ: Array  # int32, 0 = padding question
    objects_SQO7: Array  # float32 boxes of the named objects; first the one that distances start at
    objects_mask_SQO: Array  # bool
    gaps_SQO: Array  # float32 metres, closest-point distance from the first object to each
    angle_SQ2: Array  # float32 (sin, cos) of the turn, left positive
    angle_mask_SQ: Array  # bool
    relations_SQr: Array  # float32 probability of the first alternative
    relations_mask_SQr: Array  # bool
    teacher_relations_SQr: Array  # float32, as relations_SQr, from `teacher/relations`
    teacher_relations_mask_SQr: Array  # bool
    value_SQ: Array  # float32 numeric answer in the question's unit
    value_mask_SQ: Array  # bool
    base_unit_SQ: Array  # float32, factor from the question's unit to the base unit
    box_SQ7: Array  # float32, the box that is the answer
    box_mask_SQ: Array  # bool, all False in pipelines without control tokens

    # The same questions packed for training, see `data.packing`.
    packed_SWT: Array  # int32 token ids
    packed_position_SWT: Array  # int32, position in its segment
    packed_start_SWT: Array  # int32, first column of its segment
    packed_answer_SWT: Array  # bool, bos or answer token: sees the thinking tokens
    answer_column_SQA: Array  # int32, flat column (of W * T) that predicts each answer token
    encoding_column_SQ: Array  # int32, flat column of the prompt's last token
    object_column_SQO: (
        Array  # int32, flat column of the last token of each object's name, -1 = none
    )

    # Teacher logits at the answer positions; k = 0 if there is no teacher.
    topk_id_SQAk: Array  # int32
    topk_logprob_SQAk: Array  # float32, normalised over the whole vocabulary
    topk_mask_SQA: Array  # bool


def without_vision(batch: Batch) -> Batch:
    """Returns the batch with all views masked; works on host arrays and on traced arrays."""
    return dataclasses.replace(batch, view_mask_SV=batch.view_mask_SV & False)
