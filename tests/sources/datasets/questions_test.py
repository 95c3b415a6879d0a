import dataclasses
import errno
import json
import os
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from geode_jax.cli.command import main
from geode_jax.data.control import REG, control_of, number_of
from geode_jax.errors import UserError
from geode_jax.exports import Export, ExportError, ExportWriter, prompts, validate
from geode_jax.exports.files import Entry, read_list
from geode_jax.exports.kinds import VSI_CHOICE_KINDS, VSI_NUMERIC_KINDS
from geode_jax.exports.scene_names import Exclusion, path_parts
from geode_jax.sources.datasets import (
    Request,
    captions,
    conversations,
    rationales,
    scannet_questions,
)
from geode_jax.sources.datasets.answers import question_fields, read_prompt
from geode_jax.sources.datasets.prepare import SOURCES, prepare
from geode_jax.sources.datasets.questions import (
    MisfitError,
    RecordQuestions,
    Scenes,
    UnansweredError,
)
from tests.helpers.exports import write_tiny_export
from tests.sources.datasets.layouts import Case, cases, talk

TRAIN, HELD_OUT = "scene001", "scene008"
CASES = cases(TRAIN, HELD_OUT)


@pytest.fixture
def request_of(tmp_path, tiny_export):
    """Returns a function that writes a case and returns the request to prepare it."""

    def make(case: Case, **changes) -> Request:
        root = case.write(tmp_path / "raw")
        return Request(root, tmp_path / "out", **{"scenes": tiny_export.folder} | changes)

    return make


def conversation(place: str, question: str = "Is it big?", answer: str = "Yes.") -> dict:
    return {"video": place, "conversations": talk(question, answer)}


def llava(*records) -> Case:
    return Case({"a.json": list(records)}, [])


