"""Files of questions in their authors' layouts, a few about every scene."""

import json
from pathlib import Path
from typing import Any

from tests.sources.datasets.layouts import LETTER, NUMBER, PRE, talk

NEAR = "Which of these objects is the closest to the stove?\nOptions:\nA. chair\nB. sofa\nC. bed"
ROUTE = "You are at the door. Which turn leads to the bed?\nOptions:\nA. Turn Left\nB. Turn Right"


def write_questions(root: Path, scenes: list[str], pictures: list[str]) -> None:
    """Writes every data set of questions into a folder of its own.

    Args:
        root: folder of all data sets.
        scenes: ids of ScanNet's scans.
        pictures: names of pictures, without ending, that have captions.
    """
    files: dict[str, Any] = {}
    for split in ("train", "val"):  # the recipe draws the splits; what does not fit is dropped
        files[f"scanqa/ScanQA_v1.0_{split}.json"] = [
            {
                "scene_id": scene,
                "object_ids": [1],
                "object_names": ["table"],
                "question_id": f"{split}-{n}",
                "question": f"What is next to the table number {n}?",
                "answers": ["chair", "a chair"],
            }
            for n, scene in enumerate(scenes)
        ]
        files |= _sqa3d(split, scenes)
    files["vsi590k/vsi_590k.jsonl"] = [
        _talk(scene, text, answer, question_type=kind)
        for scene in scenes
        for text, answer, kind in (
            (f"{PRE}How many chair(s) are in this room?{NUMBER}", "3", "absolute_count"),
            (f"{PRE}How far is the bed from the sofa, in meters?{NUMBER}", "2.1",
             "absolute_distance_object"),
            (f"{PRE}{NEAR}{LETTER}", "C", "relative_distance_object"),
        )
    ]  # fmt: skip
    files["vlm3r/merged_qa_scannet_train.json"] = [
        _talk(scene, f"{PRE}{ROUTE}{LETTER}", "B", data_source="scannet", scene_name=scene,
              question_type="route_planning", id=f"uuid-{n}")
        for n, scene in enumerate(scenes)
    ]  # fmt: skip
    files["vica322k/scannet/base/object_count.json"] = [
        _talk(scene, "<image>\nHow many lamps are there?", "2") for scene in scenes
    ]
    files["vica322k/scannet/complex/conversation.json"] = [
        _talk(scene, "<image>\nWhere can I sit?", "On the sofa, which stands by the wall.")
        for scene in scenes
    ]
    files["vica-thinking/thinking.json"] = [
        _talk(scene, "<image>\nHow long is the bed (in meters)?",
              "**Thoughts:**\nA bed is about 2 m.\n\n**Final Answer:** 2.0")
        for scene in scenes
    ]  # fmt: skip
    files["ssr-cot/ssr-cot.jsonl"] = [
        {
            "question": "What is nearer?",
            "rationale": "The cup occludes the box.",
            "answer": "The cup.",
            "image_path": f"VoCoT/{name}.jpg",
            "depth_path": f"VoCoT/{name}_d.png",
        }
        for name in pictures
    ]
    files["cambrian-alignment/jsons/alignment_2.5m.jsonl"] = [
        {"id": name, "image": f"llava_pretrain/{name}.jpg",
         "conversations": talk("<image>\nDescribe the image.", "A room with a table.")}
        for name in pictures
    ]  # fmt: skip
    files["s-mit/train.jsonl"] = [
        {"video": f"sitting/{name}.mp4", "caption": "someone sits on a chair"} for name in pictures
    ]
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = content if path.suffix == ".jsonl" else [content]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _talk(scene: str, question: str, answer: str, **more: str) -> dict[str, Any]:
    return {"video": f"scannet/{scene}.mp4", "conversations": talk(question, answer), **more}


def _sqa3d(split: str, scenes: list[str]) -> dict[str, Any]:
    about = {"info": {"version": "1.0"}, "data_type": "scannet"}
    numbers = {scene: f"{220602000000 + n}" for n, scene in enumerate(scenes)}
    questions = [
        {
            "scene_id": scene,
            "situation": "I am facing a window.",
            "alternative_situation": ["A window is before me."],
            "question": "What is on my left?",
            "question_id": int(numbers[scene]) + 1000 * (split == "val"),
        }
        for scene in scenes
    ]
    annotations = [
        {
            "scene_id": question["scene_id"],
            "question_type": "N/A",
            "answer_type": "other",
            "question_id": question["question_id"],
            "answers": [{"answer": "sofa", "answer_confidence": "yes", "answer_id": 1}],
        }
        for question in questions
    ]
    folder = "sqa3d/sqa_task/balanced/v1_balanced"
    return {
        f"{folder}_questions_{split}_scannetv2.json": about | {"questions": questions},
        f"{folder}_sqa_annotations_{split}_scannetv2.json": about | {"annotations": annotations},
    }
