"""What the model cards of the nine gym Decision Transformers on the Hugging Face hub say, by name.

The checkpoints ``edbeeching/decision-transformer-gym-<env>-<data>`` hold no normalisation; their cards do. They were
trained on D4RL's v2 data with returns divided by 1000 (Chen et al. 2021, arXiv 2106.01345, appendix A). Three cards are
not recorded here, and the one of halfcheetah-medium-replay lists 18 standard deviations for 17 dimensions: for these
the mean and standard deviation have to be given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

OWNER = "edbeeching"
PREFIX = "decision-transformer-gym-"
DATA_SETS = ("medium", "medium-replay", "expert")
TARGET_RETURNS = {"hopper": 3600.0, "halfcheetah": 12000.0, "walker2d": 5000.0}
ENV_IDS = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4"}
"""The closest that Gymnasium still has to the environments of the data."""

# fmt: off
STATISTICS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "hopper-medium": (
        (
            1.311279, -0.08469521, -0.5382719, -0.07201576, 0.04932366, 2.1066856, -0.15017354,
            0.00878345, -0.2848186, -0.18540096, -0.28461286,
        ),
        (
            0.17790751, 0.05444621, 0.21297139, 0.14530419, 0.6124444, 0.85174465, 1.4515252,
            0.6751696, 1.536239, 1.6160746, 5.6072536,
        ),
    ),
    "hopper-medium-replay": (
        (
            1.2305138, -0.04371411, -0.44542956, -0.09370098, 0.09094488, 1.3694725, -0.19992675,
            -0.02286135, -0.5287045, -0.14465883, -0.19652697,
        ),
        (
            0.17565121, 0.06369286, 0.34383234, 0.19566889, 0.5547985, 1.0510299, 1.1583077,
            0.79631287, 1.4802359, 1.6540332, 5.108601,
        ),
    ),
    "halfcheetah-medium": (
        (
            -0.06845774, 0.01641455, -0.18354906, -0.27624607, -0.34061527, -0.09339716,
            -0.21321271, -0.08774239, 5.1730075, -0.04275195, -0.03610836, 0.14053793, 0.06049833,
            0.09550975, 0.067391, 0.00562739, 0.01338279,
        ),
        (
            0.07472999, 0.30234998, 0.3020731, 0.34417078, 0.17619242, 0.5072056, 0.25670078,
            0.32948127, 1.2574149, 0.7600542, 1.9800916, 6.5653625, 7.4663677, 4.472223, 10.566964,
            5.6719327, 7.498259,
        ),
    ),
    "halfcheetah-expert": (
        (
            -0.04489148, 0.03232588, 0.06034835, -0.17081226, -0.19480659, -0.05751596, 0.09701628,
            0.03239211, 11.047426, -0.07997331, -0.32363534, 0.36297753, 0.42322603, 0.40836546,
            1.1085187, -0.4874403, -0.0737481,
        ),
        (
            0.04002118, 0.4107858, 0.54217845, 0.41522816, 0.23796624, 0.62036866, 0.30100912,
            0.21737163, 2.2105937, 0.572586, 1.7255033, 11.844218, 12.06324, 7.0495934, 13.499867,
            7.195647, 5.0264325,
        ),
    ),
    "walker2d-medium": (
        (
            1.218966, 0.14163373, -0.03704914, -0.1381431, 0.51382244, -0.0471911, -0.47288352,
            0.04225416, 2.3948874, -0.03143199, 0.04466356, -0.02390724, -0.10134014, 0.09090938,
            -0.00419264, -0.12120572, -0.5497064,
        ),
        (
            0.12311358, 0.324188, 0.11456084, 0.26230657, 0.5640279, 0.22718786, 0.38373196,
            0.7373677, 1.2387927, 0.7980206, 1.5664079, 1.8092705, 3.0256042, 4.062486, 1.4586568,
            3.744569, 5.585129,
        ),
    ),
}
# fmt: on


def card_of(folder: Path) -> dict[str, Any]:
    """What is known of a checkpoint by the names of its folders, as keys of ``ImportOptions``; {} when nothing is.

    A folder named as on the hub is recognised, and so is the hub's own cache.
    """
    names = {f"{env}-{data}": env for env in ENV_IDS for data in DATA_SETS}
    for part in reversed(folder.absolute().parts):
        name = part.removeprefix(f"models--{OWNER}--").removeprefix(PREFIX)
        if name != part and name in names:
            env = names[name]
            card: dict[str, Any] = {"target_return": TARGET_RETURNS[env], "env_id": ENV_IDS[env]}
            if name in STATISTICS:
                card["observation_mean"], card["observation_std"] = STATISTICS[name]
            return card
    return {}
