"""Costs read from the text of compiled programs: by hand here, from the TPU compiler in test_compile.py."""

import pytest

from cjepa_jax.tpu import hlo, kernels

CONFIG = 'backend_config={"flag_configs":[],"window_config":{"kernel_window_bounds":[],"estimated_cycles":"%s"}}'

# As the TPU compiler writes it: tiled layouts with memory spaces, index comments, tuple-typed and asynchronous ops.
STEP = f"""HloModule jit_step, is_scheduled=true, num_partitions=8

FileNames
1 "model.py"

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%fused_matmul (p0: bf16[16,128], p1: bf16[128,256]) -> bf16[16,256] {{
  %p0 = bf16[16,128]{{1,0:T(8,128)(2,1)S(1)}} parameter(0)
  %p1 = bf16[128,256]{{1,0:T(8,128)(2,1)}} parameter(1)
  ROOT %product = bf16[16,256]{{1,0:T(8,128)(2,1)}} convolution(%p0, %p1), dim_labels=bf_io->bf, {CONFIG % 7}
}}

%body (state: (s32[], bf16[16,128], bf16[128,256])) -> (s32[], bf16[16,128], bf16[128,256]) {{
  %state = (s32[]{{:T(128)}}, bf16[16,128]{{1,0}}, /*index=2*/bf16[128,256]{{1,0}}) parameter(0)
  %x = bf16[16,128]{{1,0}} get-tuple-element(%state), index=1
  %w = bf16[128,256]{{1,0}} get-tuple-element(%state), index=2
  %matmul = bf16[16,256]{{1,0:T(8,128)(2,1)}} fusion(%x, %w), kind=kOutput, calls=%fused_matmul, {CONFIG % 1000}
  %gathered = bf16[256,256]{{1,0}} all-gather(%w), replica_groups=[4,2]<=[8], dimensions={{0}}
  ROOT %next = (s32[], bf16[16,128], bf16[128,256]) tuple(%i, %x, %w)
}}

%condition (state: (s32[], bf16[16,128], bf16[128,256])) -> pred[] {{
  %state.1 = (s32[], bf16[16,128], bf16[128,256]) parameter(0)
  %n = s32[]{{:T(128)}} constant(BOUND)
  ROOT %less = pred[] compare(%i, %n), direction=LT, {CONFIG % 10**6}
}}

ENTRY %main (p: (s32[], bf16[16,128], bf16[128,256]), g: f32[64], h: bf16[32]) -> f32[64] {{
  %p = (s32[]{{:T(128)}}, bf16[16,128]{{1,0:T(8,128)(2,1)}}, bf16[128,256]{{1,0:T(8,128)}}) parameter(0)
  %g = f32[64]{{0:T(256)S(1)}} parameter(1), sharding={{replicated}}
  %h = bf16[32]{{0:T(256)(128)(2,1)}} parameter(2)
  %loop = (s32[], bf16[16,128], bf16[128,256]) while(%p), condition=%condition, body=%body, BACKEND
  %all-reduce.1 = (f32[64]{{0:T(256)S(1)}}, /*index=1*/bf16[32]{{0:T(256)(128)(2,1)}}) all-reduce(%g, %h), GROUPS, to_apply=%add
  %copy-start = (f32[64]{{0:T(256)S(1)}}, f32[64]{{0:T(256)}}, u32[]{{:S(2)}}) copy-start(%g)
  %copy-done = f32[64]{{0:T(256)}} copy-done(%copy-start)
  %kernel = f32[64]{{0}} custom-call(%g), custom_call_target="tpu_custom_call", {CONFIG % (2**63 - 1)}
  ROOT %out = f32[64]{{0:T(256)}} negate(%g), metadata={{op_name="jit(step)/neg" stack_frame_id=7}}, {CONFIG % 50}
}}
"""  # noqa: E501
TRIPS = 'backend_config={"known_trip_count":{"n":"12"},"known_init_step":{"init":"0","step":"1"}}'


def program(*, loop=TRIPS, bound="{...}", groups="replica_groups={{0,1,2,3},{4,5,6,7}}"):
    return hlo.analyse(STEP.replace("BACKEND", loop).replace("BOUND", bound).replace("GROUPS", groups))


