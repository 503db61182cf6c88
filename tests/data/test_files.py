"""Our own files, stores, folders of episodes and pickles."""

from __future__ import annotations

import collections
import io
import json
import mmap
import os
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from eva_rl.data import (
    Trajectories,
    concatenate,
    load_dataset,
    read_episodes,
    read_store,
    sources,
    write_episodes,
    write_store,
)
from eva_rl.data.formats.hdf5 import HdfFile
from eva_rl.data.formats.pickles import read_pickle
from eva_rl.errors import UserError
from tests import forks
from tests.data.making import differences, random_trajectories, table, write_h5


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVA_RL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_file_and_store_round_trip(tmp_path: Path) -> None:
    data = random_trajectories()
    write_episodes(tmp_path / "a.h5", data, {"seed": 3})
    write_store(tmp_path / "store", [data.select([0]), data.select([1, 2])], "parts")
    for source in (str(tmp_path / "a.h5"), f"trajectories:{tmp_path}/a.h5", str(tmp_path / "store")):
        assert differences(load_dataset(source), data) == []
    assert read_episodes(tmp_path / "a.h5").metadata["seed"] == "3"
    assert read_episodes(tmp_path / "a.h5").content_hash == data.content_hash
    assert read_store(tmp_path / "store").source == "parts"


def test_arrays_of_a_file_are_closed_when_they_are_read(tmp_path: Path) -> None:
    """HDF5 keeps what was read of an open array: converting a file took three times its size in memory."""
    write_episodes(tmp_path / "a.h5", random_trajectories())
    with HdfFile(tmp_path / "a.h5") as file:
        for name in ("episode_0", "episode_1", "episode_0"):
            assert len(file.read(f"{name}/observations"))
            assert h5py.h5f.get_obj_count(file._file.id, h5py.h5f.OBJ_DATASET) == 0


@pytest.mark.parametrize("suffix", [".h5", ""])
def test_bounds_hold_for_target_actions_too(tmp_path: Path, suffix: str) -> None:
    """They are what a clone does, and were neither checked nor moved to the bound."""
    data, path = random_trajectories(), tmp_path / f"a{suffix}"
    assert data.target_actions is not None
    write = write_episodes if suffix else lambda path, data: write_store(path, [data], "far")
    write(path, replace(data, target_actions=3 * data.target_actions))
    with pytest.raises(UserError, match=r"target_actions, row \d+: -?[12]\.\d+ .* outside the bounds -1 to 1"):
        load_dataset(path, action_bounds=(-1, 1))
    moved = load_dataset(f"{path}?actions=clip", action_bounds=(-1, 1))
    assert np.array_equal(moved.target_actions, np.clip(3 * data.target_actions, -1, 1))
    assert np.array_equal(moved.actions, data.actions)
    assert load_dataset(f"{path}?actions=keep", action_bounds=(-1, 1)).target_actions.max() > 1


@pytest.mark.parametrize("suffix", [".h5", ""])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("keys=eef,gripper", "observations is one array, without parts"),
        ("actions=clip", "nothing says what the bounds"),
    ],
)
def test_options_that_a_file_of_ours_cannot_follow_are_refused(
    tmp_path: Path, suffix: str, options: str, told: str
) -> None:
    """A store passed them over."""
    data, path = random_trajectories(), tmp_path / f"a{suffix}"
    write_episodes(path, data) if suffix else write_store(path, [data], "mine")
    with pytest.raises(UserError, match=told):
        load_dataset(f"{path}?{options}")


def test_the_content_hash_tells_target_actions_apart() -> None:
    data = random_trajectories()
    assert data.target_actions is not None
    plain = replace(data, target_actions=None)
    assert (
        len({data.content_hash, plain.content_hash, replace(data, target_actions=-data.target_actions).content_hash})
        == 3
    )
    assert plain.content_hash == replace(plain, successes=None).content_hash


def test_a_success_lasts(tmp_path: Path) -> None:
    """Some files say of each env step alone whether it succeeded."""
    data = random_trajectories((4,))
    write_episodes(tmp_path / "a.h5", replace(data, successes=np.array([False, True, False, False])))
    found = read_episodes(tmp_path / "a.h5").successes
    assert found is not None
    assert found.tolist() == [False, True, True, True]


