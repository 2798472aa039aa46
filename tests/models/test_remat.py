"""Every policy gives the gradient of keeping everything, and recomputes what it says."""

from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.adapters.attach import attach
from jaxft.adapters.targets import LoraConfig
from jaxft.config import RematName
from jaxft.models.config import DecoderConfig, LayerSpec, Rope
from jaxft.models.decoder import initialize
from jaxft.models.linear import Adapter
from jaxft.models.remat import DOTS, SAVES, Name, check
from jaxft.training.state import Partition

LAYERS = (LayerSpec(), LayerSpec(window=5), LayerSpec(), LayerSpec(window=5), LayerSpec())
CONFIG = DecoderConfig(50, 32, 48, 4, 2, 8, LAYERS, Rope(1e4, 8, 64), 1e-5)
ALL = ("lora", "attention", "qkv", "attention_out", "mlp")


def gradient(remat, offload=False, scan_layers=True):
    """The gradient of a small model's adapters, and how many matrix products its program has."""
    model = attach(initialize(CONFIG, jax.random.key(0), scale=0.2), LoraConfig(r=4, lora_alpha=8), jax.random.key(1))
    model.remat, model.offload, model.scan_layers = remat, offload, scan_layers
    partition = Partition(model, Adapter)
    trained, frozen = partition.split(model)
    trained = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), trained)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 17)).astype(np.int32)

    def loss(trained, frozen):
        logits = partition.join(trained, frozen)(tokens)
        return jnp.sum(logits * jnp.cos(jnp.arange(50.0)))

    compiled = jax.jit(jax.grad(loss)).lower(trained, frozen).compile()
    return compiled(trained, frozen), compiled.as_text().count(" dot(")


@pytest.mark.parametrize(
    "remat, offload",
    [("full", False), ("dots", False), *(((name,), False) for name in ALL), (ALL, False), ("full", True), (ALL, True)],
)
def test_every_policy_gives_the_same_gradient(remat, offload):
    kept, again = gradient("none")[0], gradient(remat, offload)[0]
    # The layers are compiled anew, so sums of numbers up to 60 may round differently.
    chex.assert_trees_all_close(again, kept, rtol=1e-5, atol=1e-4)


def test_what_a_name_keeps_is_not_computed_again():
    full, kept = gradient("full")[1], {name: gradient((name,))[1] for name in ALL}
    assert all(products < full for products in kept.values()), (full, kept)
    assert gradient(("lora", "mlp"))[1] < min(kept["lora"], kept["mlp"])
    assert gradient("none")[1] <= gradient(ALL)[1] < min(kept.values())
    assert gradient("dots")[1] == gradient(DOTS)[1] < min(kept[name] for name in DOTS)


def test_the_config_knows_the_same_names():
    assert get_args(RematName) == get_args(Name) == tuple(SAVES)


def test_unknown_policies():
    with pytest.raises(ValueError, match="nothing is named qvk; names are lora, attention, qkv"):
        check(("qvk",), False)
    with pytest.raises(ValueError, match="remat is 'some'; choose none, full, dots or a list"):
        check("some", False)
    with pytest.raises(ValueError, match="not offloaded where remat is none; choose full, dots or a list"):
        check("none", True)
