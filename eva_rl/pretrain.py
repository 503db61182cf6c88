"""Run ``python -m eva_rl.pretrain``."""

import sys

from eva_rl.commands.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
