"""Run ``python -m eva_rl.evaluate``."""

import sys

from eva_rl.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
