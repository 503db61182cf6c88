"""Leading eigenpairs of stacked moments, batched, against a loop of torch.linalg.svd over the rows themselves.

python -m benchmarks.eva.decompositions --device cuda
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eva_rl.eva.gram import Gram
from eva_rl.eva.subspace import leading


def seconds(job: Callable[[], object], device: str) -> float:
    """Wall seconds of one run; on CUDA after one to warm up."""
    if device == "cuda":
        job()
        torch.cuda.synchronize()
    began = time.perf_counter()
    job()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def stacked(rows: Tensor) -> Gram:
    """Second moments (L, D, D) in float64 of rows (L, N, D)."""
    moments = rows.double().mT @ rows.double()
    count = torch.full((rows.shape[0],), rows.shape[1], device=rows.device)
    return Gram(
        moments, True, moments.diagonal(dim1=-2, dim2=-1).sum(-1), count, torch.zeros_like(count, dtype=torch.float64)
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--components", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table(
        "width", f"batched top-{options.components} of {options.layers}, s", f"loop of {options.layers} svd, s"
    )
    for width in options.widths:
        spread = torch.logspace(0, -2, width, device=options.device)
        rows = torch.randn(options.layers, 4 * width, width, device=options.device) * spread
        moments = stacked(rows)
        ours = seconds(lambda moments=moments: leading(moments, options.components), options.device)
        loop = seconds(lambda rows=rows: [torch.linalg.svd(x, full_matrices=False) for x in rows], options.device)
        table.add_row(str(width), f"{ours:.3f}", f"{loop:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
