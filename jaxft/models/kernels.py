"""Which kernel computes attention, and why.

Three kernels give the same: `blockwise` in plain JAX, which runs anywhere and can do everything, `splash` for TPUs and
`cudnn` for NVIDIA GPUs. `auto` takes the chip's own kernel if it can do what the layer needs, else blockwise;
`objection` lists what each kernel cannot do. A kernel that the user names but that cannot do it is an error.

Attention over a cache is always blockwise: a new token's scores fit anywhere, and the other kernels do not know the
offset of its slot.

Axes: B batch, T queries, S keys, N query heads, K key-value heads, H head_dim.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft.models import blockwise, cudnn, splash
from jaxft.models.blockwise import Reach, Rule
from jaxft.models.config import DecoderConfig
from jaxft.models.ulysses import HEADS, spread
from jaxft.sharding.layout import ways

Kernel = Literal["blockwise", "splash", "cudnn"]
Implementation = Literal["auto", "blockwise", "splash", "cudnn"]

NATIVE: dict[str, Kernel] = {"tpu": "splash", "gpu": "cudnn"}
"""The kernel made for a platform."""

ACCELERATOR_BLOCK = 512
"""Most queries, and most keys, in a block of `blockwise` off the CPU: large enough for matrix units."""


@dataclass(frozen=True)
class Backend:
    """The kernel, by name or `auto`, and the devices: those of the mesh, or the default devices."""

    implementation: Implementation = "auto"
    mesh: Mesh | None = None

    @property
    def device(self) -> jax.Device:
        """One device; all are alike. The mesh may have devices that the host does not have, to compile for."""
        return jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]

    @property
    def ways(self) -> int:
        """Into how many parts the heads are cut."""
        return 1 if self.mesh is None else ways(self.mesh, HEADS)


class Case(NamedTuple):
    """The facts that decide which kernels can compute the attention of a layer.

    Attributes:
        platform: cpu, tpu or gpu.
        capability: compute capability of an NVIDIA GPU, (0, 0) elsewhere.
        widest: the largest head_dim that cuDNN takes.
        ways: into how many parts the mesh cuts the heads.
        packed: rows may hold several segments.
    """

    platform: str
    capability: tuple[int, int]
    widest: int
    dtype: jnp.dtype
    heads: int
    head_dim: int
    ways: int
    packed: bool
    softcap: bool
    sinks: bool


class Choice(NamedTuple):
    """A kernel, and why it was chosen."""

    kernel: Kernel
    why: str

    def __str__(self) -> str:
        return f"{self.kernel}, {self.why}"


def objection(kernel: Kernel, case: Case) -> str | None:
    """Why a kernel cannot compute the case; None if it can."""
    match kernel:
        case "blockwise":
            reasons = ()
        case "splash":
            reasons = (
                (case.platform != "tpu", f"it is for TPUs, and this is a {case.platform}"),
                (case.dtype == jnp.float32, "it would round float32 to bfloat16; set `dtype: bfloat16`"),
                (case.heads % case.ways, _uneven(case)),
            )
        case "cudnn":
            reasons = (
                (case.platform != "gpu", f"it is for NVIDIA GPUs, and this is a {case.platform}"),
                (case.capability < (8, 0), "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer"),
                (case.dtype == jnp.float32, "it has no float32; set `dtype: bfloat16`"),
                (case.packed, "it cannot keep the examples of a packed row apart; set `packing: false`"),
                (case.softcap, "it cannot cap scores, which this model needs"),
                (case.sinks, "it has no sinks, which this model needs"),
                (case.head_dim % 8, f"it takes heads of a multiple of 8, not {case.head_dim}"),
                (case.head_dim > case.widest, f"it takes heads of up to {case.widest}, not {case.head_dim}"),
                (case.heads % case.ways, _uneven(case)),
            )
    return next((text for applies, text in reasons if applies), None)


def choose(implementation: Implementation, case: Case) -> Choice:
    """The kernel for a case.

    Raises:
        ValueError: the kernel asked for cannot compute it, or no kernel has that name.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"attn_implementation is {implementation!r}; choose {', '.join(get_args(Implementation))}")
    if implementation == "auto":
        native = NATIVE.get(case.platform)
        if native is None:
            return Choice("blockwise", f"as there is no kernel for a {case.platform}")
        against = objection(native, case)
        if against is not None:
            return Choice("blockwise", f"not {native}: {against}")
        return Choice(native, "made for this chip")
    against = objection(implementation, case)
    if against is not None:
        raise ValueError(f"attn_implementation is {implementation}: {against}; or choose auto or blockwise")
    return Choice(implementation, "as attn_implementation says")


