"""Files of other libraries and of no library: read where their layout is known, else named with what would fit."""

from __future__ import annotations

import json
import logging
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from eva_rl.data import Trajectories, load_dataset, write_episodes, write_store
from eva_rl.data.formats import minari_file
from eva_rl.data.formats.episodes import ReadOptions
from eva_rl.data.formats.hdf5 import HdfFile
from eva_rl.errors import UserError
from tests.data.making import differences, random_trajectories, table, write_h5


def d3rlpy(data: Trajectories, version: str = "2.1") -> dict[str, Any]:
    """What d3rlpy's ``dump`` writes: T rows of everything, one flag an episode."""
    arrays: dict[str, Any] = {"columns": ["observations"], "num_episodes": data.num_episodes, "version": version}
    for index in range(data.num_episodes):
        episode = data.episode(index)
        arrays[f"observations_{index}"] = episode.observations[:-1]
        arrays[f"actions_{index}"] = episode.actions
        arrays[f"rewards_{index}"] = episode.rewards[:, None]
        arrays[f"terminated_{index}"] = bool(episode.terminations[-1])
    return arrays


def repeated(data: Trajectories) -> Trajectories:
    """The same where the observation after the last env step is not known."""
    last = data.observations[data.offsets[1:] - 1]
    return Trajectories(**{**vars_of(data), "final_observations": last, "successes": None, "target_actions": None})


def vars_of(data: Trajectories) -> dict[str, Any]:
    fields = ("observations", "actions", "rewards", "terminations", "truncations", "final_observations", "offsets")
    return {name: getattr(data, name) for name in fields}


def test_d3rlpy(tmp_path: Path) -> None:
    data = random_trajectories(tuple(range(1, 13)))
    path = write_h5(tmp_path / "buffer.h5", d3rlpy(data))
    assert differences(load_dataset(str(path)), repeated(data)) == []  # 10 comes after 9


