"""The paper's ablations of the initialisation (arXiv 2410.07170, appendix)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eva_rl.eva.options import Variant

Array = NDArray[np.float64]


def apply(
    components: Array, eigenvalues: Array, rows: float, variant: Variant | None, rng: np.random.Generator
) -> Array:
    """Change the components (R, D) of one layer.

    Args:
        components: Orthonormal rows.
        eigenvalues: (R,) sigma^2 of each.
        rows: M, number of rows of data.
        variant: None and "minor" change nothing here; "permute" shuffles the rows of A; "rotate" multiplies A by a
            random orthogonal matrix from the left; "whiten" divides each row by its standard deviation
            sigma / sqrt(M - 1), so that every entry of A x has unit variance. (PEFT divides by sqrt(sigma), which
            depends on the number of rows.)
        rng: Source of the random matrices.
    """
    if variant == "permute":
        return components[rng.permutation(len(components))]
    if variant == "rotate":
        return _orthogonal(len(components), rng) @ components
    if variant == "whiten":
        deviations = np.sqrt(eigenvalues / max(rows - 1, 1))
        return components / np.maximum(deviations, 1e-12)[:, None]
    return components


def _orthogonal(size: int, rng: np.random.Generator) -> Array:
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return np.asarray(q * np.sign(np.diag(r)))  # uniform over the orthogonal group (Mezzadri 2007)
