"""Small data sets in the layouts of their authors, with the expected questions."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from geode_jax.sources.datasets.captions import INSTRUCTION

PRE = "<image>\nThese are frames of a video.\n"
NUMBER = "\nPlease answer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclasses.dataclass(frozen=True)
class Case:
    """A data set.

    Attributes:
        files: {relative path: content}: a text as it is, a list of records for .jsonl, any other
            JSON value for .json.
        expected: the questions in order, without `source`.
        dropped: expected {reason: count} of dropped records.
        places: fields of a record that name its scene.
    """

    files: dict[str, Any]
    expected: list[dict]
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    places: tuple[str, ...] = ("scene_id", "video", "image", "image_path")

    def write(self, root: Path) -> Path:
        for name, content in self.files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.write_text(content)
            elif path.suffix == ".jsonl":
                path.write_text("".join(json.dumps(line) + "\n" for line in content))
            else:
                path.write_text(json.dumps(content))
        return root

    def moved(self, place: str) -> "Case":
        """The data set with another name in every place of a scene."""

        def move(value):
            if isinstance(value, dict):
                return {k: place if v and k in self.places else move(v) for k, v in value.items()}
            return [move(item) for item in value] if isinstance(value, list) else value

        files = {
            name: re.sub(r"scene\d+\w*", lambda _: place, content)
            if isinstance(content, str)
            else move(content)
            for name, content in self.files.items()
        }
        return Case(files, [])


def talk(*texts: str | list[str]) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


UNKNOWN = "question: its scene is not in the export"


def cases(train: str, held_out: str) -> dict[str, Case]:
    """Returns {source: small data set about a scene of train and one of val}."""
    makers = {
        "scanqa": _scanqa,
        "sqa3d": _sqa3d,
        "vsi590k": _vsi590k,
        "vica322k": _vica322k,
        "vlm3r": _vlm3r,
        "llava3d": _llava3d,
        "ssr-cot": _ssr_cot,
        "vica-thinking": _vica_thinking,
        "jsonl": _jsonl,
        "cambrian-alignment": _cambrian_alignment,
        "s-mit": _s_mit,
    }
    return {source: make(train, held_out) for source, make in makers.items()}


def _scanqa(train: str, held_out: str) -> Case:
    def record(scene: str, own: str, question: str, answers: list | None, **more) -> dict:
        found = {"scene_id": scene, "object_ids": [8], "object_names": ["cabinet"]}
        found |= {"question_id": own, "question": question} | more
        return found if answers is None else found | {"answers": answers}

    colours = ["brown", "dark brown", "brown"]
    documented = record(held_out, "val-0", "How many lamps are there?", ["2"], object_id=[1])
    del documented["object_ids"]
    return Case(
        {
            "qa/ScanQA_v1.0_train.json": [
                record(train, "train-0", "What color is the cabinet?", colours),
                record("scene0999_00", "train-1", "Where is it?", ["there"]),
                record(held_out, "train-2", "Is this seen in training?", ["no"]),
                record(train, "train-3", "", ["no"]),
            ],
            "qa/ScanQA_v1.0_val.json": [documented],
            "qa/ScanQA_v1.0_test_w_obj.json": [record("scene0707_00", "test-0", "Where?", None)],
        },
        [
            {
                "id": "scanqa-train-0",
                "scene_id": train,
                "kind": "scanqa",
                "question": "What color is the cabinet?",
                "answer": "brown",
                "answers": colours,
            },
            {
                "id": "scanqa-val-0",
                "scene_id": held_out,
                "kind": "scanqa",
                "question": "How many lamps are there?",
                "answer": "2",
            },
        ],
        {
            UNKNOWN: 1,
            "question: of train, but its scene is of val in the export": 1,
            "question: has no answer": 1,
            "record: has no question": 1,
        },
    )


def _sqa3d(train: str, held_out: str) -> Case:
    def files(split: str, *rows: tuple[int, str, str, str]) -> dict[str, Any]:
        questions = [
            {
                "scene_id": scene,
                "situation": "I am facing a window.",
                "alternative_situation": ["I look at a window.", "A window is before me."],
                "question": question,
                "question_id": own,
            }
            for own, scene, question, _ in rows
        ]
        annotations = [
            {
                "scene_id": scene,
                "question_type": "N/A",
                "answer_type": "other",
                "question_id": own,
                "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": 1}],
                "rotation": {"_x": 0, "_y": 0, "_z": -0.99957, "_w": -0.0292},
                "position": {"x": 0.711, "y": -0.032, "z": 0},
            }
            for own, scene, _, answer in rows
        ]
        about = {"info": {"version": "1.0"}, "data_type": "scannet"}
        folder = "sqa_task/balanced/v1_balanced"
        return {
            f"{folder}_questions_{split}_scannetv2.json": about | {"questions": questions},
            f"{folder}_sqa_annotations_{split}_scannetv2.json": about
            | {"annotations": list(reversed(annotations))},
        }

    return Case(
        files("train", (220602000002, train, "What's on my left?", "piano"))
        | files("test", (220602000017, held_out, "Does the door face me?", "no")),
        [
            {
                "id": "sqa3d-220602000002",
                "scene_id": train,
                "kind": "sqa3d_what",
                "question": "I am facing a window. What's on my left?",
                "answer": "piano",
            },
            {
                "id": "sqa3d-220602000017",
                "scene_id": held_out,
                "kind": "sqa3d_other",
                "question": "I am facing a window. Does the door face me?",
                "answer": "no",
            },
        ],
    )


def _vsi590k(train: str, held_out: str) -> Case:
    options = "\nOptions:\nA. chair\nB. sofa\nC. bed"
    size = "What is the longest dimension of the bed in feet?"
    turn = "How far must I turn in degrees?"
    near = "Which of these objects is the closest to the stove?"
    return Case(
        {
            "vsi_590k.jsonl": [
                {
                    "conversations": talk(f"{PRE}How many chair(s) are here?{NUMBER}", "3"),
                    "question_type": "absolute_count",
                    "video": f"scannet/{train}.mp4",
                },
                {
                    "conversations": talk(f"{PRE}{size}{NUMBER}", "6.8"),
                    "question_type": "absolute_size_object",
                    "video": f"scannet/{train}.mp4",
                    "image": None,
                },
                {
                    "conversations": talk(f"{PRE}{near}{options}{LETTER}", "C"),
                    "question_type": "relative_distance_object",
                    "image": f"scannet/{held_out}.jpg",
                },
                {
                    "conversations": talk(f"{PRE}{turn}{NUMBER}", "90"),
                    "question_type": "absolute_direction_object",
                    "video": f"scannet/{train}.mp4",
                },
                {"conversations": talk("Hi"), "question_type": "x", "video": "a.mp4"},
                {
                    "conversations": talk(f"{PRE}{near}{options}{LETTER}", "D"),
                    "question_type": "relative_distance_object",
                    "video": f"scannet/{train}.mp4",
                },
            ]
        },
        [
            {
                "id": "vsi590k-vsi_590k-1",
                "scene_id": train,
                "kind": "object_counting",
                "question": "How many chair(s) are here?",
                "answer": "3",
                "value": 3.0,
                "unit": "items",
            },
            {
                "id": "vsi590k-vsi_590k-2",
                "scene_id": train,
                "kind": "object_size_estimation",
                "question": size,
                "answer": "6.8",
                "value": 6.8,
                "unit": "ft",
            },
            {
                "id": "vsi590k-vsi_590k-3",
                "scene_id": held_out,
                "kind": "object_rel_distance",
                "question": near,
                "options": ["A. chair", "B. sofa", "C. bed"],
                "answer": "C",
            },
            {
                "id": "vsi590k-vsi_590k-4",
                "scene_id": train,
                "kind": "absolute_direction_object",
                "question": turn,
                "answer": "90",
            },
        ],
        {
            "record: has a conversation that is not human, gpt, human, ...": 1,
            "record: has an answer that is none of its options": 1,
        },
    )


def _vica322k(train: str, held_out: str) -> Case:
    order = "In what order do chair and lamp appear?"
    return Case(
        {
            "scannet/base/object_count.json": [
                {
                    "video": f"scannet/{train}.mp4",
                    "conversations": talk("<image>\nHow many lamps are there?", "2"),
                }
            ],
            "scannet/base/obj_appearance_order.json": [
                {
                    "video": f"scannet/{held_out}.mp4",
                    "conversations": talk(f"<image>\n{order}", "lamp, chair"),
                }
            ],
            "scannet/complex/conversation.json": [
                {
                    "video": f"scannet/{train}.mp4",
                    "conversations": talk(
                        "<image>\nWhere can I sit?", "On the sofa.", "Is it soft?", "It looks so."
                    ),
                }
            ],
            "arkitscenes/complex/usage.json": [
                {"video": "arkitscenes/0.mp4", "conversations": talk("Q?", "A.", "Q?", "A.")}
            ],
        },
        [
            {
                "id": "vica322k-scannet-base-obj_appearance_order-1",
                "scene_id": held_out,
                "kind": "obj_appearance_order_open",
                "question": order,
                "answer": "lamp, chair",
                "rationale": "lamp, chair",
            },
            {
                "id": "vica322k-scannet-base-object_count-1",
                "scene_id": train,
                "kind": "object_counting",
                "question": "How many lamps are there?",
                "answer": "2",
                "rationale": "2",
                "value": 2.0,
                "unit": "items",
            },
            *(
                {
                    "id": f"vica322k-scannet-complex-conversation-1-{turn}",
                    "scene_id": train,
                    "kind": "conversation",
                    "question": question,
                    "answer": answer,
                    "rationale": answer,
                }
                for turn, question, answer in (
                    (0, "Where can I sit?", "On the sofa."),
                    (1, "Is it soft?", "It looks so."),
                )
            ),
        ],
        {UNKNOWN: 2},
    )


def _vlm3r(train: str, held_out: str) -> Case:
    route = "You are a robot at the door. You want to reach the bed. Which turn?"
    far = "What is the distance between the camera and the bed (in meters)?"
    return Case(
        {
            "merged_qa_scannet_train.json": [
                {
                    "id": "0e5a-uuid",
                    "data_source": "scannet",
                    "scene_name": train,
                    "question_type": "route_planning",
                    "video": f"scannet/videos/{train}.mp4",
                    "conversations": talk(
                        f"{PRE}{route}\nOptions:\nA. Turn Left\nB. Turn Right{LETTER}", "B"
                    ),
                }
            ],
            "vstibench_train/camera.json": [
                {
                    "id": "0e5b-uuid",
                    "data_source": "scannet",
                    "scene_name": held_out,
                    "question_type": "camera_obj_abs_dist",
                    "video": f"scannet/videos/{held_out}.mp4",
                    "conversations": talk(f"{PRE}{far}{NUMBER}", "1.4"),
                }
            ],
        },
        [
            {
                "id": "vlm3r-merged_qa_scannet_train-1",
                "scene_id": train,
                "kind": "route_planning",
                "question": route,
                "options": ["A. Turn Left", "B. Turn Right"],
                "answer": "B",
            },
            {
                "id": "vlm3r-vstibench_train-camera-1",
                "scene_id": held_out,
                "kind": "camera_obj_abs_dist",
                "question": far,
                "answer": "1.4",
                "value": 1.4,
                "unit": "m",
            },
        ],
    )


def _llava3d(train: str, held_out: str) -> Case:
    def record(scene: str, *texts: str) -> dict:
        return {"id": 0, "video": f"scannet/{scene}", "conversations": talk(*texts)}

    return Case(
        {
            "train_instruct.json": [
                record(train, "<video>\nWhat stands by the wall?", "A piano."),
                record(held_out, "<video>\nIs there a bed?", "Yes."),
                record(train, "<video>\nDescribe the object at <boxes>.", "A chair."),
                {
                    "id": 2,
                    "video": [f"scannet/posed_images/{train}/{i:05}.jpg" for i in (0, 10)],
                    "conversations": talk("<video>\nAre both furniture?", ["Yes.", "They are."]),
                },
                {"id": 3, "video": ["a/0.jpg", "b/0.jpg"], "conversations": talk("Why?", "So.")},
            ]
        },
        [
            {
                "id": "llava3d-train_instruct-1",
                "scene_id": train,
                "kind": "instruction",
                "question": "What stands by the wall?",
                "answer": "A piano.",
            },
            {
                "id": "llava3d-train_instruct-2",
                "scene_id": held_out,
                "kind": "instruction",
                "question": "Is there a bed?",
                "answer": "Yes.",
            },
            {
                "id": "llava3d-train_instruct-4",
                "scene_id": train,
                "kind": "instruction",
                "question": "Are both furniture?",
                "answer": "Yes.",
                "answers": ["Yes.", "They are."],
            },
        ],
        {
            "record: has a placeholder in its question": 1,
            "record: has not just one video, image or folder of images": 1,
        },
    )


def _ssr_cot(train: str, held_out: str) -> Case:
    def record(scene: str, question: str, rationale: str, answer: str) -> dict:
        found = {"question": question, "rationale": rationale, "answer": answer}
        return found | {"image_path": f"VoCoT/{scene}.jpg", "depth_path": f"VoCoT/{scene}_d.png"}

    return Case(
        {
            "ssr-cot.jsonl": [
                record(train, "What is nearer?", "The cup occludes the box.", "The cup."),
                record(held_out, "Is it left?", "It is in the left half.", "Yes."),
                record(train, "No reason?", "", "No."),
            ]
        },
        [
            {
                "id": "ssr-cot-ssr-cot-1",
                "scene_id": train,
                "kind": "ssr_cot",
                "question": "What is nearer?",
                "answer": "The cup.",
                "rationale": "The cup occludes the box.",
            },
            {
                "id": "ssr-cot-ssr-cot-2",
                "scene_id": held_out,
                "kind": "ssr_cot",
                "question": "Is it left?",
                "answer": "Yes.",
                "rationale": "It is in the left half.",
            },
        ],
        {"record: has no rationale": 1},
    )


def _vica_thinking(train: str, held_out: str) -> Case:
    def record(scene: str, question: str, reply: str) -> dict:
        return {"video": f"scannet/{scene}.mp4", "conversations": talk(question, reply)}

    return Case(
        {
            "thinking.json": [
                record(
                    train,
                    "<image>\nHow long is the bed (in meters)?",
                    "**Thoughts:**\nA bed is about 2 m.\nThis one too.\n\n**Final Answer:** 2.0",
                ),
                record(held_out, "<image>\nIs it big?", "Thought: I see it.\nFinal answer: Yes."),
                record(train, "<image>\nIs it big?", "Yes."),
            ]
        },
        [
            {
                "id": "vica-thinking-thinking-1",
                "scene_id": train,
                "kind": "vica_thinking",
                "question": "How long is the bed (in meters)?",
                "answer": "2.0",
                "value": 2.0,
                "unit": "m",
                "rationale": "A bed is about 2 m.\nThis one too.",
            },
            {
                "id": "vica-thinking-thinking-2",
                "scene_id": held_out,
                "kind": "vica_thinking",
                "question": "Is it big?",
                "answer": "Yes.",
                "rationale": "I see it.",
            },
        ],
        {"record: has no 'Thoughts' before a 'Final Answer'": 1},
    )


def _captioned(own: str, scene: str, caption: str) -> dict:
    fields = {"id": own, "scene_id": scene, "kind": "caption", "question": INSTRUCTION}
    return fields | {"answer": caption, "rationale": caption}


def _jsonl(train: str, held_out: str) -> Case:
    box = [1.0, 2.0, 0.5, 1.5, 0.8, 1.0, 0.25]
    return Case(
        {
            "mine.jsonl": [
                {"scene_id": train, "question": "Where is the lamp?", "answer": "on the table"},
                {
                    "scene_id": train,
                    "id": "wide",
                    "kind": "width",
                    "question": "How wide is the door?",
                    "answer": "three feet",
                    "value": 3,
                    "unit": "feet",
                    "rationale": "Doors are about as wide as chairs.",
                },
                {
                    "scene_id": held_out,
                    "question": "Which is larger?",
                    "answer": "sofa",
                    "options": ["lamp", "sofa"],
                },
                {"scene_id": held_out, "question": "Locate the sofa.", "box": box},
                {
                    "scene_id": held_out,
                    "question": "How long is the sofa, in meters?",
                    "answer": 1.5,
                },
            ]
        },
        [
            {
                "id": "jsonl-mine-1",
                "scene_id": train,
                "kind": "question",
                "question": "Where is the lamp?",
                "answer": "on the table",
            },
            {
                "id": "jsonl-wide",
                "scene_id": train,
                "kind": "width",
                "question": "How wide is the door?",
                "answer": "three feet",
                "value": 3,
                "unit": "feet",
                "rationale": "Doors are about as wide as chairs.",
            },
            {
                "id": "jsonl-mine-3",
                "scene_id": held_out,
                "kind": "question",
                "question": "Which is larger?",
                "options": ["A. lamp", "B. sofa"],
                "answer": "B",
            },
            {
                "id": "jsonl-mine-4",
                "scene_id": held_out,
                "kind": "object_box",
                "question": "Locate the sofa.",
                "answer": "1.00 2.00 0.50 1.50 0.80 1.00 0.25",
                "box": box,
            },
            {
                "id": "jsonl-mine-5",
                "scene_id": held_out,
                "kind": "question",
                "question": "How long is the sofa, in meters?",
                "answer": "1.5",
                "value": 1.5,
                "unit": "m",
            },
        ],
    )


def _cambrian_alignment(train: str, held_out: str) -> Case:
    def record(scene: str, *texts: str) -> dict:
        return {"id": "1", "image": f"llava_pretrain/{scene}.jpg", "conversations": talk(*texts)}

    return Case(
        {
            "jsons/alignment_2.5m.jsonl": [
                record(train, "Give a brief description of the image.\n<image>", "A red sofa."),
                record(held_out, "<image>\nWhat is this?", "A lamp."),
                record(train, "<image>\nWhat?", "A lamp.", "Sure?", "Yes."),
            ]
        },
        [
            _captioned("cambrian-alignment-jsons-alignment_2.5m-1", train, "A red sofa."),
            _captioned("cambrian-alignment-jsons-alignment_2.5m-2", held_out, "A lamp."),
        ],
        {"record: has more than one turn, which is no caption": 1},
    )


def _s_mit(train: str, held_out: str) -> Case:
    return Case(
        {
            "train.jsonl": [
                {"video": f"cooking/{train}.mp4", "caption": "someone stirs a pot"},
                {"video": f"cooking/{held_out}.mp4", "caption": "a pan on a stove"},
                {"video": f"cooking/{train}.mp4", "text": "no caption"},
            ]
        },
        [
            _captioned("s-mit-train-1", train, "someone stirs a pot"),
            _captioned("s-mit-train-2", held_out, "a pan on a stove"),
        ],
        {"record: has no caption": 1},
    )
