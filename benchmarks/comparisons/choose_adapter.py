"""How often ``policy.adapters.choose`` finds the adapter of a Meta-World task from its first ten env steps.

    python -m benchmarks.comparisons.choose_adapter --out docs/results/choose_adapter.json

Fifty adapters as EVA leaves them before training (rank 8, mt40, three expert episodes a task; training moves A little),
and five starts of every task, each on its own: the base acts for ten steps, asked for its default target return.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import eva_rl
from eva_rl.adapters import PROJECTIONS, Rollouts, compute_eva, input_moments, target_layers
from eva_rl.adapters.eva_init import captured_variance
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.data import WindowSampler
from eva_rl.envs import METAWORLD_TASKS, make_vec_env
from eva_rl.rollouts.experts import collect_expert
from eva_rl.seeding import ROLLOUTS, episode_seeds

RANK, EPISODES, WINDOWS = 8, 3, 60


def directions_of(policy: DecisionTransformerPolicy, task: str, layers: list[str]) -> dict[str, Tensor]:
    """EVA's directions for a task, (8, in) by layer."""
    data = collect_expert(task, EPISODES, seed=0)
    sampler = WindowSampler(data, policy.network.config.context_length, policy.scaling, seed=0)
    batch = sampler.windows(np.linspace(0, data.num_steps - 1, WINDOWS).astype(np.int64))
    result = compute_eva(policy, layers, [batch], None, max_batches=1, rank=RANK)
    return {name: result.layers[name].components.double() for name in layers}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = eva_rl.load_policy("mt40")
    layers = target_layers(policy.network, PROJECTIONS)
    known = {task: directions_of(policy, task, layers) for task in METAWORLD_TASKS}
    first, among_three, confused = 0, 0, Counter[str]()
    for task in METAWORLD_TASKS:
        vec_env = make_vec_env(task, 1, workers=0)
        for start in range(options.starts):
            vec_env.seed(episode_seeds(ROLLOUTS, 0) + start)
            moments = input_moments(policy, layers, None, Rollouts(vec_env, [""], options.steps), max_batches=0)
            scores = {name: captured_variance(rows, moments) for name, rows in known.items()}
            best = sorted(scores, key=lambda name: -scores[name])
            first, among_three = first + (best[0] == task), among_three + (task in best[:3])
            if best[0] != task:
                confused[f"{task.split('/')[1]} taken for {best[0].split('/')[1]}"] += 1
        vec_env.close()
    total = options.starts * len(METAWORLD_TASKS)
    record = {
        "starts": total,
        "steps": options.steps,
        "accuracy": first / total,
        "among_first_three": among_three / total,
        "confused": dict(confused.most_common()),
    }
    print(json.dumps(record, indent=1))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
