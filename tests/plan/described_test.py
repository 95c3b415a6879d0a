"""Described data has the shapes of real data; full sizes are those of the upstream models."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest

from configs.geode_joint import get_config as geode
from configs.hidden_cot import get_config as student
from geode_jax.exports import Export
from geode_jax.plan.described import abstract_batch, describe
from geode_jax.results.systems import results_of
from geode_jax.runs.config import make_settings
from geode_jax.runs.data import make_pipelines, prepare_tokenizer
from geode_jax.runs.systems import SYSTEMS
from tests.helpers.runs import tiny_config, tiny_geode_config, tiny_rooms


@pytest.mark.parametrize("system", ["hidden_cot", "geode_joint"])
def test_described_rooms_have_the_shapes_of_real_ones(system, tmp_path):
    """But for the numbers that a plan states as assumed."""
    images = 32 if system == "geode_joint" else 0
    folder = tiny_rooms(tmp_path / "rooms", images=images)
    if system == "hidden_cot":
        settings = make_settings(tiny_config(folder))
    else:
        settings = make_settings(tiny_geode_config("joint", folder))
    export = Export(folder)
    tokenizer = prepare_tokenizer(settings, export, tmp_path)
    real = make_pipelines(settings, export, tokenizer)["train"]
    rooms = dataclasses.replace(
        settings.data,
        export="rooms",
        rooms_images=images,
        question_length=real.config.question_length,
        answer_length=real.config.answer_length,
    )
    settings = dataclasses.replace(settings, data=rooms)
    data = describe(settings)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    described, batch = abstract_batch(settings, data, sharding), real.batch(0)
    points = batch.coord_SJ3.shape[1]
    for name, x in vars(batch).items():
        own = getattr(described, name)
        shape = tuple(
            points if size == data.shapes.points and points else size for size in own.shape
        )
        assert (name, shape, own.dtype) == (name, x.shape, x.dtype)


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize("export", ["rooms", "elsewhere"])
def test_every_system_has_its_rows_in_the_tables_of_the_rooms_above_runs(system, export):
    config = importlib.import_module(f"configs.{system.name}").get_config("")
    with config.unlocked():
        config.data.update(export=export, question_length=8, answer_length=8)
        if not system.starts_fresh:
            config.init_from = "run"
    settings = make_settings(config)
    data = describe(settings)
    batch = abstract_batch(settings, data, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert batch.vision_SVPC.shape[3] or batch.image_SVhw3.shape[2]
    assert callable(results_of(settings).finish)


def test_full_sizes_are_the_upstream_models():
    settings = make_settings(student("full"))
    data = describe(settings)
    batch = abstract_batch(settings, data, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert batch.vision_SVPC.shape == (1, 8, 37 * 37, 2048)
    assert batch.vision_SVPC.dtype == jnp.bfloat16
    assert batch.packed_SWT.shape == (1, 1, 1024)
    assert batch.topk_id_SQAk.shape == (1, 1, 64, 64)
    settings = make_settings(geode("full"))
    data = describe(settings)
    batch = abstract_batch(settings, data, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert batch.image_SVhw3.shape == (1, 16, 448, 448, 3)
    assert batch.point_SJC.shape == (1, 1024, 512)
    assert data.id_of("<REG>") != data.id_of("<3DBBOX>")
    assert max(data.id_of("<REG>"), data.id_of("<3DBBOX>")) < settings.model.decoder.vocab_size
