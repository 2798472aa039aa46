"""One layer compiled and looped over, or every layer compiled: the same function."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.adapters.attach import attach
from jaxft.adapters.targets import LoraConfig
from jaxft.models.config import DecoderConfig, LayerSpec, Rope
from jaxft.models.decoder import initialize
from jaxft.models.linear import Adapter
from jaxft.training.state import Partition

LAYERS = (LayerSpec(), LayerSpec(window=5), LayerSpec(), LayerSpec(window=5), LayerSpec())


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_unrolled_layers_are_the_scanned_ones(remat):
    config = DecoderConfig(50, 32, 48, 4, 2, 8, LAYERS, Rope(1e4, 8, 64), 1e-5)
    model = attach(initialize(config, jax.random.key(0), scale=0.2), LoraConfig(r=4, lora_alpha=8), jax.random.key(1))
    model.remat = remat
    partition = Partition(model, Adapter)
    trained, frozen = partition.split(model)
    trained = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), trained)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 17)).astype(np.int32)

    def run(scan_layers):
        def loss(trained, frozen):
            model = partition.join(trained, frozen)
            model.scan_layers = scan_layers
            logits = model(tokens)
            return jnp.sum(logits * jnp.cos(jnp.arange(50.0))), logits

        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(trained, frozen).compile()
        return compiled(trained, frozen), compiled.as_text().count(" dot(")

    (scanned, products), (unrolled, more_products) = run(True), run(False)
    chex.assert_trees_all_close(unrolled, scanned, rtol=1e-5, atol=1e-4)
    assert more_products > 1.5 * products
