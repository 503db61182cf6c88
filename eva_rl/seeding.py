"""Seeds that keep demonstrations, validation and evaluation apart."""

from __future__ import annotations

import random

BLOCK = 10_000
"""Episodes that one seed may number."""
DEMONSTRATIONS, VALIDATION, EVALUATION, ROLLOUTS, ONLINE = 0, 500_000_000, 1_000_000_000, 1_500_000_000, 2_000_000_000
MAX_SEED = 40_000
"""Largest seed whose blocks stay apart and within 32 bits."""


def episode_seeds(purpose: int, seed: int) -> int:
    """Seed of the first episode of a purpose: no two purposes, and no two seeds, share an episode."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed={seed}: expected 0 to {MAX_SEED}.")
    return purpose + seed * BLOCK


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators, for the libraries that draw from them."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
