"""``python -m eva_rl.benchmark``: tasks by methods by seeds, compared in a report."""
