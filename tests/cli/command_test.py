import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from geode_jax.exports import Export
from tests.helpers.command import one_error
from tests.helpers.exports import write_tiny_export
from tests.sources.rgbd.export_test import write_hall

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny_export(tmp_path_factory) -> Export:
    return write_tiny_export(tmp_path_factory.mktemp("exports") / "tiny")


def test_without_a_command_it_explains_itself(run):
    status, out, err = run()
    assert (status, out) == (2, "")
    for command in ("validate", "rooms", "rgbd", "scenes", "ask", "evaluate", "convert"):
        assert command in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["rooms", "--scenes", "0", "--out", "x"], "0 is less than 1"),
        (["rooms", "--scenes", "many", "--out", "x"], "invalid"),
        (["rooms", "--images", "0", "--out", "x"], "0 is less than 1"),
        (["rooms"], "--out"),
        (["ask", "--workdir", "x"], "--scene"),
        (
            ["ask", "--workdir", "x", "--scene", "y", "--temperature", "0"],
            "0 is not a number above 0",
        ),
        (["ask", "--workdir", "x", "--scene", "y", "--top-p", "1.5"], "1.5 is not above 0"),
        (["scenes", "--workdir", "x", "--split", "tset"], "tset"),
        (["rgbd", "--source", "x", "--out", "y", "--grid", "3"], "--grid"),
        (["evaluate", "vsi"], "--predictions"),
        (["evaluate", "chess", "--predictions", "x"], "chess"),
        (["evaluate", "vsi", "--predictions", "x", "--frames", "0"], "0 is less than 1"),
        (["convert", "import", "--source", "x"], "--out"),
        (["convert"], "DIRECTION"),
        (["fly"], "fly"),
    ],
)
def test_wrong_arguments_are_refused(run, arguments, complaint):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert complaint in err.splitlines()[-1]


def test_validate_prints_what_is_there(run, tiny_export):
    status, out, _ = run("validate", tiny_export.folder)
    assert status == 0
    assert "scenes: 10 (7 train, 3 val)" in out
    for kind in ("object_counting", "proximity", "scene_description"):
        assert kind in out


def test_validate_refuses_or_skips_a_broken_scene(run, tiny_export, tmp_path):
    assert "nowhere" in one_error(run("validate", tmp_path / "nowhere"))
    folder = shutil.copytree(tiny_export.folder, tmp_path / "export")
    broken = folder / "scenes" / "scene003.safetensors"
    broken.write_bytes(broken.read_bytes()[:-7])
    assert "scene scene003" in one_error(run("validate", folder))
    status, out, _ = run("validate", folder, "--skip")
    assert status == 0
    assert "scenes: 9 (6 train, 3 val)" in out
    assert "scene scene003" in out.partition("dropped, with")[2]


def test_rooms_are_made_once(run, tmp_path):
    arguments = ("rooms", "--scenes", 5, "--seed", 7, "--out", tmp_path / "rooms", "--workers", 1)
    status, out, err = run(*arguments)
    export = Export(tmp_path / "rooms")
    asked = sum(1 for _ in export.questions())
    assert status == 0
    assert "\r" not in err  # no progress bar is redrawn where there is no terminal
    line = f"{tmp_path / 'rooms'}: 6 scenes (4 train, 1 val, 1 test), {asked} questions, "
    assert out.startswith(line) and out.endswith(" s\n") and out.count("\n") == 1
    assert export.scene_ids()[0].startswith("room_s7_")
    assert "already" in one_error(run(*arguments))
    assert "images" not in export.scene_shapes(export.scene_ids()[0])
    assert "seed" in one_error(run("rooms", "--seed", -1, "--out", tmp_path / "more"))
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(("side", "pixels"), [((32,), 32), ((), 448)])
def test_rooms_have_pictures_of_the_side_asked_for(run, tmp_path, side, pixels):
    out = tmp_path / "rooms"
    arguments = ("rooms", "--scenes", 1, "--out", out, "--workers", 1, "--images", *side)
    assert run(*arguments)[0] == 0
    shapes = Export(out).scene_shapes("room_s0_000000")
    assert shapes["images"] == (4, pixels, pixels, 3)


def test_an_rgbd_folder_becomes_an_export(run, tmp_path):
    hall = write_hall(tmp_path / "hall", frames=6)
    pose = np.loadtxt(hall / "pose" / "20.txt")
    pose[:3, 3] = -np.inf
    np.savetxt(hall / "pose" / "20.txt", pose)
    out_folder = tmp_path / "export"
    arguments = ("--views", 2, "--grid", 4, 5, "--questions", 6, "--max-frames", 5)
    status, out, err = run("rgbd", "--source", hall, "--out", out_folder, *arguments)
    assert status == 0, err
    export = Export(out_folder)
    assert export.patch_grid == (4, 5)
    assert export.scene_shapes(export.scene_ids()[0])["vggt/tokens"][0] == 2
    assert out.startswith(f"{out_folder}: {len(export.scene_ids())} scenes (")
    dropped = err.splitlines()[-1]
    assert "1 thinned out" in dropped and "1 dropped" in dropped and "pose" in dropped
    assert "nowhere" in one_error(run("rgbd", "--source", "nowhere", "--out", tmp_path / "x"))


