"""Tiny exports with every kind of tensor and question, for tests that need data."""

import numpy as np
from scipy.spatial.transform import Rotation

from geode_jax.exports import Export, ExportWriter

CATEGORIES = ["chair", "table", "dining table", "lamp", "sofa"]
GRID, CELL, TOKEN_WIDTH = (2, 3), 4, 5
WORDS = ["red", "blue", "small", "large"]


def tiny_scene(random: np.random.Generator, views: int, boxes: int) -> tuple[dict, dict]:
    """Returns random arrays and teacher arrays of a scene; a fifth of the depth is unknown."""
    (gh, gw), c = GRID, len(CATEGORIES)
    h, w = gh * CELL, gw * CELL
    depth = random.uniform(0.5, 5, (views, h, w)).astype(np.float32)
    depth[random.random(depth.shape) < 0.2] = 0
    rotation = Rotation.random(views, rng=random).as_matrix()
    pose = np.concatenate([rotation, random.normal(size=(views, 3, 1))], axis=2)
    camera = np.array([[11, 0, (w - 1) / 2], [0, 12, (h - 1) / 2], [0, 0, 1]])
    arrays = {
        "vggt/tokens": random.normal(size=(views, gh * gw, TOKEN_WIDTH)).astype(np.float32),
        "vggt/depth": depth,
        "camera/extrinsic": pose.astype(np.float32),
        "camera/intrinsic": np.tile(camera, (views, 1, 1)).astype(np.float32),
        "target/depth": depth,
        "target/segmentation": random.integers(-1, c, (views, h, w)).astype(np.int16),
        "target/boxes": random.uniform(0.2, 3, (boxes, 7)).astype(np.float32),
        "target/labels": random.integers(0, c, boxes).astype(np.int32),
    }
    one_way = random.random((boxes * boxes, 2)).astype(np.float32)
    teacher = {
        "features": random.normal(size=(views, gh, gw, 7)).astype(np.float32),
        "depth_bins": random.dirichlet(np.ones(6), (views, 4, 6)).astype(np.float32),
        "detection_probs": random.dirichlet(np.ones(c), boxes).astype(np.float32),
        "relations": np.stack([one_way, 1 - one_way], -1).reshape(-1, 4),
    }
    return arrays, teacher


def tiny_questions(random: np.random.Generator, scene_id: str, boxes: np.ndarray) -> list[dict]:
    """Returns five to eleven questions of five kinds about the boxes of a scene."""
    records = []
    for i in range(random.integers(5, 12)):
        order = random.permutation(len(boxes))[:3]
        names = [CATEGORIES[j % len(CATEGORIES)] for j in order]
        objects = [
            {"name": name, "box": [float(x) for x in boxes[j]], "index": int(j)}
            for name, j in zip(names, order, strict=True)
        ]
        record = {"id": f"{scene_id}_{i}", "scene_id": scene_id}
        distance = round(float(random.uniform(0.5, 6)), 1)
        match i % 5:
            case 0:
                record |= dict(kind="object_counting", answer=str(i + 1), value=float(i + 1))
                record |= dict(question=f"How many {names[0]}(s) are in this room?")
            case 1:
                record |= dict(kind="object_abs_distance", answer=str(distance), unit="m")
                record |= dict(
                    question=f"How far is the {names[0]} from the {names[1]} (in meters)?",
                    objects=objects[:2],
                    value=distance,
                )
            case 2:
                options = [f"{letter}. {n}" for letter, n in zip("ABC", names, strict=True)]
                record |= dict(kind="object_rel_distance", options=options, answer="B")
                record |= dict(question="Which of these is the closest to the door?")
            case 3:
                p = float(random.random())
                record |= dict(kind="proximity", answer=names[int(p < 0.5)], objects=objects)
                record |= dict(
                    question=f"Which is closer, the {names[0]} or the {names[1]}?",
                    relation={"proximity": p, "left_right": float(random.integers(2))},
                )
            case 4:
                things = " and ".join(f"a {random.choice(WORDS)} {name}" for name in names)
                record |= dict(kind="scene_description", question="Describe this room.")
                record |= dict(answer=f"There is {things}.", teacher_answer=f"I see {things}.")
        records.append(record)
    return records


