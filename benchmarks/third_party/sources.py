"""Demonstrations and policies as other libraries make them, by their own code alone: nothing here imports eva_rl.

Used by third_party.py; each function writes what its library writes, below a folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Controller = Callable[[gym.Env[Any, Any], Any, dict[str, Any]], Array]
"""From the environment, its observation and info to an action."""


def play(env: gym.Env[Any, Any], act: Controller, episodes: int) -> Iterator[dict[str, Array]]:
    """Whole episodes of a controller, each a dict of arrays with D4RL's names and one observation more than actions."""
    for seed in range(episodes):
        observation, info = env.reset(seed=seed)
        observations, rows, done = [observation], [], False
        if hasattr(act, "begin"):
            act.begin(env, observation, info)
        while not done:
            action = np.clip(act(env, observation, info), env.action_space.low, env.action_space.high)  # type: ignore[attr-defined]
            observation, reward, terminated, truncated, info = env.step(action.astype(np.float32))
            observations.append(observation)
            rows.append((action, reward, terminated, truncated))
            done = terminated or truncated
        actions, rewards, terminals, timeouts = (np.array(column) for column in zip(*rows, strict=True))
        yield {
            "observations": np.array(observations),
            "actions": actions,
            "rewards": rewards,
            "terminals": terminals,
            "timeouts": timeouts,
        }


# Controllers, none of them ours but for their gains: textbook ones, and those that libraries ship.


def swing_up(_: gym.Env[Any, Any], observation: Array, __: dict[str, Any]) -> Array:
    """Pendulum: pump energy, then a PD controller (Astrom and Furuta 2000)."""
    cos, sin, speed = observation
    if cos > 0.9:
        return np.array([-(10 * np.arctan2(sin, cos) + 2 * speed)])
    return np.array([2 * np.sign(speed * (15 - speed**2 / 2 - 15 * cos)) or 2.0])


def along_the_speed(_: gym.Env[Any, Any], observation: Array, __: dict[str, Any]) -> Array:
    """MountainCarContinuous: push the way it rolls."""
    return np.array([1.0 if observation[1] >= 0 else -1.0])


def lander(env: gym.Env[Any, Any], observation: Array, _: dict[str, Any]) -> Array:
    """LunarLander: the heuristic that Gymnasium ships beside it."""
    from gymnasium.envs.box2d.lunar_lander import heuristic

    return np.asarray(heuristic(env.unwrapped, observation))


def reach(env: gym.Env[Any, Any], observation: dict[str, Array], _: dict[str, Any]) -> Array:
    """Goal-conditioned tasks of Gymnasium-Robotics: go straight to the goal, with damping where the speed is seen."""
    action = np.zeros(env.action_space.shape)  # type: ignore[arg-type]
    way = observation["desired_goal"] - observation["achieved_goal"]
    is_point = len(way) == 2
    action[: len(way)] = 8 * way - (2 * observation["observation"][2:4] if is_point else 0)
    return action


def pole(_: gym.Env[Any, Any], observation: dict[str, Array], __: dict[str, Any]) -> Array:
    """dm_control's cartpole: state feedback."""
    (x, cos, sin), (speed, turning) = observation["position"], observation["velocity"]
    return np.array([0.3 * x + 0.6 * speed + 6 * np.arctan2(sin, cos) + 1.5 * turning])


def centre(_: gym.Env[Any, Any], observation: dict[str, Array], __: dict[str, Any]) -> Array:
    """dm_control's point mass: to the origin."""
    return -20 * observation["position"] - 8 * observation["velocity"]


def balance(_: gym.Env[Any, Any], observation: Array, __: dict[str, Any]) -> Array:
    """InvertedPendulum: state feedback."""
    x, angle, speed, turning = observation
    return np.array([0.6 * x + 8 * angle + 0.8 * speed + 1.5 * turning])


