"""Targets for inputs from outside: exports, data sets, benchmark files, pretrained folders."""

import hashlib
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.campaign.damage import Damage
from tests.campaign.machine import REPOSITORY, Target, any_reader_sees, command
from tests.sources.datasets.layouts import cases


def bits(array: Any) -> str:
    """Returns a text that identifies an array's shape, dtype and content."""
    array = np.asarray(array)
    return f"{array.shape} {array.dtype} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


# --- Exports --------------------------------------------------------------------------------------


def _write_exports(folder: Path) -> None:
    from tests.helpers.exports import write_geode_export, write_tiny_export

    write_tiny_export(folder / "tiny", train=2, val=1)
    write_geode_export(folder / "geode", train=2, val=1)


def export_content(folder: Path) -> dict[str, Any]:
    """Returns everything that a trainer reads from an export."""
    from geode_jax.exports import Export

    export = Export(folder)
    scenes = {
        name: {tensor: bits(array) for tensor, array in export.read_scene(name).items()}
        for name in export.scene_ids()
    }
    return {
        "scenes": scenes,
        "splits": {split: export.scene_ids(split) for split in ("train", "val", "test")},
        "questions": list(export.questions()),
        "categories": export.categories,
    }


def _read_exports(folder: Path) -> dict[str, Any]:
    return {name: export_content(folder / name) for name in ("tiny", "geode")}


def _export_silent(before: dict, after: dict, done: Damage, folder: Path) -> str:
    # The manifest holds the checksums but none of itself, so a lost scene, a changed split or a
    # changed noun in it cannot be noticed.
    for name, old in before.items():
        new = after[name]
        scenes = {scene: old["scenes"].get(scene) for scene in new["scenes"]}
        if new["scenes"] != scenes:
            return "arrays have changed"
        if new["questions"] != old["questions"]:
            return "questions have changed"
    return "" if "manifest.json" in done.path and not done.plain else "the value has changed"


def _validate(folder: Path) -> str:
    command(["validate", "--skip", folder / "tiny"])
    return command(["validate", folder / "geode"])


# --- Data sets with questions ---------------------------------------------------------------------


def _write_source(source: str):
    def write(folder: Path) -> None:
        from tests.helpers.exports import write_tiny_export

        write_tiny_export(folder / "export", train=1, val=1)
        cases("scene000", "scene001")[source].write(folder / "root")

    return write


def _prepare(source: str, *more: str):
    def read(folder: Path) -> dict[str, Any]:
        from geode_jax.exports import Export

        out = folder.parent / "out"
        arguments = ["--root", folder / "root", "--scenes", folder / "export", "--out", out, *more]
        printed = command(["prepare", "--source", source, *arguments])
        questions = [q for q in Export(out).questions() if q.get("source") == source]
        shutil.rmtree(out)
        printed = [re.sub(r" in \d+.*", "", line) for line in printed.splitlines()]
        return {"questions": questions, "printed": printed}

    return read


def _prepare_scenes(folder: Path) -> dict[str, Any]:
    """Reads the scenes' export, through the export that adds questions to it."""
    out = folder.parent / "out"
    places = ["--root", folder / "root", "--scenes", folder / "export", "--out", out]
    command(["prepare", "--source", "scanqa", *places])
    content = {"export": export_content(out)}
    shutil.rmtree(out)
    return content


def _records(folder: Path) -> int:
    """Counts the records of a data set's files with the standard library alone."""
    count = 0
    for path in (folder / "root").glob("**/*"):
        if "annotations" in path.name or not path.is_file():
            continue
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if path.suffix == ".jsonl":
            count += len([line for line in data.split(b"\n") if line.strip()])
            continue
        try:
            value = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            continue
        value = value.get("questions") if isinstance(value, dict) else value
        count += len(value) if isinstance(value, list) else 0
    return count


def _questions_silent(before: dict, after: dict, done: Damage, folder: Path) -> str:
    """Requires that every record is a question or counted as dropped."""
    if done.plain and before["printed"] == after["printed"]:
        return "a file is not readable, and nothing is printed"
    dropped = sum(
        int(found[1].replace(",", ""))
        for line in after["printed"]
        if (found := re.match(r"dropped ([\d,]+): (?!old|scene)", line))
    )
    lost = _records(folder) - len(after["questions"]) - dropped
    return f"{lost} records are neither kept nor counted" if lost > 0 else ""


