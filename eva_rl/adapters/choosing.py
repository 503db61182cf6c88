"""Which of several adapters fits a task: the one whose directions capture most variance of the base's activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from peft import PeftModel
from torch import Tensor, linalg, nn

from eva_rl.adapters.eva_init import Rollouts, input_moments
from eva_rl.agents.policy import DecisionTransformerPolicy
from eva_rl.data.trajectories import Trajectories
from eva_rl.data.windows import WindowSampler
from eva_rl.envs import make_vec_env
from eva_rl.errors import UserError
from eva_rl.eva import SecondMoment
from eva_rl.seeding import ROLLOUTS, episode_seeds


def start_moments(
    policy: DecisionTransformerPolicy,
    layers: Sequence[str],
    where: str | Trajectories,
    *,
    steps: int,
    episodes: int,
    seed: int,
) -> dict[str, SecondMoment]:
    """Second moments of layers' inputs over the first steps of a task, the adapters being off.

    Args:
        policy: Acts, asked for its default target return: which task this is, is what has to be found out.
        layers: By full name.
        where: A task to act in, or demonstrations to read.
        steps: Env steps from the start of an episode.
        episodes: Episodes.
        seed: Of the episodes that are played.
    """
    if isinstance(where, Trajectories):
        sampler = WindowSampler(where, policy.network.config.context_length, policy.scaling)
        last = np.minimum(where.offsets[:-1] + steps, where.offsets[1:])[:episodes] - 1
        return input_moments(policy, layers, [sampler.windows(last, policy.device)], None, max_batches=1)
    vec_env = make_vec_env(where, episodes, seed=episode_seeds(ROLLOUTS, seed))
    try:
        return input_moments(policy, layers, None, Rollouts(vec_env, [""] * episodes, steps), max_batches=0)
    finally:
        vec_env.close()


def comparable_directions(model: PeftModel, adapters: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Orthonormal input directions (R, in) of the layers that all adapters have, as many as all have there.

    Args:
        model: With the adapters.
        adapters: Their names.

    Returns:
        By adapter and layer.

    Raises:
        UserError: They have no low-rank layer in common.
    """
    factors = {adapter: dict(_input_factors(model, adapter)) for adapter in adapters}
    common = set.intersection(*(set(found) for found in factors.values()))
    if not common:
        raise UserError(
            f"The adapters {', '.join(adapters)} have no low-rank layer in common whose directions could be compared. "
            "Choose among LoRA or EVA adapters, or name one: policy.adapters.use(NAME)."
        )
    ranks = {layer: min(len(found[layer]) for found in factors.values()) for layer in common}
    return {
        adapter: {layer: linalg.qr(found[layer][:rank].double().T)[0].T for layer, rank in ranks.items()}
        for adapter, found in factors.items()
    }


def _input_factors(model: PeftModel, adapter: str) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.get_base_model().named_modules():
        factors: Any = getattr(module, "lora_A", None)
        if factors is not None and adapter in factors and isinstance(factors[adapter], nn.Linear):
            yield name, factors[adapter].weight.data


def captured_variance(directions: Mapping[str, Tensor], moments: Mapping[str, SecondMoment]) -> float:
    """Share of the inputs' variance along some directions, the mean over layers.

    Args:
        directions: Orthonormal rows (R, in) by layer.
        moments: Second moments of the same layers' inputs.
    """
    shares = [float(moments[name].projected(rows).trace()) / moments[name].trace for name, rows in directions.items()]
    return float(np.mean(shares))
