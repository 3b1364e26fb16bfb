"""XLA's text is read to the byte: shapes, loops, groups, exchanges, traffic; device names and times by hand."""

import pytest

from vmm.errors import UserError
from vmm.planning.chips import CHIPS, parse_device
from vmm.planning.collectives import BATCH, PARAMETER, Collective, collectives, groups, origins
from vmm.planning.hlo import Module, arrays, memory_traffic
from vmm.planning.roofline import link_speed, roofline

HEAD = "HloModule jit_step, is_scheduled=true\n\n"

# A scan of 5 layers over FSDP 4 of a (data 2, fsdp 4) mesh: a layer of the parameter is gathered, used and its gradient
# reduced, once by XLA's reduce-scatter and once hidden in a fusion; then one sum over all devices.
PROGRAM = (
    HEAD
    + """FileNames
1 "model.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=42 end_line=42 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter (p: f32[64,1024]) -> f32[16,1024] {
  %p = f32[64,1024]{1,0} parameter(0)
  %all-reduce.9 = f32[64,1024]{1,0} all-reduce(%p), channel_id=9, replica_groups=[2,4]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[16,1024]{1,0} dynamic-slice(%all-reduce.9, %zero, %zero), dynamic_slice_sizes={16,1024}
}

%condition (state: (s32[], f32[5,16,1024], f32[8,64])) -> pred[] {
  %state = (s32[], f32[5,16,1024]{2,1,0}, f32[8,64]{1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %bound = s32[] constant(5)
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}

%body (state.1: (s32[], f32[5,16,1024], f32[8,64])) -> (s32[], f32[5,16,1024], f32[8,64]) {
  %state.1 = (s32[], f32[5,16,1024]{2,1,0}, f32[8,64]{1,0}) parameter(0)
  %counter.1 = s32[] get-tuple-element(%state.1), index=0
  %stack = f32[5,16,1024]{2,1,0} get-tuple-element(%state.1), index=1
  %x.1 = f32[8,64]{1,0} get-tuple-element(%state.1), index=2
  %zero.1 = s32[] constant(0)
  %layer = f32[1,16,1024]{2,1,0} dynamic-slice(%stack, %counter.1, %zero.1, %zero.1), dynamic_slice_sizes={1,16,1024}
  %flat = f32[16,1024]{1,0} bitcast(%layer)
  %all-gather-start.1 = (f32[16,1024]{1,0}, f32[64,1024]{1,0}) all-gather-start(%flat), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jit(step)/block/kernel" stack_frame_id=1}
  %all-gather-done.1 = f32[64,1024]{1,0} all-gather-done(%all-gather-start.1)
  %y.1 = f32[8,1024]{1,0} dot(%x.1, %all-gather-done.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %gradient = f32[64,1024]{1,0} dot(%x.1, %y.1), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %reduce-scatter.2 = f32[16,1024]{1,0} reduce-scatter(%gradient), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  %hidden = f32[16,1024]{1,0} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter
  %one = s32[] constant(1)
  %next = s32[] add(%counter.1, %one)
  ROOT %out = (s32[], f32[5,16,1024]{2,1,0}, f32[8,64]{1,0}) tuple(%next, %stack, %x.1)
}

ENTRY %main (param: f32[5,16,1024], param.1: f32[8,64]) -> f32[8,64] {
  %param = f32[5,16,1024]{2,1,0} parameter(0), metadata={op_name="state.params[\\'block\\'][\\'kernel\\']"}
  %param.1 = f32[8,64]{1,0} parameter(1), metadata={op_name="batch.inputs[\\'video\\']"}
  %start = s32[] constant(0)
  %init = (s32[], f32[5,16,1024]{2,1,0}, /*index=2*/f32[8,64]{1,0}) tuple(%start, %param, %param.1)
  %while = (s32[], f32[5,16,1024]{2,1,0}, f32[8,64]{1,0}) while(%init), condition=%condition, body=%body
  %x.2 = f32[8,64]{1,0} get-tuple-element(%while), index=2
  %all-reduce.3 = (f32[8,64]{1,0}, f32[]) all-reduce(%x.2, %start), channel_id=3, replica_groups={}, to_apply=%add
  ROOT %result = f32[8,64]{1,0} get-tuple-element(%all-reduce.3), index=0
}
"""
)
MESH = {"data": 2, "fsdp": 4}


def test_shapes_and_memory_spaces():
    (one,) = arrays("bf16[8,16]{1,0:T(8,128)(2,1)S(1)}")
    assert (one.dtype, one.dims, one.space, one.bytes) == ("bf16", (8, 16), 1, 256)
    two = arrays("(f32[]{:T(128)}, /*index=1*/pred[7]{0}, token[])")
    assert [a.bytes for a in two] == [4, 7, 0]


def test_loops_and_lines():
    module = Module(PROGRAM)
    assert module.entry == "main"
    assert module.times["body"] == 5
    assert module.times["condition"] == 6
    assert module.times["all-reduce-scatter"] == 5
    gather = module.find("body", "all-gather-start.1")
    assert module.source(gather) == "model.py:42"
    assert gather.op_name == "jit(step)/block/kernel"