def attend(
    backend: Backend,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    reach: Reach,
    rule: Rule,
    sinks: jax.Array | None = None,
    cached: bool = False,
) -> jax.Array:
    """softmax(scale q kᵀ) v for q [B, T, N, H], k and v [B, S, K, H]: [B, T, N, H], by the chosen kernel.

    Args:
        reach: without segments, each row is one segment; see `blockwise`.
        sinks: [N].
        cached: keys and values come from a cache; otherwise S is T, and the offset is 0.
    """
    mesh, platform = backend.mesh, backend.device.platform
    in_blocks = partial(blockwise.attend, block=blockwise.BLOCK if platform == "cpu" else ACCELERATOR_BLOCK)
    if cached:
        return in_blocks(q, k, v, reach, rule, sinks=sinks)
    segments = reach.query_segments
    packed, softcap, with_sinks = segments is not None, rule.softcap is not None, sinks is not None
    case = _case(backend, q.dtype, q.shape[2], q.shape[3], packed, softcap, with_sinks)
    kernel = choose(backend.implementation, case).kernel
    if kernel == "blockwise" and (mesh is None or mesh.shape["context"] == 1):
        return in_blocks(q, k, v, reach, rule, sinks=sinks)  # XLA's partitioner cuts this well, uneven heads too

    def whole_rows(q, k, v, segments, sinks):
        match kernel:
            case "blockwise":
                return in_blocks(q, k, v, Reach(jnp.int32(0), segments, segments), rule, sinks=sinks)
            case "splash":
                return splash.attend(q, k, v, segments, rule, sinks)
            case "cudnn":
                return cudnn.attend(q, k, v, rule)

    if mesh is None:
        return whole_rows(q, k, v, segments, sinks)
    return spread(whole_rows, mesh, q, k, v, segments, sinks)


def choice(config: DecoderConfig, backend: Backend, dtype: jnp.dtype, packed: bool) -> Choice:
    """The kernel of a model's layers in training, the same for all of them.

    Args:
        packed: rows may hold several examples.

    Raises:
        ValueError: see `choose`.
    """
    softcap = config.attention_softcap is not None
    case = _case(backend, dtype, config.num_heads, config.head_dim, packed, softcap, config.attention_sinks)
    return choose(backend.implementation, case)


def packs(config: DecoderConfig, backend: Backend, dtype: jnp.dtype) -> bool:
    """Whether the kernel for rows with one example also takes rows with several. Raises as `choice` does."""
    kernel = choice(config, backend, dtype, packed=False).kernel
    softcap = config.attention_softcap is not None
    case = _case(backend, dtype, config.num_heads, config.head_dim, True, softcap, config.attention_sinks)
    return objection(kernel, case) is None


def _case(
    backend: Backend, dtype: jnp.dtype, heads: int, head_dim: int, packed: bool, softcap: bool, sinks: bool
) -> Case:
    device = backend.device
    capability = _capability(device) if device.platform == "gpu" else (0, 0)
    # jax checks for Hopper on the GPU at hand, not on the GPU that it compiles for.
    widest = 256 if capability >= (9, 0) and jax.default_backend() == "gpu" else 128
    parts = backend.ways
    return Case(device.platform, capability, widest, jnp.dtype(dtype), heads, head_dim, parts, packed, softcap, sinks)


def _capability(device: jax.Device) -> tuple[int, int]:
    """The compute capability; (0, 0) if the GPU is not NVIDIA's: others give no pair of numbers, such as gfx942."""
    parts = device.compute_capability.split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(map(str.isdecimal, parts)) else (0, 0)


def _uneven(case: Case) -> str:
    return f"its {case.heads} heads cannot be cut evenly over tensor x context = {case.ways} devices"
