"""What a configuration asks for, before anything is trained."""

import pytest

from configs.hidden_cot import get_config
from geode_jax import build
from geode_jax.data.exports import Export
from geode_jax.errors import UserError
from tests.runs import tiny_rooms


def test_rooms_with_pictures_are_another_export():
    data = get_config("laptop").data
    assert build.export_folder(data).name == "rooms_8000_s0"
    with data.unlocked():
        data.rooms_images = 32
    assert build.export_folder(data).name == "rooms_8000_s0_i32"


def test_rooms_are_made_with_the_pictures_asked_for(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(build, "make_rooms", lambda *args, **kwargs: made.append((args, kwargs)))
    data = get_config("laptop").data
    with data.unlocked():
        data.update(root=str(tmp_path), rooms_images=32)
    folder = build.prepare_export(data)
    assert made == [((folder,), {"scenes": 8000, "seed": 0, "images": 32})]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rooms_images", -1, "data.rooms_images: -1 is not at least 0"),
        ("vision", "images", "data.vision: images is not what the student sees"),
    ],
)
def test_what_the_data_cannot_be_is_refused_by_name(field, value, said):
    config = get_config("laptop")
    build.check_config(config)
    with config.unlocked():
        config.data[field] = value
    with pytest.raises(UserError, match=said):
        build.check_config(config)


def test_the_students_tokenizer_learns_nothing_of_boxes(tmp_path):
    config, export = get_config("laptop"), Export(tiny_rooms(tmp_path / "rooms"))
    assert any(record["kind"] == "object_box" for record in export.questions())
    tokenizer = build.prepare_tokenizer(config, export, tmp_path)
    assert tokenizer.unk_id in tokenizer.encode("What is the 3D bounding box of the bed?")
    pipelines = build.make_pipelines(config, export, tokenizer)
    for split, pipeline in pipelines.items():
        ids = set(export.scene_ids(split))
        boxes = [r for r in export.questions() if r["scene_id"] in ids and "box" in r]
        assert pipeline.dropped == {"kind object_box": len(boxes)} and boxes
        for records, _ in pipeline.eval_batches():
            assert not any("box" in record for row in records for record in row)
