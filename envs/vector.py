"""Vectorised environments whose episodes are numbered, so that episode n is the same with any number of envs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from eva_rl.distributed import local_world_size
from eva_rl.envs.host import EnvHost, Maker, StepArrays
from eva_rl.envs.names import METAWORLD_PREFIX
from eva_rl.envs.registry import canonical_id, env_spec, make_env
from eva_rl.envs.spec import EnvSpec
from eva_rl.envs.worker import Assignment, WorkerProcess, shared_memory
from eva_rl.errors import UserError
from eva_rl.limits.threads import thread_limits

AUTO = -1
"""Workers: as many as pay, by a measurement of the environment."""
WORKER_COSTS = 0.5
"""Seconds of simulation below which starting worker processes costs more than they save."""


class TaskVecEnv(VecEnv):
    """A Stable-Baselines3 vectorised environment in this process or in workers, with equal results.

    Worker w of W hosts the environments w, w + W, ...: each has its part of any block of rows. Actions, observations
    and flags pass through shared memory. The infos hold what Stable-Baselines3 asks for: ``is_success`` (and
    ``success``, at any step so far), ``success_now``, ``TimeLimit.truncated`` and ``terminal_observation``.

    Beside Stable-Baselines3's interface, :meth:`block` gives some of the environments to step on their own.

    Args:
        makers: One an environment; picklable where there are workers.
        names: Their names, for messages.
        box: Spaces of one observation and of one action.
        first_seeds: Seed of the first episode of each environment.
        stride: Distance between the seeds of two successive episodes of an environment.
        workers: Processes; 0 hosts all environments in this one.
    """

    def __init__(
        self,
        makers: Sequence[Maker],
        names: Sequence[str],
        box: tuple[spaces.Box, spaces.Box],
        first_seeds: Sequence[int],
        stride: int,
        workers: int = 0,
    ) -> None:
        n, (observations, actions) = len(makers), box
        self.names, self.render_mode = tuple(names), None
        self._sizes, self._stride = (n, observations.shape[0], actions.shape[0]), stride
        num_bytes = StepArrays.num_bytes(*self._sizes)
        self._memory = shared_memory(num_bytes) if workers else bytearray(num_bytes)
        self.arrays = StepArrays.over(self._memory, *self._sizes)
        self.arrays.next_seeds[:] = first_seeds
        self._hosts = self._start(makers, min(workers, n))
        self._processes = [host.process for host in self._hosts if isinstance(host, WorkerProcess)]
        self._owners = [self._hosts[row % len(self._hosts)] for row in range(n)]
        super().__init__(n, observations, actions)
        self._all = self.block(range(n))

    def _start(self, makers: Sequence[Maker], workers: int) -> list[Host]:
        if not workers:
            return [LocalHost(EnvHost(self.arrays, dict(enumerate(makers)), self._stride))]
        hosts: list[Host] = []
        for first in range(workers):
            rows = range(first, len(makers), workers)
            assignment = Assignment(self._memory, self._sizes, {row: makers[row] for row in rows}, self._stride)
            hosts.append(WorkerProcess(assignment, {row: self.names[row] for row in rows}))
        return hosts

    @property
    def processes(self) -> list[Any]:
        """The worker processes."""
        return self._processes

    def block(self, rows: Iterable[int]) -> EnvBlock:
        """Some of the environments, to be reset and stepped while others do something else."""
        return EnvBlock(self.arrays, self._owners, np.fromiter(rows, np.int64))

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Let the next episode of environment i be the one seeded ``seed + i``."""
        if seed is None:
            return [None] * self.num_envs
        self.arrays.next_seeds[:] = seed + np.arange(self.num_envs)
        return [int(first) for first in self.arrays.next_seeds]

    def seed_each(self, seeds: Sequence[int]) -> None:
        """Let the next episodes of the first environments be those of these seeds."""
        self.arrays.next_seeds[: len(seeds)] = seeds

    def reset(self) -> VecEnvObs:
        """Begin the next episode of every environment."""
        self._all.begin_reset()
        self._all.finish()
        self.reset_infos = [{"episode_seed": int(seed)} for seed in self.arrays.seeds]
        return self.arrays.observations.copy()

    def step_async(self, actions: NDArray[Any]) -> None:
        """Begin one env step of every environment."""
        self._all.begin_step(actions, autoreset=True)

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for the step; where an episode ended, the next one has begun."""
        self._all.finish()
        arrays = self.arrays
        dones = arrays.terminated | arrays.truncated
        for row in np.flatnonzero(dones):
            self.reset_infos[row] = {"episode_seed": int(arrays.seeds[row])}
        infos = [self._info(row, bool(done)) for row, done in enumerate(dones)]
        arrays.success[dones] = False
        return arrays.observations.copy(), arrays.rewards.copy(), dones, infos

    def _info(self, row: int, done: bool) -> dict[str, Any]:
        arrays = self.arrays
        info: dict[str, Any] = {"TimeLimit.truncated": bool(arrays.truncated[row] and not arrays.terminated[row])}
        if arrays.reports_success[row]:
            success = bool(arrays.success[row])
            info |= {"is_success": success, "success": success, "success_now": bool(arrays.success_now[row])}
        if done:
            info["terminal_observation"] = arrays.final_observations[row].copy()
        return info

    def close(self) -> None:
        """Close the environments and end the workers."""
        for host in self._hosts:
            host.close()
        self._hosts = []

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of some environments."""
        if attr_name == "render_mode":
            return [None for _ in self._get_indices(indices)]
        return [self._owners[row].call("attribute", row, attr_name) for row in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of some environments."""
        for row in self._get_indices(indices):
            self._owners[row].call("set_attribute", row, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of some environments."""
        return [
            self._owners[row].call("call", row, method_name, *method_args, **method_kwargs)
            for row in self._get_indices(indices)
        ]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Whether a wrapper of an environment's own is of this class; Stable-Baselines3's Monitor is none of them."""
        return [self._owners[row].call("is_wrapped", row, wrapper_class) for row in self._get_indices(indices)]


class LocalHost:
    """A host in this process with the methods of a worker's handle; calls happen where they begin."""

    def __init__(self, host: EnvHost) -> None:
        self._host, self._result = host, None

    def begin(self, method: str, *args: Any, **kwargs: Any) -> int:
        """Call a method of the host."""
        self._result = getattr(self._host, method)(*args, **kwargs)
        return 0

    def finish(self, number: int) -> Any:
        """What the last call returned."""
        return self._result

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the host."""
        self.begin(method, *args, **kwargs)
        return self._result

    def close(self) -> None:
        """Close the environments."""
        self._host.close()


Host = LocalHost | WorkerProcess


@dataclass
class EnvBlock:
    """Some rows of a vectorised environment.

    Attributes:
        arrays: Of all environments.
        owners: The host of each environment.
        rows: The environments of this block.
    """

    arrays: StepArrays
    owners: Sequence[Host]
    rows: NDArray[np.int64]

    def begin_reset(self, chosen: NDArray[np.bool_] | None = None) -> None:
        """Begin the next episode of the block's environments, or of some of them."""
        self._begin("reset", self._chosen(chosen))

    def begin_step(
        self, actions: NDArray[Any], chosen: NDArray[np.bool_] | None = None, *, autoreset: bool = False
    ) -> None:
        """Begin one env step of the block's environments, or of some of them; actions are (len(rows), act).

        Raises:
            UserError: They have another shape, or are no numbers of numpy.
        """
        expected = (len(self.rows), *self.arrays.actions.shape[1:])
        try:
            given = np.asarray(actions)
        except (RuntimeError, TypeError, ValueError) as error:  # a tensor that requires a gradient, say
            raise UserError(f"The policy's actions are no numpy array: {error}") from error
        if given.shape != expected:
            raise UserError(f"The policy returned actions of shape {given.shape}, expected (n, act) = {expected}.")
        self.arrays.actions[self.rows] = given
        self._begin("step", self._chosen(chosen), autoreset)

    def finish(self) -> None:
        """Wait until the step or the reset is over."""
        while self._calls:
            host, number = self._calls.popleft()
            host.finish(number)

    def _chosen(self, chosen: NDArray[np.bool_] | None) -> list[int]:
        return [int(row) for row in (self.rows if chosen is None else self.rows[chosen])]

    def _begin(self, method: str, rows: Sequence[int], *args: Any) -> None:
        shares: dict[int, list[int]] = {}
        for row in rows:
            shares.setdefault(row % len(self._hosts), []).append(row)
        for index, share in shares.items():
            host = self._hosts[index]
            self._calls.append((host, host.begin(method, share, *args)))

    def __post_init__(self) -> None:
        self._hosts = list(dict.fromkeys(self.owners))
        self._calls: deque[tuple[Host, int]] = deque()


def make_vec_env(
    name: str,
    num_envs: int,
    *,
    seed: int = 0,
    horizon: int | None = None,
    workers: int = 0,
    stride: int | None = None,
    stop_at_success: bool = False,
) -> TaskVecEnv:
    """Make a Stable-Baselines3 vectorised environment with distinct, reproducible episodes.

    The k-th episode of environment i is seeded ``seed + i + k * num_envs``: on Meta-World every episode has its own
    goal. ``vec_env.seed(s)`` before ``vec_env.reset()`` starts the list again at ``s``.

    Args:
        name: Any name that :func:`eva_rl.envs.canonical_id` takes.
        num_envs: Number of environments.
        seed: Seed of the first episode.
        horizon: Env steps after which an episode is truncated; None takes the task's own.
        workers: Processes that share the environments; 0 steps them all in this one, :data:`AUTO` takes as many as
            pay. The results are the same.
        stride: Distance between the seeds of two successive episodes of an environment; None takes their number.
        stop_at_success: Terminate an episode at its first success.

    Raises:
        UserError: No such task, or ``num_envs`` is not positive.
    """
    if num_envs < 1:
        raise UserError(f"num_envs={num_envs}: expected at least 1.")
    return _vec_env([name] * num_envs, horizon, (seed, stride or num_envs), workers, stop_at_success)


def make_task_vec_env(
    names: Sequence[str], *, stride: int | None = None, horizon: int | None = None, workers: int = 0
) -> TaskVecEnv:
    """Make one environment per task, each with its own numbered episodes.

    Args:
        names: Tasks with equal observation and action dimensions.
        stride: Distance between the seeds of two successive episodes of an environment; None takes their number.
        horizon: Env steps after which an episode is truncated; None takes each task's own.
        workers: As in :func:`make_vec_env`.

    Raises:
        UserError: The tasks' dimensions differ.
    """
    return _vec_env(names, horizon, (0, stride or len(names)), workers)


def _vec_env(
    names: Sequence[str], horizon: int | None, seeds: tuple[int, int], workers: int, stop_at_success: bool = False
) -> TaskVecEnv:
    seed, stride = seeds
    specs = [env_spec(canonical_id(name), horizon) for name in names]
    sizes = {(spec.observation_dim, spec.action_dim): spec.env_id for spec in specs}
    if len(sizes) > 1:
        described = ", ".join(f"{name} has {obs} and {act}" for (obs, act), name in sizes.items())
        raise UserError(f"The tasks' observations and actions differ in size: {described}. Name tasks of equal sizes.")
    low, high = (np.array(bound, np.float32) for bound in (specs[0].action_low, specs[0].action_high))
    observations = spaces.Box(-np.inf, np.inf, (specs[0].observation_dim,), np.float32)
    return TaskVecEnv(
        [partial(make_env, spec.env_id, horizon=horizon, stop_at_success=stop_at_success) for spec in specs],
        [spec.env_id for spec in specs],
        (observations, spaces.Box(low, high, dtype=np.float32)),
        range(seed, seed + len(specs)),
        stride,
        workers_that_pay(specs) if workers == AUTO else workers,
    )


def workers_that_pay(specs: Sequence[EnvSpec]) -> int:
    """As many workers as there are cores for this process, where one episode of each environment takes long enough."""
    cores = thread_limits().cpus // local_world_size()
    seconds = sum(_step_seconds(spec.env_id) * spec.horizon for spec in specs)
    return min(cores, len(specs)) if cores > 1 and seconds > WORKER_COSTS else 0


METAWORLD_STEP = 4e-4
"""Seconds of a Meta-World step, about; making a task only to measure it would take as long as a thousand of them."""


@cache
def _step_seconds(env_id: str, steps: int = 20) -> float:
    """Seconds of one env step in the middle of the actions' range; measured once a process."""
    if env_id.startswith(METAWORLD_PREFIX):
        return METAWORLD_STEP
    env, spec = make_env(env_id), env_spec(env_id)
    action = np.clip(np.zeros(spec.action_dim, np.float32), spec.action_low, spec.action_high)
    env.reset(seed=0)
    began, done = time.perf_counter(), 0
    for _ in range(steps):
        _, _, terminated, truncated, _ = env.step(action)
        done += 1
        if terminated or truncated:
            break
    seconds = (time.perf_counter() - began) / done
    env.close()
    return seconds
