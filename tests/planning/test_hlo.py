"""Collectives and buffers of programs whose collectives and buffers are known."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.planning.hlo import Array, Program

SIZES = {"a": 2, "b": 4}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def compiled(mesh, function, spec, shape, dtype=jnp.float32):
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=P(), check_vma=False)
    return Program.parse(jax.jit(mapped).lower(x).compile().as_text())


@pytest.mark.parametrize(
    "kind, axes, sent",
    [
        ("all-gather", ("b",), 3 * 64 * 4),  # three shards of [8, 8] float32 pass by
        ("all-gather", ("a", "b"), 7 * 64 * 4),
        ("all-reduce", ("a",), 2 * 1 * 64 * 4 // 2),
        ("reduce-scatter", ("b",), 3 * 16 * 4),
        ("all-to-all", ("b",), 3 * 64 * 4 // 4),
        ("collective-permute", ("a",), 64 * 4),
    ],
)
@pytest.mark.parametrize("trips", [1, 5])
def test_a_collective_is_counted_as_often_as_it_runs(mesh, kind, axes, sent, trips):
    def once(x):
        match kind:
            case "all-gather":
                return jax.lax.all_gather(x, axes, tiled=True).sum() * x
            case "all-reduce":
                return jax.lax.psum(x, axes)
            case "reduce-scatter":
                return jnp.tile(jax.lax.psum_scatter(x, axes, tiled=True), (4, 1))
            case "all-to-all":
                return jax.lax.all_to_all(x, axes[0], 0, 0, tiled=True)
            case "collective-permute":
                return jax.lax.ppermute(x, axes[0], [(0, 1), (1, 0)])

    def body(x, _):
        return once(jnp.sin(x)), None

    def function(x):
        return jax.lax.scan(body, x, None, length=trips)[0]

    program = compiled(mesh, function, P(("a", "b")), (64, 8))
    (found,) = program.collectives(SIZES)
    assert found == (kind, axes, "f32", trips, trips * sent)


def test_loops_in_loops(mesh):
    def inner(x, _):
        return jax.lax.psum(jnp.sin(x), "a"), None

    def outer(x, _):
        return jax.lax.psum(jax.lax.scan(inner, x, None, length=3)[0] + 1, "b"), None

    program = compiled(mesh, lambda x: jax.lax.scan(outer, x, None, length=7)[0], P(), (8, 8))
    assert {(each.axes, each.count) for each in program.collectives(SIZES)} == {(("a",), 21), (("b",), 7)}


TEXT = """\
HloModule step

%fused (p: u4[4,64]) -> u4[8,64] {
  %p = u4[4,64]{1,0} parameter(0)
  %all-gather.1 = u4[8,64] all-gather(%p), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'x'}, metadata={op_name="w"}
  ROOT %copy.1 = u4[8,64]{1,0} copy(%all-gather.1)
}

%again (p.1: u4[4,64]) -> u4[8,64] {
  %p.1 = u4[4,64]{1,0} parameter(0)
  ROOT %a.1 = u4[8,64] all-gather(%p.1), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'x'}, metadata={op_name="w"}
}

%condition (c: (s32[], u4[4,64])) -> pred[] {
  %c = (s32[], u4[4,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %bound = s32[] constant(32)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%body (b: (s32[], u4[4,64])) -> (s32[], u4[4,64]) {
  %b = (s32[], u4[4,64]{1,0}) parameter(0)
  %codes = u4[4,64]{1,0} get-tuple-element(%b), index=1
  %start = u4[8,64]{1,0} fusion(%codes), kind=kCustom, calls=%fused
  %stop = u4[8,64]{1,0} fusion(%codes), kind=kCustom, calls=%again
  %reduce.1 = (bf16[16,8], f32[4]) all-reduce-start(%x, %y), channel_id=8, replica_groups=[2,4]<=[8], to_apply=%add
  %scatter = ((f32[32]{0}), f32[8]{0}) reduce-scatter-start(%z), channel_id=9, replica_groups=[4,2]<=[2,4]T(1,0)
  ROOT %next = (s32[], u4[4,64]{1,0}) tuple(%i.1, %codes)
}

%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %sum = f32[] add(%l, %r)
}

ENTRY %main (w: bf16[1000,1000]) -> (s32[], u4[4,64]) {
  %w = bf16[1000,1000]{1,0} parameter(0)
  %large = f32[1000,1000]{1,0:T(8,128)} fusion(%w), kind=kLoop, calls=%add, metadata={op_name="jit(step)/large"}
  %moved = bf16[500,1000]{1,0} copy(%w)
  ROOT %loop = (s32[], u4[4,64]{1,0}) while(%start.1), condition=%condition, body=%body
}
"""


def test_how_tpus_and_gpus_write_them():
    """Half bytes; one collective in several fusions; bounds in conditions; what starts an asynchronous one."""
    found = {each.kind: each for each in Program.parse(TEXT).collectives(SIZES)}
    assert found["all-gather"] == ("all-gather", ("a",), "u4", 32, 32 * 8 * 64 // 2 // 2)
    assert found["all-reduce"] == ("all-reduce", ("b",), "bf16", 32, int(32 * (256 + 16) * 1.5))
    assert found["reduce-scatter"] == ("reduce-scatter", ("a",), "f32", 32, 32 * 8 * 4)


def test_largest_buffers():
    """Of what is made, not of what is passed on; fused computations hold none."""
    largest = Program.parse(TEXT).largest_buffers(2)
    assert [buffer.array for buffer in largest] == [Array("f32", (1000, 1000)), Array("bf16", (500, 1000))]
    assert largest[0].operation == "jit(step)/large"
    assert Array("u4", (3, 3)).bytes == 5


def test_a_buffer_of_a_real_program():
    def step(x):
        return jnp.sort(x[:, None] * x[None, :], axis=1)[:, 5].sum()

    text = jax.jit(step).lower(jax.ShapeDtypeStruct((512,), jnp.float32)).compile().as_text()
    assert Program.parse(text).largest_buffers(1)[0].array == Array("f32", (512, 512))


def test_axes_of_groups(mesh):
    """Devices of one group differ along the axes over which the collective goes."""
    both = compiled(mesh, partial(jax.lax.psum, axis_name=("a", "b")), P(), (8,))
    assert both.collectives(SIZES)[0].axes == ("a", "b")