def test_scenes_of_a_run_are_listed_one_a_line(run, tiny_run):
    ids = Export(tiny_run.export).scene_ids
    listed = run("scenes", "--workdir", tiny_run.workdir)
    assert listed == (0, "".join(f"{i}\n" for i in ids()), "")
    listed = run("scenes", "--workdir", tiny_run.workdir, "--split", "test")
    assert listed == (0, "".join(f"{i}\n" for i in ids("test")), "")
    assert len(ids("test")) == 2
    assert run("scenes", "--export", tiny_run.export, "--split", "test") == listed


def test_ask_prints_the_answer_of_the_evaluation_and_nothing_else(run, tiny_run):
    lines = (tiny_run.workdir / "predictions.jsonl").read_text().splitlines()
    expected = json.loads(lines[0])
    ask = ("ask", "--workdir", tiny_run.workdir, "--scene", expected["scene_id"])
    asked = run(*ask, "--question", expected["question"])
    assert asked == (0, expected["prediction"] + "\n", "")

    asked = run(*ask, "--question", expected["question"], "--top-k", 1, "--seed", 3)
    assert asked == (0, expected["prediction"] + "\n", "")
    line = one_error(run(*ask, "--question", expected["question"], "--seed", 3))
    assert "goes with --temperature" in line

    status, out, err = run(*ask, "--question", expected["question"] + " Wallaby?", "--diagnostic")
    answer, thinking = out.splitlines()
    assert status == 0
    assert answer.startswith("answer:   ")
    assert thinking.startswith("thinking: ")
    tokens = (token.strip(" ").replace("\n", "\\n") for token in expected["thinking_tokens"])
    decoded = [token or "␣" for token in tokens]
    assert thinking[len("thinking: ") :].split(" | ") == decoded
    assert err == "warning: words that the model has never read: Wallaby\n"


def test_ask_says_that_a_run_has_not_ended(run, tiny_run, tmp_path):
    begun = shutil.copytree(tiny_run.workdir, tmp_path / "run")
    (begun / "summary.json").unlink()
    expected = json.loads((begun / "predictions.jsonl").read_text().splitlines()[0])
    ask = ("ask", "--workdir", begun, "--scene", expected["scene_id"])
    status, out, err = run(*ask, "--question", expected["question"])
    assert (status, out) == (0, expected["prediction"] + "\n")
    assert err == "note: the run has not ended; this is its model of step 3\n"