def files_below(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def new_questions(folder: Path) -> list[dict]:
    return [record for record in Export(folder).questions() if "source" in record]


# --- Every source ---------------------------------------------------------------------------------


@pytest.mark.parametrize("source", CASES)
def test_from_the_raw_layout_to_an_export(source, tiny_export, tmp_path, capsys):
    case, out = CASES[source], tmp_path / "out"
    root = case.write(tmp_path / "raw")
    arguments = ("prepare", "--source", source, "--root", root, "--out", out)
    main([str(a) for a in (*arguments, "--scenes", tiny_export.folder)])
    old, made = list(tiny_export.questions()), list(Export(out).questions())
    assert made[: len(old)] == old
    assert made[len(old) :] == [record | {"source": source} for record in case.expected]
    for record in case.expected:
        if control_of(record) == REG:
            number_of(record)  # can be regressed
    printed = capsys.readouterr().out
    for why, n in case.dropped.items():
        assert f"dropped {n}: {why}\n" in printed
    assert printed.count("dropped") == len(case.dropped)
    assert f"10 scenes, {len(old)} old questions, {len(case.expected)} questions" in printed
    assert validate(out)["splits"] == {"train": 7, "val": 3}
    before, after = Export(tiny_export.folder).manifest, Export(out).manifest
    assert after["scenes"] == before["scenes"]


@pytest.mark.parametrize("source", CASES)
def test_a_file_in_another_layout_is_refused(source, request_of, tmp_path):
    case = CASES[source]
    wrong = {name: [{"hello": "world"}] for name in case.files}
    with pytest.raises(UserError, match=rf"not in the layout of {source}: ") as refused:
        prepare(source, request_of(Case(wrong, [])))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    for path in files_below(tmp_path / "raw"):
        path.write_bytes(b"\x80\x04\x95.")
    with pytest.raises(UserError, match=r"not UTF-8|not JSON|not in the layout"):
        prepare(source, request_of(Case({}, [])))
    shutil.rmtree(tmp_path / "raw")
    with pytest.raises(UserError, match=f"no file of {source}"):
        prepare(source, request_of(Case({"nothing.txt": 0}, [])))


class _Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("source", CASES)
def test_a_pickle_by_another_name_is_not_run(source, request_of, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    request = request_of(CASES[source])
    for path in files_below(tmp_path / "raw"):
        path.write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(UserError):
        prepare(source, request)
    assert not (tmp_path / "exploded").exists()


ESCAPES = ("../scene001", "/data/scene001.mp4", "a/../scene001.mp4", "C:\\scene001", "..", "\0")


@pytest.mark.parametrize("source", CASES)
@pytest.mark.parametrize("place", ESCAPES)
def test_paths_that_escape_are_refused(source, place, request_of, tmp_path):
    with pytest.raises(UserError, match=r"absolute or leaves its folder|is no text|has no \w+"):
        prepare(source, request_of(CASES[source].moved(place)))


@pytest.mark.parametrize("own", ["../train-0", "/etc", "a/b", ".hidden", "x" * 129])
def test_ids_are_names(own, request_of):
    good = {"scene_id": TRAIN, "question": "Where?", "answers": ["there"]}
    files = {"ScanQA_v1.0_train.json": [good | {"question_id": i} for i in ("fine", own)]}
    report = prepare("scanqa", request_of(Case(files, [])))
    assert report.dropped == {"record: has an id that is no name": 1}
    assert report.kept["questions"] == 1


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"anwser": "yes"}, "record 2 has an unknown field 'anwser'; did you mean answer"),
        ({"scene_id": "hall"}, "record 2: scene 'hall': its scene is not in the export"),
        ({"answer": ""}, "record 2 has no answer"),
        ({"options": ["lamp", "sofa"]}, "record 2 has an answer that is none of its options"),
        ({"options": "lamp"}, "record 2 has options that are no list"),
        ({"kind": "../x"}, "record 2 has a kind that is no name"),
        ({"value": 3, "unit": "parsecs"}, "record 2 has an unknown unit 'parsecs'"),
        ({"unit": "m"}, "record 2 has a unit without a value"),
        ({"answer": "3 m", "value": 5, "unit": "m"}, "record 2: value: differs from the number"),
        ({"box": [1, 2, 3]}, "record 2: box: must be 7 finite numbers"),
        ({"id": "first"}, "record 2: id: duplicate question id"),
    ],
)
def test_a_line_of_ones_own_that_does_not_fit_is_refused_by_its_number(change, rule, request_of):
    good = {"scene_id": TRAIN, "question": "Is it?", "answer": "yes"}
    case = Case({"[1].jsonl": [good | {"id": "first"}, good | change]}, [])
    request = request_of(case)
    request = dataclasses.replace(request, root=request.root / "[1].jsonl")
    with pytest.raises(UserError, match=re.escape(rule)):
        prepare("jsonl", request)
    assert not (request.out / "manifest.json").exists()


def test_all_sources_are_covered():
    of_scenes = {"scannet", "3d-front", "scannetpp", "arkitscenes", "images", "vsi-bench"}
    assert of_scenes | set(CASES) == set(SOURCES)


# --- Scenes ---------------------------------------------------------------------------------------


def test_scenes_are_found_by_the_names_that_data_sets_have(tiny_export):
    export = Export(tiny_export.folder)
    for i, name in enumerate(("s1", "scannet_s2", "arkitscenes_s3", "scannet_s3")):
        export.manifest["scenes"][i]["id"] = name
    scenes = Scenes(export, Exclusion())
    assert scenes.find("s1") == "s1"
    assert scenes.find("scannet/videos/s1.mp4") == "s1"
    assert scenes.find("./scannet/s1.MP4") == "s1"
    assert scenes.find("s2") == scenes.find("scannet/videos/s2.mp4") == "scannet_s2"
    assert scenes.find("arkitscenes/s3.mp4") == "arkitscenes_s3"
    for unknown in ("s3", "s4", "scannetpp/s2.mp4", "mp4", "scannet"):
        assert scenes.find(unknown) is None


