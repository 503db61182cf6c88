"""Run ``python -m eva_rl.datasets``."""

import sys

from eva_rl.commands.datasets import main

if __name__ == "__main__":
    sys.exit(main())
