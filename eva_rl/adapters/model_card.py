"""Model cards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eva_rl.errors import counted

FACTS = (
    "env",
    "method",
    "algo",
    "seed",
    "policy",
    "data",
    "updates",
    "env_steps",
    "trainable_parameters",
    "total_parameters",
    "protocol",
    "target_return",
)
RESULTS = ("success_rate", "mean_reward", "mean_ep_length", "normalized_score")
FORMS = {
    "adapter": "`model.safetensors` holds the base policy as it was, `adapter/` what was learned; plain "
    "`peft.PeftModel.from_pretrained` reads it.",
    "merged": "The adapter is merged into `model.safetensors`.",
    "huggingface": "The adapter is merged; `transformers.DecisionTransformerModel.from_pretrained` reads the folder. "
    "Inputs are scaled as `eva_rl.json` says.",
    "onnx": "`policy.onnx` holds the network, its adapter merged, with normaliser and bounds; onnxruntime runs it.",
    "full": "`model.safetensors` holds the trained policy.",
}


def card_facts(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a policy folder remembers of the run that made it, enough for :func:`model_card`.

    Args:
        summary: The run's ``summary.json``.
    """
    results = [f"{when}/{key}" for when in ("eval_before", "eval") for key in RESULTS]
    return {key: summary[key] for key in (*FACTS, *results) if key in summary}


def model_card(facts: Mapping[str, Any], form: str = "adapter") -> str:
    """README of a fine-tuned policy: base, task, data, method, results, protocol, how to use it.

    Args:
        facts: What :func:`card_facts` kept, or the whole summary.
        form: One of FORMS: what the folder holds.
    """
    return f"""---
library_name: {"transformers" if form == "huggingface" else "eva-rl"}
pipeline_tag: reinforcement-learning
tags: [reinforcement-learning, decision-transformer, {facts["method"].replace("_", "-")}]
---
# {facts["env"]}: {facts["method"]}

A Decision Transformer policy. {FORMS[form]}

| | |
|---|---|
| base | `{facts["policy"]}` |
| env | `{facts["env"]}` |
| data | {_data(facts.get("data"))} |
| method | `adapter={facts["method"]} algo={facts.get("algo", "bc")}`, {_steps(facts)}, seed {facts["seed"]} |
| trained | {facts["trainable_parameters"]:,} of {facts["total_parameters"]:,} parameters |
| protocol | {facts["protocol"]}; target return {facts["target_return"]:.1f} |

| result | before | after |
|---|---|---|
{_results(facts)}

```python
import eva_rl

policy = eva_rl.load_policy("THIS_FOLDER")
result = eva_rl.evaluate_policy(policy, "{facts["env"]}", episodes=50)
print(result.metrics(), result.protocol)
```

```
python -m eva_rl.evaluate policy=THIS_FOLDER env={facts["env"]}
```
"""


def pretrained_card(name: str, about: Mapping[str, Any], form: str) -> str:
    """README of a policy that no run of fine-tuning made.

    Args:
        name: What it was loaded by.
        about: Its metadata.
        form: One of FORMS.
    """
    rows = "\n".join(f"| {key} | {str(value)[:300]} |" for key, value in about.items() if not isinstance(value, dict))
    return f"""---
library_name: {"transformers" if form == "huggingface" else "eva-rl"}
pipeline_tag: reinforcement-learning
tags: [reinforcement-learning, decision-transformer]
---
# {name}

A pretrained Decision Transformer policy.

| | |
|---|---|
{rows}

```python
import eva_rl

policy = eva_rl.load_policy("THIS_FOLDER")
```
"""


def _data(data: Mapping[str, Any] | None) -> str:
    if data is None:
        return "none; it learned from its own episodes"
    amount = f"{counted(data['episodes'], 'episode')}, {data['steps']:,} env steps"
    return f"{amount} ({data['source']}), mean return {data['mean_return']:.1f}"


def _steps(facts: Mapping[str, Any]) -> str:
    acted = f", {facts['env_steps']:,} env steps" if "env_steps" in facts else ""
    return f"{facts.get('updates', 0):,} gradient steps{acted}"


def _results(facts: Mapping[str, Any]) -> str:
    return "\n".join(
        f"| {key} | {_number(facts.get(f'eval_before/{key}'))} | {_number(facts[f'eval/{key}'])} |"
        for key in RESULTS
        if f"eval/{key}" in facts
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
