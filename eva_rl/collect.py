"""Run ``python -m eva_rl.collect``."""

import sys

from eva_rl.commands.collect import main

if __name__ == "__main__":
    sys.exit(main())
