"""What a manifest says: the same of equal states, another thing of every other, and nothing once it was touched."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.sharding.mesh import make_mesh
from jaxft.training.digest import digests
from jaxft.training.manifest import (
    describe,
    differences,
    digest_of_result,
    named,
    read_manifest,
    sealed,
    state_digest,
)
from jaxft.training.state import TrainState
from jaxft.training.step import initial_state

Q, NORM = "model.layers.self_attn.q_proj.A", "model.norm.weight"
OPTIMIZER = optax.adamw(optax.linear_schedule(0.0, 1e-2, 5))


def make_state(mesh=None) -> TrainState:
    random = np.random.default_rng(1)
    trained = {Q: jnp.asarray(random.normal(size=(256, 8)), jnp.float32), NORM: jnp.ones(8, jnp.bfloat16)}
    if mesh is not None:
        cut = NamedSharding(mesh, P("fsdp"))
        trained = {name: jax.device_put(array, cut) for name, array in trained.items()}
    return initial_state(trained, OPTIMIZER)


def test_digest_depends_on_values_names_dtypes_and_shapes_only():
    state = make_state()
    digest = state_digest(state)
    assert digest == state_digest(make_state(make_mesh({"fsdp": 8})))
    assert digest == state_digest(state._replace(step=jnp.int32(77)))
    assert digest == state_digest(state._replace(trained=dict(reversed(state.trained.items()))))
    flipped = state.trained[Q].at[3, 3].multiply(jnp.float32(1 + 2**-23))
    others = [
        {**state.trained, Q: flipped},
        {**state.trained, Q: state.trained[Q].reshape(8, 256)},
        {**state.trained, NORM: state.trained[NORM].view(jnp.float16)},
        {"renamed" if name == Q else name: array for name, array in state.trained.items()},
    ]
    digests = {state_digest(state._replace(trained=trained)) for trained in others}
    count = jax.tree.map(lambda leaf: leaf + 1 if leaf.dtype == jnp.int32 else leaf, state.optimizer)
    digests |= {digest, state_digest(state._replace(optimizer=count))}
    assert len(digests) == 6


def test_what_was_described_has_the_digest_of_the_state():
    arrays = named(make_state())
    described = describe(arrays, digests(arrays))
    assert {"step", f"trained.{Q}", f"trained.{NORM}"} < described.keys()
    assert described[f"trained.{NORM}"]["dtype"] == "bfloat16"
    assert digest_of_result(described) == state_digest(make_state())


def test_differences_name_what_is_on_one_side_only_and_what_has_another_type():
    arrays = named(make_state())
    recorded = describe(arrays, digests(arrays))
    assert differences(recorded, arrays) == []
    wanted = {name: array for name, array in arrays.items() if name != f"trained.{NORM}"}
    wanted |= {f"trained.{Q}": arrays[f"trained.{Q}"].T, "trained.new": jnp.zeros(3)}
    assert sorted(differences(recorded, wanted)) == [
        f"trained.{Q}: float32 [256, 8] in the checkpoint, float32 [8, 256] in the run",
        f"trained.{NORM}: bfloat16 [8] in the checkpoint, missing in the run",
        "trained.new: missing in the checkpoint, float32 [3] in the run",
    ]


BODY = {"step": 3, "best": False, "progress": {"data": [1, 2], "loss": float("nan")}, "arrays": {}}


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda text: text, None),
        (lambda text: text.replace("[1, 2]", "[1, 3]"), "its manifest does not match its SHA-256"),
        (lambda text: text.replace('"best"', '"worst"'), "its manifest does not match its SHA-256"),
        (lambda text: text.replace("sha256", "sha257"), "its manifest does not match its SHA-256"),
        (lambda text: json.dumps(sealed({**BODY, "step": 4})), "it holds step 4"),
        (lambda text: text[:-5], "its manifest cannot be read: "),
        (lambda text: "[]", "its manifest cannot be read: "),
        (lambda text: None, "its manifest cannot be read: [Errno 2]"),
    ],
)
def test_a_manifest_that_was_touched_is_not_read(tmp_path, change, reason):
    path = tmp_path / "metadata"
    if (text := change(json.dumps(sealed(BODY)))) is not None:
        path.write_text(text)
    body, fault = read_manifest(path, 3)
    if reason is None:
        assert fault is None
        assert json.dumps(body) == json.dumps(BODY)
    else:
        assert body == {}
        assert fault.startswith(reason)
