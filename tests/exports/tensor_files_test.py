"""Tensor files: exact round trips, and files that are cut off.

Files are compared with those that safetensors' own functions read and write.
"""

import json
import sys
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from geode_jax.exports import SPECS, Export, ExportWriter
from tests.helpers.contract import HEADER, VIEWS, few, forge, make_scene, refusal, two_files, write


def test_round_trip_of_every_tensor_of_the_contract(pristine):
    arrays = make_scene()
    found = Export(pristine).read_scene("a")
    assert set(found) == set(SPECS) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_files_are_ordinary_safetensors(pristine):
    scene, teacher = two_files(make_scene())
    for kind, tensors in (("scenes", scene), ("teacher", teacher)):
        found = safetensors.numpy.load_file(pristine / kind / "a.safetensors")
        assert set(found) == set(tensors)
        for name, array in tensors.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


@few
@given(data=st.data())
def test_round_trip_is_exact_for_every_dtype(tmp_path_factory, data):
    """Round trips keep the bits, also of denormals and negative zeros, from any memory layout."""
    arrays = make_scene()
    free = [n for n, spec in SPECS.items() if not spec.rule and spec.dtypes]
    name = data.draw(st.sampled_from(free))
    numpy_types = {"F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16, "U8": "u1"}
    dtype = np.dtype(numpy_types[data.draw(st.sampled_from(SPECS[name].dtypes))])
    seed = data.draw(st.integers(0, 2**32 - 1))
    shape = arrays[name].shape
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    array = raw.view(dtype)[..., 0]
    if dtype.kind != "u":
        held = np.abs(array.astype("f4")) <= min(SPECS[name].largest, np.finfo("f4").max)
        array = np.where(held, array, np.zeros((), dtype))
    if data.draw(st.booleans()):
        array = np.asfortranarray(array)
    if dtype == "f4" and data.draw(st.booleans()):
        array = array.astype(">f4")
    arrays[name] = array
    folder = write(tmp_path_factory.mktemp("round"), arrays)
    found = Export(folder).read_scene("a", [name])[name]
    assert found.dtype == dtype
    wanted = np.ascontiguousarray(array.astype(dtype))
    assert found.tobytes() == wanted.tobytes()


@few
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=12, max_size=12))
def test_bfloat16_is_rounded_as_ml_dtypes_does(tmp_path_factory, bits):
    values = np.array(bits, np.uint32).view(np.float32)
    arrays = make_scene()
    values = np.where(np.abs(values) <= 0.99e6, values, values.dtype.type(1)).reshape(VIEWS, 6)
    arrays["vggt/camera_tokens"] = values
    folder = write(tmp_path_factory.mktemp("bf16"), arrays, dtype="bfloat16")
    found = Export(folder).read_scene("a")["vggt/camera_tokens"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, values.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("given_dtype", ["f2", "f4", ml_dtypes.bfloat16])
def test_tokens_are_converted_to_the_manifests_dtype(tmp_path, dtype, given_dtype):
    arrays = make_scene()
    arrays["vggt/tokens"] = arrays["vggt/tokens"].astype(given_dtype)
    found = Export(write(tmp_path / "e", arrays, dtype=dtype)).read_scene("a")["vggt/tokens"]
    assert found.dtype.name == dtype
    np.testing.assert_array_equal(found, arrays["vggt/tokens"].astype(dtype))


def test_bfloat16_without_ml_dtypes_is_read_as_float32(tmp_path, monkeypatch):
    arrays = make_scene()
    folder = write(tmp_path / "e", arrays, dtype="bfloat16")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    found = Export(folder).read_scene("a")["vggt/tokens"]
    assert found.dtype == np.float32
    wanted = arrays["vggt/tokens"].astype(ml_dtypes.bfloat16).astype("f4")
    np.testing.assert_array_equal(found, wanted)


def test_a_room_without_boxes(tmp_path):
    arrays = make_scene()
    for name in ("target/boxes", "target/labels", "teacher/detection_probs", "teacher/relations"):
        arrays[name] = arrays[name][:0]
    export = Export(write(tmp_path / "e", arrays, questions=[]))
    assert export.read_scene("a")["teacher/relations"].shape == (0, 4)


def test_every_tensor_may_be_absent(tmp_path):
    folder = write(tmp_path / "e", {"images": make_scene()["images"]}, questions=[])
    assert set(Export(folder).read_scene("a")) == {"images"}


@pytest.mark.parametrize(("kind", "prefix"), [("scenes", ""), ("teacher", "teacher/")])
def test_a_truncated_file_names_the_tensor_that_is_cut_off(export, kind, prefix):
    name = f"{kind}/a.safetensors"
    data = (export / name).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    last = prefix + max(header, key=lambda name: header[name]["data_offsets"][1])
    size = len(data)
    rule = f"{name} is truncated (needs at least {size} bytes, has {size - 1})"
    (export / name).write_bytes(data[:-1])
    assert refusal(Export(export).read_scene, "a") == f"scene a: tensor {last}: {rule}"
    forge(export, name, data[:-1])
    assert refusal(Export(export).read_scene, "a") == f"scene a: tensor {last}: {rule}"


@pytest.mark.parametrize("names", [["a/" * 100_000], [f"x/{i}" for i in range(100_000)]])
def test_names_of_any_length_and_number_are_refused_at_once(export, names):
    data = safetensors.numpy.save({name: np.zeros(1, np.uint8) for name in names})
    forge(export, "scenes/a.safetensors", data)
    start = time.process_time()
    assert len(refusal(Export(export).read_scene, "a")) < 200
    forge(export, "scenes/a.safetensors", data[:-1])
    assert len(refusal(Export(export).read_scene, "a")) < 200
    assert time.process_time() - start < 5


def test_a_token_of_the_teachers_answers_takes_8_and_6_k_bytes(tmp_path):
    """The size is that in the contract's documentation and the exporter's README."""
    for tokens in (10, 20):
        teacher = {
            "answer_question": np.zeros(tokens, np.int32),
            "answer_id": np.zeros(tokens, np.int32),
            "topk_id": np.tile(np.arange(16, dtype=np.int32), (tokens, 1)),
            "topk_logprob": np.full((tokens, 16), -3, np.float16),
        }
        with ExportWriter(tmp_path / str(tokens), **HEADER) as writer:
            writer.add_scene("a", two_files(make_scene())[0], split="train", teacher=teacher)
    small, large = (
        (tmp_path / n / "teacher" / "a.safetensors").stat().st_size for n in ("10", "20")
    )
    assert abs(large - small - 10 * 104) < 16  # the headers' padding
