"""Run ``python -m eva_rl.finetune``."""

import sys

from eva_rl.commands.finetune import main

if __name__ == "__main__":
    sys.exit(main())
