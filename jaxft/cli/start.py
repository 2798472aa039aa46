"""Starts a script: prepares signals and output before any heavy import, then runs the command."""

import importlib
import os
import sys

from jaxft.cli.output import endure
from jaxft.limits import is_without_memory, without_memory
from jaxft.training.stopping import leave_at_once


def start(command: str) -> int:
    """Run `jaxft.cli.COMMAND` with the words of the command line; its exit code."""
    leave_at_once()
    endure()
    try:
        main = importlib.import_module(f"jaxft.cli.{command}").main
    except Exception as error:
        settings = " ".join(f"{key}={value}" for key, value in os.environ.items() if key.startswith("JAX"))
        if is_without_memory(error):  # libraries are mapped when they are imported
            told = without_memory(error)
        elif isinstance(error, ValueError) and settings:  # JAX reads its settings then, and so does jaxft
            told = f"{error}; the environment has {settings}"
        else:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 2
    return main()