def test_what_is_unknown_stays_unknown(tmp_path: Path) -> None:
    data = load_dataset(f"d4rl:{write_h5(tmp_path / 'a.hdf5', table())}")
    write_store(tmp_path / "store", [data], "")
    write_episodes(tmp_path / "a.h5", data)
    for again in (read_store(tmp_path / "store"), read_episodes(tmp_path / "a.h5")):
        assert again.successes is None
        assert again.target_actions is None
    joined = concatenate([data, data])
    assert joined.successes is None
    assert joined.offsets.tolist() == [0, 4, 7, 12, 16, 19, 24]
    mixed = concatenate([random_trajectories((2,), dims=(2, 1)), data])
    assert mixed.successes is not None
    assert not mixed.successes[2:].any()
    assert np.array_equal(mixed.column("target_actions")[2:], data.actions)


def test_more_than_ten_episodes_stay_in_order(tmp_path: Path) -> None:
    data = random_trajectories(tuple(range(1, 13)))
    write_episodes(tmp_path / "a.h5", data)
    assert read_episodes(tmp_path / "a.h5").lengths.tolist() == list(range(1, 13))


def is_mapped(array: object) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def test_mapped_data_are_what_is_read(tmp_path: Path, cache: Path) -> None:
    path = write_h5(tmp_path / "a.hdf5", table())
    mapped = load_dataset(f"d4rl:{path}", memory_map=True)
    assert differences(mapped, load_dataset(f"d4rl:{path}")) == []
    assert is_mapped(mapped.observations)
    with pytest.raises(ValueError, match="read-only"):
        mapped.observations[0] = 1
    (first,) = (path for path in (cache / "stores").iterdir() if path.is_dir())
    before = (first / "observations.npy").stat().st_mtime_ns
    load_dataset(f"d4rl:{path}", memory_map=True)
    assert (first / "observations.npy").stat().st_mtime_ns == before  # mapped again, not converted again
    write_h5(path, table(rewards=np.zeros(12)))
    os.utime(path, ns=(1, 1))
    assert load_dataset(f"d4rl:{path}", memory_map=True).returns.tolist() == [0, 0, 0]  # a changed file is converted


