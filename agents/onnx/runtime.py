"""An exported policy at work, through onnxruntime; the network itself needs no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eva_rl.agents.onnx.graph import INPUTS, OUTPUTS
from eva_rl.agents.policy import Conditioning, check_shapes, compare_action_bounds
from eva_rl.agents.policy_record import CONDITIONING, LARGEST_SIZE, SCALING
from eva_rl.errors import UserError
from eva_rl.files import regular_size
from eva_rl.schema import DIGEST, Integer, ListOf, OneOf, Record, Text

METADATA_KEY = "eva_rl"
FORMAT, FORMAT_VERSION = "eva-rl onnx", 1
_count = Integer(0, LARGEST_SIZE)
ABOUT = Record(
    {
        "format": OneOf((FORMAT,)),
        "version": OneOf((FORMAT_VERSION,)),
        **SCALING.required,
        **CONDITIONING.required,
        "context_length": Integer(1, LARGEST_SIZE),
        "empty_memory": ListOf(_count, 5, 5),
    },
    {**CONDITIONING.optional, "env_id": Text(), "sha256": Text(DIGEST)},
    others=True,
)
"""The metadata of a file."""
UNSEALED = "0" * 64
"""Stands in the place of a file's digest while that is computed."""
_SEAL = re.compile(rb'"sha256": "([0-9a-f]{64})"')


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


def sealed_content(content: bytes) -> bytes:
    """A file's content with its own digest in the place of :data:`UNSEALED`, which its metadata hold."""
    digest = hashlib.sha256(content).hexdigest().encode()
    return content.replace(b'"sha256": "' + UNSEALED.encode(), b'"sha256": "' + digest, 1)


def _checked_content(path: Path) -> bytes:
    """What a file holds, as it was written; files of earlier versions have no digest.

    Raises:
        UserError: No such file, or it was changed since.
    """
    try:
        regular_size(path)
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Name a file that `to=onnx` wrote.") from error
    seal = _SEAL.search(content)
    if seal is not None and sealed_content(content.replace(seal[0], b'"sha256": "%b"' % UNSEALED.encode())) != content:
        raise UserError(f"{path} is damaged or was changed since it was written. Export the policy again.")
    return content


def _about(session: Any, path: Path) -> dict[str, Any]:
    """A file's metadata, held against its inputs and outputs.

    Raises:
        UserError: They are missing, of other types, or do not fit the graph.
    """
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise UserError(f"{path} has no metadata of eva-rl: it is another model. Name a file that `to=onnx` wrote.")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its metadata are no JSON: {error}. Export the policy again.") from error
    about = {"per_env": {}} | ABOUT.of(found, f"{path}, metadata")
    _check_graph(session, about, path)
    return about


def _check_graph(session: Any, about: Mapping[str, Any], path: Path) -> None:
    inputs = {value.name: list(value.shape) for value in session.get_inputs()}
    outputs = tuple(value.name for value in session.get_outputs())
    if (tuple(inputs), outputs) != (INPUTS, OUTPUTS):
        raise UserError(f"{path} has other inputs or outputs than an exported policy. Export the policy again.")
    lengths = [len(about[key]) for key in ("observation_mean", "observation_std", "action_low", "action_high")]
    dims, acts = inputs["observations"][-1], inputs["previous_actions"][-1]
    layers, _, heads, _, width = inputs["keys"]
    own = [dims, dims, acts, acts], [layers, 1, heads, 0, width]
    if (lengths, about["empty_memory"]) != own:
        raise UserError(
            f"{path}: its metadata describe numbers and memory of {lengths} and {about['empty_memory']}, its graph "
            f"takes {own[0]} and {own[1]}. Export the policy again."
        )


class OnnxPolicy:
    """A :class:`eva_rl.agents.Policy` from an ONNX file.

    Args:
        path: What :func:`eva_rl.agents.onnx.export_onnx` wrote.
        threads: Of onnxruntime.

    Raises:
        UserError: It cannot be read, is another model, is damaged, or was changed since it was written.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        runtime = onnx_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        content = _checked_content(Path(path))
        try:
            self._session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes, which differ by what is wrong
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is no ONNX model that can be run: {reason}. Export the policy again.") from error
        self.about: dict[str, Any] = _about(self._session, Path(path))
        self._envs: list[_Episode] = []

    @property
    def observation_dim(self) -> int:
        """Numbers in one observation."""
        return len(self.about["observation_mean"])

    @property
    def action_dim(self) -> int:
        """Numbers in one action."""
        return len(self.about["action_low"])

    def check_action_bounds(self, low: ArrayLike, high: ArrayLike, what: str) -> None:
        """Raise unless the actions span those of a task; see :func:`eva_rl.agents.policy.compare_action_bounds`."""
        lowest, highest = (np.array(self.about[key], np.float32) for key in ("action_low", "action_high"))
        compare_action_bounds((lowest, highest), low, high, what)

    def reset(self, env_ids: Sequence[str]) -> None:
        """Forget all histories and prepare for one environment per name."""
        conditioning = Conditioning(self.about["target_return"], self.about["per_env"])
        self._envs = [_Episode(self._session, self.about, conditioning.of(env_id)) for env_id in env_ids]

    def act(
        self, observations: NDArray[np.float32], rewards: NDArray[np.float32], episode_starts: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Choose the deterministic action of each environment; see :meth:`eva_rl.agents.Policy.act`."""
        n = len(self._envs)
        expected = {"observations": (n, self.observation_dim), "rewards": (n,), "episode_starts": (n,)}
        check_shapes(expected, observations=observations, rewards=rewards, episode_starts=episode_starts)
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
        if start or not self._steps:
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
