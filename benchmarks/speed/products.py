"""Float32 products of a policy's layers on MKL, which PyTorch uses, and on oneDNN, which ours may use.

    python -m benchmarks.speed.products --threads 1

Prints billions of operations a second of the forward product, of the input's gradient and of the weight's, the best
of interleaved rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.benchmark import Timer

from eva_rl.agents import linear as products

SHAPES = ((3840, 128, 512), (3840, 256, 256), (3840, 256, 1024), (3840, 1024, 256), (150, 256, 1024), (3, 256, 1024))
"""Rows (windows x tokens, or environments x tokens), inputs and outputs."""


def seconds(call: Callable[[], Tensor], threads: int) -> float:
    """Mean seconds of a call."""
    return Timer("call()", globals={"call": call}, num_threads=threads).timeit(20).mean


def main() -> None:
    """Time every product both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    table = Table("rows x in x out", "product", "MKL", "ours", "ratio", title="10^9 operations/s")
    for rows, inputs, outputs in SHAPES:
        x, weight, grad = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
        pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "forward": (lambda x=x, w=weight: F.linear(x, w), lambda x=x, w=weight: products.linear(x, w)),
            "input's gradient": (lambda g=grad, w=weight: g @ w, lambda g=grad, w=weight: products.product(g, w)),
            "weight's gradient": (lambda g=grad, x=x: g.mT @ x, lambda g=grad, x=x: products.product(g.mT, x)),
        }
        for name, calls in pairs.items():
            taken = [[seconds(call, options.threads) for call in calls] for _ in range(options.rounds + 1)][1:]
            mkl, ours = (2e-9 * rows * inputs * outputs / min(column) for column in zip(*taken, strict=True))
            table.add_row(f"{rows} x {inputs} x {outputs}", name, f"{mkl:.0f}", f"{ours:.0f}", f"{ours / mkl:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
