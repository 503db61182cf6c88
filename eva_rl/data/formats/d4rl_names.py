"""What D4RL's names stand for: files, conventions, known faults.

Sources: https://github.com/Farama-Foundation/D4RL and its issues, whose numbers are given.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import urllib.request
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path

import h5py

from eva_rl.data.formats.checks import kind_of_file
from eva_rl.data.formats.hdf5 import HdfFile
from eva_rl.errors import UnknownNameError, UserError
from eva_rl.files import expanded, write_file

log = logging.getLogger(__name__)

BASE_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
TIMEOUT_SECONDS = 20

_MAZES = {
    "umaze": ("u-maze", "False", "False"),
    "umaze-diverse": ("u-maze", "True", "True"),
    "medium-play": ("big-maze", "True", "False"),
    "medium-diverse": ("big-maze", "True", "True"),
    "large-play": ("hardest-maze", "True", "False"),
    "large-diverse": ("hardest-maze", "True", "True"),
}
_KITCHEN = {
    "complete": "mini_kitchen_microwave_kettle_light_slider",
    "partial": "kitchen_microwave_kettle_light_slider",
    "mixed": "kitchen_microwave_kettle_bottomburner_light",
}


def _files() -> dict[str, str]:
    """Path below :data:`BASE_URL` of each data set that can be named."""
    files = {}
    for env in ("hopper", "halfcheetah", "walker2d", "ant"):
        for quality in ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay"):
            files[f"{env}-{quality}-v2"] = f"gym_mujoco_v2/{env}_{quality.replace('-', '_')}-v2.hdf5"
    for hand in ("pen", "hammer", "door", "relocate"):
        for origin in ("human", "cloned", "expert"):
            files[f"{hand}-{origin}-v1"] = f"hand_dapg_v1/{hand}-{origin}-v1.hdf5"
    for name, (maze, start, goal) in _MAZES.items():
        file = f"Ant_maze_{maze}_noisy_multistart_{start}_multigoal_{goal}_sparse_fixed.hdf5"
        files[f"antmaze-{name}-v2"] = f"ant_maze_v2/{file}"
    for name, file in _KITCHEN.items():
        files[f"kitchen-{name}-v0"] = f"kitchen/{file}-v0.hdf5"
    for size in ("umaze", "medium", "large"):
        files[f"maze2d-{size}-v1"] = f"maze2d/maze2d-{size}-sparse-v1.hdf5"
    return files


D4RL_FILES = _files()

ENV_IDS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}
"""Gymnasium's environment with the same observations and actions; D4RL's own is Gym's v2, with other dynamics."""

_HORIZONS = {
    r"hopper|halfcheetah|walker2d|ant(?!_?maze)": 1000,
    r"pen": 100,
    r"hammer|door|relocate": 200,
    r"kitchen|mini_kitchen": 280,
    r"ant_?maze(.*u-?maze)": 700,
    r"ant_?maze": 1000,
}
_WARNINGS = {
    r"hopper.medium.expert-v0": "its medium half is really of the mixed data (D4RL issue 19); use -v2",
    r"hopper.(medium|expert)-v1": "the medium and expert files of v1 are swapped (D4RL issue 76); use -v2",
    r"hopper.*-v1": "v1 has no timeouts and is of low quality (D4RL issue 86); use -v2",
    r"(hopper|halfcheetah|walker2d|ant(?!-?maze)).*-v0": "v0 was replaced because of faults; use -v2",
    r"antmaze.*-v[01]|ant-maze.*sparse\.": "the timeouts of v0 do not fall on the ends of episodes (D4RL issues "
    "77, 146); use -v2, whose files end in _fixed",
    r"maze2d": "it is one continuous run whose timeouts mean that a goal was reached (D4RL issues 85, 194); "
    "each goal is one episode",
}


@dataclass(frozen=True)
class Conventions:
    """How a D4RL file is to be read.

    Attributes:
        env_id: Gymnasium's environment with the same spaces, "" where there is none.
        horizon: Env steps after which an episode is cut where the file has no timeouts; None where unknown.
        goal_ends: The first terminal of an episode ends it and the rows until its timeout are left out: AntMaze,
            where terminals are repeated while the ant stays near its goal (D4RL issue 199).
        unit_actions: Actions are known to lie in [-1, 1].
        cuts: The horizon was asked for: it cuts episodes of a file that notes time limits, too.
    """

    env_id: str
    horizon: int | None
    goal_ends: bool
    unit_actions: bool
    cuts: bool = False


def conventions(name: str) -> Conventions:
    """Conventions of a data set, from its name or the name of its file."""
    name = name.lower()
    family = re.match(r"(hopper|halfcheetah|walker2d)(?=[-_])", name)
    horizons = [steps for pattern, steps in _HORIZONS.items() if re.match(rf"({pattern})(?=[-_.]|$)", name)]
    known = bool(horizons) or name.startswith("maze2d")
    return Conventions(
        env_id=ENV_IDS[family[1]] if family else "",
        horizon=horizons[0] if horizons else None,
        goal_ends=re.match(r"ant_?maze", name) is not None,
        unit_actions=known,
    )


def known_faults(name: str) -> list[str]:
    """What is known to be wrong with a data set, from its name or the name of its file."""
    return [text for pattern, text in _WARNINGS.items() if re.match(pattern, name.lower().replace("_", "-"))]


def resolve(name: str, cache: Path) -> Path:
    """The file of a named data set, downloaded into ``cache`` where it is not there yet.

    Args:
        name: For instance ``hopper-medium-v2``.
        cache: Folder of downloaded files.

    Raises:
        UserError: No such name, or it is not there and cannot be downloaded.
    """
    if name not in D4RL_FILES:
        raise UnknownNameError("D4RL data set or file", name, D4RL_FILES, "Or give d4rl:PATH of an HDF5 file.")
    file = Path(D4RL_FILES[name]).name
    own = expanded(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets"))
    for folder in (cache, own):
        for spelling in (file, f"{name}.hdf5"):
            if (folder / spelling).is_file() and (folder != cache or h5py.is_hdf5(folder / spelling)):
                return folder / spelling
    download(os.environ.get("D4RL_BASE_URL", BASE_URL) + D4RL_FILES[name], cache / file)
    return cache / file


def download(url: str, path: Path) -> None:
    """Fetch a file, completely or not at all.

    Raises:
        UserError: It cannot be reached, what comes is no whole HDF5 file, or the disk is full; nothing is kept then.
    """
    log.info("Downloading %s to %s.", url, path)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            write_file(path, lambda aside: _copy(answer, aside))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{url} could not be downloaded: {getattr(error, 'reason', error)}. Fetch that file on a machine with a "
            f"network and put it at {path}, or give d4rl:PATH of the file."
        ) from error


def _copy(answer: HTTPResponse, aside: Path) -> None:
    with aside.open("wb") as file:
        shutil.copyfileobj(answer, file)
        expected, got = answer.headers.get("Content-Length"), file.tell()
    if expected is not None and int(expected) != got:
        raise ValueError(f"the connection ended after {got} of {expected} bytes")
    try:
        with HdfFile(aside):  # fails on a file that is cut short, too
            pass
    except UserError as error:
        kind = kind_of_file(aside) or "not a whole HDF5 file"
        raise ValueError(f"the server's answer is {kind}, expected an HDF5 file") from error
