"""Meta-World's arm without the Python around its physics: equal to the bit, at two to three times the speed.

Of a plain Meta-World step about a sixth is MuJoCo; the rest looks names up, walks over contacts in Python, and clips
and stacks small arrays. Here the same numbers are computed from cached views. The physics, the observations and the
rewards are Meta-World's own: ``tests/envs/test_sawyer.py`` compares every task with the plain one, bit by bit, and
another version of Meta-World than the one compared is used as it is.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from typing import Any

import mujoco
import numpy as np
from gymnasium.utils import seeding
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.utils import reward_utils
from numpy.typing import NDArray

COMPARED = ("3.1.1",)
"""Versions of Meta-World whose steps were found equal."""
LONG_TAIL_SCALE = float(np.sqrt(1 / 0.1 - 1))

Floats = NDArray[np.float64]


class _SharedModel:
    """One compiled MuJoCo model for all tasks of a process that use it, with the parts that a task writes.

    Compiling takes 0.2 s and 20 MB. Meta-World's tasks change the positions of bodies and sites alone.
    """

    def __init__(self, path: str) -> None:
        self.model: Any = mujoco.MjModel.from_xml_path(path)
        self._mutable = (self.model.body_pos, self.model.site_pos)
        self._first = self._copies()
        self._owner: LeanSawyer | None = None

    def _copies(self) -> tuple[Floats, ...]:
        return tuple(array.copy() for array in self._mutable)

    def lend(self, task: LeanSawyer) -> None:
        """Put a task's own positions into the model, and keep those of the task that had it before."""
        if self._owner is task:
            return
        if self._owner is not None:
            self._owner.positions = self._copies()
        for array, own in zip(self._mutable, task.positions or self._first, strict=True):
            array[:] = own
        self._owner = task

    def give_back(self, task: LeanSawyer) -> None:
        """Forget a task that is closed."""
        if self._owner is task:
            self._owner = None


_shared_model = cache(_SharedModel)


class LeanSawyer(SawyerXYZEnv):  # type: ignore[misc]  # metaworld's classes are not exported as typed
    """Comes before a task's class in the order of resolution and overrides what is slow in their common base."""

    positions: tuple[Floats, ...] | None = None
    _shared: _SharedModel | None = None
    _skips_hand = False

    def _initialize_simulation(self) -> tuple[Any, Any]:
        self._shared = _shared_model(self.fullpath)
        self._shared.lend(self)
        return self._shared.model, mujoco.MjData(self._shared.model)

    def _use_own_positions(self) -> None:
        if self._shared is not None:
            self._shared.lend(self)

    def seed(self, seed: int) -> list[int]:
        """Seed the stream that goals are drawn from; the spaces' own streams are drawn from by nobody."""
        self.np_random, seed = seeding.np_random(seed)
        return [seed]

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Start an episode.

        Meta-World places everything twice, before and after it resets the simulator; what the hand's 50 steps of the
        first time lead to is lost, so that they are not simulated.
        """
        self._use_own_positions()
        self._skips_hand = True
        self.curr_path_length = 0
        self.reset_model()
        self._skips_hand = False
        mujoco.mj_resetData(self.model, self.data)
        observation = self.reset_model()
        self._prev_obs = observation[:18].copy()
        observation[18:36] = self._prev_obs
        return observation.astype(np.float64), {}

    def _reset_hand(self, steps: int = 50) -> None:
        if self._skips_hand:
            self.init_tcp = self.tcp_center
        else:
            super()._reset_hand(steps)

    def step(self, action: NDArray[np.float32]) -> tuple[Floats, Any, bool, bool, dict[str, Any]]:
        """Advance one env step, as :meth:`SawyerXYZEnv.step` does."""
        self._use_own_positions()
        self._move(action)
        mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        mujoco.mj_rnePostConstraint(self.model, self.data)
        self.curr_path_length += 1
        mujoco.mj_forward(self.model, self.data)
        observation = self._clipped(self._get_obs())
        self._last_stable_obs = observation
        reward, info = self.evaluate_state(observation, action)
        return observation.copy(), reward, False, self.curr_path_length == self.max_path_length, info

    def _move(self, action: NDArray[np.float32]) -> None:
        if self.curr_path_length >= self.max_path_length:
            raise ValueError("You must reset the env manually once truncate==True")
        data = self.data
        moved = data.mocap_pos[0] + np.minimum(np.maximum(action[:3], -1), 1) * self.action_scale
        data.mocap_pos[0] = np.minimum(np.maximum(moved, self.mocap_low), self.mocap_high)
        data.mocap_quat[:] = _POINTING_DOWN
        data.ctrl[:] = action[-1], -action[-1]

    def _clipped(self, observation: Floats) -> Floats:
        space = self.sawyer_observation_space
        bounded: Floats = np.minimum(np.maximum(observation, space.low), space.high)
        return bounded

    def get_body_com(self, body_name: str) -> Floats:
        """Where a body is, (3,): a view that follows the simulation."""
        view = self._bodies.get(body_name)
        if view is None:
            view = self._bodies[body_name] = self.data.body(body_name).xpos
        return view

    @property
    def _bodies(self) -> dict[str, Floats]:
        cached: dict[str, Floats] = self.__dict__.setdefault("_body_views", {})
        return cached

    def get_endeff_pos(self) -> Floats:
        """Where the hand is, (3,)."""
        return self.get_body_com("hand")

    @property
    def tcp_center(self) -> Floats:
        """The middle between the fingers, (3,)."""
        views = self.__dict__.get("_finger_views")
        if views is None:
            views = self._finger_views = tuple(self.data.site(f"{side}EndEffector").xpos for side in ("right", "left"))
        center: Floats = (views[0] + views[1]) / 2.0
        return center

    def touching_object(self, object_geom_id: int) -> bool:
        """Whether both fingers press on a geom."""
        if "_pad_geoms" not in self.__dict__:
            self._pad_geoms = tuple(self.data.geom(f"{side}pad_geom").id for side in ("left", "right"))
        contact = self.data.contact
        first, second = contact.geom1, contact.geom2
        with_object = (first == object_geom_id) | (second == object_geom_id)
        if not with_object.any():
            return False
        return all(self._pressure(contact, with_object & ((first == pad) | (second == pad))) for pad in self._pad_geoms)

    def _pressure(self, contact: Any, chosen: NDArray[np.bool_]) -> bool:
        return bool(sum(self.data.efc_force[address] for address in contact.efc_address[chosen]) > 0)

    def _get_curr_obs_combined_no_goal(self) -> Floats:
        apart = self.get_body_com("rightclaw") - self.get_body_com("leftclaw")
        observation = np.zeros(4 + self._obs_obj_max_len)
        observation[:3] = self.get_endeff_pos()
        observation[3] = min(max(np.linalg.norm(apart) / 0.1, 0.0), 1.0)
        positions, quaternions = self._get_pos_objects(), self._get_quat_objects()
        objects = observation[4 : 4 + len(positions) + len(quaternions)].reshape(-1, 7)
        objects[:, :3] = positions.reshape(-1, 3)
        objects[:, 3:] = quaternions.reshape(-1, 4)
        return observation

    def close(self) -> None:
        """Close the renderer, where there is one."""
        if self._shared is not None:
            self._shared.give_back(self)
        super().close()


_POINTING_DOWN = np.array([1.0, 0.0, 1.0, 0.0])


def tolerance(
    x: Any, bounds: tuple[Any, Any] = (0.0, 0.0), margin: Any = 0.0, sigmoid: Any = "gaussian", **others: Any
) -> Any:
    """``metaworld.utils.reward_utils.tolerance``, with plain floats where a task's reward asks for a long tail."""
    lower, upper = bounds
    if sigmoid != "long_tail" or others or type(x) not in _NUMBERS or not margin > 0 or lower > upper:
        return reward_utils.tolerance(x, bounds, margin, sigmoid, **others)
    x = float(x)
    if lower <= x <= upper:
        return 1.0
    distance = float(lower - x if x < lower else x - upper) / float(margin)
    return 1 / ((distance * LONG_TAIL_SCALE) ** 2 + 1)


