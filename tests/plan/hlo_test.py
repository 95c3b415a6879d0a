"""Compiled programs are read right: loops, collectives, matrix products."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from geode_jax.errors import UserError
from geode_jax.measure.flops import count_flops
from geode_jax.plan.hlo import Module, mesh_axes, shape_bytes

GOLDEN = Path(__file__).parent / "golden"


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


@pytest.mark.parametrize(
    ("name", "collectives"),
    [
        # (kind, axes, bytes that one device sends each time); a shard of a matrix has 16,384 bytes.
        (
            "v5e",
            [
                *[("all-gather", "fsdp", 16_384), ("all-reduce", "model", 4_096)] * 2,
                *[("all-gather", "fsdp", 16_384)] * 2,
                ("reduce-scatter", "fsdp", 32_768),
            ],
        ),
        (
            "h100",
            [
                ("all-gather", "fsdp", 32_768),  # both matrices at once
                ("all-reduce", "model", 4_096),
                ("all-gather", "fsdp", 32_768),
                ("reduce-scatter", "fsdp", 32_768),
                ("all-reduce", "model", 4_096),
            ],
        ),
        (
            "cpu",  # which computes in float32
            [
                *[*[("all-gather", "fsdp", 32_768)] * 2, ("all-reduce", "model", 8_192)] * 2,
                ("all-reduce", "fsdp", 131_072),
            ],
        ),
    ],
)
def test_golden_programs_of_three_compilers(name, collectives):
    """A step on MLPs [128, 256] in a scan of three layers, 32 rows, over 2 x 2 devices."""
    module = Module((GOLDEN / f"{name}.hlo").read_text())
    # Two products a layer, three times as many with the gradient's, a quarter on each device.
    assert module.flops() == 3 * 2 * 3 * (2 * 32 * 128 * 256) // 4
    assert module.unknown_loops == 0
    found = module.collectives((1, 2, 2))
    assert [(c.kind, c.axes, c.size) for c in found] == collectives
    assert {c.times for c in found} == {3}


def test_a_program_of_an_unknown_form_is_refused_in_one_line():
    text = LOOPS.replace("get-tuple-element(%p), index=0", "get-tuple-element(%p), place=0")
    with pytest.raises(UserError, match=r"plan: .* has an unknown form: %i , place=0$"):
        Module(text)


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