def _write_excluded(folder: Path) -> None:
    _write_source("scanqa")(folder)
    (folder / "excluded.txt").write_text("scene000\n# of the evaluation\n")


def _read_excluded(folder: Path) -> dict[str, Any]:
    return _prepare("scanqa", "--exclude-scenes", str(folder / "excluded.txt"))(folder)


def _excluded_silent(before: dict, after: dict, done: Damage, folder: Path) -> str:
    """Requires that the scene is excluded as long as the list names it in some spelling."""
    if done.plain:
        return "the list is not readable"
    text = (folder / "excluded.txt").read_bytes().decode("utf-8-sig", errors="replace")
    lines = [line.partition("#")[0] for line in text.splitlines()]
    if "scene000" in re.split(r"[^A-Za-z0-9_]+", "\n".join(lines)):
        return "a scene of the list is trained on"
    return ""


# --- Data sets with scenes ------------------------------------------------------------------------


def _write_scannet(folder: Path) -> None:
    from tests.sources.datasets.scannet_test import write_scan

    write_scan(folder / "scans", "scene0000_00", seed=0)
    write_scan(folder / "scans", "scene0001_00", seed=1, sens=False)
    (folder / "scannetv2_train.txt").write_text("scene0000_00\n")
    (folder / "scannetv2_val.txt").write_text("scene0001_00\n")


def _write_scannetpp(folder: Path) -> None:
    from tests.sources.datasets.scannetpp_test import write_scene

    for n in range(2):
        write_scene(folder / "data" / f"0a5c01343{n}", n)


def _write_arkitscenes(folder: Path) -> None:
    from tests.sources.datasets.arkitscenes_test import write_arkitscenes

    write_arkitscenes(folder, videos=2)


def _write_pictures(folder: Path) -> None:
    from tests.sources.datasets.images_test import transforms, write_scene

    write_scene(folder / "a", transforms())
    write_scene(folder / "b")


def _write_vsi_bench(folder: Path) -> None:
    from tests.sources.datasets.vsi_bench_test import write_vsi_bench

    write_vsi_bench(folder, scenes={"41069025": "arkitscenes", "scene0015_00": "scannet"})


def _read_scans(source: str, *options: str) -> Callable[[Path], dict[str, Any]]:
    """Returns a function that prepares a source of scenes."""

    def read(folder: Path) -> dict[str, Any]:
        from geode_jax.sources.datasets import arkitscenes, images, scannet, scannetpp

        for module in (arkitscenes, images, scannet, scannetpp):
            module.IMAGE_SIDE = 32
        out = folder.parent / "out"
        printed = command(
            ["prepare", "--source", source, "--root", folder, "--out", out, *options]
            + ["--views", "2", "--grid", "2", "2"]
        )
        content = export_content(out)
        shutil.rmtree(out)
        printed = [re.sub(r" in \d+.*", "", line) for line in printed.splitlines()]
        return {"content": content, "printed": printed}

    return read


def _scans_silent(before: dict, after: dict, done: Damage, folder: Path) -> str:
    """Requires that losses are counted; there are no checksums."""
    fewer = [
        what
        for what, old, new in (
            ("scenes", before["content"]["scenes"], after["content"]["scenes"]),
            ("questions", before["content"]["questions"], after["content"]["questions"]),
        )
        if len(new) < len(old)
    ]
    reported = (
        len(after["printed"]) > len(before["printed"])
        or after["printed"][1:] != before["printed"][1:]
    )
    if (done.plain or fewer) and not reported:
        return f"fewer {' and '.join(fewer)}, or a file is not readable, and nothing is printed"
    return ""


def _write_sens(folder: Path) -> None:
    from tests.sources.rgbd.sens_test import sens_bytes, three_frames

    frames, _, _ = three_frames()
    (folder / "scan.sens").write_bytes(sens_bytes(frames))


def _frames(sequence) -> dict[str, list[str]]:
    """Returns pose, depth and colour of every frame, or why it is dropped."""
    from geode_jax.sources.rgbd.sequence import Dropped

    found: dict[str, list[str]] = {}
    for name in sequence.names[:100]:
        found[name] = []
        for read in (sequence.read_pose, sequence.read_depth, sequence.read_color):
            try:
                found[name].append(bits(read(name)))
            except Dropped as reason:
                found[name].append(f"dropped: {reason}")
    return found