def test_d3rlpy_s_names_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are several for each episode: listing them for each one takes the square of the time."""
    listed, names = [], HdfFile.names

    def counting(file: HdfFile, group: str = "") -> list[str]:
        listed.append(group)
        return names(file, group)

    monkeypatch.setattr(HdfFile, "names", counting)
    counts = []
    for episodes in (3, 12):
        listed.clear()
        load_dataset(str(write_h5(tmp_path / f"{episodes}.h5", d3rlpy(random_trajectories((2,) * episodes)))))
        counts.append(len(listed))
    assert counts[0] == counts[1]


def test_parts_of_a_file_of_episodes_have_about_as_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minari_file, "PART_ROWS", 5)
    write_episodes(tmp_path / "a.h5", random_trajectories((2, 2, 3, 6, 1, 1)))
    parts = list(minari_file.iterate_episodes(tmp_path / "a.h5", ReadOptions()))
    assert [part.lengths.tolist() for part in parts] == [[2, 2, 3], [6], [1, 1]]


def test_d3rlpy_with_tuples(tmp_path: Path) -> None:
    data = random_trajectories((3, 2))
    arrays = d3rlpy(data)
    for index in range(2):
        both = arrays.pop(f"observations_{index}")
        arrays[f"observations_{index}_0"], arrays[f"observations_{index}_1"] = both[:, :1], both[:, 1:]
    assert differences(load_dataset(str(write_h5(tmp_path / "b.h5", arrays))), repeated(data)) == []


def test_version_1_of_d3rlpy_is_a_table(tmp_path: Path) -> None:
    arrays = table(timeouts=None, next_observations=None)
    ends = np.isin(np.arange(12), [3, 6, 11]).astype(np.float32)
    path = write_h5(tmp_path / "a.h5", arrays | {"episode_terminals": ends, "version": "1.0"})
    data = load_dataset(f"d4rl:{path}")
    assert data.lengths.tolist() == [4, 3, 5]
    assert (data.terminations.sum(), np.flatnonzero(data.truncations).tolist()) == (1, [6, 11])
    with pytest.raises(UserError, match=r"row 3: an episode ends there and the file goes on.*d4rl:"):
        load_dataset(str(path))


def robomimic(path: Path, keys: tuple[str, ...] = ("eef", "gripper")) -> Path:
    with h5py.File(path, "w") as file:
        for demo, steps in enumerate((3, 2)):
            group = file.create_group(f"data/demo_{demo}")
            group["actions"], group["rewards"] = np.full((steps, 2), 0.5), np.zeros(steps)
            group["dones"], group["states"] = np.ones(steps), np.zeros((steps, 9))
            for column, key in enumerate(keys):
                group[f"obs/{key}"] = np.full((steps, 2), 10.0 * column + demo)
                group[f"next_obs/{key}"] = np.full((steps, 2), 10.0 * column + demo + 0.5)
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift"})
    return path


def test_robomimic(tmp_path: Path) -> None:
    path = robomimic(tmp_path / "low_dim.hdf5")
    data = load_dataset(f"{path}?keys=gripper,eef")
    assert data.lengths.tolist() == [3, 2]
    assert data.observations[3].tolist() == [11.0, 11.0, 1.0, 1.0]
    assert data.final_observations[1].tolist() == [11.5, 11.5, 1.5, 1.5]
    assert np.flatnonzero(data.truncations).tolist() == [2, 4]
    assert not data.terminations.any()
    assert data.env_id == "Lift"
    with pytest.raises(UserError, match=r"data/demo_0/obs has the parts eef, gripper.*\?keys=eef,gripper"):
        load_dataset(str(path))
    assert load_dataset(str(robomimic(tmp_path / "one.hdf5", ("state",)))).observation_dim == 2


def test_robomimic_without_observations(tmp_path: Path) -> None:
    path = robomimic(tmp_path / "raw.hdf5")
    with h5py.File(path, "a") as file:
        for demo in range(2):
            del file[f"data/demo_{demo}/obs"], file[f"data/demo_{demo}/next_obs"]
    with pytest.raises(UserError, match=r"data/demo_0/obs is missing.*holds actions, dones, rewards, states"):
        load_dataset(str(path))


def write(path: Path, arrays: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(arrays))
    else:
        write_h5(path, arrays)
    return path


DONES = {name: value for name, value in table().items() if name not in {"terminals", "timeouts"}} | {
    "dones": np.isin(np.arange(12), [3, 6, 11])
}


@pytest.mark.parametrize("name", ["dones", "done", "timeout", "truncation"])
@pytest.mark.parametrize("suffix", [".npz", ".pkl", ".hdf5"])
def test_tables_of_several_episodes_are_cut_at_their_ends(tmp_path: Path, suffix: str, name: str) -> None:
    """A column ``done`` was passed over: one episode of twelve steps."""
    arrays = {name if key == "dones" else key: value for key, value in DONES.items()}
    data = load_dataset(str(write(tmp_path / f"a{suffix}", arrays)), allow_pickle=True)
    assert data.lengths.tolist() == [4, 3, 5]
    assert np.flatnonzero(data.truncations).tolist() == [3, 6, 11]
    assert data.final_observations[:, 0].tolist() == [3.5, 6.5, 11.5]
    assert data.rewards.tolist() == [10.0 * row for row in range(12)]


HELD = {
    "dones": (
        DONES,
        "d4rl:",
        r"terminals is missing.*holds actions, dones, .*dones does not say.*trajectories:",
    ),
    "Gymnasium's ends": (
        {"truncations" if name == "dones" else name: value for name, value in DONES.items()},
        "d4rl:",
        r"terminals is missing.*holds .*truncations.*under Gymnasium's names, name it trajectories:",
    ),
    "d3rlpy": (
        d3rlpy(random_trajectories()),
        "d4rl:",
        r"observations is missing.*d3rlpy's layout: .* trajectories:",
    ),
    "table": (table(), "", r"row 3: an episode ends there and the file goes on.*D4RL's layout: name it d4rl:"),
    "other names": (
        {"s": np.zeros((3, 2)), "a": np.zeros((3, 1)), "r": np.zeros(3)},
        "",
        r"observations is missing; expected observations or states or obs\. .* holds a, r, s\.",
    ),
    "minari": ({"episode_0/rewards": np.zeros(3)}, "d4rl:", r"Minari's layout: name it trajectories:"),
    "robomimic": ({"data/demo_0/rewards": np.zeros(3)}, "d4rl:", r"robomimic's layout .*name it trajectories:"),
    "no rewards": (
        {"episode_0/observations": np.zeros((3, 2)), "episode_0/acts": np.zeros((2, 1))},
        "",
        r"episode_0/actions is missing.*holds acts, observations",
    ),
}


@pytest.mark.parametrize("case", HELD)
def test_what_is_missing_is_named_with_what_there_is(tmp_path: Path, case: str) -> None:
    arrays, kind, message = HELD[case]
    path = write_h5(tmp_path / "a.hdf5", arrays)
    with pytest.raises(UserError, match=message):
        load_dataset(f"{kind}{path}")


@pytest.mark.parametrize("suffix", [".npz", ".pkl"])
def test_other_names_are_listed(tmp_path: Path, suffix: str) -> None:
    arrays = {"obs": np.zeros((3, 2)), "acts": np.zeros((3, 1)), "reward": np.zeros(3)}
    with pytest.raises(UserError, match=r"rewards is missing; expected rewards or rews.*holds acts, obs, reward\."):
        load_dataset(str(write(tmp_path / f"a{suffix}", arrays)), allow_pickle=True)


CONTENTS = {
    "an HTML or XML page": b"<!DOCTYPE html><html>404</html>",
    "a pickle; name it trajectories:PATH and add data.allow_pickle=true": pickle.dumps([DONES]),
    r"a zip archive, as \.npz files are": b"PK\x03\x04" + bytes(40),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "a gzip archive": b"\x1f\x8b\x08" + bytes(20),
    "JSON": b'\n {"message": "not found"}',
}


@pytest.mark.parametrize("kind", ["d4rl:", "trajectories:"])
@pytest.mark.parametrize("content", CONTENTS)
def test_other_files_are_recognised(tmp_path: Path, kind: str, content: str) -> None:
    (tmp_path / "a.hdf5").write_bytes(CONTENTS[content])
    with pytest.raises(UserError, match=rf"a\.hdf5: not readable: it is not an HDF5 file but {content}"):
        load_dataset(f"{kind}{tmp_path / 'a.hdf5'}")


@pytest.mark.parametrize("suffix", [".csv", ".npy", ""])
def test_other_suffixes(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(UserError, match=r"is an HDF5 file: expected a file \.h5, \.hdf5, \.npz"):
        load_dataset(str(tmp_path / f"a{suffix}"))


def never_true(layout: str, path: Path) -> Path:
    """Episodes of 3 and 2 env steps whose flags are there and never true."""
    for index, steps in enumerate((3, 2)):
        arrays = {"observations": np.zeros((steps + 1, 2)), "actions": np.zeros((steps, 1)), "rewards": np.ones(steps)}
        none = np.zeros(steps, bool)
        if layout == "minari":
            with h5py.File(path / "a.h5", "a") as file:
                for name, array in (arrays | {"terminations": none, "truncations": none}).items():
                    file[f"episode_{index}/{name}"] = array
        else:
            flags = {"dones": {"dones": none}, "both": {"terminals": none, "timeouts": none}, "none": {}}[layout]
            np.savez(path / f"{index}.npz", **arrays, **flags)
    return path / "a.h5" if layout == "minari" else path


@pytest.mark.parametrize("layout", ["minari", "dones", "both", "none"])
def test_an_episode_without_an_end_is_truncated_and_said(
    tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        data = load_dataset(str(never_true(layout, tmp_path)))
    assert np.flatnonzero(data.truncations).tolist() == [2, 4]
    assert not data.terminations.any()
    assert "2 of 2 episodes have no end flag that is true. Their last row counts as a truncation." in caplog.text


def test_timeouts_that_are_never_true_are_counted(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "mine.hdf5", table(timeouts=np.zeros(12, bool)))
    assert load_dataset(f"d4rl:{path}?horizon=3").lengths.tolist() == [3, 1, 3, 3]
    assert load_dataset(f"d4rl:{path}").lengths.tolist() == [4]


@pytest.mark.parametrize("form", ["dict", "list", "lists of numbers", "from_arrays", "trajectories"])
def test_data_in_memory(form: str) -> None:
    arrays = {name: value for name, value in table().items() if name != "next_observations"}
    if form == "dict":
        data = load_dataset(arrays)
    elif form == "list":
        data = load_dataset([{k: v[a:b] for k, v in arrays.items()} for a, b in ((0, 4), (4, 7), (7, 12))])
    elif form == "lists of numbers":
        data = load_dataset({name: value.tolist() for name, value in arrays.items()})
    else:
        names = {"terminals": "terminations", "timeouts": "truncations"}
        data = Trajectories.from_arrays(**{names.get(k, k): v for k, v in arrays.items()}, env_id="Pendulum-v1")
        data = load_dataset(data) if form == "trajectories" else data
        assert data.env_id == "Pendulum-v1"
    assert data.lengths.tolist() == [4, 3, 5]
    assert np.flatnonzero(data.terminations).tolist() == [3]
    assert np.flatnonzero(data.truncations).tolist() == [6, 11]
    assert data.final_observations[:, 0].tolist() == [3.0, 6.0, 11.0]


@pytest.mark.parametrize("missing", ["terminals", "success"])
def test_none_in_a_dict_is_an_array_that_is_not_there(missing: str) -> None:
    arrays = table() | {"success": np.zeros(12)}
    expected = load_dataset({name: value for name, value in arrays.items() if name != missing})
    found = load_dataset(arrays | {missing: None})
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert (found.successes is None) == (expected.successes is None)


def test_flags_that_stay_true_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each row after the first was an episode of its own, without a word."""
    stays = np.arange(12) >= 8
    assert load_dataset(table(terminals=stays, timeouts=None)).lengths.tolist() == [9, 1, 1, 1]
    assert "arrays: 3 episodes of one env step, each right after an end: a flag stays true there" in caplog.text
    caplog.clear()
    path = write_h5(tmp_path / "mine.hdf5", table(terminals=np.zeros(12), timeouts=stays))
    assert load_dataset(f"d4rl:{path}").lengths.tolist() == [9, 1, 1, 1]
    assert "3 episodes of one env step, each right after an end" in caplog.text
    caplog.clear()
    load_dataset(table(terminals=np.ones(12), timeouts=None))
    assert caplog.text == "", "env steps that are episodes"


