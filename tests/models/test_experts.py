"""Grouped products against a loop over experts; the balancing loss against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.models.experts import load_balancing_loss
from jaxft.models.grouped import grouped_matmul
from jaxft.quantization.formats import parse_format
from jaxft.quantization.qtensor import quantize


def slow(x, weight, sizes):
    """Each expert's rows times its matrix, one after the other; rows that are nobody's give zeros."""
    ends = np.cumsum(sizes)
    parts = [x[end - size : end] @ w.T for size, end, w in zip(sizes, ends, weight, strict=True)]
    return jnp.concatenate([*parts, jnp.zeros((len(x) - ends[-1], weight.shape[1]))])


@pytest.mark.parametrize("inner, outer", [(24, 40), (40, 3)], ids=["wide", "narrow"])
@pytest.mark.parametrize(
    "sizes, rows",
    [((5, 0, 1, 19), 25), ((0, 0, 7), 7), ((300, 3, 0, 40), 350), ((1,), 4), ((0, 0), 6), ((8, 8, 16), 32)],
    ids=str,
)
def test_grouped_products(sizes, rows, inner, outer):
    """Tiles that run over into the next expert, experts without rows, rows without expert."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, inner)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(len(sizes), outer, inner)), jnp.float32)
    dy = jnp.asarray(rng.normal(size=(rows, outer)), jnp.float32)
    groups = jnp.asarray(sizes, jnp.int32)
    y, pull = jax.vjp(jax.jit(lambda x, w: grouped_matmul(x, w, groups)), x, weight)
    with jax.default_matmul_precision("highest"):
        expected, expected_pull = jax.vjp(lambda x, w: slow(x, w, sizes), x, weight)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for ours, theirs in zip(pull(dy), expected_pull(dy), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("form", ["int8", "int4", "nf4"])
def test_grouped_products_with_codes(form):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(30, 128)), jnp.float32)
    codes = quantize(jnp.asarray(rng.normal(size=(4, 20, 128)), jnp.float32), parse_format(form))
    sizes = jnp.asarray((9, 0, 20, 1), jnp.int32)
    dy = jnp.asarray(rng.normal(size=(30, 20)), jnp.float32)
    y, pull = jax.vjp(lambda x: grouped_matmul(x, codes, sizes), x)
    dense = codes.dequantize(jnp.float32)
    expected, expected_pull = jax.vjp(lambda x: grouped_matmul(x, dense, sizes), x)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(pull(dy)[0], expected_pull(dy)[0], atol=1e-5)


def test_bfloat16_products_are_accumulated_in_float32():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(64, 512)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(3, 16, 512)), jnp.bfloat16)
    sizes = jnp.asarray((30, 30, 4), jnp.int32)
    exact = slow(x.astype(jnp.float32), weight.astype(jnp.float32), (30, 30, 4))
    ours = grouped_matmul(x, weight, sizes)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2**-8, atol=1e-3)


MOE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0,
    num_key_value_heads=2, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.3,
)  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss"])
def test_balancing_loss_is_that_of_transformers(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    configs = {
        "mixtral": lambda: transformers.MixtralConfig(**MOE, num_local_experts=5),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            **MOE, head_dim=8, num_experts=6, moe_intermediate_size=24, mlp_only_layers=[1]
        ),
        "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**MOE, num_experts=6, moe_intermediate_size=24),
        "gpt_oss": lambda: transformers.GptOssConfig(
            **MOE, head_dim=8, num_local_experts=6, rope_parameters=dict(rope_type="default", rope_theta=100.0)
        ),
    }
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(configs[name]()).float().eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.ndim == 1))
    reference.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 97, (3, 21), dtype=np.int32)
    mask = (np.arange(21)[None] < np.array([21, 14, 3])[:, None]).astype(np.int32)
    with torch.no_grad():
        out = reference(torch.tensor(tokens), attention_mask=torch.tensor(mask), labels=torch.tensor(tokens).long())
    _, balances = jaxft.load_model(tmp_path).hidden_and_balance(tokens, None, mask)
    assert load_balancing_loss(balances) == pytest.approx(out.aux_loss.item(), rel=1e-5)
    assert abs(out.aux_loss.item() - 2) > 0.01  # it would be 2 if the experts had the same load
