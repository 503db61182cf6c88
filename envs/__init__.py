"""Tasks: one registry for Meta-World v3, MuJoCo and any other Gymnasium environment with Box spaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eva_rl.lazy import lazy_names

if TYPE_CHECKING:
    from eva_rl.envs.metaworld import scripted_expert
    from eva_rl.envs.names import CW10, METAWORLD_TASKS, MT40, TASK_SETS, split_options, task_list, with_options
    from eva_rl.envs.registry import canonical_id, env_spec, make_env, task_ids
    from eva_rl.envs.scores import normalized_score, reference_scores, score_between
    from eva_rl.envs.spec import EnvSpec
    from eva_rl.envs.vector import AUTO, TaskVecEnv, make_task_vec_env, make_vec_env

__all__ = [
    "AUTO",
    "CW10",
    "METAWORLD_TASKS",
    "MT40",
    "TASK_SETS",
    "EnvSpec",
    "TaskVecEnv",
    "canonical_id",
    "env_spec",
    "make_env",
    "make_task_vec_env",
    "make_vec_env",
    "normalized_score",
    "reference_scores",
    "score_between",
    "scripted_expert",
    "split_options",
    "task_ids",
    "task_list",
    "with_options",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AUTO": "eva_rl.envs.vector",
        "CW10": "eva_rl.envs.names",
        "EnvSpec": "eva_rl.envs.spec",
        "METAWORLD_TASKS": "eva_rl.envs.names",
        "MT40": "eva_rl.envs.names",
        "TASK_SETS": "eva_rl.envs.names",
        "TaskVecEnv": "eva_rl.envs.vector",
        "canonical_id": "eva_rl.envs.registry",
        "env_spec": "eva_rl.envs.registry",
        "make_env": "eva_rl.envs.registry",
        "make_task_vec_env": "eva_rl.envs.vector",
        "make_vec_env": "eva_rl.envs.vector",
        "normalized_score": "eva_rl.envs.scores",
        "reference_scores": "eva_rl.envs.scores",
        "score_between": "eva_rl.envs.scores",
        "scripted_expert": "eva_rl.envs.metaworld",
        "split_options": "eva_rl.envs.names",
        "task_ids": "eva_rl.envs.registry",
        "task_list": "eva_rl.envs.names",
        "with_options": "eva_rl.envs.names",
    },
)
