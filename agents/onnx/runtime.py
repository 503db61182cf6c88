"""An exported policy at work, through onnxruntime; the network itself needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eva_rl.agents.onnx.graph import INPUTS
from eva_rl.errors import UserError

METADATA_KEY = "eva_rl"


def onnx_module(name: str) -> Any:
    """Import onnx or onnxruntime.

    Raises:
        UserError: It is not installed.
    """
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed. Install the extra: pip install 'eva-rl[onnx]'.") from error


class OnnxPolicy:
    """A :class:`eva_rl.agents.Policy` from an ONNX file.

    Args:
        path: What :func:`eva_rl.agents.onnx.export_onnx` wrote.
        threads: Of onnxruntime.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        runtime = onnx_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.about: dict[str, Any] = json.loads(self._session.get_modelmeta().custom_metadata_map[METADATA_KEY])
        self._envs: list[_Episode] = []

    @property
    def observation_dim(self) -> int:
        """Numbers in one observation."""
        return len(self.about["observation_mean"])

    @property
    def action_dim(self) -> int:
        """Numbers in one action."""
        return len(self.about["action_low"])

    def reset(self, env_ids: Sequence[str]) -> None:
        """Forget all histories and prepare for one environment per name."""
        targets = [self.about["per_env"].get(env_id, self.about["target_return"]) for env_id in env_ids]
        self._envs = [_Episode(self._session, self.about, target) for target in targets]

    def act(
        self, observations: NDArray[np.float32], rewards: NDArray[np.float32], episode_starts: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Choose the deterministic action of each environment; see :meth:`eva_rl.agents.Policy.act`."""
        rows = zip(self._envs, observations, rewards, episode_starts, strict=True)
        return np.stack([env.act(observation, reward, start) for env, observation, reward, start in rows])

    def executed(self, actions: NDArray[np.float32]) -> None:
        """Remember the actions (n, act) that were executed, where they are not those that :meth:`act` returned."""
        for env, action in zip(self._envs, actions, strict=True):
            env.executed(action)


class _Episode:
    """One environment's history and memory."""

    def __init__(self, session: Any, about: dict[str, Any], target: float) -> None:
        self._session, self._about, self._target = session, about, target
        self._memory: list[NDArray[np.float32]] = []
        self._steps: list[tuple[Any, ...]] = []

    def act(self, observation: NDArray[np.float32], reward: float, start: bool) -> NDArray[np.float32]:
        if start:
            self._to_go, self._seen, self._steps = self._target, 0, []
            self._action: NDArray[np.float32] = np.zeros(len(self._about["action_low"]), np.float32)
            reward = 0.0
        self._to_go -= float(reward)
        self._steps.append((observation, self._action, [reward], [self._to_go], len(self._steps)))
        new = self._new_steps()
        columns = [np.array([column], np.float32) for column in zip(*self._steps[-new:], strict=True)]
        inputs = [*columns[:4], columns[4].astype(np.int64), *self._memory]
        actions, *self._memory = self._session.run(None, dict(zip(INPUTS, inputs, strict=True)))
        self._action = actions[0]
        return self._action

    def executed(self, action: NDArray[np.float32]) -> None:
        self._action = action

    def _new_steps(self) -> int:
        """How many steps to show: one beside the memory, or a window where a context begins."""
        T, self._seen = self._about["context_length"], self._seen + 1
        if self._seen > 1 and self._seen <= T:
            return 1
        self._seen = min(max(1, T // 2), len(self._steps))
        self._memory = [np.zeros(self._about["empty_memory"], np.float32)] * 2
        return self._seen
