"""The cost of a mixture of experts, compared with a dense layer that multiplies as many rows.

    python benchmarks/experts.py                      # a small layer, for a CPU; half a minute
    python benchmarks/experts.py --hidden 2048 --inner 768 --experts 128 --per-token 8 --tokens 8192   # Qwen3-30B-A3B

It measures one projection of all experts, in milliseconds, the best of five: the product and its gradient with respect
to the rows, on plain and on NF4 weights, and the same for an adapter of rank 16 (with the gradient of A). The ratio
compares with one matrix of an expert's size, multiplied with all rows: the cost of a perfect grouped product. Experts
get uneven shares of the rows.

Measured on two Zen 5 cores (jax 0.10.2), the default sizes:

    8192 rows, 32 experts of 512 x 1024, in ms (ratio)
                          dense        grouped            NF4  rank 16
    float32    product     22.3    44.0 (2.0)    49.1 (2.2)     11.0
    float32    gradient    53.0    92.0 (1.7)    96.6 (1.8)     13.5
    bfloat16   product      9.4    53.9 (5.7)    50.5 (5.4)     13.4
    bfloat16   gradient    35.2    93.4 (2.6)    75.8 (2.2)     25.1
"""

import argparse
from collections.abc import Callable
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.models.grouped import grouped_matmul
from jaxft.models.linear import matmul
from jaxft.quantization.nf4 import NF4
from jaxft.quantization.qtensor import quantize

RANK = 16


def milliseconds(function: Callable, *arguments: jax.Array) -> float:
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(5):
        start = perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(perf_counter() - start)
    return 1e3 * min(times)


def backward(function: Callable, argument: int) -> Callable:
    """The gradient with respect to one argument, of a sum that depends on every value."""

    def loss(*arguments: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(function(*arguments).astype(jnp.float32)))

    return jax.grad(loss, argnums=argument)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure grouped products against a dense one.")
    for name, default in (("tokens", 2048), ("per-token", 4), ("experts", 32), ("hidden", 1024), ("inner", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args()
    rng, rows = np.random.default_rng(0), o.tokens * o.per_token
    shares = rng.dirichlet(np.full(o.experts, 3.0))
    sizes = jnp.asarray(rng.multinomial(rows, shares), jnp.int32)
    print(f"{jax.devices()[0].device_kind}: {rows} rows, {o.experts} experts of {o.inner} x {o.hidden}, in ms (ratio)")
    print(f"{'':10} {'':8} {'dense':>7} {'grouped':>14} {'NF4':>14} {'rank 16':>8}")
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray(rng.normal(size=(rows, o.hidden)), dtype)
        experts = jnp.asarray(rng.normal(size=(o.experts, o.inner, o.hidden)), dtype)
        codes = jax.jit(quantize, static_argnums=1)(experts, NF4())
        A = jnp.asarray(rng.normal(size=(o.experts, RANK, o.hidden)), jnp.float32)
        for what, wrap in (("product", None), ("gradient", 0)):
            dense, grouped = (f if wrap is None else backward(f, wrap) for f in (matmul, grouped_matmul))
            adapter = grouped_matmul if wrap is None else backward(grouped_matmul, 1)
            base = milliseconds(dense, x, experts[0])
            found = [milliseconds(grouped, x, weight, sizes) for weight in (experts, codes)]
            cells = " ".join(f"{time:>7.1f} ({time / base:.1f})" for time in found)
            print(f"{dtype.__name__:10} {what:8} {base:>7.1f} {cells} {milliseconds(adapter, x, A, sizes):>8.1f}")


if __name__ == "__main__":
    main()
