"""The kernels as compilers for other chips see them; nothing runs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.models.blockwise import Reach, Rule
from jaxft.models.kernels import Backend, attend
from jaxft.models.remat import rematerialised
from jaxft.planning.machines import Topology
from jaxft.sharding.mesh import BATCH_AXES, make_mesh

pytestmark = pytest.mark.ahead


def compiled(
    machine: Topology, length: int, heads: int, kv_heads: int, head_dim: int, segmented: bool, rule: Rule, remat
):
    """Text of attention and its gradients on a mesh of four by context=2, as `auto` has it."""
    mesh = make_mesh(dict(fsdp=4, context=2), machine.devices)

    def placed(heads):
        cut = NamedSharding(mesh, P(BATCH_AXES, "context", "tensor"))
        return jax.ShapeDtypeStruct((4, length, heads, head_dim), jnp.bfloat16, sharding=cut)

    def loss(q, k, v, segments):
        def layer(q, _):
            out = attend(Backend("auto", mesh), q, k, v, Reach(jnp.int32(0), segments, segments), rule)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return rematerialised(layer, remat, False, False)(q, None)

    cut = NamedSharding(mesh, P(BATCH_AXES, "context"))
    segments = jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=cut) if segmented else None
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    return step.lower(placed(heads), placed(kv_heads), placed(kv_heads), segments).compile().as_text()


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [((1000, 4, 2, 64), Rule(200)), ((2048, 16, 8, 128), Rule()), ((512, 4, 4, 80), Rule(softcap=30.0))],
)
def test_splash(sizes, rule, machine):
    text = compiled(machine("v5e:2x4"), *sizes, True, rule, "none")
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, and two of the backward pass
    assert " all-to-all(" in text


@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("full", 2), (("attention",), 1)])
def test_cudnn(remat, forward, machine):
    text = compiled(machine("h100:8"), 1000, 16, 8, 128, False, Rule(300), remat)
    assert text.count('custom_call_target="__cudnn$fmhaSoftmax"') == forward
    assert text.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') == 1
    assert '"sliding_window_length":300' in text.replace(" ", "")


def test_packed_rows_on_a_gpu(machine):
    assert "fmha" not in compiled(machine("h100:8"), 512, 8, 8, 64, True, Rule(), "none")