def test_a_bare_name_must_be_of_one_data_set(tiny_export):
    export = Export(tiny_export.folder)
    for i, name in enumerate(("scannet_a", "arkitscenes_a", "scannet_b", "room_c")):
        export.manifest["scenes"][i]["id"] = name
    scenes = Scenes(export, Exclusion())
    assert [scenes.find(name) for name in "abc"] == [None, "scannet_b", None]


def test_two_folders_with_one_name_are_not_mixed_up(request_of):
    records = [conversation(f"{folder}/{TRAIN}.jpg") for folder in ("coco", "coco", "sam")]
    with pytest.raises(UserError, match=r"is it coco/ or sam/\?"):
        prepare("llava3d", request_of(llava(*records)))


def test_files_are_linked_or_copied(request_of, tiny_export, tmp_path, monkeypatch):
    request = request_of(CASES["llava3d"])
    prepare("llava3d", request)
    for path in tiny_export.folder.glob("*/*.safetensors"):
        assert os.path.samefile(path, request.out / path.relative_to(tiny_export.folder))

    def no_links(*_):
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", no_links)
    shutil.rmtree(request.out)
    prepare("llava3d", request)
    for path in tiny_export.folder.glob("*/*.safetensors"):
        copy = request.out / path.relative_to(tiny_export.folder)
        assert not os.path.samefile(path, copy)
        assert path.read_bytes() == copy.read_bytes()
    assert not list(request.out.rglob("*.part"))


def test_a_missing_scene_file_is_named(request_of, tiny_export, tmp_path):
    scenes = shutil.copytree(tiny_export.folder, tmp_path / "scenes")
    (scenes / "scenes" / "scene004.safetensors").unlink()
    with pytest.raises(ExportError, match=r"scene004.* is missing"):
        prepare("llava3d", request_of(CASES["llava3d"], scenes=scenes))


def test_what_was_cut_off_is_no_export_and_can_be_done_again(request_of, monkeypatch):
    request = request_of(CASES["llava3d"])

    def power_cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ExportWriter, "add_questions", power_cut)
        with pytest.raises(KeyboardInterrupt):
            prepare("llava3d", request)
    with pytest.raises(ExportError, match="unfinished"):
        Export(request.out)
    prepare("llava3d", request)
    made = (request.out / "questions.jsonl").read_bytes()
    with pytest.raises(ExportError, match="is an export already"):
        prepare("llava3d", request)
    assert (request.out / "questions.jsonl").read_bytes() == made


def test_the_same_questions_twice_are_counted(request_of, tmp_path):
    first = request_of(CASES["scanqa"])
    prepare("scanqa", first)
    again = Request(first.root, tmp_path / "again", first.out)
    with pytest.raises(UserError, match="2: question: its id is there already"):
        prepare("scanqa", again)


# --- Splits and excluded scenes -------------------------------------------------------------------


def test_parts_choose_files(request_of):
    request = request_of(CASES["vica322k"], parts=("base",))
    prepare("vica322k", request)
    expected = [r["id"] for r in CASES["vica322k"].expected if "-base-" in r["id"]]
    assert [record["id"] for record in new_questions(request.out)] == expected
    with pytest.raises(UserError, match="no part 'basic', but base, complex"):
        prepare("vica322k", request_of(CASES["vica322k"], parts=("basic",)))
    shutil.rmtree(request.root / "scannet" / "complex")
    shutil.rmtree(request.root / "arkitscenes")
    with pytest.raises(UserError, match="no \\*/complex/"):
        prepare("vica322k", Request(request.root, request.out, request.scenes, ("complex",)))


