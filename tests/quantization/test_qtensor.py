import dataclasses
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.quantization.integer import Int4, Int8
from jaxft.quantization.nf4 import NF4
from jaxft.quantization.qtensor import QTensor, quantize

FORMATS = [Int8(), Int4(48), NF4(), NF4(double_quant=True)]
ALL = pytest.mark.parametrize("format", FORMATS, ids=str)

run = jax.jit(quantize, static_argnames="format")
dequantize = jax.jit(QTensor.dequantize, static_argnames="dtype")


SHAPE = (2, 64, 256)


def weights(shape=SHAPE, dtype=jnp.bfloat16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * 0.02, dtype)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("format", [Int8(), Int4(48), NF4(double_quant=True)], ids=str)
def test_bits_are_the_same_without_jit(format):
    w = weights()
    q = run(w, format)
    assert_same(quantize(w, format), q)
    np.testing.assert_array_equal(q.dequantize(jnp.bfloat16), dequantize(q, jnp.bfloat16))


@ALL
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_result_is_a_rounding_of_the_f32_weight(format, dtype):
    q = run(weights(), format)
    back = dequantize(q, dtype)
    assert (back.shape, back.dtype) == (q.shape, dtype)
    np.testing.assert_array_equal(back, dequantize(q, jnp.float32).astype(dtype))


@pytest.mark.parametrize("format", [Int8(), Int4(48), NF4()], ids=str)
def test_half_precision_input_is_read_as_f32(format):
    w = weights(dtype=jnp.float16)
    assert_same(run(w, format), run(w.astype(jnp.float32), format))


@ALL
def test_leaves_are_named_and_the_format_is_static(format):
    q = run(weights(), format)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(q)[0]]
    nested = [".nested_absmax", ".nested_offset"] if q.nested_absmax is not None else []
    assert names == [".codes", ".scales", *nested]
    assert jax.tree.map(lambda leaf: leaf, q).format == format
    assert (q.shape, q.ndim) == (SHAPE, 3)


@ALL
def test_shapes_alone_are_enough(format):
    w = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    abstract = jax.eval_shape(partial(quantize, format=format), w)
    real = run(weights(), format)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), real) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract
    )
    assert (abstract.shape, abstract.nbytes) == (real.shape, real.nbytes)
    assert jax.eval_shape(lambda q: q.dequantize(jnp.bfloat16), abstract) == w


@ALL
def test_scan_over_the_stack_equals_a_loop_over_layers(format):
    stack, xs = run(weights(), format), weights((3, 256), jnp.float32, seed=1)

    @jax.jit
    def scanned(stack, xs):
        return jax.lax.scan(lambda total, q: (total + xs @ q.dequantize(jnp.float32).T, None), 0.0 * xs[:, :64], stack)

    dense = dequantize(stack, jnp.float32)
    np.testing.assert_allclose(scanned(stack, xs)[0], xs @ dense[0].T + xs @ dense[1].T, rtol=1e-5, atol=1e-6)


@ALL
def test_vmap_equals_a_stack(format):
    stack = run(weights(), format)
    assert_same(jax.jit(jax.vmap(partial(quantize, format=format)))(weights()), stack)
    back = jax.jit(jax.vmap(lambda q: q.dequantize(jnp.bfloat16)))(stack)
    np.testing.assert_array_equal(back, dequantize(stack, jnp.bfloat16))


@ALL
def test_lives_in_an_nnx_parameter(format):
    class Experts(nnx.Module):
        def __init__(self, weight):
            self.weight = nnx.Param(weight)

        def __call__(self, x):
            return jnp.einsum("bi,eoi->ebo", x, self.weight.get_value().dequantize(x.dtype))

    q, x = run(weights(), format), weights((3, 256), jnp.float32)
    graph, state = nnx.split(Experts(q))
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(q))
    merged = nnx.merge(graph, state)
    assert_same(merged.weight.get_value(), q)
    expected = jnp.einsum("bi,eoi->ebo", x, dequantize(q, jnp.float32))
    np.testing.assert_allclose(jax.jit(lambda model, x: model(x))(merged, x), expected, rtol=1e-5, atol=1e-6)


@ALL
def test_donated_buffers_are_reused(format):
    q, kept = run(weights(), format), run(weights(), format)
    turn = jax.jit(partial(jax.tree.map, jnp.flip), donate_argnums=0)
    out = turn(turn(q))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(q))
    assert_same(out, kept)


@pytest.mark.parametrize(
    "format, expected",
    [
        (Int8(), 1 + 4 / 2048),
        (Int4(), 0.5 + 4 / 64),
        (Int4(128), 0.5 + 4 / 128),
        (NF4(), 0.5 + 4 / 64),
        (NF4(double_quant=True), 0.5 + 1 / 64 + 4 / 64 / 256 + 4 / (1024 * 2048)),
    ],
    ids=str,
)
def test_bytes_per_weight(format, expected):
    abstract = jax.eval_shape(partial(quantize, format=format), jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16))
    assert abstract.nbytes == pytest.approx(expected * 1024 * 2048, abs=0)
    compiled = dequantize.lower(abstract, jnp.bfloat16).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == abstract.nbytes


