"""Tasks: one registry for Meta-World v3, MuJoCo and any other Gymnasium environment with Box spaces."""

from eva_rl.envs.metaworld import CW10, METAWORLD_TASKS, MT40, scripted_expert
from eva_rl.envs.registry import TASK_SETS, canonical_id, env_spec, make_env, task_ids, task_list
from eva_rl.envs.scores import normalized_score, reference_scores, score_between
from eva_rl.envs.spec import EnvSpec
from eva_rl.envs.vector import close_vec_env, make_task_vec_env, make_vec_env

__all__ = [
    "CW10",
    "METAWORLD_TASKS",
    "MT40",
    "TASK_SETS",
    "EnvSpec",
    "canonical_id",
    "close_vec_env",
    "env_spec",
    "make_env",
    "make_task_vec_env",
    "make_vec_env",
    "normalized_score",
    "reference_scores",
    "score_between",
    "scripted_expert",
    "task_ids",
    "task_list",
]