def test_loops_multiply_all_that_they_hold():
    result = program()
    assert result.cycles == 12 * 1000 + 50  # the fusion's own estimate, not those inside it or of the condition
    assert result.matmul_flops == 12 * 2 * 16 * 128 * 256
    gather = next(c for c in result.collectives if c.opcode == "all-gather")
    assert gather == ("gathered", "all-gather", 2, 128 * 256 * 2, 12, False)
    assert gather.sent_bytes == 12 * 128 * 256 * 2
    assert [(c.name, c.source) for c in result.costs] == [("matmul", ""), ("out", "jit(step)/neg")]


def test_a_scan_tells_its_turns_by_its_condition():
    assert program(loop="backend_config={}", bound="12") == program()


def test_a_loop_of_unknown_length_is_told():
    result = program(loop="backend_config={}")
    assert result.cycles == 1000 + 50
    assert "while (turns unknown, counted once)" in result.uncosted
    assert not any("while" in name for name in program().uncosted)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2,'axis_2'=1] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0':(2)2}", 2),
        (
            "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_0'}",
            4,
        ),
        ("replica_groups={}", 8),
    ],
)
def test_tuple_all_reduce_and_the_notations_of_its_groups(groups, size):
    reduce = next(c for c in program(groups=groups).collectives if c.opcode == "all-reduce")
    assert (reduce.group, reduce.operand_bytes, reduce.times) == (size, 64 * 4 + 32 * 2, 1)
    assert reduce.sent_bytes == 2 * (size - 1) / size * 320


def test_what_has_no_estimate_is_listed():
    assert program().uncosted == {"copy-start": (1, 64 * 8 + 4), "custom-call tpu_custom_call": (1, 256)}


def test_a_kernel_says_its_own_flops():
    """Its name is the last one before "pallas_call", whatever JAX wraps around it."""
    attributes = """custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(jvp(NAME))/pallas_call"},
backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"700","bytes_accessed":"16"}}}"""
    text = f"""HloModule jit_step

ENTRY %main (p: bf16[4,56,576]) -> bf16[4,56,192] {{
  %p = bf16[4,56,576]{{2,1,0}} parameter(0)
  %m = f32[4,56,1]{{2,1,0}} copy(%p)
  ROOT %k = bf16[4,56,192]{{2,1,0}} custom-call(%m, %p), {attributes}
}}
""".replace("\nbackend", " backend")
    result = hlo.analyse(text.replace("NAME", "attention_forward_3x64"))
    (kernel,) = result.kernels
    assert kernel == ("attention_forward_3x64", "f32[4,56,1], bf16[4,56,576]", 1, 700, 2 * 4 * 56 * 192)
    assert result.matmul_flops == 700 and "custom-call tpu_custom_call" not in result.uncosted
    forward, _ = kernels.CYCLES["v5e"][56, 3, 64, True]
    assert kernels.cycles(kernel._replace(times=5), "v5e") == 5 * 4 * forward
    assert kernels.cycles(kernel, "v9") is None
    assert kernels.cycles(kernel._replace(operands="bf16[4,57,576]"), "v5e") is None
    other = hlo.analyse(text.replace("NAME", "mine")).kernels[0]
    assert kernels.cycles(other, "v5e") is None


def test_asynchronous_collectives_count_once():
    text = """HloModule jit_step, num_partitions=4

%wrapped (q: bf16[64]) -> bf16[16] {
  %q = bf16[64]{0} parameter(0)
  ROOT %scattered = bf16[16]{0} reduce-scatter(%q), replica_groups={}, dimensions={0}, to_apply=%add
}

ENTRY %main (p: bf16[64]) -> bf16[16] {
  %p = bf16[64]{0:T(256)} parameter(0)
  %start = (bf16[64]{0}, bf16[256]{0}) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}
  %done = bf16[256]{0} all-gather-done(%start)
  %async = ((bf16[64]{0}), bf16[16]{0}, s32[]) async-start(%p), calls=%wrapped
  ROOT %end = bf16[16]{0} async-done(%async)
}
"""
    result = hlo.analyse(text)
    assert [(c.opcode, c.sent_bytes) for c in result.collectives] == [("all-gather", 384), ("reduce-scatter", 96)]
    assert result.uncosted == {}
    assert [c.overlapped for c in result.collectives] == [False, False]
    work = f"  %work = bf16[64]{{0}} add(%p, %p), {CONFIG % 5}\n"
    within = text.replace("  %done =", work + "  %done =")
    assert [c.overlapped for c in hlo.analyse(within).collectives] == [True, False]
    after = text.replace("  %async =", work + "  %async =")
    assert [c.overlapped for c in hlo.analyse(after).collectives] == [False, False]