def test_data_that_are_large_for_this_memory_are_mapped_unasked(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_h5(tmp_path / "a.hdf5", table())
    assert not is_mapped(load_dataset(f"d4rl:{path}").observations)
    monkeypatch.setattr(sources, "memory_limit", lambda: path.stat().st_size * 2)
    assert is_mapped(load_dataset(f"d4rl:{path}").observations)


def test_what_lies_beside_the_data_counts_as_well(tmp_path: Path, cache: Path) -> None:
    """A map was taken for that of other lengths, or of metadata that said something else."""
    np.savez(tmp_path / "0.npz", observations=np.zeros((4, 2)), actions=np.zeros((4, 1)), rewards=np.zeros(4))
    load_dataset(tmp_path, memory_map=True)
    (tmp_path / "episode_lengths.json").write_text('{"0.npz": 9}')
    with pytest.raises(UserError, match="expected 9"):
        load_dataset(tmp_path, memory_map=True)


@pytest.mark.parametrize("name", ["push.0", "push.0.npz", "task/push.0"])
def test_lengths_are_those_of_names_with_dots(tmp_path: Path, name: str) -> None:
    """What follows the last dot was cut off a name without a suffix, and the file not checked."""
    steps = {"observations": np.zeros((4, 2)), "actions": np.zeros((4, 1)), "rewards": np.zeros(4)}
    np.savez(tmp_path / "push.0.npz", **steps)
    (tmp_path / "episode_lengths.json").write_text(json.dumps({name: 9}))
    with pytest.raises(UserError, match=r"push\.0\.npz: rewards has 4 rows, expected 9: episode_lengths"):
        load_dataset(tmp_path)


def test_processes_that_want_the_same_data_convert_them_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One would move away what the other maps, or find its folder not empty."""
    path, log = write_h5(tmp_path / "a.hdf5", table()), tmp_path / "log"
    parts = sources._parts

    def slowly(*arguments: Any) -> Any:
        with log.open("a") as file:
            file.write("converted\n")
        time.sleep(0.2)
        return parts(*arguments)

    monkeypatch.setattr(sources, "_parts", slowly)

    def load() -> int:
        return int(load_dataset(f"d4rl:{path}", memory_map=True).num_steps != 12)

    processes = [forks.start(load, tmp_path / "out") for _ in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0], (tmp_path / "out").read_text()
    assert log.read_text() == "converted\n"


def episode_arrays(steps: int, number: int) -> dict[str, np.ndarray]:
    return {
        "states": np.full((steps, 2), number, np.float32),
        "actions": np.zeros((steps, 1), np.float32),
        "rewards": np.ones(steps, np.float32),
        "dones": np.arange(steps) == steps - 1,
        "returns_to_go": np.arange(steps, 0, -1),
    }


@pytest.mark.parametrize("suffix", [".npz", ".hdf5", ".pkl"])
def test_one_file_per_episode(tmp_path: Path, suffix: str) -> None:
    lengths = {f"{number}{suffix}": number + 1 for number in range(11)}
    for number, (name, steps) in enumerate(lengths.items()):
        arrays = episode_arrays(steps, number)
        if suffix == ".npz":
            np.savez(tmp_path / name, **arrays)
        elif suffix == ".pkl":
            (tmp_path / name).write_bytes(pickle.dumps(arrays))
        else:
            write_h5(tmp_path / name, arrays)
    (tmp_path / "episode_lengths.json").write_text(json.dumps(lengths))
    data = load_dataset(f"trajectories:{tmp_path}", allow_pickle=True)
    assert data.lengths.tolist() == list(range(1, 12))  # by number: 10 after 9
    assert data.observations[data.offsets[:-1], 0].tolist() == list(range(11))
    assert data.truncations.sum() == 11
    assert not data.terminations.any()  # dones does not say that the environment ended the episode
    (tmp_path / "episode_lengths.json").write_text(json.dumps(lengths | {f"4{suffix}": 9}))
    with pytest.raises(UserError, match=rf"4{suffix}: .*rewards has 5 rows, expected 9: episode_lengths.json"):
        load_dataset(f"trajectories:{tmp_path}", allow_pickle=True)


def kzl() -> list[dict[str, np.ndarray]]:
    """What the Decision Transformer's own scripts pickle: the second episode ran into its time limit."""
    episodes = []
    for number, terminal in ((1, True), (2, False)):
        rows = np.arange(3, dtype=np.float32)[:, None] + 10 * number
        terminals = np.array([False, False, terminal])
        episode = {"observations": rows, "next_observations": rows + 1, "actions": rows / 100, "rewards": np.ones(3)}
        episodes.append(episode | {"terminals": terminals})
    return episodes


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_lists(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "hopper-medium-v2.pkl"
    path.write_bytes(pickle.dumps(kzl(), protocol=protocol))
    with pytest.raises(UserError, match="allow_pickle=true"):
        load_dataset(f"trajectories:{path}")
    data = load_dataset(f"trajectories:{path}", allow_pickle=True)
    assert data.terminations.tolist() == [False, False, True, False, False, False]
    assert data.truncations.tolist() == [False, False, False, False, False, True]
    assert data.final_observations.tolist() == [[13.0], [23.0]]
    assert data.actions.tolist() == [[row.item()] for row in np.concatenate([e["actions"] for e in kzl()])]


class Bomb:
    """Writes a file when it is unpickled without restrictions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "nested", [lambda bomb: bomb, lambda bomb: [{"a": bomb}], lambda bomb: np.array([bomb], object)]
)
def test_pickles_run_nothing(tmp_path: Path, nested: object) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(nested(Bomb(tmp_path / "gone off"))))  # type: ignore[operator]
    with pytest.raises(
        UserError, match=r"wants posix.mkdir, which is neither a numpy array|an array of .O8., expected numbers"
    ):
        load_dataset(f"trajectories:{path}", allow_pickle=True)
    assert not (tmp_path / "gone off").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "gone off").exists()  # it would have


@pytest.mark.parametrize(
    "name", ["builtins\neval", "builtins\ngetattr", "os\nsystem", "numpy\nload", "_codecs\ndecode"]
)
def test_pickles_name_nothing_else(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(b"c" + name.encode() + b"\n.")
    with pytest.raises(UserError, match="is not opened: it wants"):
        read_pickle(path, True)


def test_pickles_admit_builtin_containers(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    content = [{"a": (1, 2.5, "x", b"y", None, True)}, {1, 2}, frozenset({3}), bytearray(b"z"), np.float32(4)]
    path.write_bytes(pickle.dumps(content))
    assert read_pickle(path, True) == content
    path.write_bytes(pickle.dumps(collections.OrderedDict(a=1)))
    assert read_pickle(path, True) == {"a": 1}


@pytest.mark.parametrize("content", [3, [], [3], {"a": 1}, [{"observations": np.array(["x"])}], {1: 2}])
def test_pickles_of_other_things(tmp_path: Path, content: object) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"a\.pkl"):
        load_dataset(f"trajectories:{path}", allow_pickle=True)


def test_npz_with_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", **episode_arrays(3, 0) | {"actions": np.array([Bomb(tmp_path / "gone off")] * 3)})
    with pytest.raises(UserError, match=r"0\.npz.*allow_pickle=False"):
        load_dataset(f"trajectories:{tmp_path}", allow_pickle=True)
    assert not (tmp_path / "gone off").exists()


def spoil(folder: Path, name: str, array: np.ndarray) -> None:
    """Another array in a store of format 1, which has no digests."""
    np.save(folder / f"{name}.npy", array)
    index = json.loads((folder / "trajectories.json").read_text())
    del index["sha256"]
    (folder / "trajectories.json").write_text(json.dumps(index | {"format": 1}))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("rewards", np.zeros(10, np.float32), "rewards has 10 rows, expected 11"),
        ("rewards", np.zeros(11), r"rewards\.npy holds float64"),
        (
            "observations",
            np.zeros(33, np.float32),
            r"observations\.npy holds float32 with 1 axes, expected float32 with 2",
        ),
        ("offsets", np.array([0, 4, 4, 11]), "episode 1 is empty"),
        ("offsets", np.array([1, 4, 11]), "start with 1"),
        ("offsets", np.array([0]), "no episode"),
        ("actions", np.array([None]), r"actions\.npy: not readable"),
    ],
)
def test_damaged_stores(tmp_path: Path, name: str, array: np.ndarray, message: str) -> None:
    folder = tmp_path / "store"
    write_store(folder, [random_trajectories()], "x")
    spoil(folder, name, array)
    with pytest.raises(UserError, match=message):
        load_dataset(str(folder))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"format": 1, "columns": ["observations"]}', '{"format": 1, "columns": ["x"]}']
)
def test_damaged_index(tmp_path: Path, text: str) -> None:
    write_store(tmp_path / "store", [random_trajectories()], "x")
    (tmp_path / "store" / "trajectories.json").write_text(text)
    with pytest.raises(UserError, match=r"trajectories\.json"):
        load_dataset(str(tmp_path / "store"))


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "final_observations", "successes", "offsets"])
def test_every_array_of_a_store_has_its_digest(tmp_path: Path, name: str) -> None:
    write_store(tmp_path / "store", [random_trajectories()], "x")
    content = bytearray((tmp_path / "store" / f"{name}.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "store" / f"{name}.npy").write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}\.npy is damaged or was changed"):
        load_dataset(str(tmp_path / "store"))


@pytest.mark.parametrize("change", [{"env_id": "Hopper-v5"}, {"columns": []}, {"metadata": {"a": 1}}, {"format": 1}])
def test_the_index_of_a_store_has_its_digest(tmp_path: Path, change: dict[str, object]) -> None:
    write_store(tmp_path / "store", [random_trajectories()], "x")
    file = tmp_path / "store" / "trajectories.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=r"trajectories\.json"):
        load_dataset(str(tmp_path / "store"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("episode_0/rewards", np.zeros(4, np.float32)), ("episode_2/infos/success", np.zeros(6, bool)), ("env_id", "A")],
)
def test_files_of_episodes_have_a_digest(tmp_path: Path, key: str, value: object) -> None:
    write_episodes(tmp_path / "a.h5", random_trajectories())
    with h5py.File(tmp_path / "a.h5", "a") as file:
        if key in file:
            del file[key]
            file[key] = value
        else:
            file.attrs[key] = value
    with pytest.raises(UserError, match=r"a\.h5 is damaged or was changed"):
        load_dataset(str(tmp_path / "a.h5"))


@pytest.mark.parametrize("dims", [(4, 2), (3, 1)])
def test_a_store_of_parts_that_differ_is_not_written(dims: tuple[int, int], tmp_path: Path) -> None:
    """Rows of another width, one after the other, were read back as rows of the first one's."""
    parts = [random_trajectories(), random_trajectories(dims=dims)]
    with pytest.raises(UserError, match=r"numbers in an observation and . in an action.*Join data of one kind"):
        write_store(tmp_path / "store", parts, "both")
    assert not (tmp_path / "store").exists()


def test_a_store_says_of_its_parts_what_all_say(tmp_path: Path) -> None:
    one = replace(random_trajectories(), env_id="A-v0", metadata={"author": "x"})
    other = replace(one, env_id="B-v0", metadata={})
    for name, parts in {"same": [one, one], "other": [one, other]}.items():
        write_store(tmp_path / name, parts, "both")
        stored, joined = read_store(tmp_path / name), concatenate(parts)
        assert (stored.env_id, stored.metadata) == (joined.env_id, joined.metadata)


def test_unfinished_stores_are_not_there(tmp_path: Path) -> None:
    def parts() -> collections.abc.Iterator[Trajectories]:
        yield random_trajectories()
        raise UserError("row 7 is bad")

    with pytest.raises(UserError, match="row 7"):
        write_store(tmp_path / "store", parts(), "x")
    with pytest.raises(UserError, match="no episode"):
        write_store(tmp_path / "store", [], "x")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_episodes(tmp_path / "a.h5", random_trajectories())
    with pytest.raises(UserError, match="exists and is not overwritten"):
        write_episodes(tmp_path / "a.h5", random_trajectories())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("d4r:x", "Did you mean 'd4rl'"),
        ("d4rl:", "names no data"),
        ("d4rl:x?horizon=0", "horizon='0'.*number of env steps"),
        ("d4rl:x?actions=drop", "check or clip or keep"),
        ("folder?horizon=3", "horizon=3 in the data source: only d4rl: cuts episodes"),
        ("d4rl:x?keys=a,b", "keys=a,b in the data source: observations of d4rl: have no parts"),
        ("d4rl:x?clip=1", "Unknown option of a data source 'clip'"),
        ("/nowhere/at/all", "No data at /nowhere/at/all"),
        ("trajectories:/nowhere", "No data at /nowhere"),
    ],
)
def test_sources(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_dataset(source)


@pytest.mark.parametrize("name", ["what?.npz", "data?v=2.npz", "a?actions=clip", "q?keys=a,b"])
def test_a_path_may_hold_a_question_mark(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was read as options, which there are not."""
    path = tmp_path / name
    steps = {"observations": np.zeros((4, 2)), "actions": np.full((4, 1), 9.0), "rewards": np.zeros(4)}
    where = path if path.suffix == ".npz" else path / "0.npz"
    where.parent.mkdir(exist_ok=True)
    np.savez(where, **steps)
    for source in (str(path), f"trajectories:{path}", f"{path}?actions=keep"):
        assert load_dataset(source, action_bounds=([9], [9])).num_episodes == 1
    assert load_dataset(f"{path}?actions=clip", action_bounds=([-1], [1])).actions.max() == 1
    monkeypatch.chdir(tmp_path)
    assert load_dataset(name).num_episodes == 1
    with pytest.raises(UserError, match=r"No data at .*nothing\?\.npz"):
        load_dataset("nothing?.npz")


def test_written_files_carry_checksums(tmp_path: Path) -> None:
    write_episodes(tmp_path / "a.h5", random_trajectories())
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["episode_0/rewards"].fletcher32
    content = bytearray((tmp_path / "a.h5").read_bytes())
    place = content.index(random_trajectories().actions[:4].tobytes())
    content[place] ^= 1
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(UserError, match="episode_0/actions: not readable"):
        read_episodes(tmp_path / "a.h5")
    assert io.BytesIO(content).read(4) == b"\x89HDF"
