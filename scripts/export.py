"""Take a run's result away: `python scripts/export.py --run DIR --format peft|merged --output DIR`."""

import sys

from jaxft.cli.start import start

if __name__ == "__main__":
    sys.exit(start("export"))
