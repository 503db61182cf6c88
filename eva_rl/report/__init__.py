"""``python -m eva_rl.report``: compare runs, with sound statistics."""
