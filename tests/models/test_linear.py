"""The one matmul: gradients against plain autodiff, and what it keeps for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.adapters.attach import attach
from jaxft.adapters.targets import LoraConfig
from jaxft.models.config import DecoderConfig, LayerSpec, Rope
from jaxft.models.decoder import Decoder
from jaxft.models.linear import Adapter, matmul
from jaxft.quantization.formats import parse_format
from jaxft.quantization.qtensor import quantize
from jaxft.training.state import Partition

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, 192)).astype(np.float32)
W = RNG.normal(size=(320, 192)).astype(np.float32)
DY = RNG.normal(size=(2, 5, 320)).astype(np.float32)


def plain(x, w):
    return jnp.einsum("...i,oi->...o", x, w, precision="highest")


@pytest.mark.core
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows_out", [320, 192, 16, 1])
def test_dense_product_and_gradients(rows_out, dtype):
    """Wide, square and as narrow as a rank: the weight's gradient is computed one way or the other by its shape."""
    dy, w = DY[..., :rows_out], W[:rows_out]
    ours, pull = jax.vjp(jax.jit(matmul), X.astype(dtype), jnp.asarray(w, dtype))
    expected, pull_plain = jax.vjp(plain, X, w)
    tolerance = dict(rtol=1e-5, atol=1e-4) if dtype == "float32" else dict(rtol=2e-2, atol=0.3)
    for found, wanted in zip((ours, *pull(dy.astype(dtype))), (expected, *pull_plain(dy)), strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float32), wanted, **tolerance)


@pytest.mark.core
@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_product_is_that_of_the_dequantized_weight(name, dtype):
    q = jax.jit(quantize, static_argnums=1)(W, parse_format(name))
    x = X.astype(dtype)
    ours, pull = jax.vjp(lambda x: matmul(x, q), x)
    expected, pull_plain = jax.vjp(lambda x: plain(x, q.dequantize(jnp.float32)), X)
    tolerance = dict(rtol=1e-5, atol=1e-4) if dtype == "float32" else dict(rtol=2e-2, atol=0.3)
    assert ours.dtype == dtype
    np.testing.assert_allclose(np.asarray(ours, np.float32), expected, **tolerance)
    (dx,), (dx_plain,) = pull(DY.astype(dtype)), pull_plain(DY)
    np.testing.assert_allclose(np.asarray(dx, np.float32), dx_plain, **tolerance)


@pytest.mark.core
@pytest.mark.parametrize("name, codes", [("int8", "int8"), ("int4", "int4"), ("nf4", "uint4")])
def test_backward_keeps_codes_and_no_dequantized_weight(name, codes):
    """What `jax.vjp` keeps: the activations, the codes and the scales; nothing float of the weight's size."""
    q = quantize(jnp.asarray(W), parse_format(name))
    _, pull = jax.vjp(lambda x: matmul(x, q), X)
    kept = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "dtype")]
    assert any(leaf.dtype == codes and leaf.shape == W.shape for leaf in kept)
    assert not any(leaf.dtype in (jnp.float32, jnp.bfloat16) and leaf.size >= W.size for leaf in kept)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_a_stack_of_layers_keeps_no_dequantized_weight(remat):
    """Through scan and remat too: what a layer adds to the compiled gradient is less than its dequantized weights."""
    width, inner = 256, 2048

    def make(parameter):
        value = 0.02 * jnp.ones(parameter.stacked_shape, jnp.float32)
        return quantize(value, parse_format("nf4")) if parameter.name.endswith("_proj.weight") else value

    def temporaries(layers):
        config = DecoderConfig(64, width, inner, 4, 2, 64, (LayerSpec(),) * layers, Rope(1e4, 64, 64), 1e-5)
        base = Decoder(config, make, jnp.float32, remat)
        model = attach(base, LoraConfig(r=2, lora_alpha=2), jax.random.key(0))
        partition = Partition(model, Adapter)

        def loss(trained, frozen):
            return partition.join(trained, frozen).hidden(np.zeros((1, 8), np.int32)).sum()

        compiled = jax.jit(jax.grad(loss)).lower(*partition.split(model)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    per_layer = (temporaries(10) - temporaries(2)) / 8
    weights = 3 * width * inner + 2 * width * (256 + 128)
    # On CPU the loop keeps the codes unpacked, a byte each; dequantized weights would be four.
    assert per_layer < 1.5 * weights
