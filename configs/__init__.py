"""Hydra's primary configs, one a command; every default stands in a dataclass of ``eva_rl.cli``."""