def _read_sens(folder: Path) -> dict[str, list[str]]:
    from geode_jax.sources.rgbd.sens import open_sens

    return _frames(open_sens(folder / "scan.sens"))


def _write_rgbd(folder: Path) -> None:
    from tests.sources.rgbd.export_test import write_hall

    write_hall(folder, frames=4)
    for path in (folder / "color").glob("*.png"):
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpg"))
        path.unlink()


def _read_rgbd(folder: Path) -> dict[str, list[str]]:
    from geode_jax.sources.rgbd.folder import open_folder

    return _frames(open_folder(folder))


def _rgbd_silent(before: dict, after: dict, done: Damage, folder: Path) -> str:
    lost = [name for name in before if name not in after]
    if lost and not done.path.startswith("color"):
        return f"frames {lost} are lost"
    reported = [name for name, frame in after.items() if any("dropped" in part for part in frame)]
    return "a file is not readable, and no frame is dropped" if done.plain and not reported else ""


def _write_rows(folder: Path) -> None:
    """Writes the same folder with pose.txt and one intrinsic."""
    from scipy.spatial.transform import Rotation

    from tests.sources.rgbd.export_test import camera_pose

    _write_rgbd(folder)
    shutil.rmtree(folder / "pose")
    (folder / "intrinsic" / "intrinsic_color.txt").unlink()
    with Image.open(next((folder / "depth").iterdir())) as depth:
        size = depth.size
    for path in (folder / "color").iterdir():  # one intrinsic needs pictures of one shape
        with Image.open(path) as image:
            image.resize(size).save(path)
    poses = [camera_pose(n) for n in range(4)]
    rows = [[*pose[:3, 3], *Rotation.from_matrix(pose[:3, :3]).as_quat()] for pose in poses]
    np.savetxt(folder / "pose.txt", rows)


def _write_front(folder: Path) -> None:
    from tests.sources.datasets.front3d_test import write_front

    write_front(folder, houses=2)


def _read_front(folder: Path) -> dict[str, Any]:
    from geode_jax.errors import UserError
    from geode_jax.sources.datasets.front3d import read_house, read_models

    models = read_models(folder / "3D-FUTURE-model" / "model_info.json")
    dropped, rooms = Counter(), {}
    for name in ("house0", "house1"):
        try:
            found = read_house(folder / "3D-FRONT" / f"{name}.json", models, dropped)
        except UserError as error:
            dropped[f"house: {error}"] += 1
            continue
        rooms |= {scene: [r.names, r.size.tolist(), r.boxes.tolist()] for scene, r in found.items()}
    return {"rooms": rooms, "dropped": dict(dropped)}


def _front_silent(before: dict, after: dict, done: Damage, folder: Path) -> str:
    """Requires that every piece of furniture is in its room or counted."""

    def pieces(found: dict) -> int:
        return sum(len(room[0]) for room in found["rooms"].values())

    if after["dropped"] != before["dropped"]:
        return ""
    if done.plain and "model_info" not in done.path:
        return "a file is not readable, and nothing is counted"
    if pieces(after) < pieces(before) and not done.kind.startswith(("json", "line")):
        return "furniture is lost"
    return any_reader_sees(before, after, done, folder)


# --- Inputs of exporters --------------------------------------------------------------------------


def _write_for_exporters(folder: Path) -> None:
    from tests.sources.datasets.scannet_test import ply_bytes

    points = np.random.default_rng(0).normal(size=(8, 3))
    (folder / "a.ply").write_bytes(ply_bytes(points))
    header = "ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\n"
    (folder / "b.ply").write_text(header + "property float z\nend_header\n1 2 3\n4 5 6\n")
    np.savez(folder / "c.npz", points=points, colour=points)
    _lines(folder / "records.jsonl", [{"id": "a", "scene_id": "x"}, {"id": "b"}])
    (folder / "splits.txt").write_text("x val\ny test\n")