def test_an_evaluation_question_about_a_training_scene_is_dropped(request_of):
    def record(own, scene):
        return {"scene_id": scene, "question_id": own, "question": "Where?", "answers": ["there"]}

    rows = [record("val-0", TRAIN), record("val-1", HELD_OUT)]
    request = request_of(Case({"ScanQA_v1.0_val.json": rows}, []))
    report = prepare("scanqa", request)
    assert report.dropped == {"question: of val, but its scene is of train in the export": 1}
    assert [record["id"] for record in new_questions(request.out)] == ["scanqa-val-1"]


def entries(*names: str) -> tuple[Entry, ...]:
    """Returns names as entries of `read_list`."""
    return tuple(Entry(f"list: line {n}", (name,)) for n, name in enumerate(names, 1))


@pytest.mark.parametrize(
    "named",
    [
        f"scannet/{TRAIN}.mp4\n",
        f"\ufeff{TRAIN},scannet_{HELD_OUT}\r\n",
        json.dumps([f"ScanNet/scans/{TRAIN.upper()}/"]),
        f"{TRAIN}\nelse",
    ],
)
def test_excluded_scenes_are_not_trained_on(named, request_of, tmp_path, tiny_export):
    (tmp_path / "list.txt").write_bytes(named.encode())
    exclude = tuple(read_list(tmp_path / "list.txt"))
    strange = named.endswith("else")
    request = request_of(CASES["llava3d"], exclude=exclude, allow_missing=strange)
    report = prepare("llava3d", request)
    (missing,) = [n for why, n in report.dropped.items() if "entry of --excl" in why] or [0]
    assert missing == strange
    old = [record for record in tiny_export.questions() if record["scene_id"] == TRAIN]
    assert report.dropped["scene: excluded from training"] == 1
    assert report.dropped["old question: its scene is excluded from training"] == len(old) > 0
    new = [record for record in CASES["llava3d"].expected if record["scene_id"] == TRAIN]
    assert report.dropped["question: its scene is excluded from training"] == len(new) > 0
    asked = {record["scene_id"] for record in Export(request.out).questions()}
    assert asked == set(tiny_export.scene_ids()) - {TRAIN}
    # They are also left out if the new export is prepared again, without the list.
    shutil.rmtree(request.root)
    again = request_of(llava(conversation(TRAIN), conversation(HELD_OUT)), scenes=request.out)
    again = dataclasses.replace(again, out=tmp_path / "again")
    report = prepare("llava3d", again)
    assert report.dropped == {"question: its scene is not in the export": 1}
    assert TRAIN not in Export(again.out).scene_ids()


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("scene0001_00", ["scene0001_00", "scannet_scene0001_01", "scannet/x/Scene0001_02/3.jpg"]),
        ("scannet/scans/SCENE0001_00/scene0001_00.sens", ["scene0001_01"]),
        ("scannetpp\\0a5c013435", ["0a5c013435", "scannetpp_0a5c013435"]),
        ("41069021", ["arkitscenes/41069021.mp4"]),
    ],
)
def test_an_entry_means_its_scene_however_it_is_written(entry, names):
    exclusion = Exclusion(entries(entry))
    assert all(exclusion.covers(name) for name in names)
    assert not exclusion.covers("scene0010_00", "scannetpp_0a5c01343", "arkitscenes/4106902.mp4")
    exclusion.check("it", False, Counter())
    deep = "/".join(["a"] * 100_000)
    assert not exclusion.covers(deep) and exclusion.covers(f"{names[0]}/{deep}")
    with pytest.raises(MisfitError, match="more than 64 folders"):
        path_parts(deep)


def test_frames_of_an_excluded_video_are_excluded(request_of):
    records = [conversation(f"scannet/other/{TRAIN}.jpg"), conversation(HELD_OUT)]
    report = prepare("llava3d", request_of(llava(*records), exclude=entries("scannet/other")))
    assert report.dropped == {"question: its scene is excluded from training": 1}


