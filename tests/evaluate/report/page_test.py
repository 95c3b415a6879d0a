"""The page is read back with the standard library's parser, as a browser would."""

import base64
import io
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from geode_jax.errors import UserError
from geode_jax.evaluate.report import page as report

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects text, tags and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.images, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href"):
                (self.images if tag == "img" else self.links).append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def example(**more):
    fixed = {
        "kind": "contact",
        "question": "Does the lamp touch the desk?",
        "answer": "yes",
        "prediction": "yes",
    }
    return {**fixed, **more}


def write(tmp_path, **more):
    arguments = {
        "title": "A run",
        "origin": "geode_jax 0.1.0, seed 0",
        "config_text": "",
        "metrics_rows": [],
        "scores": {},
        "examples": [],
        **more,
    }
    report.write_report(tmp_path / "report.html", **arguments)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    return Page(text), text


@pytest.fixture
def full(tmp_path):
    rows = [
        {
            "step": step,
            "loss": 1 / (step + 1) - 0.1,
            "loss/text": 1.0,
            "loss/depth/ce": 2.0,
            "weight/text": 0.5 + step,
        }
        for step in range(100)
    ]
    rows += [{"step": 99, "val/loss": 0.4, "val/contact": 0.9}]
    image = np.zeros((8, 12, 3), np.uint8)
    image[:, 6:] = (255, 0, 7)
    return write(
        tmp_path,
        config_text="lr = 1e-3",
        metrics_rows=rows,
        scores={
            "model": {"spatial_accuracy": 0.91, "contact": 0.93, "depth_rmse": 0.25},
            "vision_removed": {"spatial_accuracy": 0.52, "contact": 0.5},
            "frequency": {"spatial_accuracy": 0.44},
        },
        examples=[
            example(image=image, thinking_tokens=["lamp", ""], metrics={"rouge1": 0.25}),
            example(prediction="no", thinking_tokens=["lamp"]),
            example(kind="object_counting", answer="10", prediction="11", value=10.0),
        ],
        depth_examples=[
            {"image": image, "target": np.ones((4, 6)), "prediction": np.full((4, 6), np.nan)}
        ],
        efficiency={
            "parameters": 1234567,
            "bytes": 3 * 2**20,
            "train_seconds": 605,
            "where": "cpu",
        },
        notes=["Rooms are synthetic."],
        score_notes={"depth_rmse": "input contains depth"},
    )


def test_everything_is_on_the_page(full):
    page, _ = full
    for text in (
        "A run",
        "Rooms are synthetic.",
        "lr = 1e-3",
        "0.910",
        "0.520",
        "0.440",
        "input contains depth",
        "depth/ce",
        "Uncertainty weights",
        "✓ right",
        "✗ wrong",
        "MRA 0.90",
        "␣",
        "1,234,567",
        "3.0 MiB",
        "train time",
        "10 min 5 s",
        "true depth",
    ):
        assert text in page.text, text


def test_charts_are_svg(full):
    page, _ = full
    # Total loss, weights, two terms, one validation score.
    assert page.tags.count("svg") == 5


def test_the_page_needs_nothing_else(full):
    page, text = full
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert page.links == []
    assert "script" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.images)
    assert not re.search(r"url\(|@import|https?://", text)


def test_pictures_survive(full):
    page, _ = full
    assert len(page.images) == 4
    data = base64.b64decode(page.images[0].split(",")[1])
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert pixels.shape == (8, 12, 3)
    assert tuple(pixels[3, 9]) == (255, 0, 7)


def test_bars_show_the_scores(full):
    _, text = full
    row = text[text.index(">spatial accuracy (mean)<") :]
    assert re.findall(r"(?:width|left):([\d.]+)%", row)[:3] == ["91.0", "52.0", "44.0"]


def test_all_text_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>\"&"
    page, text = write(
        tmp_path,
        title=evil,
        config_text=evil,
        metrics_rows=[{"step": i, f"loss/{evil}": 1.0, f"val/{evil}": 2.0} for i in (0, 1)],
        scores={evil: {evil: 0.5, "contact": 0.1}},
        examples=[
            example(
                question=evil,
                answer=evil,
                prediction=evil,
                kind=evil,
                options=[evil],
                unit=evil,
                thinking_tokens=[evil],
                metrics={evil: 1.0},
            )
        ],
        depth_examples=[
            {
                "image": np.zeros((2, 2, 3), np.uint8),
                "target": np.ones((2, 2)),
                "prediction": np.ones((2, 2)),
                "caption": evil,
            }
        ],
        efficiency={evil: evil},
        notes=[evil],
        score_notes={"contact": evil},
    )
    assert "script" not in page.tags
    assert "<script" not in text
    assert page.text.count(evil) >= 12


def test_a_unit_is_shown_once(tmp_path):
    answers = ("1.9", "1.9 m", "190 cm")
    page, _ = write(tmp_path, examples=[example(answer=answer, unit="m") for answer in answers])
    assert "190 cm m" not in page.text and "1.9 m m" not in page.text
    assert page.text.count("1.9 m") == 2


def test_an_empty_run_still_has_a_page(tmp_path):
    page, _ = write(tmp_path)
    title = ["A", "run"]
    origin = ["geode_jax", "0.1.0,", "seed", "0"]
    assert page.text.split() == [*title, *title, *origin]  # <title>, <h1> and its line


def test_odd_numbers_do_not_break_the_page(tmp_path):
    rows = [{"step": 0, "loss": float("nan"), "loss/text": float("inf"), "weight/text": None}]
    page, _ = write(
        tmp_path, metrics_rows=rows, scores={"model": {"contact": float("nan"), "mra": 1.0}}
    )
    assert "nan" in page.text


def test_no_half_written_file_is_left(tmp_path, monkeypatch):
    write(tmp_path, title="first")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(UserError, match=r"report.html: cannot be written: No space"):
        write(tmp_path, title="second")
    assert "first" in (tmp_path / "report.html").read_text()