MEASURE = """
import re, sys
from pathlib import Path
import jax, jax.numpy as jnp

def resident():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))

count, dtype = 64 * 2**20, sys.argv[1]
make = jax.jit(lambda: (jnp.arange(count, dtype=jnp.uint32) % 7).astype(dtype)).lower().compile()
before = resident()
codes = jax.block_until_ready(make())
print((resident() - before) / count, int(codes[12].astype(jnp.int32)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["uint4", "int4"])
def test_four_bit_codes_take_half_a_byte_of_the_process(dtype):
    """In a process of its own, that has no freed memory to take."""
    command = [sys.executable, "-c", MEASURE, dtype]
    per_code, code = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    assert float(per_code) == pytest.approx(0.5, abs=0.1)
    assert int(code) == 5


def operations(compiled):
    """Names of the operations that the entry computation of a compiled function runs."""
    text = compiled.as_text()
    names = re.findall(r"^\s+(?:ROOT )?%\S+ = \S+ ([\w-]+)\(", text[text.index("ENTRY") :], re.MULTILINE)
    return [name for name in names if name not in ("parameter", "constant")]


@pytest.mark.parametrize("width", [576, 600])
@ALL
def test_dequantizing_is_one_fusion(format, width):
    abstract = jax.eval_shape(partial(quantize, format=format), jax.ShapeDtypeStruct((2, 64, width), jnp.float32))
    compiled = dequantize.lower(abstract, jnp.bfloat16).compile()
    nested = abstract.nested_absmax is not None
    assert operations(compiled) == ["fusion"] * (2 if nested else 1)
    assert compiled.memory_analysis().temp_size_in_bytes <= (8192 if nested else 0)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    "format, width, spec, scales",
    [
        (NF4(), 512, P(None, "data", "model"), P(None, "data", "model")),
        (NF4(), 512, P(None, None, ("data", "model")), P(None, None, ("data", "model"))),
        (NF4(), 576, P(None, "model", "data"), P(None, "model", None)),
        (NF4(), 600, P("data", None, "model"), P("data", None, None)),
        (Int4(32), 576, P(None, "model", "data"), P(None, "model", "data")),
        (Int8(), 512, P(None, "data", "model"), P(None, "data", None)),
        (NF4(), 512, P("data"), P("data", None, None)),
        (NF4(double_quant=True), 512, P("data", "model"), P("data", "model", None)),
    ],
    ids=str,
)
def test_specs_of_the_leaves(mesh, format, width, spec, scales):
    abstract = jax.eval_shape(partial(quantize, format=format), jax.ShapeDtypeStruct((2, 64, width), jnp.bfloat16))
    specs = abstract.specs(spec, mesh)
    assert (specs.codes, specs.scales) == (spec, scales)
    if abstract.nested_absmax is not None:
        assert (specs.nested_absmax, specs.nested_offset) == (P(spec[0], None), P(spec[0]))
    assert jax.tree.structure(specs) == jax.tree.structure(abstract)
    assert abstract.specs(spec, mesh.abstract_mesh) == specs


SPECS = [P(None, "data", "model"), P("data", ("model",), None)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@ALL
def test_sharded_leaves_give_the_same_weight(mesh, format, spec):
    w = weights()
    q = run(w, format)
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), q.specs(spec, mesh))
    placed = jax.device_put(q, shardings)
    assert_same(placed, q)
    np.testing.assert_array_equal(dequantize(placed, jnp.bfloat16), dequantize(q, jnp.bfloat16))
    sharded = jax.jit(partial(quantize, format=format), in_shardings=NamedSharding(mesh, spec), out_shardings=shardings)
    assert_same(sharded(jax.device_put(w, NamedSharding(mesh, spec))), q)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("format", [Int8(), Int4(), NF4(), NF4(double_quant=True)], ids=str)
def test_whole_blocks_dequantize_without_communication(mesh, format, spec):
    abstract = jax.eval_shape(partial(quantize, format=format), jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16))
    placed = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, s)),
        abstract,
        abstract.specs(spec, mesh),
    )
    function = jax.jit(lambda q: q.dequantize(jnp.bfloat16), out_shardings=NamedSharding(mesh, spec))
    text = function.lower(placed).compile().as_text()
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)


@pytest.mark.parametrize("format", [Int4(), NF4(), NF4(double_quant=True)], ids=str)
def test_blocks_cut_by_shards_still_give_the_weight(mesh, format):
    w, spec = weights((64, 600)), P("data", "model")
    q = run(w, format)
    placed = jax.device_put(q, jax.tree.map(lambda s: NamedSharding(mesh, s), q.specs(spec, mesh)))
    np.testing.assert_array_equal(dequantize(placed, jnp.float32), dequantize(q, jnp.float32))


@pytest.mark.parametrize("w", [jnp.ones(64), jnp.ones((4, 64), jnp.int32)], ids=["vector", "integers"])
def test_only_floating_point_matrices_are_quantized(w):
    with pytest.raises(ValueError, match=r"only floating point weights .* got \w+\[.*64\]; keep norms"):
        quantize(w, NF4())


def test_is_frozen():
    q = run(weights(), Int8())
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.codes = None