_NUMBERS = (float, np.float64)
_rewards = types.SimpleNamespace(
    tolerance=tolerance,
    hamacher_product=reward_utils.hamacher_product,
    rect_prism_tolerance=reward_utils.rect_prism_tolerance,
)


class _Rotation:
    """The part of SciPy's ``Rotation`` that tasks use, on the routine beneath it."""

    def __init__(self, quaternion: Floats) -> None:
        self._quaternion = quaternion

    @classmethod
    def from_matrix(cls, matrix: Floats) -> _Rotation:
        """From one (3, 3) matrix, which MuJoCo keeps orthogonal."""
        return cls(np.asarray(rotation_routines.from_matrix(matrix, assume_valid=True)).reshape(4))

    def as_quat(self) -> Floats:
        """(x, y, z, w)."""
        return self._quaternion


_LEANER: dict[str, Any] = {"reward_utils": _rewards}
try:
    from scipy.spatial.transform import _rotation_cy as rotation_routines
except ImportError:  # private: SciPy may move it, and its public way serves as well
    pass
else:
    _LEANER["Rotation"] = _Rotation


@cache
def lean_class(plain: type[Any]) -> type[Any]:
    """The class of a Meta-World task with the leaner step before it; the class itself for an unknown version."""
    if version("metaworld") not in COMPARED:
        return plain
    return type(plain.__name__, (LeanSawyer, plain), dict(_rebound(plain)))


def _rebound(plain: type[Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """A task's own methods with other helpers in their namespace; Meta-World's modules stay as they are."""
    for owner in reversed(plain.__mro__[: plain.__mro__.index(SawyerXYZEnv) + 1]):
        for name, method in vars(owner).items():
            if isinstance(method, types.FunctionType) and set(method.__code__.co_names) & set(_LEANER):
                yield name, _with_globals(method)


def _with_globals(method: types.FunctionType) -> types.FunctionType:
    made = types.FunctionType(
        method.__code__,
        {**method.__globals__, **{k: v for k, v in _LEANER.items() if k in method.__globals__}},
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
    made.__kwdefaults__ = method.__kwdefaults__
    return made
