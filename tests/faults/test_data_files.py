"""Our own data files with any damage: the same data or one error, and never a library that does not come back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eva_rl.data import Trajectories, load_dataset, write_episodes, write_store
from eva_rl.errors import UserError
from tests.data.making import differences, random_trajectories

pytestmark = pytest.mark.timeout(120)
QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
PLACES = st.floats(0, 1, exclude_max=True)


@pytest.fixture(scope="module")
def data() -> Trajectories:
    return random_trajectories()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, data: Trajectories) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_episodes(folder / "a.h5", data, {"note": "text " * 20})
    write_store(folder / "store", [data], "x")
    return folder


def is_sound_or_refused(source: Path, data: Trajectories) -> None:
    try:
        loaded = load_dataset(str(source))
    except UserError:
        return
    assert differences(loaded, data) == []


@QUICK
@given(place=PLACES, filler=st.sampled_from([b"\0", b"\xff", b"\x01", b"random"]), length=st.integers(1, 80))
def test_a_block_of_a_file_of_episodes(
    tmp_path_factory: pytest.TempPathFactory, sound: Path, data: Trajectories, place: float, filler: bytes, length: int
) -> None:
    content = bytearray((sound / "a.h5").read_bytes())
    begin = int(place * len(content))
    content[begin : begin + length] = (filler * length)[: min(length, len(content) - begin)]
    path = tmp_path_factory.mktemp("damaged") / "a.h5"
    path.write_bytes(content)
    is_sound_or_refused(path, data)


@pytest.mark.parametrize("offset", range(0, 160, 8))
def test_the_texts_of_a_file_of_episodes(tmp_path: Path, sound: Path, data: Trajectories, offset: int) -> None:
    """HDF5 walks its heap of texts by the sizes in it; zeros there are steps of no length."""
    content = bytearray((sound / "a.h5").read_bytes())
    begin = content.index(b"GCOL") + 16 + offset
    content[begin : begin + 64] = bytes(64)
    (tmp_path / "a.h5").write_bytes(content)
    is_sound_or_refused(tmp_path / "a.h5", data)


@QUICK
@given(
    name=st.sampled_from(["observations", "actions", "rewards", "terminations", "offsets", "final_observations"]),
    place=PLACES,
    bits=st.integers(1, 255),
)
def test_a_byte_of_a_store(
    tmp_path_factory: pytest.TempPathFactory, sound: Path, data: Trajectories, name: str, place: float, bits: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "store"
    shutil.copytree(sound / "store", folder)
    content = bytearray((folder / f"{name}.npy").read_bytes())
    content[int(place * len(content))] ^= bits
    (folder / f"{name}.npy").write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}\.npy is damaged or was changed"):
        load_dataset(str(folder))


@pytest.mark.parametrize("one", ["observations", "actions", "rewards", "terminations"])
@pytest.mark.parametrize("other", ["final_observations", "truncations", "target_actions", "successes"])
def test_exchanged_files_of_a_store(tmp_path: Path, sound: Path, one: str, other: str) -> None:
    shutil.copytree(sound / "store", tmp_path / "store")
    shutil.copyfile(sound / "store" / f"{other}.npy", tmp_path / "store" / f"{one}.npy")
    with pytest.raises(UserError, match=rf"{one}\.npy is damaged or was changed"):
        load_dataset(str(tmp_path / "store"))