HEADER = {
    "producer": {"project": "test", "commit": "0", "weights": "none", "licence": "CC0-1.0"},
    "dtype": "float32",
    "scale": "metric",
    "token_width": TOKEN_WIDTH,
    "patch_grid": GRID,
    "tokens_contain_depth": False,
    "categories": CATEGORIES,
}
"""Arguments of `ExportWriter` for the exports of these tests."""


def write_tiny_export(folder, train: int = 7, val: int = 3, seed: int = 0) -> Export:
    """Writes an export of random valid scenes and opens it.

    Scene 0 has only tokens, every third scene a teacher; views (1 to 3) and boxes (3 to 6) vary.
    """
    random = np.random.default_rng(seed)
    with ExportWriter(folder, **HEADER) as writer:
        for i in range(train + val):
            arrays, teacher = tiny_scene(random, 1 + i % 3, 3 + i % 4)
            scene_id, split = f"scene{i:03}", "train" if i < train else "val"
            questions = tiny_questions(random, scene_id, arrays["target/boxes"])
            if i == 0:
                arrays = {"vggt/tokens": arrays["vggt/tokens"]}
                questions = [q for q in questions if "objects" not in q]
            writer.add_scene(scene_id, arrays, split=split, teacher=teacher if i % 3 == 1 else None)
            writer.add_questions(questions)
    return Export(folder)


IMAGE, POINT_WIDTH = (6, 8), 4


def write_geode_export(folder, train: int = 4, val: int = 2, seed: int = 0) -> Export:
    """Writes an export for GEODE: images and points instead of tokens, boxes, rationales.

    Views (1 to 3) and points (3 to 6) vary, scene 0 has no points. The questions of
    `tiny_questions` with named objects have a rationale. Two more questions of every scene are
    answered by a box and by a number in centimetres.
    """
    random = np.random.default_rng(seed)
    with ExportWriter(folder, **HEADER) as writer:
        for i in range(train + val):
            views, points = 1 + i % 3, 3 + i % 4
            arrays, _ = tiny_scene(random, views, 3)
            del arrays["vggt/tokens"]
            arrays["images"] = random.integers(1, 256, (views, *IMAGE, 3), np.uint8)
            if i:
                features = random.normal(size=(points, POINT_WIDTH))
                arrays["sonata/features"] = features.astype(np.float16)
                arrays["sonata/coord"] = random.normal(size=(points, 3)).astype(np.float32)
                arrays["sonata/frame"] = np.arange(points, dtype=np.int32) % views
            scene_id, split = f"scene{i:03}", "train" if i < train else "val"
            questions = tiny_questions(random, scene_id, arrays["target/boxes"])
            for record in questions:
                if "objects" in record:
                    record["rationale"] = f"I look at the {record['objects'][0]['name']}."
            box = [round(float(x), 2) for x in arrays["target/boxes"][0]]
            long = round(100 * box[3])
            chair = {
                "scene_id": scene_id,
                "objects": [{"name": "chair", "box": box, "index": 0}],
                "rationale": f"The chair is {long} centimeters long.",
            }
            asks_box = {
                "id": f"{scene_id}_box",
                "kind": "object_box",
                "question": "What is the 3D bounding box of the chair?",
                "answer": " ".join(map(str, box)),
                "box": box,
            }
            asks_size = {
                "id": f"{scene_id}_size",
                "kind": "object_size_estimation",
                "question": "How long is the chair?",
                "answer": str(long),
                "value": long,
                "unit": "cm",
            }
            writer.add_scene(scene_id, arrays, split=split)
            writer.add_questions([*questions, chair | asks_box, chair | asks_size])
    return Export(folder)