def _read_as_exporters(folder: Path) -> list:
    """Calls every reader separately, since one bad scene must not stop the others."""
    sys.path.insert(0, str(REPOSITORY / "third_party"))
    import export_job
    import export_scans

    contract = export_job.load_contract(REPOSITORY / "geode_jax" / "exports")

    def tried(read, *arguments):
        try:
            return read(*arguments)
        except (export_job.InputError, contract.files.UserError) as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, error
            return "refused"

    scans = [tried(export_scans.read_scan, folder / name) for name in ("a.ply", "b.ply", "c.npz")]
    return [
        *(scan if scan == "refused" else bits(scan.points) for scan in scans),
        tried(lambda: list(export_job.read_records(contract, folder / "records.jsonl"))),
        tried(export_job.splits_of, ["x", "y", "z"], "train", folder / "splits.txt"),
    ]


def _exporters_silent(before: list, after: list, done: Damage, folder: Path) -> str:
    names = ("a.ply", "b.ply", "c.npz", "records.jsonl", "splits.txt")
    reported = any(value == "refused" for value in after)
    unknown = [name for name in names if name not in done.path]
    changed = [n for n, a, b in zip(names, before, after, strict=True) if a != b and n in unknown]
    if changed:
        return f"other files {changed} are read differently"
    return "a file is not readable, and nothing is refused" if done.plain and not reported else ""


# --- Benchmarks -----------------------------------------------------------------------------------