class Oracles:
    """OGBench's scripted oracles, one after the other, each until what it cares for is as the task wants it."""

    def begin(self, env: gym.Env[Any, Any], observation: Array, info: dict[str, Any]) -> None:
        """Plan an episode."""
        np.random.seed(0)  # noqa: NPY002 - the oracles draw from the global generator
        self._steps = list(_ogbench_plan(env.unwrapped))
        for oracle, _, _ in self._steps:
            oracle.reset(observation, info)

    def __call__(self, env: gym.Env[Any, Any], observation: Array, info: dict[str, Any]) -> Array:
        """The action of the oracle whose turn it is."""
        while len(self._steps) > 1 and self._steps[0][2]():
            self._steps.pop(0)
        oracle, told, _ = self._steps[0]
        return np.asarray(oracle.select_action(observation, info | told()))


def _ogbench_plan(task: Any) -> Iterator[tuple[Any, Callable[[], dict[str, Any]], Callable[[], bool]]]:
    """Oracles with what each is told in OGBench's data collection (here the goals of the task), and when it is done."""
    from ogbench.manipspace.oracles.markov import button_markov, cube_markov, drawer_markov, window_markov

    goal, data = task.cur_task_info, task._data

    def site(name: str, number: int) -> Callable[[], dict[str, Any]]:
        return lambda: {f"privileged/target_{name}_handle_pos": data.site_xpos[number].copy()}

    def button(number: int) -> Callable[[], dict[str, Any]]:
        top = data.site_xpos[task._button_site_ids[number]].copy()
        told = {"button": number, "button_state": goal["goal_button_states"][number], "button_top_pos": top}
        return lambda: {f"privileged/target_{name}": value for name, value in told.items()}

    if "goal_xyzs" in goal:
        told = {"block": 0, "block_pos": goal["goal_xyzs"][0], "block_yaw": np.zeros(1)}
        targets = {f"privileged/target_{name}": value for name, value in told.items()}
        yield cube_markov.CubeMarkovOracle(env=task), lambda: targets, lambda: False
    elif "goal" in goal:  # the scene: first the drawer, then the window
        drawer = site("drawer", task._drawer_target_site_id)
        wanted = goal["goal"]["drawer_pos"]
        yield (
            drawer_markov.DrawerMarkovOracle(env=task),
            drawer,
            lambda: abs(data.joint("drawer_slide").qpos[0] - wanted) < 0.03,
        )
        yield window_markov.WindowMarkovOracle(env=task), site("window", task._window_target_site_id), lambda: False
    else:  # the puzzle, whose first task is solved by two corners: a button turns its neighbours, too
        for number in (0, 8):
            pressed = partial(lambda n: task._cur_button_states[n] == goal["goal_button_states"][n], number)
            yield button_markov.ButtonMarkovOracle(env=task, gripper_always_closed=True), button(number), pressed


# Writers


def minari(env_id: str, act: Controller, episodes: int, name: str, **kwargs: Any) -> None:
    """A Minari data set by Minari's own DataCollector."""
    from minari import DataCollector

    env = DataCollector(gym.make(env_id, **kwargs), record_infos=False)
    for _ in play(env, act, episodes):
        pass
    env.create_dataset(name, algorithm_name=act.__name__ if hasattr(act, "__name__") else "oracle")
    env.close()


def d4rl(path: Path, env: gym.Env[Any, Any], act: Controller, episodes: int) -> None:
    """One HDF5 file with D4RL's layout: rows of all episodes one after the other, observations flat."""
    parts = [
        {key: value[: len(e["actions"])] if key == "observations" else value for key, value in e.items()}
        for e in play(env, act, episodes)
    ]
    for part in parts:
        part["observations"] = np.array([gym.spaces.flatten(env.observation_space, o) for o in part["observations"]])
    with h5py.File(path, "w") as file:
        for key in parts[0]:
            rows = np.concatenate([part[key] for part in parts])
            file[key] = rows.astype(np.bool_ if key in ("terminals", "timeouts") else np.float32)