def test_a_collective_that_compute_overlaps_counts_once():
    """The TPU compiler splits it over a start, the fusions that it overlaps, and a done."""
    gather = "all-gather(%q), channel_id=8, replica_groups=[2,4]<=[8], dimensions={0}"
    text = f"""HloModule jit_step, num_partitions=8

%start (q: bf16[64]) -> bf16[256] {{
  %q = bf16[64]{{0}} parameter(0)
  ROOT %all-gather.1 = bf16[256]{{0}} {gather}
}}

%overlapped (q: bf16[64]) -> (f32[16], bf16[256]) {{
  %q = bf16[64]{{0}} parameter(0)
  %all-gather.2 = bf16[256]{{0}} {gather}
  ROOT %both = (f32[16]{{0}}, bf16[256]{{0}}) tuple(%x, %all-gather.2)
}}

%all-reduce-scatter.1 (q: bf16[64]) -> bf16[16] {{
  %q = bf16[64]{{0}} parameter(0)
  %all-reduce.5 = bf16[64]{{0}} all-reduce(%q), channel_id=9, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part = bf16[16]{{0}} dynamic-slice(%all-reduce.5, %i), dynamic_slice_sizes={{16}}
}}

ENTRY %main (p: bf16[64]) -> bf16[16] {{
  %p = bf16[64]{{0:T(256)}} parameter(0)
  %async-collective-start = bf16[256]{{0}} fusion(%p), kind=kCustom, calls=%start
  %fusion.26 = (f32[16]{{0}}, bf16[256]{{0}}) fusion(%p), kind=kOutput, calls=%overlapped, {CONFIG % 77}
  %async-collective-done = bf16[256]{{0}} fusion(%p), kind=kCustom, calls=%start
  ROOT %end = bf16[16]{{0}} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}}
"""
    result = hlo.analyse(text)
    assert [(c.opcode, c.group, c.sent_bytes) for c in result.collectives] == [
        ("all-gather", 4, 384),
        ("reduce-scatter", 4, 96),
    ]
    assert result.cycles == 77 and result.uncosted == {}
    assert [c.overlapped for c in result.collectives] == [True, False]


# Attention scores of 64 sequences and 3 heads, as TPU programs write them: the batch is a dilated window.
SCORES = "window={size=64x3 stride=63x2 lhs_dilate=64x3}, dim_labels=0b1f_0o1i->01bf"


@pytest.mark.parametrize(
    ("shapes", "attributes", "multiply_adds"),
    [
        (("bf16[64,80,3,32]", "bf16[64,70,3,32]", "f32[64,3,80,70]"), SCORES, 64 * 3 * 80 * 70 * 32),
        (
            ("f32[2,6,6,4]", "f32[3,3,4,5]", "f32[2,4,4,5]"),
            "window={size=3x3}, dim_labels=b01f_01io->b01f",
            2 * 16 * 180,
        ),
        (("f32[1,4,1]", "f32[3,1,1]", "f32[1,4,1]"), "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 10),
    ],
)
def test_convolution_flops_leave_out_padding(shapes, attributes, multiply_adds):
    lhs, rhs, out = shapes
    text = f"""HloModule m
ENTRY %main (a: {lhs}, b: {rhs}) -> {out} {{
  %a = {lhs} parameter(0)
  %b = {rhs} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {attributes}
}}
"""
    assert hlo.analyse(text).matmul_flops == 2 * multiply_adds


def test_dot_flops():
    text = """HloModule m
ENTRY %main (a: f32[3,4,5], b: f32[3,5,6]) -> f32[3,4,6] {
  %a = f32[3,4,5]{2,1,0} parameter(0)
  %b = f32[3,5,6]{2,1,0} parameter(1)
  ROOT %c = f32[3,4,6]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_contracting_dims={1}
}
"""
    assert hlo.analyse(text).matmul_flops == 2 * 3 * 4 * 5 * 6


@pytest.mark.parametrize(("shape", "size"), [("pred[5]", 5), ("(bf16[3,2], s32[])", 16), ("s4[3]", 2), ("token[]", 0)])
def test_shape_bytes(shape, size):
    assert hlo.shape_bytes(shape) == size


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.analyse("module @jit_step {\n}\n")
