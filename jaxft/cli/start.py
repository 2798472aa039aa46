"""How a script begins, before it imports anything heavy: signals and output are seen to, then the command is run."""

import importlib
import os
import sys

from jaxft.cli.output import endure
from jaxft.training.stopping import leave_at_once


def start(command: str) -> int:
    """Run `jaxft.cli.COMMAND` with the words of the command line; its exit code."""
    leave_at_once()
    endure()
    try:
        main = importlib.import_module(f"jaxft.cli.{command}").main
    except ValueError as error:  # JAX reads its settings when it is imported
        settings = " ".join(f"{key}={value}" for key, value in os.environ.items() if key.startswith("JAX_"))
        if not settings:
            raise
        print(f"error: {error}; the environment has {settings}", file=sys.stderr)
        return 2
    return main()
