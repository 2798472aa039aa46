"""Complete prompts with a model: python scripts/generate.py --help"""

import sys

from jaxft.cli.start import start

if __name__ == "__main__":
    sys.exit(start("generate"))