def test_the_last_steps_of_flat_arrays_are_an_episode(caplog: pytest.LogCaptureFixture) -> None:
    data = Trajectories.from_arrays(np.zeros((5, 2)), np.zeros(5), np.zeros(5), [False, True, False, False, False])
    assert data.lengths.tolist() == [2, 3]
    assert data.actions.shape == (5, 1)
    assert np.flatnonzero(data.truncations).tolist() == [4]
    assert "the last episode has no end flag that is true" in caplog.text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros(3), r"was given a ndarray\. Expected a source such as .* Trajectories\.from_arrays"),
        (None, "was given a NoneType"),
        ([np.zeros(3)], "arrays holds a list, expected a dict of arrays, or a list of such dicts"),
        ([], "arrays holds no episode"),
        ({}, "observations is missing.*arrays holds nothing"),
        ({"observations": 1}, "actions is missing.*arrays holds observations"),
        ({**table(), "rewards": np.zeros(11)}, "rewards"),
        ({**table(), "actions": np.full((12, 1), np.nan)}, "actions, row 0: nan is not a finite"),
        ({**table(), "rewards": "abc"}, "rewards: not readable"),
        ({**table(), "observations": {"a": np.zeros(12)}}, r"observations is a dictionary of a; .*side by side"),
        ({**table(), "rewards": [[1], [1, 2]]}, "rewards: not readable"),
        ({**table(), "terminals": np.full(12, 2)}, "expected 0 or 1"),
        ({**table(), "rewards": np.ma.masked_equal(np.arange(12.0), 3)}, "rewards has masked values"),
    ],
)
def test_wrong_data_in_memory(source: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_dataset(source)


def test_advice_fits_data_in_memory() -> None:
    steps = {"observations": np.zeros((4, 2)), "actions": np.full((4, 1), 1.5), "rewards": np.zeros(4)}
    with pytest.raises(UserError, match=r"lies outside the bounds -1 to 1\. Move such actions .* np\.clip"):
        load_dataset(steps, action_bounds=(-1, 1))
    del steps["rewards"]
    with pytest.raises(UserError, match=r"episode_0 holds actions, dones, observations\. Or leave .*skip_damaged=True"):
        load_dataset([{**steps, "dones": np.ones(4)}])


def test_what_is_no_array_is_not_called_a_damaged_file() -> None:
    with pytest.raises(UserError, match=r"arrays: observations: not readable: .*Give an array of numbers") as caught:
        load_dataset(table() | {"observations": torch.zeros(12, 2, requires_grad=True)})
    assert "download" not in str(caught.value)


def test_most_episodes_are_not_left_out_as_damaged() -> None:
    """The first one, of another width, was kept alone."""
    steps = {"actions": np.zeros((4, 1)), "rewards": np.zeros(4), "terminals": np.arange(4) == 3}
    wide, narrow = (steps | {"observations": np.zeros((5, width))} for width in (3, 2))
    with pytest.raises(UserError, match=r"3 of 4 episodes are damaged.*Most are unlike the first one"):
        load_dataset([wide, narrow, narrow, narrow], skip_damaged=True)


def test_faults_of_all_episodes_are_not_left_out() -> None:
    images = {"observations": np.zeros((4, 2, 2), np.uint8), "actions": np.zeros((4, 1)), "rewards": np.zeros(4)}
    with pytest.raises(UserError, match="vectors of numbers") as caught:
        load_dataset([images])
    assert "skip_damaged" not in str(caught.value)


def test_clipping_needs_bounds_and_parts_need_names(tmp_path: Path) -> None:
    """Both were passed over."""
    path = write_h5(tmp_path / "a.hdf5", table())
    with pytest.raises(UserError, match=r"actions=clip: nothing says what the bounds .* action_bounds"):
        load_dataset(f"d4rl:{path}?actions=clip")
    assert load_dataset(f"d4rl:{path}?actions=clip", action_bounds=(-1, 1)).num_steps == 12
    np.savez(tmp_path / "0.npz", **{k: v for k, v in table().items() if k != "terminals"})
    with pytest.raises(UserError, match=r"keys=a,b: .*observations is one array"):
        load_dataset(f"{tmp_path / '0.npz'}?keys=a,b")


@pytest.mark.parametrize("form", ["store", "trajectories", "dict"])
def test_the_bounds_of_the_task_count_for_every_source(tmp_path: Path, form: str) -> None:
    data = random_trajectories()
    write_store(tmp_path / "store", [data], "x")
    columns = {k: v for k, v in vars_of(data).items() if k not in {"final_observations", "offsets"}}
    source: Any = {"store": str(tmp_path / "store"), "trajectories": data, "dict": columns}[form]
    with pytest.raises(UserError, match=r"actions, row \d+: .* lies outside the bounds -0\.1 to 0\.1"):
        load_dataset(source, action_bounds=([-0.1] * 2, [0.1] * 2))
    with pytest.raises(UserError, match="actions has 2 numbers a row, expected 3"):
        load_dataset(source, action_bounds=([-1] * 3, [1] * 3))
    assert load_dataset(source, action_bounds=([-1] * 2, [1] * 2)).num_episodes == 3
    if form == "store":
        clipped = load_dataset(f"{source}?actions=clip", action_bounds=([-0.1] * 2, [0.1] * 2))
        np.testing.assert_array_equal(clipped.actions, np.clip(data.actions, np.float32(-0.1), np.float32(0.1)))


def flat(**others: Any) -> dict[str, Any]:
    """A table of ten rows, in two episodes of five where the flags say so."""
    rows = np.arange(10.0)
    arrays = {"observations": rows[:, None], "actions": np.zeros((10, 1)), "rewards": rows}
    return {name: value for name, value in (arrays | others).items() if value is not None}


FIFTH, NONE = np.arange(10) % 5 == 4, np.zeros(10, bool)


@pytest.mark.parametrize(
    ("flags", "terminations", "truncations"),
    [
        ({"dones": FIFTH}, [], [4, 9]),
        ({"dones": FIFTH, "timeouts": NONE}, [4, 9], []),
        ({"dones": FIFTH, "terminals": NONE}, [], [4, 9]),
        ({"dones": FIFTH, "terminals": np.arange(10) == 4}, [4], [9]),
        ({"dones": FIFTH, "timeouts": np.arange(10) == 4}, [9], [4]),
        ({"done": FIFTH, "timeouts": np.arange(10) == 9, "terminals": np.arange(10) == 4}, [4], [9]),
    ],
)
def test_what_other_flags_do_not_say_done_says(
    flags: dict[str, Any], terminations: list[int], truncations: list[int]
) -> None:
    data = load_dataset(flat(**flags))
    assert data.lengths.tolist() == [5, 5]
    assert np.flatnonzero(data.terminations).tolist() == terminations
    assert np.flatnonzero(data.truncations).tolist() == truncations


@pytest.mark.parametrize("name", ["success", "dones", "rewards", "terminals"])
def test_a_single_number_in_a_table_is_named(name: str) -> None:
    """It was asked for its length: TypeError."""
    flags = {"timeouts": FIFTH} | ({"terminals": NONE} if name == "dones" else {})
    with pytest.raises(UserError, match=r"arrays: \w+ (has 1 row|is a single number|has 10 rows, expected 1)"):
        load_dataset(flat(**flags | {name: 1.0}))


def test_a_file_with_damaged_flags_is_left_out_where_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its flags say where its episodes end, and so it was refused before it was one that may be damaged."""
    np.savez(tmp_path / "0.npz", **flat(dones=FIFTH))
    np.savez(tmp_path / "1.npz", **flat(dones=np.full(10, 0.5)))
    with pytest.raises(UserError, match=r"1\.npz: dones, row 0: 0\.5, expected 0 or 1"):
        load_dataset(tmp_path)
    assert load_dataset(tmp_path, skip_damaged=True).lengths.tolist() == [5, 5]
    assert "1 of 3 episodes are damaged" in caplog.text


def test_two_names_of_one_are_equal_or_refused() -> None:
    same = load_dataset(flat(dones=FIFTH, obs=np.arange(10.0)[:, None]))
    assert same.observations[:, 0].tolist() == list(range(10))
    with pytest.raises(UserError, match="observations and states, which are names of the same and differ"):
        load_dataset(flat(dones=FIFTH, states=np.ones((10, 1))))


def test_success_in_infos_that_begin_with_that_of_the_reset() -> None:
    """Which is empty: all of it was passed over."""
    infos: list[dict[str, Any]] = [{}, *({"success": step == 3} for step in range(10))]
    data = load_dataset([flat(observations=np.arange(11.0)[:, None], infos=infos)])
    assert data.successes is not None
    assert data.successes.tolist() == [False] * 3 + [True] * 7
    with pytest.raises(UserError, match="successes has 12 rows, expected 10"):
        load_dataset([flat(infos=[*infos, {"success": True}])])


def test_success_by_its_other_name_and_of_a_whole_episode() -> None:
    by_step = load_dataset([flat(is_success=np.arange(10) == 3)])
    assert by_step.successes is not None
    assert by_step.successes.tolist() == [False] * 3 + [True] * 7
    for solved in (True, False):
        whole = load_dataset([flat(success=solved)])
        assert whole.successes is not None
        assert whole.successes.tolist() == [False] * 9 + [solved]


@pytest.mark.parametrize("form", ["dict", "list", "file"])
@pytest.mark.parametrize("name", ["success", "is_success"])
def test_success_in_infos_is_read(tmp_path: Path, form: str, name: str) -> None:
    """It was ignored without a word."""
    arrays: dict[str, Any] = {
        "observations": np.zeros((5, 2)),
        "actions": np.zeros((4, 1)),
        "rewards": np.zeros(4),
        "truncations": np.arange(4) == 3,
    }
    told = np.array([0, 0, 1, 1])
    source: Any = [arrays | {"infos": {name: told} if form == "dict" else [{name: bool(value)} for value in told]}]
    if form == "file":
        (tmp_path / "episodes").mkdir()
        write_h5(tmp_path / "episodes" / "0.hdf5", arrays | {f"infos/{name}": told})
        source = tmp_path / "episodes"
    found = load_dataset(source).successes
    assert found is not None
    assert found.tolist() == [False, False, True, True]
    for nothing in ([{name: None}] * 4, {name: np.full(4, np.nan)}, {name: "no"}, {name: None}, [{}] * 4):
        assert load_dataset([arrays | {"infos": nothing}]).successes is None


def test_a_damaged_episode_of_a_table_can_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewards = np.arange(10.0)
    rewards[7] = np.nan
    arrays = flat(dones=FIFTH, rewards=rewards, next_observations=np.arange(10.0)[:, None] + 0.5)
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=r"episode_1/rewards, row 7: nan.*data\.skip_damaged=true"):
        load_dataset(str(tmp_path / "a.npz"))
    for given in (str(tmp_path / "a.npz"), arrays):
        with caplog.at_level(logging.WARNING):
            data = load_dataset(given, skip_damaged=True)
        assert data.lengths.tolist() == [5]
        assert data.final_observations.tolist() == [[4.5]]
        assert "1 of 2 episodes are damaged" in caplog.text
        caplog.clear()


def test_what_macos_leaves_beside_a_file_is_no_episode(tmp_path: Path) -> None:
    np.savez(tmp_path / "ep_0.npz", **flat())
    (tmp_path / "._ep_0.npz").write_bytes(b"\x00\x05\x16\x07")
    assert load_dataset(str(tmp_path)).num_episodes == 1


def test_an_array_that_changes_later_changes_no_data() -> None:
    arrays = {name: np.asarray(value, np.float32) for name, value in flat().items()}
    data = Trajectories.from_arrays(**arrays)  # type: ignore[arg-type]  # all are float32
    for array in arrays.values():
        array[:] = 7
    assert data.rewards.tolist() == list(range(10))
    assert data.observations[:, 0].tolist() == list(range(10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": np.zeros((3, 2), np.float32)}, "episode 1/observations has 3 rows, expected 4: .* led to"),
        (
            {"actions": np.zeros((3, 2), np.float32)},
            r"episode 1/actions has shape \(3, 2\), expected \(3, 1\), as wide",
        ),
        ({"rewards": np.zeros((3, 1), np.float32)}, r"episode 1/rewards has shape \(3, 1\), expected \(3,\)"),
        ({"rewards": np.array([0, np.nan, 0], np.float32)}, "episode 1/rewards, row 1 is not finite"),
        ({"terminations": np.array([False, True, False])}, "episode 1/terminations, row 1: .* goes on to row 2"),
        ({"rewards": np.zeros(0, np.float32)}, "episode 1/rewards is empty"),
    ],
)
def test_episodes_made_by_hand_are_checked(changes: dict[str, Any], message: str) -> None:
    sound = random_trajectories((3,), dims=(2, 1)).episode(0)
    with pytest.raises(UserError, match=message):
        Trajectories.from_episodes([sound, replace(sound, **changes)])


def test_what_data_say_of_success_is_not_looked_for_in_their_infos() -> None:
    """They would be two names of one that differ."""
    arrays = {"observations": np.zeros((5, 2)), "actions": np.zeros((4, 1)), "rewards": np.zeros(4)}
    told = {"truncations": np.arange(4) == 3, "successes": np.arange(4) == 2, "infos": {"success": np.zeros(4)}}
    found = load_dataset([arrays | told]).successes
    assert found is not None
    assert found.tolist() == [False, False, True, True]