def test_ask_without_a_question_asks_the_scenes_own(run, tiny_run):
    lines = (tiny_run.workdir / "predictions.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    scene_id = found[0]["scene_id"]
    found = {p["id"]: p for p in found if p["scene_id"] == scene_id}
    status, out, err = run("ask", "--workdir", tiny_run.workdir, "--scene", scene_id)
    assert (status, err) == (0, "")
    records = [q for q in Export(tiny_run.export).questions() if q["scene_id"] == scene_id]
    records = [q for q in records if "box" not in q]  # which the student is not asked
    lines = out.splitlines()
    assert len(lines) == 2 * len(records)
    for record, question, answers in zip(records, lines[::2], lines[1::2], strict=True):
        assert question.startswith(f"{record['kind']}: ")
        assert record["question"].split()[-1] in question
        said = " ".join(found[record["id"]]["prediction"].split())
        assert answers == f"    model: {said}    true: {record['answer']}"


def test_what_cannot_be_asked_is_one_line(run, tiny_run, tmp_path):
    ask = ("ask", "--workdir", tiny_run.workdir, "--question", "Is the bed touching the desk?")
    line = one_error(run(*ask, "--scene", "attic"))
    assert f"geode-jax scenes --workdir {tiny_run.workdir}" in line
    scene_id = Export(tiny_run.export).scene_ids()[0]
    line = one_error(run("ask", "--workdir", tmp_path, "--scene", scene_id))
    assert "no run was started in this folder" in line
    options = ("--scene", scene_id, "--options", "A. x")
    assert "--question" in one_error(run("ask", "--workdir", tiny_run.workdir, *options))
    assert "no run was started" in one_error(run("scenes", "--workdir", tmp_path))
    shutil.copy(tiny_run.workdir / "config.json", tmp_path)
    line = one_error(run("ask", "--workdir", tmp_path, "--scene", scene_id))
    assert "no checkpoint yet" in line


def write_lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_vsi_bench_is_scored_into_a_file(run, tmp_path):
    asked = {"id": 7, "question_type": "object_counting", "ground_truth": "10"}
    dataset = write_lines(tmp_path / "test.jsonl", asked)
    predictions = write_lines(tmp_path / "said.jsonl", {"id": 7, "prediction": "11"})
    evaluate = ("evaluate", "vsi", "--predictions", predictions, "--dataset", dataset)
    told = ("--revision", "v1", "--frames", 16, "--decoding", "greedy")
    status, out, err = run(*evaluate, *told)
    assert (status, err) == (0, "")
    assert ["overall", "90.0", "100.0", "-"] in [line.split() for line in out.splitlines()]
    assert "note: the means are over 1 of the 8 tasks" in out
    file = tmp_path / "said.vsi.json"
    assert out.endswith(f"result: {file}\n")
    result = json.loads(file.read_text())
    assert result["scores"]["model"]["overall"] == pytest.approx(90)
    assert (result["frames"], result["decoding"]) == (16, "greedy")
    assert result["dataset"]["revision"] == "v1"

    other = tmp_path / "other.json"
    assert run(*evaluate, "--blind", predictions, "--out", other)[0] == 0
    assert "blind" in json.loads(other.read_text())["scores"]
    assert sorted(tmp_path.iterdir()) == sorted([dataset, predictions, file, other])


def test_what_cannot_be_scored_leaves_every_file_as_it_is(run, tmp_path):
    row = {"id": 7, "question_type": "object_3d_box", "ground_truth": "1", "prediction": "1"}
    predictions = write_lines(tmp_path / "said.jsonl", row)
    result = write_lines(tmp_path / "said.vsi.json", {"earlier": "result"})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    evaluate = ("evaluate", "vsi", "--predictions", predictions)
    assert "said.jsonl:1: question_type" in one_error(run(*evaluate))
    assert "nowhere" in one_error(run(*evaluate, "--dataset", tmp_path / "nowhere.jsonl"))
    assert "one of the files to read" in one_error(run(*evaluate, "--out", predictions))
    assert "directory" in one_error(run("evaluate", "vsi", "--predictions", tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    write_lines(predictions, row | {"question_type": "object_counting"})
    assert "not a regular file" in one_error(run(*evaluate, "--out", tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted([predictions, result])
    assert result.read_bytes() == before[result]


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "predictions.jsonl"])
def test_a_result_does_not_replace_a_file_of_a_run(run, tmp_path, name):
    write_lines(tmp_path / "config.json", {})
    said = write_lines(tmp_path / "said.jsonl", {"id": 1, "kind": "x", "answer": "a"})
    for source in (("vsi", "--workdir", tmp_path), ("text", "--predictions", said)):
        refused = one_error(run("evaluate", *source, "--out", tmp_path / name))
        assert f"{name} is a file of a run" in refused
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "said.jsonl"}


def command(*arguments, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "geode_jax.cli.command", *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_ctrl_c_ends_every_process_without_a_traceback(tmp_path):
    """As from a terminal, the signal goes to the workers too."""
    folder = tmp_path / "rooms"
    child = command(
        *("rooms", "--scenes", 2000, "--out", folder, "--workers", 2), start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not list((folder / "scenes").glob("*.safetensors")):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 130
    assert out == ""
    assert "Traceback" not in err and "leaked" not in err
    assert err.splitlines()[-1] == "interrupted"
    assert not (folder / "manifest.json").exists()


def test_a_reader_that_goes_away_is_no_error(tiny_export):
    child = command("validate", tiny_export.folder)
    child.stdout.close()  # before it prints: the import alone takes longer
    assert child.wait(timeout=60) == 1
    assert "rror" not in child.stderr.read()
    child.stderr.close()


def test_checking_a_folder_does_not_wait_for_jax(tiny_export):
    code = (
        "import sys; from geode_jax.cli.command import main; "
        f"main(['validate', {str(tiny_export.folder)!r}]); sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_error(tmp_path, closed):
    words = f'"{sys.executable}" -m geode_jax.cli.command rooms --scenes 4 --out "$1" --workers 1'
    done = subprocess.run(
        ["bash", "-c", f"{words} {closed}", "bash", tmp_path / "rooms"], cwd=REPOSITORY
    )
    assert done.returncode == 0
    assert Export(tmp_path / "rooms").scene_ids()


def test_files_do_not_get_the_descriptors_of_closed_streams(tmp_path):
    """What a library prints to its stderr would be written into them."""
    code = (
        "import os; from geode_jax.cli.reported import open_standard_streams as opened; opened(); "
        f"file = open({str(tmp_path / 'file')!r}, 'w'); os.write(2, b'of a library'); print(1); "
        "raise SystemExit(file.fileno() < 3)"
    )
    closed = ["bash", "-c", f'"{sys.executable}" -c "$1" <&- >&- 2>&-', "bash", code]
    assert subprocess.run(closed, cwd=REPOSITORY).returncode == 0
    assert (tmp_path / "file").read_text() == ""
