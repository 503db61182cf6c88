"""Run ``python -m eva_rl.report``."""

import sys

from eva_rl.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
