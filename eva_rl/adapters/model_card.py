"""Model cards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from eva_rl.adapters.markdown import front_matter, markdown_block, markdown_cell, markdown_code
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
NEEDED = frozenset(FACTS) - {"algo", "data", "updates", "env_steps"}
"""What a card of a fine-tuned policy cannot do without."""
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
    command = f"python -m eva_rl.evaluate policy=THIS_FOLDER env={facts['env']}"
    method = f"adapter={facts['method']} algo={facts.get('algo', 'bc')}"
    return f"""{_front_matter(form, re.sub(r"[^A-Za-z0-9.]+", "-", str(facts["method"]))[:50])}
# {markdown_cell(facts["env"])}: {markdown_cell(facts["method"])}

A Decision Transformer policy. {FORMS[form]}

| | |
|---|---|
| base | {markdown_code(facts["policy"])} |
| env | {markdown_code(facts["env"])} |
| data | {_data(facts.get("data"))} |
| method | {markdown_code(method)}, {_steps(facts)}, seed {markdown_cell(facts["seed"])} |
| trained | {_count(facts["trainable_parameters"])} of {_count(facts["total_parameters"])} parameters |
| protocol | {markdown_cell(facts["protocol"])}; target return {_number(facts["target_return"], ".1f")} |

| result | before | after |
|---|---|---|
{_results(facts)}

```python
import eva_rl

policy = eva_rl.load_policy("THIS_FOLDER")
result = eva_rl.evaluate_policy(policy, {json.dumps(str(facts["env"]))}, episodes=50)
print(result.metrics(), result.protocol)
```

{markdown_block(" ".join(command.split()))}
"""


def pretrained_card(name: str, about: Mapping[str, Any], form: str) -> str:
    """README of a policy that no run of fine-tuning made.

    Args:
        name: What it was loaded by.
        about: Its metadata.
        form: One of FORMS.
    """
    shown = {key: value for key, value in about.items() if not isinstance(value, dict)}
    rows = "\n".join(f"| {markdown_cell(key)} | {markdown_cell(value)} |" for key, value in shown.items())
    return f"""{_front_matter(form)}
# {markdown_cell(name)}

A pretrained Decision Transformer policy.

| | |
|---|---|
{rows}

```python
import eva_rl

policy = eva_rl.load_policy("THIS_FOLDER")
```
"""


def _front_matter(form: str, *tags: str) -> str:
    library = "transformers" if form == "huggingface" else "eva-rl"
    all_tags = ["reinforcement-learning", "decision-transformer", *tags]
    return front_matter({"library_name": library, "pipeline_tag": "reinforcement-learning", "tags": all_tags})


def _data(data: object) -> str:
    """In words; anything but a mapping, from a foreign file, is as good as none."""
    if not isinstance(data, Mapping):
        return "none; it learned from its own episodes"
    episodes = data.get("episodes")
    shown = counted(episodes, "episode") if isinstance(episodes, int) else "- episodes"
    amount = f"{shown}, {_count(data.get('steps'))} env steps"
    return f"{amount} ({markdown_cell(data.get('source'))}), mean return {_number(data.get('mean_return'), '.1f')}"


def _steps(facts: Mapping[str, Any]) -> str:
    acted = f", {_count(facts['env_steps'])} env steps" if "env_steps" in facts else ""
    return f"{_count(facts.get('updates', 0))} gradient steps{acted}"


def _results(facts: Mapping[str, Any]) -> str:
    return "\n".join(
        f"| {key} | {_number(facts.get(f'eval_before/{key}'))} | {_number(facts[f'eval/{key}'])} |"
        for key in RESULTS
        if f"eval/{key}" in facts
    )


def _number(value: object, form: str = ".3g") -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else "-"