def test_requests_that_cannot_be_met_are_one_line(request_of):
    request = request_of(CASES["scanqa"])
    with pytest.raises(UserError, match="--scenes: scanqa asks about scenes"):
        prepare("scanqa", Request(request.root, request.out))
    with pytest.raises(ExportError, match="not an export"):
        prepare("scanqa", Request(request.root, request.out, request.root))
    with pytest.raises(UserError, match=r"--exclude-scenes: list: line 1: '\.\./x' names no scene"):
        prepare("scanqa", request_of(CASES["scanqa"], exclude=entries("../x")))
    with pytest.raises(UserError, match=r"list: line 2: 'scene01' is no scene of .*1 more entr"):
        prepare("scanqa", request_of(CASES["scanqa"], exclude=entries(TRAIN, "scene01", "id")))
    with pytest.raises(UserError, match=r"no question of llava3d .*1: question: its scene is not"):
        prepare("llava3d", request_of(llava(conversation("scannet/attic.mp4"))))


def test_what_breaks_the_contract_is_dropped_and_counted(request_of):
    # A lone surrogate is valid in JSON but not in text.
    records = [conversation(TRAIN, "Is \ud800 here?"), conversation(TRAIN)]
    report = prepare("llava3d", request_of(llava(*records)))
    assert report.dropped == {"question: question breaks the contract": 1}
    assert report.kept["questions"] == 1


# --- Parsers --------------------------------------------------------------------------------------

PARSERS = {
    "scanqa": scannet_questions.scanqa_record,
    "ssr-cot": rationales.ssr_cot_record,
    "vica-thinking": rationales.vica_thinking_record,
    "instruction": lambda record, path: conversations.conversation_questions(
        record, "object_counting"
    ),
    "kind": lambda record, path: conversations.conversation_questions(
        record, conversations.question_type(record)
    ),
    "caption": lambda record, path: captions.caption_question(
        conversations.media_of(record), conversations.turns_of(record)[0][1][0]
    ),
    "sqa3d": lambda record, path: scannet_questions.sqa3d_record(
        {"annotation": None, "question_id": 1} | record, path
    ),
}
FIELDS = ("scene_id", "question_id", "question", "answers", "situation", "annotation", "video")
FIELDS += ("image", "image_path", "conversations", "from", "value", "question_type", "rationale")
TEXTS = st.sampled_from(["human", "gpt", "A. x\nB. y", "A", "Thoughts: x Final Answer: 1", "<box>"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)
    ),
    max_leaves=8,
)
RECORDS = st.dictionaries(st.sampled_from(FIELDS), VALUES)
TALKS = st.lists(st.text() | TEXTS, min_size=2, max_size=4).map(lambda texts: talk(*texts))


@pytest.mark.parametrize("name", PARSERS)
@given(record=RECORDS, talks=TALKS | VALUES, video=st.text() | VALUES)
def test_a_parser_gives_questions_or_a_reason(name, record, talks, video):
    if not isinstance(record.get("annotation"), dict):
        record["annotation"] = None
    record = record | {"conversations": talks, "video": video}
    try:
        asked = PARSERS[name](record, Path("a.json"))
    except (MisfitError, UnansweredError):
        return
    assert isinstance(asked, RecordQuestions)
    for question in asked.questions:
        assert set(question) >= {"kind", "question", "answer"}
        assert all(question[name].strip() for name in ("kind", "question", "answer"))


LINES = st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1).map(str.strip)
SAYABLE = LINES.filter(lambda t: t and not re.search(r"^\(?[A-Z][.):]|^Options:?$|<", t))
KINDS = sorted({*VSI_CHOICE_KINDS, *VSI_NUMERIC_KINDS, "other"})


@given(
    st.sampled_from(KINDS),
    st.lists(SAYABLE, min_size=1, max_size=3).map("\n".join),
    st.lists(SAYABLE, min_size=2, max_size=5),
)
def test_a_prompt_is_read_back(kind, question, options):
    if kind in VSI_NUMERIC_KINDS:
        options = []
    options = [f"{chr(65 + i)}. {text}" for i, text in enumerate(options)]
    record = {"kind": kind, "question": question, "options": options}
    assert read_prompt("<image>\n" + prompts.prompt(record)) == (question, options)


