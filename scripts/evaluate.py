"""Loss of a model on a file: `python scripts/evaluate.py --model DIR [--adapter DIR] --data FILE`."""

import sys

from jaxft.cli.start import start

if __name__ == "__main__":
    sys.exit(start("evaluate"))
