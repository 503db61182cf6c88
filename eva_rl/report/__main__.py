"""Run ``python -m eva_rl.report``."""

from eva_rl.report.command import main

if __name__ == "__main__":
    raise SystemExit(main())
