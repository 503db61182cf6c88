"""Run ``python -m eva_rl.export``."""

import sys

from eva_rl.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