@given(st.text())
def test_a_path_has_parts_inside_or_is_refused(place):
    try:
        parts = path_parts(place)
    except MisfitError:
        return
    assert parts and ".." not in parts and not any("/" in part for part in parts)


@pytest.mark.parametrize(
    ("kind", "question", "answer", "found"),
    [
        ("object_abs_distance", "How far?", "2.5", {"value": 2.5, "unit": "m"}),
        ("object_abs_distance", "How far (in centimeters)?", "15.0", {"value": 15, "unit": "cm"}),
        ("room_size_estimation", "How big, in square feet?", "99", {"value": 99, "unit": "ft2"}),
        ("object_size_estimation", "Length in inches?", "7", {"value": 7, "unit": "in"}),
        ("object_rel_distance", "Which?", "chair", {"kind": "object_rel_distance_open"}),
        ("anything", "How much?", "7", {}),
        ("anything", "How high in meters?", "7", {"value": 7, "unit": "m"}),
        ("object_size_estimation", "How many meters tall?", "1.9", {"value": 1.9, "unit": "m"}),
        ("object_size_estimation", "What height in m?", "1.9", {"value": 1.9, "unit": "m"}),
        (
            "object_size_estimation",
            "How tall? The unit is meters.",
            "1.9",
            {"value": 1.9, "unit": "m"},
        ),
        (
            "object_size_estimation",
            "How tall (millimeters)?",
            "1900",
            {"value": 1900, "unit": "mm"},
        ),
        ("object_abs_distance", "How far in mm?", "1,400", {"value": 1400, "unit": "mm"}),
        ("object_abs_distance", "How many centimeters apart?", "140", {"value": 140, "unit": "cm"}),
        ("room_size_estimation", "How large in sq ft?", "215", {"value": 215, "unit": "ft2"}),
        ("room_size_estimation", "How many square feet?", "215", {"value": 215, "unit": "ft2"}),
        # The unit of the answer itself.
        ("object_size_estimation", "How tall?", "1.9 m", {"value": 1.9, "unit": "m"}),
        ("object_size_estimation", "In feet or meters?", "5'11\"", {"value": 71, "unit": "in"}),
        ("room_size_estimation", "How large?", "20 m²", {"value": 20, "unit": "m2"}),
        ("scanqa", "How far?", "2 m", {}),
    ],
)
def test_numbers_have_values_and_units(kind, question, answer, found):
    fields = {"kind": kind, "question": question, "answer": answer}
    assert question_fields(kind, question, answer) == fields | found


@pytest.mark.parametrize(
    ("kind", "question", "answer", "why"),
    [
        ("object_counting", "How many?", "two", "no single number"),
        ("object_counting", "How many?", "inf", "no single number"),
        ("object_abs_distance", "How far?", "2-3 m", "no single number"),
        ("object_abs_distance", "How far in furlongs?", "2", "unknown unit"),
        ("object_abs_distance", "How far in m2?", "2", "another quantity"),
        ("object_abs_distance", "How far?", "2 m2", "another quantity"),
        ("room_size_estimation", "How large in square feet or meters?", "2", "several units"),
    ],
)
def test_an_unclear_number_has_no_value_and_says_why(kind, question, answer, why):
    fields = question_fields(kind, question, answer)
    assert why in fields.pop("no_value")
    assert fields == {"kind": f"{kind}_open", "question": question, "answer": answer}


