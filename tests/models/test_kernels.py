"""Every kernel of attention against all scores at once in float32, forward and backward; and which one is chosen."""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models import blockwise, cudnn, kernels, splash
from jaxft.models.blockwise import Reach, Rule
from jaxft.models.hf_config import decoder_config
from jaxft.models.kernels import Backend, Case, choice, choose, objection


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    sinks: jax.Array | None


def plain(inputs: Inputs, segments: jax.Array | None, rule: Rule) -> jax.Array:
    """softmax(cap(scale q kᵀ)) v with the whole matrix of scores, and sinks as a column without value."""
    q, k, v, sinks = inputs
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (rule.scale or q.shape[3] ** -0.5)
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    seen = (distance >= 0) & (distance < (rule.window or length))
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    scores = jnp.where(seen, scores, -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, column], axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores)[..., :length], v)


def draw(length: int, heads: int, kv_heads: int, head_dim: int, sinks: bool = False, rows: int = 2):
    """Inputs whose softmax is far from flat, and a cotangent."""
    keys = jax.random.split(jax.random.key(length), 5)
    shapes = [(rows, length, heads, head_dim)] + 2 * [(rows, length, kv_heads, head_dim)]
    q, k, v = (1.5 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
    column = 2 * jax.random.normal(keys[3], (heads,)) if sinks else None
    return Inputs(q, k, v, column), jax.random.normal(keys[4], shapes[0])


def packed(length: int, rows: int = 2) -> jax.Array:
    """Segments of different lengths, the first row with padding at its end."""
    segments = np.sort(np.random.default_rng(length).integers(1, 5, (rows, length)), axis=1)
    segments[0, length - length // 5 :] = 0
    return jnp.asarray(segments, jnp.int32)


def in_blocks(inputs: Inputs, segments: jax.Array | None, rule: Rule) -> jax.Array:
    reach = Reach(jnp.int32(0), segments, segments)
    return blockwise.attend(*inputs[:3], reach, rule, block=48, sinks=inputs.sinks)


def by_splash(inputs: Inputs, segments: jax.Array | None, rule: Rule) -> jax.Array:
    return splash.attend(*inputs[:3], segments, rule, inputs.sinks, interpret=True)


def by_cudnn(inputs: Inputs, segments: jax.Array | None, rule: Rule) -> jax.Array:
    """Without segments: one example to a row is all it can do."""
    return cudnn.attend(*inputs[:3], rule)


@partial(jax.jit, static_argnums=(0, 3))
def both(attend, inputs: Inputs, segments: jax.Array | None, rule: Rule, d_out: jax.Array) -> tuple[jax.Array, Inputs]:
    """Values and gradients."""
    out, pull = jax.vjp(lambda inputs: attend(inputs, segments, rule), inputs)
    return out, pull(d_out.astype(out.dtype))[0]


CASES = {  # length, query heads, key-value heads, head_dim, packed, sinks, rule
    "one group, packed": (128, 2, 2, 64, True, False, Rule()),
    "pairs, odd length, window": (77, 4, 2, 80, False, False, Rule(window=19)),
    "fours, window, packed, sinks": (150, 4, 1, 64, True, True, Rule(window=33)),
    "eights, softcap, scale": (65, 8, 1, 128, False, False, Rule(scale=0.2, softcap=5.0)),
    "wide heads, softcap, window, packed": (60, 2, 1, 256, True, False, Rule(window=7, softcap=20.0)),
    "sinks alone, several blocks": (530, 2, 1, 16, True, True, Rule()),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", [in_blocks, by_splash])
def test_values_and_gradients(kernel, case):
    *sizes, with_segments, with_sinks, rule = CASES[case]
    inputs, d_out = draw(*sizes, with_sinks)
    segments = packed(sizes[0]) if with_segments else None
    out, gradient = both(kernel, inputs, segments, rule, d_out)
    expected, expected_gradient = both(plain, inputs, segments, rule, d_out)
    chex.assert_trees_all_close(out, expected, atol=1e-5, rtol=1e-5)
    chex.assert_trees_all_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)


def assert_close_in_bfloat16(found, expected) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(np.asarray(one, np.float32) - other) / np.linalg.norm(other)
        assert error < 4 * 2**-8


def test_splash_in_bfloat16():
    """Its own precision on TPUs: errors of the order of bfloat16's rounding, 2^-8, of the values."""
    inputs, d_out = draw(140, 4, 2, 64, sinks=True)
    inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
    segments, rule = packed(140), Rule(window=50)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    found, expected = both(by_splash, inputs, segments, rule, d_out), both(plain, wide, segments, rule, d_out)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    assert_close_in_bfloat16(found, expected)


@pytest.mark.parametrize("window", [None, 1, 9])
def test_what_is_asked_of_cudnn(monkeypatch, window):
    """Scale, causality, windows and groups mean in jax's call what they mean here, by its implementation in XLA.

    Rows are padded on the right: without segments, the examples get what they get with them.
    """
    call = jax.nn.dot_product_attention

    def by_xla(*arguments, implementation, **options):
        assert implementation == "cudnn"
        return call(*arguments, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    inputs, d_out = draw(40, 4, 2, 16)
    segments = jnp.asarray(np.arange(40) < [[40], [23]], jnp.int32)
    rule, d_out = Rule(window, 0.3), d_out * segments[..., None, None].astype(jnp.float32)
    out, gradient = both(by_cudnn, inputs, segments, rule, d_out)
    expected, expected_gradient = both(plain, inputs, segments, rule, d_out)
    real = segments[..., None, None] > 0
    chex.assert_trees_all_close(jnp.where(real, out, 0.0), jnp.where(real, expected, 0.0), atol=1e-5)
    chex.assert_trees_all_close(gradient, expected_gradient, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"), [(8, 8, 64, None), (8, 2, 128, 100), (8, 1, 80, 7)]
)
def test_cudnn_on_a_gpu(heads, kv_heads, head_dim, window):
    try:
        (gpu, *_) = jax.devices("cuda")
    except RuntimeError:
        pytest.skip("needs an NVIDIA GPU")
    inputs, d_out = draw(391, heads, kv_heads, head_dim)
    inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
    found = both(by_cudnn, *jax.device_put((inputs, None), gpu), Rule(window), jax.device_put(d_out, gpu))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    assert_close_in_bfloat16(jax.device_get(found), both(plain, wide, None, Rule(window), d_out))


@pytest.mark.parametrize("kernel", [in_blocks, by_splash])
def test_kept_under_its_name(kernel):
    """With a policy that keeps `attention`, the backward pass does not run the loops of the forward kernel again."""
    inputs, _ = draw(64, 2, 1, 16)

    def loops(policy) -> int:
        function = jax.checkpoint(lambda inputs: jnp.sum(kernel(inputs, None, Rule()) ** 2), policy=policy)
        return jax.jit(jax.value_and_grad(function)).lower(inputs).as_text().count("stablehlo.while")

    assert loops(jax.checkpoint_policies.save_only_these_names("attention")) == loops(None) - 2


TPU = Case("tpu", (0, 0), 128, jnp.dtype("bfloat16"), 32, 128, 1, packed=True, softcap=True, sinks=True)
H100 = Case("gpu", (9, 0), 256, jnp.dtype("bfloat16"), 32, 128, 1, packed=False, softcap=False, sinks=False)
FLOAT32 = jnp.dtype("float32")


@pytest.mark.parametrize(
    ("case", "kernel", "why"),
    [
        (TPU, "splash", "made for"),
        (TPU._replace(dtype=FLOAT32), "blockwise", "splash: it would round float32"),
        (TPU._replace(ways=5), "blockwise", "32 heads cannot be cut evenly over tensor x context = 5"),
        (H100, "cudnn", "made for"),
        (H100._replace(head_dim=256), "cudnn", "made for"),
        (H100._replace(head_dim=256, widest=128), "blockwise", "heads of up to 128, not 256"),
        (H100._replace(head_dim=100), "blockwise", "a multiple of 8, not 100"),
        (H100._replace(packed=True), "blockwise", "cudnn: it cannot keep the examples of a packed row apart"),
        (H100._replace(softcap=True), "blockwise", "cap scores"),
        (H100._replace(sinks=True), "blockwise", "no sinks"),
        (H100._replace(dtype=FLOAT32), "blockwise", "no float32"),
        (H100._replace(capability=(7, 5)), "blockwise", "8.0"),
        (H100._replace(platform="cpu", capability=(0, 0)), "blockwise", "there is no kernel for a cpu"),
    ],
)
def test_auto_takes_the_chips_kernel_where_that_can_do_it(case, kernel, why):
    chosen = choose("auto", case)
    assert chosen.kernel == kernel
    assert why in chosen.why
    assert choose("blockwise", case).kernel == "blockwise"
    if kernel != "blockwise":
        assert choose(kernel, case).kernel == kernel
    for other in {"splash", "cudnn"} - {kernel}:
        assert objection(other, case)
        with pytest.raises(ValueError, match=f"attn_implementation is {other}: .*; or choose auto or blockwise"):
            choose(other, case)


def test_what_is_said_of_a_model():
    config = decoder_config({"model_type": "gemma2", "num_hidden_layers": 6})
    chosen = choice(config, Backend(), jnp.dtype("bfloat16"), packed=True)
    assert str(chosen) == "blockwise, as there is no kernel for a cpu"
    with pytest.raises(ValueError, match="attn_implementation is 'flash'; choose auto, blockwise, splash, cudnn"):
        choice(config, Backend("flash"), jnp.dtype("bfloat16"), packed=True)


def test_a_kernel_that_is_asked_for_is_not_replaced():
    inputs, _ = draw(16, 2, 1, 16)
    reach = Reach(jnp.int32(0), None, None)
    with pytest.raises(ValueError, match="attn_implementation is splash: it is for TPUs, and this is a cpu"):
        kernels.attend(Backend("splash"), *inputs[:3], reach, Rule())
    kernels.attend(Backend("splash"), *inputs[:3], reach, Rule(), cached=True)  # a cache is read blockwise
