"""Does a run fit a machine? `python scripts/plan.py --config FILE --topology v5e:2x4 [--search] [key=value ...]`."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # a compiler for another machine is no reason to look for one here

from jaxft.cli.start import start

if __name__ == "__main__":
    sys.exit(start("plan"))
