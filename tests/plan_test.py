"""The plan: data described as it is, compiled text read right, bounds by hand, errors in a line."""

import importlib.util
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from benchmarks import scaling
from configs.geode_joint import get_config as geode
from configs.hidden_cot import get_config as student
from geode_jax.cli.command import main
from geode_jax.errors import UserError
from geode_jax.exports import Export
from geode_jax.measure.chips import CHIPS, chip_of
from geode_jax.measure.flops import count_flops
from geode_jax.plan import command
from geode_jax.plan.bounds import Bounds, network_seconds
from geode_jax.plan.compiled import Program, Run, make_run, missing_memory
from geode_jax.plan.described import abstract_batch, describe
from geode_jax.plan.hlo import Collective, Module, mesh_axes, shape_bytes
from geode_jax.plan.topology import TARGETS, devices_of, parse_topology
from geode_jax.runs.data import make_pipelines, prepare_tokenizer
from tests.helpers.runs import tiny_config, tiny_geode_config, tiny_rooms

# --- Chips and topologies -------------------------------------------------------------------------


def test_chips_are_known_by_what_devices_call_themselves():
    for chip in CHIPS.values():
        for kind in chip.device_kinds:
            assert chip_of(types.SimpleNamespace(device_kind=kind)) is chip
    assert chip_of(jax.devices("cpu")[0]) is None
    assert chip_of(types.SimpleNamespace(device_kind="NVIDIA H100 PCIe")) is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


def test_every_gpu_has_a_target_with_its_memory_and_bandwidth():
    for chip in CHIPS.values():
        if chip.platform == "cuda":
            text = (TARGETS / f"{chip.name}.txtpb").read_text()
            assert f"device_memory_size: {chip.hbm_bytes}\n" in text
            assert f"memory_bandwidth: {chip.hbm_bandwidth}\n" in text
            assert f'"{chip.device_kinds[0]}"' in text


def test_topologies():
    slice_, nodes = parse_topology("v5p:4x4x4"), parse_topology("h100:2x8")
    assert (slice_.chip.name, slice_.size, slice_.shape) == ("v5p", 64, (4, 4, 4))
    assert (nodes.chip.name, nodes.size, nodes.shape) == ("h100", 16, (2, 8))
    assert parse_topology("a100:1x8").chip.name == "a100-80"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tpu:4x4", "tpu: no such chip; there are v4, v5e"),
        ("v5e", "no shape"),
        ("v5e:4x", "no shape"),
        ("v5e:0x4", "no shape"),
        ("v5p:4x4", "3 axes"),
        ("h100:8", "nodes x GPUs"),
        ("h100:1x16", "a node has at most 8"),
        ("v6e:32x32", "a pod has at most 256"),
    ],
)
def test_topologies_that_there_are_not(text, said):
    with pytest.raises(UserError, match=said):
        parse_topology(text)


@pytest.mark.parametrize(
    ("topology", "remedy"),
    [
        ("v5e:2x2", "libtpu: pip install -e '.[plan]' in the checkout"),
        ("h100:1x1", f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"),
    ],
)
def test_a_missing_compiler_is_one_line_with_the_remedy(topology, remedy, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=re.escape(remedy) + "$"):
        devices_of(parse_topology(topology))
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config", "configs/hidden_cot.py", "--topology", topology])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# --- Configurations and described data ------------------------------------------------------------


def test_configurations_are_read_with_their_arguments_and_changes():
    changes = ["train.microbatches=2", "model.remat=dots", "mesh=(1, 2, -1)"]
    config = command.read_config("configs/hidden_cot.py:full,thinking=4", changes)
    assert config.model.thinking_tokens == 4
    assert (config.train.microbatches, config.model.remat) == (2, "dots")
    assert tuple(config.mesh) == (1, 2, -1)


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ("configs/nothing.py", [], "no such file"),
        ("configs/hidden_cot.py:huge", [], "size=huge"),
        ("configs/common.py", [], "AttributeError"),
        ("configs/hidden_cot.py", ["model.depth=3"], "model.depth=3: no such field"),
        ("configs/hidden_cot.py", ["seed=many"], "seed=many: no such field, or not"),
    ],
)
def test_configurations_that_cannot_be_read(text, changes, said):
    with pytest.raises(UserError, match=said):
        command.read_config(text, changes)


