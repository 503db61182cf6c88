"""Seeds that keep demonstrations, validation and evaluation apart."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, device

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


def random_state(where: device) -> dict[str, Tensor]:
    """PyTorch's global generators, as a checkpoint keeps them: the CPU's and, on a GPU, that of the device."""
    import torch

    state = {"random/torch": torch.get_rng_state()}
    if where.type == "cuda":  # dropout draws there
        state["random/cuda"] = torch.cuda.get_rng_state(where)
    return state


def restore_random_state(tensors: Mapping[str, Tensor], where: device) -> None:
    """Put back what :func:`random_state` gave; a checkpoint of another kind of device holds nothing for a GPU."""
    import torch

    torch.set_rng_state(tensors["random/torch"])
    if where.type == "cuda" and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"], where)
