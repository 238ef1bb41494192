"""Entry point of `python -m lenet_sweep`."""

import sys

from lenet_sweep.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