def test_a_configuration_that_ends_the_process_is_one_line(tmp_path):
    (tmp_path / "ends.py").write_text("raise GeneratorExit\n")
    with pytest.raises(UserError, match="GeneratorExit"):
        command.read_config(str(tmp_path / "ends.py"))


@pytest.mark.parametrize("system", ["hidden_cot", "geode_joint"])
def test_described_rooms_have_the_shapes_of_real_ones(system, tmp_path):
    """But for the numbers that a plan states as assumed."""
    images = 32 if system == "geode_joint" else 0
    folder = tiny_rooms(tmp_path / "rooms", images=images)
    if system == "hidden_cot":
        config = tiny_config(folder)
    else:
        config = tiny_geode_config("joint", folder)
    export = Export(folder)
    tokenizer = prepare_tokenizer(config, export, tmp_path)
    real = make_pipelines(config, export, tokenizer)["train"]
    with config.unlocked():
        config.data.export = "rooms"
        config.data.rooms_images = images
        config.data.question_length = real.config.question_length
        config.data.answer_length = real.config.answer_length
    data = describe(config)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    described, batch = abstract_batch(config, data, sharding), real.batch(0)
    points = batch.coord_SJ3.shape[1]
    for name, x in vars(batch).items():
        own = getattr(described, name)
        shape = tuple(
            points if size == data.shapes.points and points else size for size in own.shape
        )
        assert (name, shape, own.dtype) == (name, x.shape, x.dtype)


