"""Run ``python -m eva_rl.benchmark``."""

from eva_rl.benchmark.command import main

if __name__ == "__main__":
    raise SystemExit(main())
