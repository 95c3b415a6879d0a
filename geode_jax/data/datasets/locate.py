"""Questions for a box, of any export that has boxes: "Locate the sofa."

The field's question sets have no boxes for GEODE's `<3DBBOX>` to learn from, the scenes have: an
export of ScanNet, 3D-FRONT or rooms holds them in its own frame.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from geode_jax.data.datasets import Report, Request
from geode_jax.data.datasets.questions import Asked, Layout, UnansweredError, make_questions
from geode_jax.data.exports import Export
from geode_jax.errors import UserError


def locate(request: Request) -> Report:
    """Asks for every object that is the only one of its category in its scene.

    Args:
        request: `root` is the export that has the boxes and is asked about.

    Raises:
        UserError: `scenes` is another export, whose world frame need not be the same.
    """
    if request.scenes not in (None, request.root):
        raise UserError("--scenes: locate asks about the scenes of --root, which has the boxes")
    layout = Layout("locate", {"all": ("manifest.json",)}, _scene_record, _scenes_of)
    return make_questions(layout, dataclasses.replace(request, scenes=request.root))


def _scenes_of(path: Path) -> Iterator[dict]:
    """Every scene of an export with the names of its boxes."""
    export = Export(path.parent)
    for scene_id in export.scene_ids():
        found = export.read_scene(scene_id, ("target/boxes", "target/labels"))
        labels = found.get("target/labels", ())
        boxes = found.get("target/boxes", ())
        names = [export.categories[label] for label in labels]
        yield {"scene_id": scene_id, "names": names, "boxes": boxes}


def _scene_record(record: dict, path: Path) -> Asked:
    names = record["names"]
    counts = Counter(names)
    questions = []
    for index, (name, row) in enumerate(zip(names, record["boxes"], strict=False)):
        if counts[name] == 1:
            # Added zero: -0.004 is 0.00, not -0.00.
            answer = " ".join(f"{round(float(value), 2) + 0.0:.2f}" for value in row)
            box = [round(float(value), 4) for value in row]
            questions.append(
                {
                    "kind": "object_box",
                    "question": f"Locate the {name}.",
                    "answer": answer,
                    "box": box,
                    "objects": [{"name": name, "box": box, "index": index}],
                }
            )
    if not questions:
        raise UnansweredError
    return Asked(record["scene_id"], questions)
