"""Makes empty parameters and fills them in place, tensor by tensor, so that there is never a second copy.

A compiled function encodes a tensor into the parameter that it receives, and returns the parameter. XLA's CPU backend
is too slow for this with 4-bit codes: it stores codes one by one, at 5 ns each, and stores the whole parameter again
for every tensor, which takes minutes for 8B weights. It stores two codes in a byte at the speed of memory. So on CPU a
parameter is filled as bytes, and `finish` tells JAX that the bytes are codes.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.models.linear import Weight
from jaxft.models.parameter import Parameter
from jaxft.quantization.qtensor import Format, QTensor, quantize
from jaxft.sharding.jax_internals import declared
from jaxft.sharding.layout import in_memory, layout_of


@dataclass(frozen=True)
class Storage:
    """How a parameter is stored.

    Attributes:
        stack: sizes of the leading axes, which its tensors do not have.
        dtype: dtype of the values if the parameter is not quantized.
        form: format of the quantized weight; None: not quantized.
        sharding: how each tensor is sharded; None: not at all.
        stack_spec: how the leading axes are sharded: layers never, experts over the mesh axis `expert`.
        packed: the dtype of the codes if they are stored two to a byte until `finish`; otherwise None.
    """

    stack: tuple[int, ...]
    dtype: jnp.dtype
    form: Format | None
    sharding: NamedSharding | None
    stack_spec: P
    packed: jnp.dtype | None

    @classmethod
    def of(cls, parameter: Parameter, dtype: jnp.dtype, form: Format | None, mesh: Mesh | None) -> "Storage":
        shape, sharding, stack_spec = parameter.tensor_shape, None, P()
        device = next(iter(jnp.zeros(()).devices())) if mesh is None else mesh.devices.flat[0]
        if mesh is not None:
            stored = layout_of(parameter.name, parameter.shape, mesh, form.block_in if form else 1).stored
            outside = len(parameter.shape) - len(shape)
            sharding = NamedSharding(mesh, P(*stored[outside:]))
            stack_spec = P(*(None,) * (len(parameter.stack) - outside), *stored[:outside])
        packed = None
        if form is not None and device.platform == "cpu":
            codes = jax.eval_shape(partial(quantize, format=form), jax.ShapeDtypeStruct(shape, jnp.float32)).codes
            width = shape[-1] if sharding is None else sharding.shard_shape(shape)[-1]
            if jnp.iinfo(codes.dtype).bits == 4 and width % 2 == 0:
                packed = codes.dtype
        return cls(parameter.stack, dtype, form, sharding, stack_spec, packed)

    def encode(self, x: Weight) -> Weight:
        """Encode one tensor for storage. Codes stay unchanged; 4-bit codes come packed two to a byte."""
        if self.form is None:
            return self.constrain(x.astype(self.dtype))
        if isinstance(x, QTensor):
            if x.codes.dtype == jnp.uint8 and self.packed is None:
                codes = jax.lax.bitcast_convert_type(x.codes, jnp.uint4)
                x = replace(x, codes=codes.reshape(*x.codes.shape[:-1], -1))
            return self.constrain(x)
        value = self.constrain(quantize(x, self.form))
        if self.packed is not None:
            pairs = value.codes.reshape(*value.codes.shape[:-1], -1, 2)
            value = self.constrain(replace(value, codes=jax.lax.bitcast_convert_type(pairs, jnp.uint8)))
        return value

    def constrain(self, value: Weight, stacked: bool = False) -> Weight:
        if self.sharding is None:
            return value
        mesh, spec = self.sharding.mesh, self.sharding.spec
        if stacked:
            spec = P(*self.stack_spec, *spec)
        specs = value.specs(spec, mesh) if isinstance(value, QTensor) else spec
        return jax.lax.with_sharding_constraint(value, jax.tree.map(partial(NamedSharding, mesh), specs))


def add_tensor(weight: Weight | None, x: Weight, position: tuple[int, ...], storage: Storage) -> Weight:
    """The parameter with `x` at `position` of its stack. Uses up `weight`; None means an empty parameter."""
    if weight is None:
        weight = _empty(x, storage)
    return jax.block_until_ready(_add(weight, x, tuple(map(jnp.int32, position)), storage))


@partial(jax.jit, static_argnames="storage")
def _empty(x: Weight, storage: Storage) -> Weight:
    value = jax.eval_shape(storage.encode, x)
    stack = jax.tree.map(lambda leaf: jnp.zeros((*storage.stack, *leaf.shape), leaf.dtype), value)
    return storage.constrain(stack, stacked=True)


@partial(jax.jit, static_argnames="storage", donate_argnames="weight")
def _add(weight: Weight, x: Weight, position: tuple[jax.Array, ...], storage: Storage) -> Weight:
    def place(whole: jax.Array, part: jax.Array) -> jax.Array:
        start = (*position, *(jnp.int32(0),) * part.ndim)
        return jax.lax.dynamic_update_slice(whole, part.reshape((1,) * len(position) + part.shape), start)

    return storage.constrain(jax.tree.map(place, weight, storage.encode(x)), stacked=True)


def finish(weight: Weight, storage: Storage) -> Weight:
    """The finished parameter, after all its tensors were added. Uses up `weight`."""
    if storage.packed is not None:
        weight = replace(weight, codes=_typed(_declared(weight.codes, storage.packed), storage.packed))
    if isinstance(weight, QTensor) and jnp.iinfo(weight.codes.dtype).bits == 4:
        there = in_memory(weight.codes.sharding, weight.ndim)
        if there != weight.codes.sharding:
            weight = replace(weight, codes=jax.jit(_as_it_is, out_shardings=there, donate_argnums=0)(weight.codes))
    return weight


def _as_it_is(x: jax.Array) -> jax.Array:
    return x


def _declared(pairs: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The same buffers as an array of 4-bit codes. XLA also stores the first code in the lower half.

    A conversion by JAX would take 2 ns a code and twice the memory. Only JAX knows the new type here; the buffers get
    it when the array passes through a compiled function.
    """
    *axes, width = pairs.shape
    return declared(pairs, (*axes, 2 * width), dtype)


@partial(jax.jit, static_argnames="dtype", donate_argnames="x")
def _typed(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return `x` unchanged. `dtype` is an argument because JAX finds compiled functions by the type of buffers."""
    assert x.dtype == dtype
    return x
