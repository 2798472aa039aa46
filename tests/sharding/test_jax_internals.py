"""That this version of JAX has inside what is used of it, and what is said where one has not."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.sharding import jax_internals
from jaxft.sharding.jax_internals import JaxInternalsError, clusters, declared, service
from jaxft.sharding.mesh import make_mesh

pytestmark = pytest.mark.core


def test_a_process_on_its_own():
    assert service() == (None, 0, 1)


def test_the_clusters_that_launching_is_documented_for():
    known = clusters()
    names = {kind.__name__ for kind in known.kinds}
    assert {"SlurmCluster", "OmpiCluster", "GceTpuCluster", "GkeTpuCluster", "K8sCluster"} <= names
    assert known.kubernetes in known.kinds
    for kind in known.kinds:
        for method in ("is_env_present", "get_coordinator_address", "get_process_count", "get_process_id"):
            assert callable(getattr(kind, method))


@pytest.mark.parametrize("cut", [None, P("fsdp"), P(None, "fsdp")])
def test_buffers_are_declared_to_be_of_another_type(cut):
    pairs = jnp.arange(64, dtype=jnp.uint8).reshape(8, 8)
    if cut is not None:
        pairs = jax.device_put(pairs, NamedSharding(make_mesh({"fsdp": 8}), cut))
    codes = declared(pairs, (8, 16), jnp.dtype(jnp.uint4))
    assert (codes.shape, codes.dtype, codes.sharding, codes.committed) == (
        (8, 16),
        jnp.uint4,
        pairs.sharding,
        cut is not None,
    )
    plain = np.asarray(jax.jit(lambda x: x.astype(jnp.int32))(jax.jit(lambda x: x)(codes)))
    expected = np.arange(64).reshape(8, 8)
    np.testing.assert_array_equal(plain[:, ::2], expected % 16)
    np.testing.assert_array_equal(plain[:, 1::2], expected // 16)


class _Array:
    addressable_shards = ()


@pytest.mark.parametrize(
    "module, use, what",
    [
        ("jax._src.distributed", service, "state of the distributed service"),
        ("jax._src.clusters", clusters, "list of clusters"),
        (None, lambda: declared(_Array(), (2,), jnp.dtype(jnp.uint4)), "array of given buffers"),
    ],
)
def test_what_a_version_lacks_is_named_with_versions_that_have_it(monkeypatch, module, use, what):
    if module is not None:
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delattr(sys.modules["jax._src"], module.rpartition(".")[2], raising=False)
    with pytest.raises(
        JaxInternalsError,
        match=rf"jax {jax.__version__} has no {what} as jaxft uses it \(.*\); known to work: jax 0\.10",
    ):
        use()


def test_nothing_else_of_jaxft_looks_inside():
    from pathlib import Path

    root = Path(jax_internals.__file__).parents[1]
    found = {
        path.name for path in root.rglob("*.py") if "jax._src" in path.read_text() or "_skip_checks" in path.read_text()
    }
    assert found == {"jax_internals.py"}