def l2m(folder: Path, env: gym.Env[Any, Any], act: Controller, episodes: int) -> None:
    """A folder as the L2M release lays it out: one file an episode, its lengths beside them."""
    folder.mkdir(parents=True)
    lengths = {}
    for number, episode in enumerate(play(env, act, episodes)):
        rewards = episode["rewards"].astype(np.float32)
        dones = np.arange(1, len(rewards) + 1) == len(rewards)
        np.savez(
            folder / f"{number}.npz",
            states=episode["observations"][:-1].astype(np.float32),
            actions=episode["actions"].astype(np.float32),
            rewards=rewards,
            dones=dones,
            returns_to_go=rewards[::-1].cumsum()[::-1],
        )
        lengths[str(number)] = len(rewards)
    (folder / "episode_lengths.json").write_text(json.dumps(lengths))


def sb3_agent(env_id: str, steps: int) -> Controller:
    """An agent trained and loaded by Stable-Baselines3 as its README does."""
    from stable_baselines3 import PPO

    model = PPO("MlpPolicy", env_id, n_steps=512, gae_lambda=0.9, learning_rate=1e-3, seed=0, device="cpu")
    model.learn(steps)
    model.save("agent")
    agent = PPO.load("agent", device="cpu")
    return lambda env, observation, info: agent.predict(observation, deterministic=True)[0]


def metaworld(task: str) -> tuple[gym.Env[Any, Any], Controller]:
    """Meta-World's own environment and scripted policy; each reset draws one of its goals."""
    import metaworld as mw
    from metaworld.policies import ENV_POLICY_MAP

    env = mw.MT1(task, seed=1).train_classes[task]()
    tasks, expert = mw.MT1(task, seed=1).train_tasks, ENV_POLICY_MAP[task]()

    class EachGoal(gym.Wrapper[Any, Any, Any, Any]):
        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[Any, dict[str, Any]]:
            self.unwrapped.set_task(tasks[(seed or 0) % len(tasks)])  # type: ignore[attr-defined]
            return self.env.reset(seed=seed, options=options)

    limited = gym.wrappers.TimeLimit(EachGoal(env), 200)
    return limited, lambda _, observation, __: expert.get_action(observation)


def transformers_policy(folder: Path, episodes: list[dict[str, Array]], updates: int) -> None:
    """A Decision Transformer trained with transformers' model as Hugging Face's blog does, and saved by it."""
    import torch
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    torch.manual_seed(0)
    length, scale, rng = 10, 100.0, np.random.default_rng(0)
    states = np.concatenate([e["observations"][:-1] for e in episodes])
    mean, std = states.mean(0), states.std(0) + 1e-6
    config = DecisionTransformerConfig(
        state_dim=states.shape[1],
        act_dim=episodes[0]["actions"].shape[1],
        hidden_size=64,
        max_ep_len=1000,
        n_layer=2,
        n_head=2,
    )
    model = DecisionTransformerModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(updates):
        rows = []
        for episode in rng.choice(np.array(episodes, object), 32):
            start = int(rng.integers(len(episode["actions"]) - length))
            span = slice(start, start + length)
            to_go = (episode["rewards"][::-1].cumsum()[::-1] / scale)[span, None]
            rows.append(
                (
                    (episode["observations"][span] - mean) / std,
                    episode["actions"][span],
                    to_go,
                    np.arange(start, start + length),
                )
            )
        s, a, g = (torch.tensor(np.stack(column), dtype=torch.float32) for column in list(zip(*rows, strict=True))[:3])
        t = torch.tensor(np.stack([row[3] for row in rows]))
        predicted = model(
            states=s, actions=a, rewards=torch.zeros_like(g), returns_to_go=g, timesteps=t,
            attention_mask=torch.ones(t.shape), return_dict=True,
        ).action_preds  # fmt: skip
        loss = torch.mean((predicted - a) ** 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    (folder / "scaling.json").write_text(json.dumps({"mean": mean.tolist(), "std": std.tolist(), "scale": scale}))