def _lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_vsi(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    options = ["A. chair", "B. table", "C. lamp"]
    rows = [
        {"id": 0, "question_type": "object_counting", "ground_truth": "4", "options": None},
        {"id": 1, "question_type": "room_size_estimation", "ground_truth": "20.5", "options": None},
        {"id": 2, "question_type": "route_planning", "ground_truth": "B", "options": options},
        {"id": 3, "question_type": "object_rel_distance", "ground_truth": "C", "options": options},
    ]
    _lines(folder / "test.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "test.parquet")
    answers = ("4", "about 21", "B.", "A")
    _lines(folder / "answers.jsonl", [{"id": i, "prediction": x} for i, x in enumerate(answers)])
    _lines(folder / "blind.jsonl", [{"id": i, "prediction": "B"} for i in range(4)])
    (folder / "ids.txt").write_text("0\n2\n3\n")


def _result(path: Path) -> dict:
    result = json.loads(path.read_text())
    path.unlink()
    return {name: result[name] for name in ("scores", "questions", "notes")}


def _read_vsi(folder: Path) -> list[dict]:
    found = []
    for dataset in ("test.jsonl", "test.parquet"):
        arguments = ["--predictions", folder / "answers.jsonl", "--dataset", folder / dataset]
        more = ["--blind", folder / "blind.jsonl", "--debiased-ids", folder / "ids.txt"]
        out = folder.parent / "out.json"
        command(["evaluate", "vsi", *arguments, *more, "--out", out])
        found.append(_result(out))
    return found


def _write_text_answers(folder: Path) -> None:
    rows = [(f"val-{n}", [colour, f"dark {colour}"]) for n, colour in enumerate(("red", "blue"))]
    rows = [{"question_id": i, "question": "What?", "answers": a} for i, a in rows]
    (folder / "ScanQA_v1.0_val.json").write_text(json.dumps(rows))
    answers = [{"id": "val-0", "prediction": "red"}, {"id": "scanqa-val-1", "prediction": "a bed"}]
    _lines(folder / "answers.jsonl", answers)


def _read_text_answers(folder: Path) -> dict:
    arguments = ["--predictions", folder / "answers.jsonl"]
    out = folder.parent / "out.json"
    dataset = folder / "ScanQA_v1.0_val.json"
    command(["evaluate", "text", *arguments, "--dataset", dataset, "--out", out])
    return _result(out)


def _scores_silent(before: Any, after: Any, done: Damage, folder: Path) -> str:
    """Requires that a plain damage changes the reported number of questions or the notes."""
    old, new = (value if isinstance(value, list) else [value] for value in (before, after))
    for a, b in zip(old, new, strict=True):
        same = a["questions"] == b["questions"] and a["notes"] == b["notes"]
        if done.plain and same:
            return "a file is not readable, and the scores have changed without a note"
    return ""


# --- Pretrained folders ---------------------------------------------------------------------------


def _write_qwen(folder: Path) -> None:
    from geode_jax.models.decoder import Decoder, DecoderConfig
    from geode_jax.weights import save_pretrained
    from tests.helpers.tiny_models import materialize

    config = DecoderConfig(
        vocab_size=11, width=8, layers=2, heads=2, kv_heads=1, head_width=4, mlp_width=12,
        mlp="swiglu", norm="rms", linear_bias=False,
    )  # fmt: skip
    model = materialize(lambda rngs: Decoder(config, rngs=rngs))
    save_pretrained(model, folder / "model")
    from geode_jax.weights.convert import write_model

    write_model(model, folder / "shards", shard_bytes=1000)


def _read_qwen(folder: Path) -> dict[str, Any]:
    from flax import nnx

    from geode_jax.weights import load_pretrained

    found = {}
    for name in ("model", "shards"):
        state = nnx.state(load_pretrained(folder / name))
        flat = nnx.to_flat_state(state)
        found[name] = {".".join(map(str, p)): bits(v[...]) for p, v in flat}
    return found


def _pretrained_silent(before: dict, after: dict, done: Damage, folder: Path) -> str:
    if done.kind in ("cut", "longer") and done.path.endswith((".json", ".safetensors")):
        return "a file of another length is accepted"
    return any_reader_sees(before, after, done, folder)


def _write_hub_tokenizer(folder: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>", "<|pad|>"], show_progress=False
    )
    backend.train_from_iterator(["How many chairs are there?", "There are 4 chairs."], trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>",
              "pad_token": "<|pad|>", "model_max_length": 1000}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def tokenizer_content(folder: Path) -> list:
    """Returns what a tokenizer makes of a few texts."""
    from geode_jax.data.tokens import load_tokenizer

    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode_batch(["How many chairs are there?", "4", "A. chair\nB. table", "é"])
    special = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id]
    return [ids, [tokenizer.decode(one) for one in ids], special, tokenizer.vocab_size]


TARGETS = {
    "export": Target(_write_exports, _read_exports, 2, silent=_export_silent),
    "validate": Target(_write_exports, _validate, 0.7, silent=any_reader_sees),
    **{
        f"prepare/{source}": Target(
            _write_source(source), _prepare(source), 0.5, ("root/**/*",), _questions_silent
        )
        for source in cases("scene000", "scene001")
    },
    "prepare/scenes": Target(
        _write_source("scanqa"), _prepare_scenes, 1, ("export/**/*",), _export_silent
    ),
    "lists/exclude": Target(
        _write_excluded, _read_excluded, 1, ("excluded.txt",), _excluded_silent
    ),
    "prepare/scannet": Target(_write_scannet, _read_scans("scannet"), 1, silent=_scans_silent),
    "prepare/scannetpp": Target(
        _write_scannetpp, _read_scans("scannetpp"), 1, silent=_scans_silent
    ),
    "prepare/dslr": Target(
        _write_scannetpp,
        _read_scans("scannetpp", "--part", "dslr"),
        1,
        ("**/dslr/**/*", "**/scans/*"),
        _scans_silent,
    ),
    "prepare/arkitscenes": Target(
        _write_arkitscenes, _read_scans("arkitscenes"), 1, silent=_scans_silent
    ),
    "prepare/images": Target(_write_pictures, _read_scans("images"), 1, silent=_scans_silent),
    "prepare/vsi-bench": Target(
        _write_vsi_bench, _read_scans("vsi-bench"), 1, silent=_scans_silent
    ),
    "sens": Target(_write_sens, _read_sens, 2, silent=any_reader_sees),
    "3d-front": Target(_write_front, _read_front, 2, silent=_front_silent),
    "rgbd": Target(_write_rgbd, _read_rgbd, 2, silent=_rgbd_silent),
    "rgbd/rows": Target(_write_rows, _read_rgbd, 1, ("*.txt", "intrinsic/*"), any_reader_sees),
    "exporters": Target(_write_for_exporters, _read_as_exporters, 2, silent=_exporters_silent),
    "evaluate/vsi": Target(_write_vsi, _read_vsi, 2, silent=_scores_silent),
    "evaluate/text": Target(_write_text_answers, _read_text_answers, 1, silent=_scores_silent),
    "pretrained/qwen2": Target(_write_qwen, _read_qwen, 2, silent=_pretrained_silent),
    "pretrained/tokenizer": Target(
        _write_hub_tokenizer, tokenizer_content, 1.5, silent=any_reader_sees
    ),
}
"""The targets of this module by name."""
