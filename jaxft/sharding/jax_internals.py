"""All uses of JAX's private parts, in one module, so that a new version of JAX breaks this module only and says so.

The tests check that each function serves its purpose. If JAX no longer has a part, the error names the version that is
known to have it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

TESTED = "0.10.2"
"""The newest version of jax in which everything here was found."""


DISCOVERY_LOG = "jax._src.xla_bridge"
"""The logger that tells of plugins which find no device."""


class JaxInternalsError(ValueError):
    """This version of JAX lacks a private part that jaxft uses."""

    def __init__(self, what: str, error: Exception):
        super().__init__(
            f"jax {jax.__version__} has no {what} as jaxft uses it ({type(error).__name__}: {error}); "
            f"known to work: jax {TESTED}"
        )


class Service(NamedTuple):
    """This process among those of a run. `client` speaks to the coordination service; None if there is no service."""

    client: Any
    process_id: int
    num_processes: int


def service() -> Service:
    """The state of `jax.distributed`."""
    try:
        from jax._src.distributed import global_state

        return Service(global_state.client, global_state.process_id, global_state.num_processes)
    except (ImportError, AttributeError) as error:
        raise JaxInternalsError("state of the distributed service", error) from error


class Clusters(NamedTuple):
    """The kinds of clusters that JAX detects by itself, in its order, and which of them is Kubernetes."""

    kinds: Sequence[type]
    kubernetes: type


def clusters() -> Clusters:
    """The clusters that JAX knows. `jax.distributed.initialize` asks them too, but then starts at once."""
    try:
        from jax._src import clusters

        kinds = [kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method]
        return Clusters(kinds, clusters.K8sCluster)
    except (ImportError, AttributeError) as error:
        raise JaxInternalsError("list of clusters", error) from error


def declared(array: jax.Array, shape: tuple[int, ...], dtype: jax.numpy.dtype) -> jax.Array:
    """The same buffers as an array of another shape and dtype. JAX does not check that they fit."""
    try:
        aval = jax.core.ShapedArray(shape, dtype)
        buffers = [shard.data for shard in array.addressable_shards]
        return type(array)(aval, array.sharding, buffers, committed=array.committed, _skip_checks=True)
    except (AttributeError, TypeError) as error:
        raise JaxInternalsError("array of given buffers", error) from error
