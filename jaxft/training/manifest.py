"""Writes and checks the manifest of a checkpoint, which makes damage visible.

A manifest is the dtype, shape and digest (`jaxft.training.digest`) of each array of a train state under its dotted
name, the step and the progress of the run, and a SHA-256 of all this. The same description, of a state's result alone,
tells whether two runs ended in the same bits.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from jaxft.training.digest import Digest, digests
from jaxft.training.state import TrainState

_RESULT = ("trained.", "optimizer.")  # the arrays of a state that are its result; the others count


def state_digest(state: TrainState) -> str:
    """SHA-256 of names, dtypes, shapes and digests of the trained parameters and of the optimizer state.

    Equal states have equal digests, however they are sharded and ordered. Processes call it together.
    """
    result = {name: array for name, array in named(state).items() if name.startswith(_RESULT)}
    return digest_of_result(describe(result, digests(result)))


def digest_of_result(described: dict[str, dict[str, Any]]) -> str:
    """`state_digest` of the state that was described."""
    return _sha256_of_json({name: array for name, array in described.items() if name.startswith(_RESULT)})


def named(state: TrainState) -> dict[str, jax.Array]:
    """Dotted name -> leaf, in the order of the leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(found) == len(leaves), "two leaves of one name"
    return found


def describe(arrays: dict[str, jax.Array], found: dict[str, Digest]) -> dict[str, dict[str, Any]]:
    """The entries of a manifest for these arrays, by name."""
    return {
        name: {"dtype": str(array.dtype), "shape": list(array.shape), "digest": found[name].sums}
        for name, array in arrays.items()
    }


def differences(recorded: dict[str, dict[str, Any]], wanted: dict[str, jax.Array]) -> list[str]:
    """A line per array that the checkpoint and the template do not share."""
    ours = {name: f"{array.dtype} {list(array.shape)}" for name, array in wanted.items()}
    theirs = {name: f"{array['dtype']} {array['shape']}" for name, array in recorded.items()}
    return [
        f"{name}: {theirs.get(name, 'missing')} in the checkpoint, {ours.get(name, 'missing')} in the run"
        for name in {**ours, **theirs}
        if theirs.get(name) != ours.get(name)
    ]


def sealed(body: dict[str, Any]) -> dict[str, Any]:
    """The body as JSON returns it, with its SHA-256."""
    body = json.loads(json.dumps(body))
    return {**body, "sha256": _sha256_of_json(body)}


def is_sealed(value: dict[str, Any]) -> bool:
    """Whether `value` is unchanged since `sealed` made it."""
    return value.get("sha256") == _sha256_of_json({key: part for key, part in value.items() if key != "sha256"})


def read_manifest(path: Path, step: int) -> tuple[dict[str, Any], str | None]:
    """The manifest of `step` without its SHA-256, or what is wrong with it."""
    try:
        body = json.loads(path.read_bytes())
        intact = is_sealed(body)
        body.pop("sha256", None)
    except (OSError, ValueError, AttributeError, TypeError) as error:  # not JSON, or JSON of another form
        return {}, f"its manifest cannot be read: {error}"
    if not intact:
        return {}, "its manifest does not match its SHA-256"
    if body["step"] != step:
        return {}, f"it holds step {body['step']}"
    return body, None


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
