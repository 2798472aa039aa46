"""Fine-tune a model: `python scripts/train.py --config FILE [--dry-run] [key=value ...]`."""

import sys

from jaxft.cli.start import start

if __name__ == "__main__":
    sys.exit(start("train"))