def test_full_sizes_are_the_upstream_models():
    config = student("full")
    data = describe(config)
    batch = abstract_batch(config, data, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert batch.vision_SVPC.shape == (1, 8, 37 * 37, 2048)
    assert batch.vision_SVPC.dtype == jnp.bfloat16
    assert batch.packed_SWT.shape == (1, 1, 1024)
    assert batch.topk_id_SQAk.shape == (1, 1, 64, 64)
    config = geode("full")
    data = describe(config)
    batch = abstract_batch(config, data, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert batch.image_SVhw3.shape == (1, 16, 448, 448, 3)
    assert batch.point_SJC.shape == (1, 1024, 512)
    assert data.id_of("<REG>") != data.id_of("<3DBBOX>")
    assert max(data.id_of("<REG>"), data.id_of("<3DBBOX>")) < config.model.decoder.vocab_size


def test_a_run_knows_its_steps_parameters_and_what_no_batch_can_do_without():
    run = make_run(student("full"), jax.devices()[:1], scenes=4)
    assert run.steps == 5 * 1600 // 4
    counts = run.parameters()
    assert counts["parameters"] == counts["trainable"] == 1_387_658_442
    # Parameters and two moments in float32; counters besides.
    assert run.state_bytes() == pytest.approx(12 * counts["parameters"], rel=1e-5)
    joint = make_run(geode("full"), jax.devices()[:1])
    assert joint.parameters()["trainable"] < joint.parameters()["parameters"]


def test_a_mesh_that_does_not_multiply_is_refused():
    with pytest.raises(UserError, match=r"--mesh: .*does not multiply to the 1 devices"):
        make_run(student("laptop"), jax.devices()[:1], (3, 5, 1))


# --- Reading compiled programs --------------------------------------------------------------------

LOOPS = """HloModule jit_step, num_partitions=8

%cond (p: (u32[], bf16[8,4])) -> pred[] {
  %bound = u32[]{:T(128)} constant(8)
  %p = (u32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (p.1: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %p.1 = (u32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  %two = u32[]{:T(128)} constant(2)
  %w = bf16[4,4]{1,0} constant({...})
  %y = bf16[8,4]{1,0:T(8,128)(2,1)} convolution(%x, %w), dim_labels=bf_io->bf
  %gathered = bf16[16,4]{1,0} all-gather(%y), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}, metadata={op_name="jit(step)/gather"}
  %passed = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[], u32[]) collective-permute-start(%y), channel_id=2, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  %done = bf16[8,4]{1,0} collective-permute-done(%passed)
  %next = u32[]{:T(128)} add(%i.1, %two)
  ROOT %t = (u32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) tuple(%next, %done)
}

ENTRY %main (a: bf16[8,4]) -> (u32[], bf16[8,4]) {
  %a = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %first = u32[]{:T(128)} constant(1)
  %start = (u32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) tuple(%first, %a)
  ROOT %loop = (u32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) while(%start), condition=%cond, body=%body
}
"""  # noqa: E501


def test_loops_go_round_as_often_as_start_bound_and_step_say():
    module = Module(LOOPS)
    assert module.times == {"main": 1, "body": 4}  # 1, 3, 5, 7
    assert module.flops() == 4 * 2 * 8 * 4 * 4
    gather, passed = module.collectives((4, 2, 1))
    assert (gather.kind, gather.axes, gather.times) == ("all-gather", "fsdp", 4)
    assert (gather.size, gather.bytes) == (64, 256)  # one sends its 8 x 4 bfloat16 to the other
    assert gather.place == "jit(step)/gather"
    assert (passed.kind, passed.axes, passed.bytes) == ("collective-permute", "data", 256)
    assert passed.group == (0, 2, 4, 6)


def test_a_trip_count_that_the_compiler_knows_and_one_that_nobody_knows():
    known = LOOPS.replace(
        "body=%body\n}", 'body=%body, backend_config={"known_trip_count":{"n":"24"}}\n}'
    )
    assert Module(known).times["body"] == 24
    unknown = Module(LOOPS.replace("direction=LT", "direction=NE"))
    assert (unknown.times["body"], unknown.unknown_loops) == (1, 1)
    assert Module(LOOPS).unknown_loops == 0


@pytest.mark.parametrize(
    ("groups", "axes", "sent"),
    [
        # 64 bytes held; an all-reduce of n sends 2 (n - 1) / n of them.
        ("{{0,2,4,6},{1,3,5,7}}", "data", 96),
        ("[4,2]<=[8]", "fsdp", 64),
        ("[2,4]<=[4,2]T(1,0)", "data", 96),
        ("mesh['axis_0'=8] {'axis_0'}", "data+fsdp", 112),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", "fsdp", 64),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", "data", 96),
        ("mesh['axis_0'=8] {'axis_0':(4)2}", "fsdp", 64),
        ("{}", "data+fsdp", 112),
    ],
)
def test_replica_groups_become_mesh_axes(groups, axes, sent):
    text = f"""
ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {{
  %a = bf16[8,4]{{1,0}} parameter(0)
  ROOT %sum = bf16[8,4]{{1,0}} all-reduce(%a), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    (found,) = Module(text).collectives((4, 2, 1))
    assert (found.axes, found.bytes) == (axes, sent)


def test_groups_of_one_exchange_nothing():
    text = """
ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  ROOT %sum = bf16[8,4]{1,0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add
}
"""
    assert Module(text).collectives((2, 1, 1)) == []


ASYNCHRONOUS = """
%start (p.0: bf16[1,4]) -> (bf16[1,4], bf16[8,4]) {
  %p.0 = bf16[1,4]{1,0} parameter(0)
  %gather.1 = bf16[8,4]{1,0} all-gather(%p.0), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %begun = (bf16[1,4]{1,0}, bf16[8,4]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%middle (p.1: bf16[1,4]) -> bf16[8,4] {
  %p.1 = bf16[1,4]{1,0} parameter(0)
  ROOT %gather.2 = bf16[8,4]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%all-reduce-scatter.3 (p.2: f32[8,4]) -> f32[1,4] {
  %p.2 = f32[8,4]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %sum = f32[8,4]{1,0} all-reduce(%p.2), channel_id=9, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %own = f32[1,4]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={1,4}
}

ENTRY %main (a: bf16[1,4], b: f32[8,4]) -> f32[1,4] {
  %a = bf16[1,4]{1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %f.1 = (bf16[1,4]{1,0}, bf16[8,4]{1,0}) fusion(%a), kind=kCustom, calls=%start
  %f.2 = bf16[8,4]{1,0} fusion(%a), kind=kOutput, calls=%middle
  ROOT %f.3 = f32[1,4]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.3
}
"""  # noqa: E501


def test_a_tpus_pieces_of_one_collective_count_once_and_its_reduce_scatter_is_one():
    gather, scatter = Module(ASYNCHRONOUS).collectives((1, 8, 1))
    assert (gather.kind, gather.bytes) == ("all-gather", 8 * 7)
    assert (scatter.kind, scatter.bytes) == ("reduce-scatter", 8 * 4 * 4 * 7 // 8)


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # A batch of 5 products as a convolution whose window walks over the batch.
        (
            "f32[5,2,7]{2,1,0} convolution(%a, %b), window={size=5 stride=4 pad=0_0 lhs_dilate=5},"
            " dim_labels=0bf_0io->0bf",
            5 * 2 * 2 * 3 * 7,
        ),
        (
            "f32[5,2,7]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, rhs_batch_dims={0}, "
            "lhs_contracting_dims={2}, rhs_contracting_dims={1}",
            5 * 2 * 2 * 3 * 7,
        ),
        (
            "(f32[5,2,7]{2,1,0}, s8[99]{0}) custom-call(%a, %b), "
            'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
            '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],'
            '"rhs_contracting_dimensions":["1"]}}}',
            5 * 2 * 2 * 3 * 7,
        ),
        (
            'f32[5,2,7]{2,1,0} custom-call(%a, %b), custom_call_target="tpu_custom_call", '
            'backend_config={"custom_call_config":{"body":"TUzvUg==","cost_estimate":'
            '{"flops":"420","transcendentals":"9","bytes_accessed":"33"}}}',
            420,
        ),
    ],
)
def test_products_as_compilers_write_them(line, flops):
    text = f"""
ENTRY %main (a: f32[5,2,3], b: f32[5,3,7]) -> f32[5,2,7] {{
  %a = f32[5,2,3]{{2,1,0}} parameter(0)
  %b = f32[5,3,7]{{2,1,0}} parameter(1)
  ROOT %c = {line}
}}
"""
    assert Module(text).flops() == flops


def test_what_was_compiled_does_what_was_counted():
    """On this machine's compiler: a scan and its gradient."""

    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    args = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32), jax.ShapeDtypeStruct((16, 64), "float32")
    module = Module(jax.jit(jax.grad(loss)).lower(*args).compile().as_text())
    assert module.flops() == count_flops(jax.grad(loss), *args) == 3 * 5 * 2 * 16 * 64 * 64
    assert module.unknown_loops == 0


def test_shapes_in_bytes():
    assert shape_bytes("bf16[2,3]{1,0:T(8,128)(2,1)}") == 12
    assert shape_bytes("(f32[4]{0}, (s8[3]{0}, pred[]), token[])") == 16 + 3 + 1
    assert shape_bytes("f8e4m3fn[5]") == 5
    assert mesh_axes((0, 1, 8, 9), (2, 4, 2)) == "data+model"


# --- Bounds ---------------------------------------------------------------------------------------


def tpus(*sizes):
    places = [(x, y, z) for x in range(sizes[0]) for y in range(sizes[1]) for z in range(sizes[2])]
    return [types.SimpleNamespace(coords=place) for place in places]


def sending(size, group):
    return Collective("all-gather", "fsdp", 1, size, tuple(group), "")


def test_links_of_a_torus():
    cube = parse_topology("v5p:4x4x4")
    ring = sending(6 * 10**9, range(4))  # along z, which closes: two links of 100 GB/s
    assert network_seconds([ring], cube, tpus(4, 4, 4)) == pytest.approx(0.03)
    # Along all three axes six links, and rings on different axes overlap.
    assert network_seconds([sending(6 * 10**9, range(64))], cube, tpus(4, 4, 4)) == 0.01
    other = sending(6 * 10**9, range(0, 64, 16))
    assert network_seconds([ring, other], cube, tpus(4, 4, 4)) == pytest.approx(0.03)
    assert network_seconds([ring, ring], cube, tpus(4, 4, 4)) == pytest.approx(0.06)
    # Four chips of sixteen are no ring, and a v5e's ring has sixteen.
    square = parse_topology("v5e:4x4")
    ends = network_seconds([sending(10**9, (0, 1, 2, 3))], square, tpus(4, 4, 1))
    assert ends == pytest.approx(0.02)


def test_links_of_nodes():
    nodes = parse_topology("h100:2x8")
    gpus = [types.SimpleNamespace(process_index=i // 8) for i in range(16)]
    inside = sending(45 * 10**8, range(8))
    assert network_seconds([inside], nodes, gpus) == pytest.approx(0.01)
    # Two GPUs of two nodes: all that one sends goes through its card of 50 GB/s.
    between = sending(10**9, (0, 8))
    assert network_seconds([between], nodes, gpus) == pytest.approx(0.02)
    # All sixteen: half of the whole, 16/15 of what one sends, comes in through eight cards.
    everyone = sending(15 * 10**9, range(16))
    assert network_seconds([everyone], nodes, gpus) == pytest.approx(15 / 450)
    slow = sending(15 * 10**9, (0, 1, 8, 9))
    assert network_seconds([slow], nodes, gpus) == pytest.approx(15 * 4 / 3 / 2 / 2 / 50)
    assert network_seconds([], nodes, gpus) == 0


def test_the_longest_binds():
    assert Bounds(1.0, 3.0, 2.0).binding == "memory"
    assert Bounds(1.0, 3.0, 2.0).seconds == 3.0


def test_what_the_compiler_says_where_memory_is_short():
    said = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
    said += "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    assert missing_memory(said) == int(20.5 * 2**30)
    said = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    said += "temporaries (48.00G) exceeds available HBM (15.75G)."
    assert missing_memory(said) == 48 * 2**30
    assert missing_memory("RESOURCE_EXHAUSTED: no figures") == 0
    assert missing_memory("INVALID_ARGUMENT: 3 of 4") is None


def test_the_search_for_a_batch_closes_in():
    def search(peak, room, first):
        tried, count = {0: peak(0)}, first
        while count not in tried:
            tried[count] = peak(count)
            count = command.next_count(tried, room)
        return max(c for c in tried if tried[c] <= room), len(tried) - 1

    found, trials = search(lambda n: 10 + 3 * n, 1000, 1)  # 330 fit
    assert 330 * 7 / 8 <= found <= 330
    assert trials <= command.TRIALS
    found, trials = search(lambda n: 10 + n * n, 1000, 1)  # 31 fit
    assert 28 <= found <= 31
    assert trials <= command.TRIALS
    assert search(lambda n: 10 + 3 * n, 11, 4)[0] == 0  # not even one


def program(**changes):
    """A compiled step whose every figure is known: 2 s of an H100's arithmetic, 3 s of memory."""
    known = dict(
        arguments=3_000_000_000,
        outputs=50_000_000,
        temporaries=3_500_000_000,
        peak=6_550_000_000,
        refused="",
        flops=2 * 989 * 10**12,
        device_flops=2 * 989 * 10**12,
        collectives=(),
        unknown_loops=1,
        kernels=("attention_forward",),
        seconds=1.0,
    )
    return Program(**known | changes)


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """`command.plan` of a tiny student on one device, whose programs are of the test's making."""

    def plan(step, answers=None, **options):
        monkeypatch.setattr(command, "devices_of", lambda _: jax.devices()[:1])
        monkeypatch.setattr(Run, "train_step", lambda _: step)
        monkeypatch.setattr(Run, "answers", lambda _: answers)
        monkeypatch.setattr(Run, "model_flops", lambda _: 989 * 10**12)
        return command.plan(tiny(tiny_config(tmp_path)), "h100:1x1", **options)

    return plan


def test_a_plan_is_arithmetic_on_what_was_compiled(planned):
    answers = program(device_flops=0, temporaries=0, unknown_loops=0)
    facts = planned(program(), answers)
    assert facts["seconds"] == {
        "compute": 2.0,
        "memory": pytest.approx((3.05 + 7) / 3350),
        "network": 0.0,
    }
    assert (facts["bound"], facts["step_seconds"]) == ("compute", 2.0)
    assert facts["mfu_ceiling"] == 0.5  # half of the work is done twice
    assert facts["tokens_per_step"] == 2 * 2 * 64
    assert facts["tokens_per_second"] == 128
    assert facts["steps"] == 3
    assert facts["chip_hours"] == facts["hours"] == pytest.approx(6 / 3600)
    assert facts["fits"]
    assert facts["decode"]["bound"] == "memory"
    assert facts["decode"]["answers"] == 2 * 4
    json.dumps(facts)
    text = command.table(facts)
    assert "peak 6.55 GB: fits" in text
    assert "compute 2 s" in text
    assert "unknown loops       1, counted once" in text
    assert "kernels             attention_forward" in text
    assert "50.0% of peak (MFU), 128 tokens/s" in text


def test_what_does_not_fit_is_said(planned):
    assert not planned(program(peak=81 * 10**9), decode=False)["fits"]
    refused = program(peak=90 * 10**9, refused="RESOURCE_EXHAUSTED: Used 90G of 79G hbm")
    facts = planned(refused, decode=False)
    assert not facts["fits"]
    assert facts["hbm_peak_bytes"] == 90 * 10**9
    assert "DOES NOT FIT: RESOURCE_EXHAUSTED" in command.table(facts)


def test_the_largest_batch_is_searched_for(planned, monkeypatch):
    sizes = []

    def step(run):
        sizes.append(run.config.data.scenes_per_batch)
        return program(peak=(5 + 3 * sizes[-1]) * 10**9)

    monkeypatch.setattr(Run, "state_bytes", lambda _: 5 * 10**9)
    assert planned(program(), decode=False)["scenes_per_batch"] == 2
    monkeypatch.setattr(Run, "train_step", step)
    config = tiny(tiny_config("rooms"))
    facts = command.plan(config, "h100:1x1", search=True, decode=False)
    assert 22 <= facts["largest_batch"] <= 25  # 5 + 3 n of 80
    assert facts["scenes_per_batch"] == facts["largest_batch"]
    assert len(sizes) <= command.TRIALS + 1


# --- Tables ---------------------------------------------------------------------------------------


def test_the_documents_tables_come_from_kept_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = scaling.weak(scaling.STUDENT, "v5e:4x4")
    assert (row.scenes, row.mesh) == (64, (1, -1, 1))
    assert scaling.weak(scaling.STUDENT, "h100:2x8").mesh == (2, -1, 1)
    assert scaling.line(row).startswith("| v5e:4x4 | | 64 | not planned yet |")
    facts = {
        "devices": 16,
        "mesh": {"data": 1, "fsdp": 16, "model": 1},
        "scenes_per_batch": 64,
        "fits": True,
        "hbm_peak_bytes": 9 * 10**9,
        "hbm_bytes": 16 * 2**30,
        "bound": "compute",
        "seconds": {"compute": 0.25, "memory": 0.01, "network": 0.2},
        "mfu_ceiling": 0.8,
        "tokens_per_second": 262144.0,
        "chip_hours": 1.5,
        "step_seconds": 0.25,
        "scenes_per_second": 256.0,
        "collective_bytes": {"fsdp": {"all-gather": 7 * 10**9, "all-to-all": 10}},
    }
    scaling.CACHE.mkdir(parents=True)
    row.file.write_text(json.dumps(facts))
    assert "| fsdp 16 | 64 | yes | 9.0 of 17 GB | 250 ms |" in scaling.line(row)
    other = scaling.weak(scaling.GEODE, "v5e:4x4")
    other.file.write_text(json.dumps({"failed": "INTERNAL: no"}))
    assert "failed to compile" in scaling.line(other)
    assert scaling.result(other) is None
    names = scaling.sections()
    document = tmp_path / "SCALING.md"
    document.write_text("".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in names))
    scaling.write(document)
    text = document.read_text()
    assert "old" not in text
    assert "all-gather along fsdp 7.00 GB |" in text
    assert text.count("Not planned: ") == 1
    document.write_text("no markers")
    with pytest.raises(UserError, match="no marker"):
        scaling.write(document)


def test_every_marker_is_in_the_document():
    text = (scaling.DOCUMENT).read_text()
    for name in scaling.sections():
        assert f"<!-- {name} -->" in text


# --- The compilers --------------------------------------------------------------------------------


def tiny(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Rooms, described; a step that compiles in half a minute."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.export = "rooms"
        config.optimizer.name = "adamw"
    return config


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "package"), [("v5e:2x2", "libtpu"), ("h100:2x2", "cuda13")])
def test_a_plan_is_compiled_for_hardware_that_is_not_there(topology, package, tmp_path):
    modules = {"libtpu": "libtpu", "cuda13": "jax_cuda13_plugin"}
    if importlib.util.find_spec(modules[package]) is None:
        pytest.skip(f"{modules[package]} is not installed: extra plan")
    config = tiny(tiny_config(tmp_path))
    facts = command.plan(config, topology, (1, 2, 2), 4)
    assert facts["fits"]
    assert facts["mesh"] == {"data": 1, "fsdp": 2, "model": 2}
    assert facts["hbm_peak_bytes"] < facts["hbm_bytes"]
    spread = facts["flops_per_device"] * facts["devices"] / facts["flops_per_step"]
    assert 0.9 < spread < 4  # small heads may be left whole on the model axis
    assert any("fsdp" in axes for axes in facts["collective_bytes"])
    assert facts["bound"] in ("compute", "memory", "network")
    assert 0 < facts["mfu_ceiling"] < 1
    assert math.isfinite(facts["chip_hours"])
    assert facts["decode"]["fits"]
    json.dumps(facts)
    text = command.table(facts)
    assert "fits" in text
    assert "binds" in text
