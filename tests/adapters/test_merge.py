"""Folding adapters into stacked weights: the sum, and what becomes of the model that is given."""

import jax
import numpy as np
import pytest

import jaxft
from jaxft.adapters.attach import Factors, attach_factors, sites
from jaxft.adapters.merge import merge
from jaxft.adapters.targets import LoraConfig

MODEL = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
CONFIG = LoraConfig(
    r=3,
    lora_alpha=6,
    target_modules=["q_proj", "down_proj", "lm_head"],
    rank_pattern={"layers.1.self_attn.q_proj": 2},
)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_layer_gets_its_own_product(random_checkpoint, dtype, donate):
    base = jaxft.load_model(random_checkpoint(MODEL), dtype)
    rng = np.random.default_rng(2)
    factors, expected = {}, {}
    for site in sites(base):
        for layer, name in enumerate(site.modules):
            weight = np.asarray(site.linear.weight.get_value()[layer] if site.stack else site.linear.weight[...])
            weight = weight.astype(np.float64)
            if name.endswith(("q_proj", "down_proj", "lm_head")):
                rank = CONFIG.rank(name)
                a = rng.standard_normal((rank, weight.shape[1])).astype(np.float32)
                b = rng.standard_normal((weight.shape[0], rank)).astype(np.float32)
                factors[name] = Factors(a, b)
                weight = weight + CONFIG.alpha(name) / rank * b.astype(np.float64) @ a
            expected[name] = weight
    model = attach_factors(base, CONFIG, factors)
    merged = merge(model, donate=donate)
    exact = 1e-6 if dtype == "float32" else 2**-8
    for site in sites(merged):
        found = np.asarray(site.linear.weight.get_value()).astype(np.float64)
        for layer, name in enumerate(site.modules):
            one = found[layer] if site.stack else found
            np.testing.assert_allclose(one, expected[name], rtol=exact, atol=1e-5, err_msg=name)
    used_up = {
        site.modules[0].rsplit(".", 1)[-1]
        for site in sites(base)
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(site.linear.weight.get_value()))
    }
    assert used_up == ({"q_proj", "down_proj", "lm_head"} if donate else set())


def test_a_bfloat16_base_merges_to_bfloat16_as_it_would_from_float32(random_checkpoint, tmp_path):
    jaxft.save_model(jaxft.load_model(random_checkpoint(MODEL), "bfloat16"), tmp_path)
    rng, narrow, wide = np.random.default_rng(4), jaxft.load_model(tmp_path, "bfloat16"), jaxft.load_model(tmp_path)
    factors = {
        name: Factors(
            rng.standard_normal((CONFIG.rank(name), site.linear.weight.get_value().shape[-1])).astype(np.float32),
            rng.standard_normal((site.linear.weight.get_value().shape[-2], CONFIG.rank(name))).astype(np.float32),
        )
        for site in sites(wide)
        for name in site.modules
        if name.endswith(("q_proj", "down_proj", "lm_head"))
    }
    narrow, wide = (merge(attach_factors(base, CONFIG, factors)) for base in (narrow, wide))
    for ours, theirs in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        np.testing.assert_array_equal(
            np.asarray(ours).view(np.uint16), np.asarray(theirs.astype(ours.dtype)).view("u2")
        )
