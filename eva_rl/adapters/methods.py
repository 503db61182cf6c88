"""The ways to fine-tune a policy, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        name: What a user types.
        summary: One line on what it does.
        paper: Where it was proposed.
        adapter: Whether it trains a PEFT adapter, rather than weights of the policy itself.
        eva: Whether its directions come from EVA.
        dora: Whether PEFT splits magnitude from direction.
        rslora: Whether the scale is alpha over the square root of the rank.
        adalora: Whether ranks are pruned while training.
    """

    name: str
    summary: str
    paper: str
    adapter: bool = True
    eva: bool = False
    dora: bool = False
    rslora: bool = False
    adalora: bool = False


LORA, DORA = "Hu et al. 2021, arXiv 2106.09685", "Liu et al. 2024, arXiv 2402.09353"
EVA, RSLORA = "Paischer et al. 2024, arXiv 2410.07170", "Kalajdzievski 2023, arXiv 2312.03732"
ADALORA = "Zhang et al. 2023, arXiv 2303.10512"

METHODS = {
    method.name: method
    for method in (
        Method("eva", "LoRA along the principal directions of the policy's own activations", EVA, eva=True),
        Method("lora", "low-rank updates from a random start", LORA),
        Method("dora", "LoRA with a trained magnitude per output", DORA, dora=True),
        Method("rslora", "LoRA scaled by the square root of the rank", RSLORA, rslora=True),
        Method("eva_dora", "DoRA along EVA's directions", f"{EVA}; {DORA}", eva=True, dora=True),
        Method("eva_rslora", "rsLoRA along EVA's directions", f"{EVA}; {RSLORA}", eva=True, rslora=True),
        Method("adalora", "singular triplets, the least important pruned while training", ADALORA, adalora=True),
        Method("eva_adalora", "AdaLoRA along EVA's directions", f"{EVA}; {ADALORA}", eva=True, adalora=True),
        Method("full", "every weight of the policy", "", adapter=False),
        Method("head", "the action head alone", "", adapter=False),
    )
}