def test_a_known_trip_count_counts_before_the_condition():
    text = PROGRAM.replace(
        "condition=%condition, body=%body",
        'condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}',
    )
    assert Module(text).times["body"] == 7


def test_a_kernel_that_speaks_over_several_lines():
    text = PROGRAM.replace(
        "  %start = s32[] constant(0)\n", '  %start = s32[] constant(0), config={\n"note": 1\n}}, more\n'
    )
    assert Module(text).find("main", "while") is not None


def test_exchanges_to_the_byte():
    found = {one.name: one for one in collectives(Module(PROGRAM), MESH, [((5, 64, 1024), {1: 4})])}
    assert set(found) == {"all-gather-start.1", "reduce-scatter.2", "all-reduce.9", "all-reduce.3"}
    layer = 64 * 1024 * 4
    gather = found["all-gather-start.1"]
    assert (gather.kind, gather.axes, gather.members, gather.count) == ("all-gather", ("fsdp",), 4, 5)
    assert (gather.role, gather.bytes, gather.wire, gather.total) == (
        "parameter",
        layer,
        layer * 3 / 4,
        5 * layer * 3 / 4,
    )
    for name in ("reduce-scatter.2", "all-reduce.9"):
        one = found[name]
        assert (one.kind, one.axes, one.role, one.count) == ("reduce-scatter", ("fsdp",), "gradient", 5)
        assert one.wire == layer * 3 / 4
    total = found["all-reduce.3"]
    assert (total.axes, total.members, total.count, total.role) == (("data", "fsdp"), 8, 1, "gradient")
    assert total.wire == 2 * 7 / 8 * (8 * 64 * 4 + 4)


def test_what_values_are_made_from():
    made = origins(Module(PROGRAM))
    assert made["body", "all-gather-start.1"] == PARAMETER
    assert made["body", "gradient"] == PARAMETER | BATCH
    assert made["main", "x.2"] == BATCH


def test_steps_of_one_asynchronous_exchange_count_once():
    """As TPUs have it: fusions that start, carry on and end a gather all name it, by one channel and a chain."""
    gather = "f32[64,1024]{1,0} all-gather(%p), channel_id=4, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, frontend_attributes={chain_id=\"1\"}"
    text = HEAD + "".join(
        f"%f{n} (p: f32[16,1024]) -> f32[64,1024] {{\n  %p = f32[16,1024]{{1,0}} parameter(0)\n  ROOT %g{n} = {gather}\n}}\n\n"
        for n in range(3)
    )
    text += "ENTRY %main (a: f32[16,1024]) -> f32[64,1024] {\n  %a = f32[16,1024]{1,0} parameter(0)\n"
    text += "".join(
        f"  {'ROOT ' * (n == 2)}%c{n} = f32[64,1024]{{1,0}} fusion(%a), kind=kLoop, calls=%f{n}\n" for n in range(3)
    )
    (one,) = collectives(Module(text + "}\n"), MESH)
    assert (one.axes, one.count, one.bytes) == (("fsdp",), 1, 64 * 1024 * 4)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("replica_groups={{0,4},{1,5}}", (0, 4)),
        ("replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", (0, 4)),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=mesh['x'=8] {'x':(2)2}", (0, 2)),
        ("replica_groups=mesh['x'=2,'y'=4], device_ids=([8]<=[4,2]T(1,0)) {'y'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['x'=4,'y'=1,'z'=2], device_ids=([2,4]T(1,0)) {'x'}, dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=mesh['x'=4,'y'=1,'z'=2], device_ids=([2,4]T(1,0)) {'z'}", (0, 4)),
        ("source_target_pairs={{0,1},{1,0}}", (0, 1)),
    ],
)
def test_groups(text: str, first: tuple):
    assert groups(text, 8)[0] == first


def test_groups_of_an_unknown_form_are_no_guess():
    with pytest.raises(UserError, match="not known yet"):
        groups("replica_groups=@new<4>", 8)


def test_a_permute_belongs_to_the_axis_it_moves_along():
    text = PROGRAM.replace(
        "all-reduce(%x.2, %start), channel_id=3, replica_groups={}, to_apply=%add",
        "collective-permute(%x.2), channel_id=3, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}",
    )
    one = next(one for one in collectives(Module(text), MESH) if one.kind == "collective-permute")
    assert (one.axes, one.members, one.wire) == (("data",), 2, 8 * 64 * 4)


def test_edges_of_a_gradient_are_gradients():
    """Shards of 44 rows, reduced as tiles of 8: 28 of them go to a neighbour; as many rows of tokens are no gradient."""
    text = PROGRAM.replace(
        "  %hidden =",
        "  %edge = f32[28,6144]{1,0} dot(%x.1, %y.1), lhs_contracting_dims={0}, rhs_contracting_dims={0}\n"
        "  %cp.1 = f32[28,6144]{1,0} collective-permute(%edge), channel_id=8, source_target_pairs={{0,1},{1,0}}\n"
        "  %more = f32[8,28,6144]{2,1,0} dot(%x.1, %y.1), lhs_contracting_dims={0}, rhs_contracting_dims={0}\n"
        "  %cp.2 = f32[8,28,6144]{2,1,0} collective-permute(%more), channel_id=9, source_target_pairs={{0,1},{1,0}}\n"
        "  %hidden =",
    )
    found = {one.name: one.role for one in collectives(Module(text), MESH, [((1408, 6144), {0: 32})])}
    assert found["cp.1"] == "gradient"
    assert found["cp.2"] == "activation"


