"""Draws docs/images/room.png: the views and the floor plan of one room, and one of its questions.

    geode-jax rooms --scenes 6 --images 320 --out DIR
    python docs/images/room_picture.py DIR

The names in the views and the whole floor plan are drawn for the reader; a model sees neither.
"""

import argparse
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from geode_jax import exports

SIDE, GAP, PLAN = 320, 8, 648
"""Pixels: the side of a view, the space between views, the side of the floor plan."""
KIND = "object_abs_distance"
LEAST_CELLS = 6
"""An object that covers fewer cells of the segmentation in a view gets no name there."""


def label(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str) -> None:
    """Writes a name on a white ground, its middle at `place`."""
    font = ImageFont.load_default(15)
    box = draw.textbbox(place, text, font=font, anchor="mm")
    draw.rectangle((box[0] - 3, box[1] - 2, box[2] + 3, box[3] + 2), fill="white")
    draw.text(place, text, fill="black", font=font, anchor="mm")


def view(picture: np.ndarray, categories_hw: np.ndarray, names: list[str]) -> Image.Image:
    """A view [H, W, 3] with the name of every category in the middle of the cells that show it."""
    image = Image.fromarray(picture).resize((SIDE, SIDE))
    draw = ImageDraw.Draw(image)
    cell = SIDE / categories_hw.shape[0]
    for category in np.unique(categories_hw[categories_hw >= 0]):
        rows, columns = np.nonzero(categories_hw == category)
        if len(rows) >= LEAST_CELLS:
            place = ((np.median(columns) + 0.5) * cell, (np.median(rows) + 0.5) * cell)
            label(draw, place, names[category])
    return image


def floor_plan(boxes_N7: np.ndarray, names: list[str], cameras_V3: np.ndarray) -> Image.Image:
    """The true boxes from above, x to the right and y upwards, and the places of the cameras."""
    image = Image.new("RGB", (PLAN, PLAN), "white")
    draw = ImageDraw.Draw(image)
    reach = 1.15 * np.abs(np.concatenate([boxes_N7[:, :2], cameras_V3[:, :2]])).max() + 0.5

    def place(point: np.ndarray) -> tuple[float, float]:
        return (PLAN / 2 * (1 + point[0] / reach), PLAN / 2 * (1 - point[1] / reach))

    for box in boxes_N7:
        turn = np.array([[np.cos(box[6]), -np.sin(box[6])], [np.sin(box[6]), np.cos(box[6])]])
        corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * box[3:5] / 2
        draw.polygon([place(c) for c in corners @ turn.T + box[:2]], fill="#d9e6f2", outline="#345")
    for box, name in zip(boxes_N7, names, strict=True):
        label(draw, place(box), name)
    for number, camera in enumerate(cameras_V3, start=1):
        x, y = place(camera)
        draw.ellipse((x - 9, y - 9, x + 9, y + 9), fill="#a03030")
        draw.text((x, y), str(number), fill="white", font=ImageFont.load_default(13), anchor="mm")
    draw.line((20, PLAN - 20, 20 + PLAN / 2 / reach, PLAN - 20), fill="black", width=3)
    draw.text((20, PLAN - 44), "1 m", fill="black", font=ImageFont.load_default(15))
    draw.rectangle((0, 0, PLAN - 1, PLAN - 1), outline="#999")
    return image


def main() -> None:
    """Composes the picture of the export's first test room."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, metavar="DIR")
    parser.add_argument("--scene", metavar="ID", help="default: the first of the test split")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "room.png")
    arguments = parser.parse_args()
    export = exports.Export(arguments.export)
    scene_id = arguments.scene or export.scene_ids("test")[0]
    scene = export.read_scene(scene_id)
    question = next(
        record
        for record in export.questions()
        if record["scene_id"] == scene_id and record["kind"] == KIND
    )
    names = export.categories
    views = [
        view(picture, categories, names)
        for picture, categories in zip(scene["images"], scene["target/segmentation"], strict=True)
    ]
    rotation_V33, shift_V3 = np.split(scene["camera/extrinsic"], [3], axis=2)
    cameras_V3 = -np.einsum("vij,vi->vj", rotation_V33, shift_V3[..., 0])
    labels = [names[i] for i in scene["target/labels"]]
    plan = floor_plan(scene["target/boxes"], labels, cameras_V3)

    width = 2 * SIDE + GAP + GAP + PLAN
    text = [
        *textwrap.wrap(f"Question: {question['question']}", 100),
        f"True answer: {question['answer']} {question.get('unit', '')}",
    ]
    image = Image.new("RGB", (width, PLAN + 24 + 30 * len(text)), "white")
    for number, picture in enumerate(views):
        x, y = (number % 2) * (SIDE + GAP), (number // 2) * (SIDE + GAP)
        image.paste(picture, (x, y))
        ImageDraw.Draw(image).text(
            (x + 8, y + 6), f"view {number + 1}", fill="white", font=ImageFont.load_default(15)
        )
    image.paste(plan, (2 * (SIDE + GAP), 0))
    for number, line in enumerate(text):
        ImageDraw.Draw(image).text(
            (8, PLAN + 16 + 30 * number), line, fill="black", font=ImageFont.load_default(22)
        )
    image.quantize(128).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