CASE_03 = [
    ("absolute_size_object", "How many meters tall is the wardrobe?", "1.9", 1.9),
    ("absolute_size_object", "What is the height of the wardrobe in m?", "1.9", 1.9),
    ("absolute_size_object", "Height? Give one number, the unit is meters.", "1.9", 1.9),
    ("absolute_size_object", "How tall is the wardrobe (millimeters)?", "1900", 1.9),
    ("absolute_distance_object", "What is the distance of chair and sofa in mm?", "1400", 1.4),
    ("absolute_distance_object", "How many centimeters apart are chair and sofa?", "140", 1.4),
    ("absolute_size_room", "How large is this room in sq ft?", "215", 215 * 0.3048**2),
    ("absolute_size_room", "How many square feet does this room have?", "215", 215 * 0.3048**2),
    ("absolute_size_object", "How tall is the wardrobe in cubits?", "4", None),
    ("absolute_size_room", "How large is this room in meters?", "5", None),
]


def test_units_in_other_words_reach_training_or_are_counted(tiny_export, tmp_path, capsys):
    train = tiny_export.scene_ids("train")[0]
    rows = [
        {
            "video": f"{train}.mp4",
            "question_type": kind,
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for kind, question, answer, _ in CASE_03
    ]
    (tmp_path / "vsi").mkdir()
    (tmp_path / "vsi" / "vsi_590k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ("prepare", "--source", "vsi590k", "--root", tmp_path / "vsi")
    main([str(a) for a in (*arguments, "--scenes", tiny_export.folder, "--out", tmp_path / "out")])
    made = [r for r in Export(tmp_path / "out").questions() if r.get("source") == "vsi590k"]
    assert len(made) == len(CASE_03)
    for record, (_, _, _, metres) in zip(made, CASE_03, strict=True):
        if metres is None:
            assert "value" not in record and control_of(record) == ""
        else:
            value, base = number_of(record)
            assert value * base == pytest.approx(metres)
    printed = capsys.readouterr().out
    for why in ("asks in an unknown unit", "asks in a unit of another quantity"):
        assert f"dropped 1: value, its question is kept as words: its question {why}\n" in printed


def test_an_option_is_found_by_its_size():
    options = ["A. 190 cm", "B. 1.4 m", "C. 19 feet"]
    for answer in ("1.9 meters", "1,900 mm", "190 cm", "A"):
        assert question_fields("x", "How tall?", answer, options)["answer"] == "A"
    with pytest.raises(MisfitError):
        question_fields("x", "How tall?", "1.9", options)


@pytest.mark.parametrize("answer", ["B", "B.", "B. sofa", "B) sofa", "(B) sofa", "sofa", "Sofa"])
def test_an_option_is_its_letter(answer):
    options = ["A. chair", "B. sofa"]
    fields = question_fields("object_rel_distance", "Which?", answer, options)
    assert fields["answer"] == "B" and fields["options"] == options
    with pytest.raises(MisfitError):
        question_fields("object_rel_distance", "Which?", "C", options)


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_source_reaches_training(tmp_path):
    from geode_jax.train import train_and_evaluate
    from tests.helpers.runs import tiny_config, tiny_rooms

    export = tiny_rooms(tmp_path / "rooms")
    train, held_out = (Export(export).scene_ids(split)[0] for split in ("train", "test"))
    for source, case in cases(train, held_out).items():
        root, out = case.write(tmp_path / source / "raw"), tmp_path / source / "export"
        arguments = ("prepare", "--source", source, "--root", root, "--out", out)
        main([str(a) for a in (*arguments, "--scenes", export)])
        export = out
    config = tiny_config(export, steps=0, epochs=1)
    with config.unlocked():
        config.data.update(question_length=150, answer_length=60, row_length=220)
    summary = train_and_evaluate(config, tmp_path / "run")
    assert not any("long" in why for why in summary["train"]["dropped"])
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    answered = [json.loads(line) for line in lines]
    assert {record.get("source") for record in answered} == {None, *CASES}


def test_the_tiny_exports_are_what_these_tests_think(tmp_path):
    export = write_tiny_export(tmp_path / "export")
    assert TRAIN in export.scene_ids("train") and HELD_OUT in export.scene_ids("val")
