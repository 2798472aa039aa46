import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.quantization.nf4 import LEVELS, NF4
from jaxft.quantization.qtensor import QTensor, quantize

run = jax.jit(quantize, static_argnames="format")
dequantize = jax.jit(QTensor.dequantize, static_argnames="dtype")


def weights(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * 0.02, dtype)


def relative_error(w, q):
    error = dequantize(q, jnp.float32) - w.astype(jnp.float32)
    return float(jnp.sqrt(jnp.mean(error**2) / jnp.mean(w.astype(jnp.float32) ** 2)))


class Reference:
    """One matrix quantized by bitsandbytes, with the pure torch kernel for nested codes."""

    def __init__(self, w, kernels):
        torch = pytest.importorskip("torch")
        self.functional = pytest.importorskip("bitsandbytes.functional")
        self.shape = tuple(w.shape)
        self.packed, self.state = self.functional.quantize_4bit(w, quant_type="nf4", blocksize=64)
        packed = self.packed.numpy().reshape(-1)
        self.codes = np.stack([packed >> 4, packed & 15], -1).reshape(self.shape)
        self.absmax = self.state.absmax.reshape(self.shape[0], -1).numpy()
        _, double = self.functional.quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=True)
        self.offset, self.nested_absmax = double.offset, double.state2.absmax
        centred = self.state.absmax - double.offset
        whole = torch.nn.functional.pad(centred, (0, -centred.numel() % 256))
        code = self.functional.create_dynamic_map()
        self.nested_codes = kernels["quantize_blockwise"](whole, code, 256)[0][: centred.numel()]
        self.double_absmax = self.functional.dequantize_blockwise(
            self.nested_codes, absmax=self.nested_absmax, code=code, blocksize=256
        )
        self.double_absmax += self.offset

    def dequantized(self, absmax, dtype):
        torch = pytest.importorskip("torch")
        out = torch.ops.bitsandbytes.dequantize_4bit(self.packed, absmax, 64, "nf4", self.shape, getattr(torch, dtype))
        return out.float().numpy()


def assert_equals_reference(q, double, reference):
    np.testing.assert_array_equal(q.codes.astype(jnp.uint8), reference.codes)
    np.testing.assert_array_equal(q.scales, reference.absmax)
    np.testing.assert_array_equal(double.codes.astype(jnp.uint8), reference.codes)
    np.testing.assert_array_equal(double.nested_offset, reference.offset.numpy())
    np.testing.assert_array_equal(double.nested_absmax, reference.nested_absmax.numpy())
    np.testing.assert_array_equal(double.scales.reshape(-1), reference.nested_codes.numpy())


@pytest.mark.parity
@pytest.mark.parametrize(
    "dtype, shape",
    [("bfloat16", (576, 576)), ("bfloat16", (3, 64)), ("float32", (100, 320)), ("float16", (64, 64))],
)
def test_equals_bitsandbytes_bit_for_bit(bnb_kernels, one_torch_thread, dtype, shape):
    torch = pytest.importorskip("torch")
    w = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02).to(getattr(torch, dtype))
    reference = Reference(w, bnb_kernels)
    w = jnp.asarray(w.float().numpy(), dtype)
    q, double = run(w, format=NF4()), run(w, format=NF4(double_quant=True))
    assert_equals_reference(q, double, reference)
    for out in ("float32", "bfloat16", "float16"):
        single = np.asarray(dequantize(q, out), np.float32)
        np.testing.assert_array_equal(single, reference.dequantized(reference.state.absmax, out))
        nested = np.asarray(dequantize(double, out), np.float32)
        np.testing.assert_array_equal(nested, reference.dequantized(reference.double_absmax, out))


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_weights_equal_bitsandbytes_bit_for_bit(material, bnb_kernels, dtype):
    torch = pytest.importorskip("torch")
    tensors = pytest.importorskip("safetensors.numpy").load_file(material / "models/stories15M/model.safetensors")
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(6)]
    stack = jnp.asarray(np.stack([tensors[name] for name in names]), dtype)
    assert stack.shape == (6, 288, 768)
    q, double = run(stack, format=NF4()), run(stack, format=NF4(double_quant=True))
    for i in range(6):
        w = torch.from_numpy(np.array(stack[i], np.float32)).to(getattr(torch, dtype))
        layer, layer_double = jax.tree.map(lambda leaf, i=i: leaf[i], (q, double))
        assert_equals_reference(layer, layer_double, Reference(w, bnb_kernels))
    assert relative_error(stack, q) < 0.11
    assert relative_error(stack, double) < 1.01 * relative_error(stack, q)


@pytest.mark.parametrize("width", [1, 65, 288])
def test_short_blocks_equal_a_row_filled_with_zeros(width):
    w = weights((5, width), jnp.bfloat16)
    q = run(w, format=NF4())
    filled = run(jnp.pad(w, [(0, 0), (0, -width % 64)]), format=NF4())
    assert q.shape == (5, width)
    np.testing.assert_array_equal(q.scales, filled.scales)
    np.testing.assert_array_equal(q.codes, filled.codes[:, :width])
    np.testing.assert_array_equal(dequantize(q, jnp.float32), dequantize(filled, jnp.float32)[:, :width])


def test_short_blocks_are_as_accurate_as_whole_ones():
    whole = weights((512, 576))
    error = relative_error(whole, run(whole, format=NF4()))
    assert 0.08 < error < 0.1
    for width in (570, 600):
        w = weights((512, width), seed=width)
        assert relative_error(w, run(w, format=NF4())) < 1.01 * error


@pytest.mark.parametrize("scale", [1.0, 0.0123, 3e30])
def test_levels_come_back_exactly_each_under_its_code(scale):
    order = np.random.default_rng(0).permutation(np.tile(np.arange(16), 4))
    w = (LEVELS[order] * np.float32(scale))[None]
    q = run(jnp.asarray(w), format=NF4())
    np.testing.assert_array_equal(q.codes.astype(jnp.uint8)[0], order)
    np.testing.assert_array_equal(dequantize(q, jnp.float32), w)


@pytest.mark.parametrize("double_quant", [False, True])
def test_zero_blocks_and_zero_matrices_give_zeros(double_quant):
    for w in (jnp.zeros((4, 128)), jnp.zeros((4, 128)).at[1, 70].set(0.5)):
        q = run(w, format=NF4(double_quant))
        np.testing.assert_array_equal(q.codes[0].astype(jnp.uint8), 7)
        np.testing.assert_allclose(dequantize(q, jnp.float32), w, rtol=0.02)


@pytest.mark.parametrize("double_quant", [False, True])
def test_stack_gives_the_stack_of_matrices(double_quant):
    w = weights((2, 2, 20, 100), jnp.bfloat16)
    q = run(w, format=NF4(double_quant))
    back = dequantize(q, jnp.bfloat16)
    for i, j in np.ndindex(2, 2):
        one = run(w[i, j], format=NF4(double_quant))
        for whole, leaf in zip(jax.tree.leaves(q), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(whole[i, j], leaf)
        np.testing.assert_array_equal(back[i, j], dequantize(one, jnp.bfloat16))
