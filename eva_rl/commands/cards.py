"""Model cards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(summary: Mapping[str, Any]) -> str:
    """README of a fine-tuned policy: what it is, how it was made, what it reached, how to use it.

    Args:
        summary: The run's ``summary.json``.
    """
    rows = "\n".join(
        f"| {key} | {_number(summary.get(f'eval_before/{key}'))} | {_number(summary.get(f'eval/{key}'))} |"
        for key in ("success_rate", "mean_reward", "mean_ep_length")
    )
    return f"""---
library_name: eva-rl
tags: [reinforcement-learning, decision-transformer, eva]
---
# {summary["env"]}: {summary["method"]}

A Decision Transformer policy (base: `{summary["policy"]}`), fine-tuned with `adapter={summary["method"]}` on
{summary["data"]["episodes"]} episodes ({summary["data"]["source"]}) for {summary["updates"]} gradient steps, seed
{summary["seed"]}. Trained {summary["trainable_parameters"]:,} of {summary["total_parameters"]:,} parameters.

| | before | after |
|---|---|---|
{rows}

Protocol: {summary["protocol"]}. Target return {summary["target_return"]:.1f}.

```
python -m eva_rl.evaluate policy=THIS_FOLDER env={summary["env"]}
```
"""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
