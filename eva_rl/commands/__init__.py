"""The commands behind ``python -m eva_rl.<name>``: from a config to calls of everything else."""
