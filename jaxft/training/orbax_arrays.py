"""Reads the arrays of a step with Orbax and shortens its errors.

A failure in Orbax or TensorStore raises any exception, with the whole description of a store in its message, and fills
the log with pages of tracebacks. A checkpoint needs one line of it.
"""

import errno
import functools
import logging
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

_FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
"""The system's messages for a full disk. TensorStore puts them in the middle of its own message."""


def read(directory: Path, wanted: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], str | None]:
    """The arrays that are named, as those of `wanted` lie, or why this process cannot read them.

    Args:
        directory: the item of a step that holds arrays; what it holds besides `wanted` is not read.
        wanted: gives names, shapes, dtypes and shardings.
    """
    some = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
    restore = {name: _restore_args(leaf) for name, leaf in wanted.items()}
    arguments = ocp.args.PyTreeRestore(item=some, restore_args=restore, partial_restore=True)
    try:
        found = ocp.PyTreeCheckpointHandler().restore(directory, args=arguments)
        return {name: found[name] if leaf.committed else jnp.array(found[name]) for name, leaf in wanted.items()}, None
    except Exception as error:  # Orbax and TensorStore raise anything at a damaged directory
        return {}, reason(error)


def _restore_args(like: jax.Array) -> ocp.RestoreArgs:
    """On the devices of `like`; on the host where it was not bound to any."""
    if not like.committed:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=like.sharding, global_shape=like.shape, dtype=like.dtype)


def reason(error: Exception) -> str:
    """The message of a library's error, without TensorStore's description of itself."""
    if full := next((word for word in _FULL if word in str(error)), None):
        return f"{full}; make room there"
    return (str(error).partition(" [tensorstore_spec")[0].splitlines() or [type(error).__name__])[0]


@functools.cache
def hush() -> None:
    """Drop what the libraries log of a failure that is raised: Orbax's tracebacks, and what TensorStore's threads
    say, a hundred times, of the event loop that Orbax closed after it.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in Path(record.pathname).parts)
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
            before(found)

    sys.unraisablehook = hook
