"""Loss of a model on a file: `python scripts/evaluate.py --model DIR [--adapter DIR] --data FILE`."""

import sys

from jaxft.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
