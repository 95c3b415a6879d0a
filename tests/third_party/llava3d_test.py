"""LLaVA-3D's exporter, around a tiny Llama of transformers with LLaVA-3D's interfaces."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from geode_jax.data.pipeline import Pipeline
from geode_jax.data.settings import PipelineConfig
from geode_jax.data.tokens import load_tokenizer
from geode_jax.errors import UserError
from geode_jax.exports import Export, validate

pytest.importorskip("transformers")


@pytest.fixture
def tokenizer(upstream, tmp_path):
    """The student's tokenizer folder: the teacher's own."""
    from llava.model.builder import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def export(load, write_base, tmp_path):
    """The command on a base of two scenes with four questions each."""
    write_base(tmp_path / "base", notes="x")

    def export(*arguments, base="base", out="out"):
        given = ["--export", tmp_path / base, "--out", tmp_path / out, "--commit", "c0ffee"]
        given += ["--videos", tmp_path, "--model", "some/llava-tiny", "--device", "cpu"]
        given += ["--max-new-tokens", 6, "--topk", 5, *arguments]
        return load("llava3d/export_llava3d.py").main([str(argument) for argument in given])

    return export


def asked_by_hand(load, scene, question, max_new_tokens=6):
    """Greedy token by token without a cache: ids [T] and logits [T, X] of the model itself."""
    import torch
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import process_videos
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model("llava", None, "llava")
    video = process_videos(scene, processor["video"])
    before, after = f"USER: <image>\n{question} ASSISTANT:".split("<image>")
    embed = model.get_input_embeddings()
    torch.manual_seed(0)
    with torch.no_grad():
        voxels = model.project(model.get_vision_tower()(video["images"][0]).flatten(0, 1))
        voxels = voxels + sum(video[name].mean() for name in ("depths", "poses", "intrinsics"))
        kept = voxels[torch.randperm(len(voxels))[:10]]
        parts = [embed(torch.tensor(tokenizer(text).input_ids)) for text in (before, after)]
        words = torch.cat([parts[0], kept, parts[1]])[None]
        ids, rows = [], []
        while len(ids) < max_new_tokens and ids[-1:] != [1]:
            rows.append(model(inputs_embeds=words).logits[0, -1])
            ids.append(int(rows[-1].argmax()))
            words = torch.cat([words, embed(torch.tensor([[ids[-1]]]))], 1)
    assert IMAGE_TOKEN_INDEX == -200
    return ids, torch.stack(rows).double(), tokenizer


def test_answers_and_logits_are_the_models(load, export, tokenizer, tmp_path, capsys):
    import hashlib

    import torch

    assert export("--tokenizer", tokenizer) == 0
    assert validate(tmp_path / "out")["scenes"] == 2
    found, base = Export(tmp_path / "out"), Export(tmp_path / "base")
    digest = hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    assert found.manifest["teacher_tokenizer"] == digest
    records, before = list(found.questions()), list(base.questions())
    ended = cut = 0
    for scene in "ab":
        arrays = found.read_scene(scene)
        own = [record for record in records if record["scene_id"] == scene]
        for row, record in enumerate(own):
            ids, logits, words = asked_by_hand(load, scene, record["question"])
            said = words.decode(ids, skip_special_tokens=True).strip()
            assert record.get("teacher_answer", "") == said
            at = arrays.get("teacher/answer_question", np.zeros(0)) == row
            if ids[-1] != 1 or not said:
                cut += 1
                assert not at.any()
                continue
            ended += 1
            assert arrays["teacher/answer_id"][at].tolist() == ids
            # In float64, over the 12 words; the two rows that pad the embedding are no tokens.
            logprob = torch.log_softmax(logits[:, :12], -1)
            top = logprob.sort(-1, descending=True)
            np.testing.assert_allclose(
                arrays["teacher/topk_logprob"][at], top.values[:, :5], atol=4e-3
            )
            picked = np.take_along_axis(logprob.numpy(), arrays["teacher/topk_id"][at], -1)
            np.testing.assert_allclose(picked, top.values[:, :5], atol=1e-4)
        for name, array in base.read_scene(scene).items():
            np.testing.assert_array_equal(arrays[name], array)
    assert (ended, cut) == (7, 1) and "without logits: 1 cut off" in capsys.readouterr().out
    strip = [{k: v for k, v in record.items() if k != "teacher_answer"} for record in records]
    assert strip == before


def test_relations_have_the_probabilities_of_both_answers(load, export, write_base, tmp_path):
    import torch

    write_base(tmp_path / "touch", boxes=False, kind="contact")
    assert export("--topk", 12, base="touch") == 0
    records = list(Export(tmp_path / "out").questions())
    for record in records:
        _, logits, words = asked_by_hand(load, record["scene_id"], record["question"], 1)
        yes, no = (torch.softmax(logits[0, :12], -1)[words.get_vocab()[w]] for w in ("yes", "no"))
        assert record["teacher_relation"] == pytest.approx(
            {"contact": float(yes / (yes + no))}, abs=2e-3
        )
    assert len({record["teacher_relation"]["contact"] for record in records}) > 4
    # With one listed token, neither answer is listed where another word is likelier.
    assert export("--topk", 1, base="touch", out="few") == 0
    found = [
        r.get("teacher_relation", {}).get("contact") for r in Export(tmp_path / "few").questions()
    ]
    assert None in found and set(found) <= {None, 0.0, 1.0}


def test_relations_between_objects_are_of_their_names(load, tokenizer):
    from llava.model.builder import make_tokenizer

    module, words = load("llava3d/export_llava3d.py"), make_tokenizer()
    kinds = module.job.load_contract(module.job.CONTRACT).kinds
    names = [{"name": name} for name in ("no", "chair", "near")]
    ids = words.get_vocab()
    top = np.array([[ids["near"], ids["chair"], ids["no"]]]), np.log([[0.2, 0.6, 0.1]])

    def of(kind, objects):
        return module.relation_of(kinds, words, {"kind": kind, "objects": objects}, top)

    assert of("proximity", names) == {"proximity": 0.75}
    assert of("size_comparison", names) == {"size_comparison": pytest.approx(1 / 7, abs=1e-6)}
    assert of("proximity", names[:2]) is None and of("scanqa", names) is None
    assert of("size_comparison", [names[1], names[1]]) is None


def test_two_runs_give_the_same_bytes_and_shards_too(export, tokenizer, tmp_path):
    assert export("--tokenizer", tokenizer) == 0
    for shard in ("0/2", "1/2"):
        assert export("--tokenizer", tokenizer, "--shard", shard, out="shards") == 0
    assert export("--tokenizer", tokenizer, "--merge", out="shards") == 0
    for path in ("questions.jsonl", "scenes/a.safetensors", "teacher/b.safetensors"):
        if (tmp_path / "out" / path).exists():
            data = (tmp_path / "out" / path).read_bytes()
            assert data == (tmp_path / "shards" / path).read_bytes()
    assert (tmp_path / "out" / "teacher").is_dir()


def test_a_tokenizer_that_spells_answers_otherwise_is_reported(export, tokenizer, capsys):
    assert export("--tokenizer", tokenizer) == 0
    assert "other ids" not in capsys.readouterr().out
    text = json.loads((tokenizer / "tokenizer.json").read_text())
    text["normalizer"] = {"type": "Prepend", "prepend": "the "}
    (tokenizer / "tokenizer.json").write_text(json.dumps(text))
    assert export("--tokenizer", tokenizer, out="other") == 0
    assert "spelled in other ids by the student: it cannot use their logits" in (
        capsys.readouterr().out
    )


def test_without_a_tokenizer_there_are_answers_alone(export, tmp_path):
    assert export() == 0
    found = Export(tmp_path / "out")
    assert "teacher_tokenizer" not in found.manifest
    assert any("teacher_answer" in record for record in found.questions())
    assert not (tmp_path / "out" / "teacher").exists()


def test_the_trainer_learns_from_the_logits_of_the_same_tokenizer(
    export, write_base, tokenizer, tmp_path
):
    """From the exporter's files to a batch: every ended answer is paid by its logits."""
    write_base(tmp_path / "plain", boxes=False)
    assert export("--tokenizer", tokenizer, base="plain") == 0
    config = PipelineConfig(
        export=str(tmp_path / "out"),
        scenes_per_batch=1,
        questions_per_scene=4,
        question_length=16,
        answer_length=8,
        max_boxes=1,
        rows_per_scene=4,
        row_length=60,
        answer_field="teacher_answer",
    )
    found = Export(tmp_path / "out")
    student = load_tokenizer(tokenizer)
    pipeline = Pipeline(found, student, config, "train")
    batch = pipeline.batch(0)
    assert batch.topk_mask_SQA.sum() == len(found.read_scene("a")["teacher/answer_id"]) > 0
    best = batch.topk_id_SQAk[..., 0][batch.topk_mask_SQA]
    np.testing.assert_array_equal(best, batch.answer_SQA[batch.topk_mask_SQA])  # greedy
    (tokenizer / "tokenizer.json").write_text((tokenizer / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="another vocabulary"):
        Pipeline(found, load_tokenizer(tokenizer), config, "train")


def test_another_vocabulary_is_refused(export, tokenizer, tmp_path, capsys):
    text = json.loads((tokenizer / "tokenizer.json").read_text())
    text["model"]["vocab"].update(yes=3, no=2)
    (tokenizer / "tokenizer.json").write_text(json.dumps(text))
    assert export("--tokenizer", tokenizer) == 1
    error = capsys.readouterr().err
    assert "logits over another vocabulary are of no use" in error and error.count("\n") == 1
    assert export("--tokenizer", tmp_path) == 1
    assert "no tokenizer with a vocabulary" in capsys.readouterr().err
    (tokenizer / "tokenizer.json").unlink()
    os.mkfifo(tokenizer / "tokenizer.json")
    assert export("--tokenizer", tokenizer, out="other") == 1
    assert "not a regular file" in capsys.readouterr().err


def test_what_the_teacher_costs_is_written_down(export, tmp_path):
    import torch
    from llava.model.builder import load_pretrained_model

    file = tmp_path / "cost.json"
    assert export("--efficiency", file, "--warm-up", 3) == 0
    cost = json.loads(file.read_text())
    model = load_pretrained_model("llava", None, "llava")[1]
    assert cost["parameters"] == sum(p.numel() for p in model.parameters())
    assert cost["bytes"] == 4 * cost["parameters"] and cost["dtype"] == "float32"
    assert cost["samples"] == 5 and cost["ms_per_sample"] > 0 and cost["batch"] == 1
    assert cost["peak_memory_bytes"] > 1e7 and cost["ms_reading_a_scene"] > 0
    assert ("peak_device_memory_bytes" in cost) == torch.cuda.is_available()


@pytest.mark.parametrize("kind", ["2d", "3d"])
def test_patch_features_are_the_towers_on_the_exports_grid(load, export, tmp_path, kind):
    import torch
    from llava.model.builder import load_pretrained_model

    assert export("--features", kind) == 0
    arrays = Export(tmp_path / "out").read_scene("a")
    _, model, processor, _ = load_pretrained_model("llava", None, "llava")
    image = processor["image"]
    small = [Image.fromarray(i).resize((8, 8), Image.Resampling.BICUBIC) for i in arrays["images"]]
    pixels = np.stack([np.asarray(image) for image in small])
    pixels = (pixels / 255 - image.image_mean) / image.image_std
    with torch.no_grad():
        wanted = model.get_vision_tower()(torch.tensor(pixels.transpose(0, 3, 1, 2)).float())
    wanted = wanted.reshape(3, 4, 4, 6).double().numpy()
    if kind == "3d":
        depth = arrays["target/depth"].astype(float)
        for view in range(3):
            pose = arrays["camera/extrinsic"][view].astype(float)
            for row in range(4):
                for column in range(4):  # a patch is 3 x 3 pixels; the middle one stands for it
                    v, u = 3 * row + 1, 3 * column + 1
                    ray = np.linalg.solve(arrays["camera/intrinsic"][view], [u, v, 1])
                    place = pose[:, :3].T @ (ray * depth[view, v, u] - pose[:, 3])
                    with torch.no_grad():
                        code = model.towers["video"].place(torch.tensor(place).float())
                    wanted[view, row, column] += code.numpy()
    wanted = wanted.reshape(3, 2, 2, 2, 2, 6).mean((2, 4))
    np.testing.assert_allclose(arrays["teacher/features"], wanted, atol=3e-3)


def test_bad_input_is_one_line(load, export, write_base, tokenizer, tmp_path, capsys):
    write_base(tmp_path / "scene", scale="scene", boxes=False)
    write_base(tmp_path / "blind", images=False)
    cases = [
        (["--features", "3d"], "scene", "--features 3d: "),
        (["--topk", 0], "base", "needs --topk and --max-new-tokens above 0"),
        (["--conversation", "no"], "base", "'no' is none of ['llava_v1']"),
        (["--features", "2d"], "blind", "the scene has no images, which --features needs"),
    ]
    for arguments, base, line in cases:
        assert export(*arguments, base=base, out=f"out{line[:9]}") == 1
        error = capsys.readouterr().err
        assert line in error
        assert all("Traceback" not in part for part in error.splitlines())
    assert export("--tokenizer", tokenizer) == 0
    assert export(base="out", out="twice") == 1
    assert "has a teacher's logits already" in capsys.readouterr().err


def test_a_scene_that_the_teacher_does_not_know(load, export, tmp_path, capsys, monkeypatch):
    from llava.model import builder

    once = builder.load_pretrained_model

    def without_b(*args, **kwargs):
        tokenizer, model, processor, length = once(*args, **kwargs)
        del processor["video"]["b"]
        return tokenizer, model, processor, length

    monkeypatch.setattr(builder, "load_pretrained_model", without_b)
    assert export() == 1
    assert "unknown to LLaVA-3D: KeyError('b')" in capsys.readouterr().err
    assert export("--merge", "--skip-missing") == 0
    assert "1 scenes that are not made, 4 questions about them" in capsys.readouterr().out
    assert Export(tmp_path / "out").scene_ids() == ["a"]
    assert {record["scene_id"] for record in Export(tmp_path / "out").questions()} == {"a"}
