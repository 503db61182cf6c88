"""Run ``python -m eva_rl.benchmark``."""

import sys

from eva_rl.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
