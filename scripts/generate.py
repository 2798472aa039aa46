"""Complete prompts with a model: python scripts/generate.py --help"""

import sys

from jaxft.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