def test_what_slices_send_each_other():
    """Four slices of two devices: what a device sends its like in the other slices."""
    text = PROGRAM.replace(
        "  %all-reduce.3 =",
        "  %token = token[] after-all()\n  %send = (f32[8,64]{1,0}, u32[], token[]) send(%x.2, %token), channel_id=7, "
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.7",'
        '_xla_megascale_target="{1,2:4}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}\n  %all-reduce.3 =',
    )
    one = next(one for one in collectives(Module(text), {"data": 4, "fsdp": 2}) if one.name == "send")
    assert (one.kind, one.axes, one.members, one.group) == ("all-reduce", ("data",), 4, (0, 2, 4, 6))
    assert one.wire == 2 * 3 / 4 * 8 * 64 * 4


def test_traffic_counts_slices_and_leaves_fusions_out():
    """Per trip: the slice read and written, the gather's and the products' operands and results, the reductions."""
    layer, shard, x, y = 64 * 1024 * 4, 16 * 1024 * 4, 8 * 64 * 4, 8 * 1024 * 4
    trip = 2 * shard  # the layer out of its stack
    trip += shard + layer  # all-gather
    trip += x + layer + y  # first product
    trip += x + y + layer  # second product
    trip += 2 * (layer + shard)  # two reductions
    trip += 4 + 4 + 4  # the counter
    once = 2 * (x + 4)  # the last sum
    condition = 6 * (4 + 4 + 1)
    assert memory_traffic(Module(PROGRAM)) == 5 * trip + condition + once


# ---- machines and times -----------------------------------------------------------------------------


def test_names_of_machines():
    v5e, v5p = parse_device("v5e-256"), parse_device("v5p-512")
    assert (v5e.chips, v5e.sides, v5e.rings()) == (256, (16, 16), (True, True))
    assert (v5p.chips, v5p.sides, v5p.rings()) == (256, (4, 8, 8), (True, True, True))  # the name counts TensorCores
    assert parse_device("v5e-16").rings() == (False, False)
    assert parse_device("v5p:2x4x4").chips == 32
    assert parse_device("tpu7x-128").devices == 128
    assert parse_device("tpu7x-128").chips == 64
    assert (parse_device("h200-8x4").devices, parse_device("h200-8x4").slices) == (32, 4)
    assert parse_device("v6e-256", 2).devices == 512


@pytest.mark.parametrize("name", ["v5e-33", "x1-8", "v5p-7", "v5e", "h100-9", "v5e:4x4x4", "cpu-0", "v5e-4x4", "v6e-0"])
def test_a_name_of_nothing_is_one_line(name: str):
    with pytest.raises(UserError) as error:
        parse_device(name)
    assert "\n" not in str(error.value)


def exchange(kind: str, size: float, group: tuple, count: float = 1.0) -> Collective:
    return Collective(kind, ("fsdp",), len(group), (), size, count, "parameter", group, "", "", "")


def test_roofline_by_hand():
    target = parse_device("v5e-256")
    chip = CHIPS["v5e"]
    where = [(0, (x, y, 0)) for x in range(16) for y in range(16)]
    row = tuple(range(16))  # one side of the torus, a ring: two links
    everything = tuple(range(256))  # both sides: four
    one, two = exchange("all-gather", 16e9, row), exchange("all-reduce", 256e9, everything, count=2)
    assert link_speed(target, one, where) == 2 * 50e9
    assert link_speed(target, two, where) == 4 * 50e9
    times = roofline(target, 256 * 197e12, 819e9, [one, two], where)
    assert (times.compute, times.memory) == (1.0, 1.0)
    assert times.links == pytest.approx(15e9 / 100e9 + 2 * 2 * 255e9 / 200e9)
    assert times.bound == "links"
    assert times.step == times.links
    assert times.apart == pytest.approx(2 + times.links)
    assert chip.peak == 197e12


def test_a_line_has_half_the_links_of_a_ring():
    target = parse_device("v5e-16")
    where = [(0, (x, y, 0)) for x in range(4) for y in range(4)]
    assert link_speed(target, exchange("all-gather", 1, (0, 1, 2, 3)), where) == 50e9


def test_between_slices_the_network_counts():
    """A sum over 2 slices of 2 chips: scattered within each, half of it crosses, gathered within."""
    target = parse_device("v6e-4", 2)
    where = [(s, (x, y, 0)) for s in range(2) for x in range(2) for y in range(2)]
    one = exchange("all-reduce", 8e9, (0, 1, 4, 5))
    times = roofline(target, 0.0, 0.0, [one], where)
    assert times.links == pytest.approx(2 * 8e9 / 2 / 100e9)
    assert times.network == pytest.approx(2 * 4e9 / 2 / 12.5e9)
    assert times.bound == "network"
