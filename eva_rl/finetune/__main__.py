"""Run ``python -m eva_rl.finetune``."""

from eva_rl.finetune.command import main

if __name__ == "__main__":
    raise SystemExit(main())
