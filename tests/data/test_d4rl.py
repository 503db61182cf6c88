"""D4RL's conventions: a file with every trap gives exactly the episodes expected, and naive readings do not."""

from __future__ import annotations

import gzip
import logging
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from eva_rl.data import load_dataset
from eva_rl.data.formats import d4rl
from eva_rl.data.formats.d4rl_names import D4RL_FILES, conventions, download, known_faults
from eva_rl.errors import UserError
from tests.data.making import differences, table, write_h5

NAME = "hopper_medium-v2.hdf5"


def trapped() -> dict[str, np.ndarray]:
    """Rewards and terminals of shape (N, 1), a terminal that is also a timeout, an unfinished last episode."""
    arrays = table(15)
    arrays["timeouts"][3] = True
    arrays["rewards"], arrays["terminals"] = arrays["rewards"][:, None], arrays["terminals"][:, None]
    return arrays | {"infos/qpos": np.full((15, 2), np.nan), "metadata/algorithm": "SAC", "metadata/iteration": 3}


def starts_and_ends(path: Path) -> list[tuple[int, int]]:
    """First and last row of each episode, as the numbers in the observations say."""
    data = load_dataset(f"d4rl:{path}")
    rows = data.observations[:, 0]
    return [(int(rows[b]), int(rows[e - 1])) for b, e in zip(data.offsets[:-1], data.offsets[1:], strict=True)]


def test_every_trap(tmp_path: Path) -> None:
    path = write_h5(tmp_path / NAME, trapped())
    data = load_dataset(f"d4rl:{path}")
    assert starts_and_ends(path) == [(0, 3), (4, 6), (7, 11)]  # rows 12 to 14 are unfinished
    assert data.rewards.tolist() == [10.0 * row for row in range(12)]
    assert data.returns.tolist() == [60.0, 150.0, 450.0]
    assert np.flatnonzero(data.terminations).tolist() == [3]
    assert np.flatnonzero(data.truncations).tolist() == [3, 6, 11]
    assert data.final_observations.tolist() == [[3.5, -3.0], [6.5, -6.0], [11.5, -11.0]]
    assert data.env_id == "Hopper-v5"


def naive_ends(arrays: dict[str, np.ndarray], keys: tuple[str, ...], trailing: bool) -> list[int]:
    ends = np.any([arrays[key].reshape(-1) for key in keys], axis=0)
    return [*np.flatnonzero(ends).tolist(), *([len(ends) - 1] if trailing else [])]


@pytest.mark.parametrize(
    ("keys", "trailing"),
    [(("terminals",), False), (("timeouts",), True), (("terminals", "timeouts"), True), (("timeouts",), False)],
)
def test_naive_ends_are_other_episodes(tmp_path: Path, keys: tuple[str, ...], trailing: bool) -> None:
    arrays = trapped()
    arrays["timeouts"][3] = False  # or terminals would not be needed
    expected = [end for _, end in starts_and_ends(write_h5(tmp_path / NAME, arrays))]
    assert expected == [3, 6, 11]
    assert naive_ends(arrays, keys, trailing) != expected


def test_naive_next_rows_are_other_observations(tmp_path: Path) -> None:
    arrays = trapped()
    finals = load_dataset(f"d4rl:{write_h5(tmp_path / NAME, arrays)}").final_observations
    assert not np.array_equal(arrays["observations"][[4, 7, 12]], finals)


def test_naive_column_rewards_broadcast() -> None:
    rewards = trapped()["rewards"]
    assert (rewards - rewards.mean(1)).shape == (15, 15)  # what (N, 1) does where (N,) was meant


def test_without_next_observations_the_last_one_is_repeated(tmp_path: Path) -> None:
    path = write_h5(tmp_path / NAME, table(next_observations=None))
    assert load_dataset(f"d4rl:{path}").final_observations[:, 0].tolist() == [3.0, 6.0, 11.0]


def test_without_timeouts_the_horizon_counts_from_the_last_end(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "mine.hdf5", table(timeouts=None))
    with pytest.raises(UserError, match=r"timeouts is missing.*\?horizon="):
        load_dataset(f"d4rl:{path}")
    data = load_dataset(f"d4rl:{path}?horizon=3")
    assert data.lengths.tolist() == [3, 1, 3, 3]  # rows 0-2, 3 (terminal), 4-6, 7-9; 10 and 11 are unfinished
    assert np.flatnonzero(data.truncations).tolist() == [2, 6, 9]
    assert np.flatnonzero(data.terminations).tolist() == [3]


@pytest.mark.parametrize("name", ["dones", "done", "truncations", "truncated", "episode_terminals"])
def test_ends_under_other_names_count_where_there_are_no_timeouts(tmp_path: Path, name: str) -> None:
    """They were not looked at: several episodes were read as one, or cut across their ends."""
    whole = table()
    noted = whole["terminals"] | whole["timeouts"] if name in {"dones", "done"} else whole["timeouts"]
    data = load_dataset(f"d4rl:{write_h5(tmp_path / 'mine.hdf5', table(timeouts=None, **{name: noted}))}")
    assert data.lengths.tolist() == [4, 3, 5]
    assert np.flatnonzero(data.terminations).tolist() == [3]
    assert np.flatnonzero(data.truncations).tolist() == [6, 11]


def endless(rows: int = 12, **changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """A table whose flags are never true."""
    none = np.zeros(12, bool)
    return {key: array[:rows] for key, array in table(**{"terminals": none, "timeouts": none, **changes}).items()}


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize(
    ("name", "changes", "query"),
    [
        ("mine.hdf5", {}, ""),
        ("mine.hdf5", {"timeouts": None}, ""),
        ("mine.hdf5", {"terminals": np.zeros((12, 1), np.uint8)}, ""),
        ("mine.hdf5", {"timeouts": None, "episode_terminals": np.zeros(12)}, ""),
        ("mine.hdf5", {"timeouts": None}, "?horizon=13"),
        (NAME, {"timeouts": None}, ""),  # hopper: 1,000 env steps an episode
        ("maze2d-umaze-sparse-v1.hdf5", {}, ""),
        ("antmaze-umaze-v2.hdf5", {}, ""),
    ],
)
def test_flags_that_are_never_true_make_one_truncated_episode(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    changes: dict[str, np.ndarray | None],
    query: str,
    rows: int,
) -> None:
    with caplog.at_level(logging.WARNING):
        data = load_dataset(f"d4rl:{write_h5(tmp_path / name, endless(rows, **changes))}{query}")
    assert data.lengths.tolist() == [rows]
    assert np.flatnonzero(data.truncations).tolist() == [rows - 1]
    assert not data.terminations.any()
    assert f"The {rows} rows are read as one, truncated at the last row" in caplog.text
    assert "?horizon=" in caplog.text


def test_one_end_in_one_chunk_is_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The rows of the other chunk are an unfinished episode then."""
    chunks = [endless(), {key: array[:9] for key, array in table().items()}]
    chunked = {f"virtual/{i}/{key}": array for i, chunk in enumerate(chunks) for key, array in chunk.items()}
    assert starts_and_ends(write_h5(tmp_path / "mine.hdf5", chunked)) == [(0, 3), (4, 6)]
    assert "read as one" not in caplog.text
    chunked = {f"virtual/{i}/{key}": array for i in range(2) for key, array in endless().items()}
    assert starts_and_ends(write_h5(tmp_path / "mine.hdf5", chunked)) == [(0, 11), (0, 11)]
    assert caplog.text.count("read as one") == 2


def test_a_horizon_that_is_asked_for_cuts_noted_episodes_too(tmp_path: Path) -> None:
    """It was passed over where the file notes a time limit."""
    path = write_h5(tmp_path / "mine.hdf5", table())
    assert load_dataset(f"d4rl:{path}").lengths.tolist() == [4, 3, 5]
    data = load_dataset(f"d4rl:{path}?horizon=2")
    assert data.lengths.tolist() == [2, 2, 2, 1, 2, 2, 1]
    assert np.flatnonzero(data.terminations).tolist() == [3]
    assert np.flatnonzero(data.truncations).tolist() == [1, 5, 6, 8, 10, 11]
    assert load_dataset(f"d4rl:{write_h5(tmp_path / 'pen-mine.hdf5', table())}").lengths.tolist() == [4, 3, 5]


def test_a_goal_of_a_maze_is_no_end_to_count_the_time_limit_from(tmp_path: Path) -> None:
    """Two of three episodes were lost: those after terminals without a timeout, or with one of another name."""
    near_the_goal = np.isin(np.arange(12), [2, 3, 6, 7])
    path = write_h5(tmp_path / "antmaze-mine.hdf5", table(terminals=near_the_goal, timeouts=None))
    limits = np.arange(12) % 4 == 3
    for name in ("timeouts", "truncations", "truncated", "episode_terminals"):
        noted = write_h5(
            tmp_path / f"antmaze-{name}.hdf5", table(terminals=near_the_goal, **{"timeouts": None, name: limits})
        )
        for source in (f"d4rl:{path}?horizon=4", f"d4rl:{noted}"):
            data = load_dataset(source)
            assert data.lengths.tolist() == [3, 3, 4], source
            assert data.observations[data.offsets[:-1], 0].tolist() == [0, 4, 8]


def test_horizon_of_named_files() -> None:
    names = [
        "hopper-medium-v0",
        "pen-human-v1",
        "door_x",
        "Ant_maze_u-maze_noisy",
        "antmaze-large-play-v2",
        "ant-expert-v2",
    ]
    assert [conventions(name).horizon for name in names] == [1000, 100, 200, 700, 1000, 1000]
    assert conventions("mini_kitchen_microwave-v0").horizon == 280
    assert conventions("mine").horizon is None


def antmaze() -> dict[str, np.ndarray]:
    """Two timeouts; goals at rows 2-4 (met and stayed at) and at 13-14, after the last timeout."""
    arrays = table(15)
    arrays["terminals"][:] = arrays["timeouts"][:] = False
    arrays["terminals"][[2, 3, 4, 13, 14]] = True
    arrays["timeouts"][[5, 10]] = True
    return arrays | {"rewards": arrays["terminals"].astype(np.float32)}


def test_antmaze_ends_at_its_goal_and_not_once_per_row_beside_it(tmp_path: Path) -> None:
    file = Path(D4RL_FILES["antmaze-umaze-v2"]).name
    path = write_h5(tmp_path / file, antmaze())
    assert starts_and_ends(path) == [(0, 2), (6, 10), (11, 13)]
    data = load_dataset(f"d4rl:{path}")
    assert data.returns.tolist() == [1.0, 0.0, 1.0]
    assert data.successes is not None
    assert np.flatnonzero(data.successes).tolist() == np.flatnonzero(data.terminations).tolist() == [2, 10]
    naive = load_dataset(f"d4rl:{write_h5(tmp_path / 'other.hdf5', antmaze())}")
    assert naive.lengths.tolist() == [3, 1, 1, 1, 5, 3, 1]  # terminals as they stand


def test_antmaze_unfinished_end_is_left_out(tmp_path: Path) -> None:
    arrays = antmaze()
    arrays["terminals"][[13, 14]] = False
    path = write_h5(tmp_path / "antmaze-umaze-v2.hdf5", arrays)
    assert starts_and_ends(path) == [(0, 2), (6, 10)]


def test_chunks_are_read_in_order_and_not_joined(tmp_path: Path) -> None:
    chunked = {f"virtual/{i}/{key}": value for i in range(11) for key, value in table(rewards=np.full(12, i)).items()}
    data = load_dataset(f"d4rl:{write_h5(tmp_path / NAME, chunked)}")
    assert data.num_episodes == 33
    assert data.rewards[::12].tolist() == list(range(11))  # 10 comes after 9, not after 1


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_parts_do_not_change_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    files = [write_h5(tmp_path / NAME, trapped()), write_h5(tmp_path / "antmaze-umaze-v2.hdf5", antmaze())]
    whole = [load_dataset(f"d4rl:{file}") for file in files]
    monkeypatch.setattr(d4rl, "PART_ROWS", rows)
    for file, expected in zip(files, whole, strict=True):
        assert differences(load_dataset(f"d4rl:{file}"), expected) == []


def test_actions_out_of_bounds(tmp_path: Path) -> None:
    arrays = table()
    arrays["actions"][7] = -1.5
    path = write_h5(tmp_path / NAME, arrays)
    with pytest.raises(UserError, match=rf"{NAME}: actions, row 7: -1.5 .* -1 to 1"):
        load_dataset(f"d4rl:{path}")
    assert load_dataset(f"d4rl:{path}?actions=clip").actions[7].tolist() == [-1.0]
    assert load_dataset(f"d4rl:{path}?actions=keep").actions[7].tolist() == [-1.5]


def test_known_faults_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_h5(tmp_path / "hopper_medium_expert-v0.hdf5", table())
    with caplog.at_level(logging.WARNING):
        load_dataset(f"d4rl:{path}")
    assert "issue 19" in caplog.text
    assert not known_faults("hopper-medium-v2")
    assert "swapped" in known_faults("hopper-expert-v1")[0]
    assert "goal" in known_faults("maze2d-umaze-v1")[0]
    assert not known_faults("antmaze-umaze-v2")
    assert not known_faults(Path(D4RL_FILES["antmaze-large-diverse-v2"]).stem)


def test_names_resolve_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVA_RL_CACHE", str(tmp_path))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("D4RL_BASE_URL", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match=rf"could not be downloaded.*put it at {tmp_path}/d4rl/{NAME}"):
        load_dataset("d4rl:hopper-medium-v2")
    with pytest.raises(UserError, match="Did you mean 'hopper-medium-v2'"):
        load_dataset("d4rl:hoper-medium-v2")
    (tmp_path / "d4rl").mkdir()
    write_h5(tmp_path / "d4rl" / NAME, table())
    data = load_dataset("d4rl:hopper-medium-v2")
    assert (data.num_episodes, data.metadata["dataset"]) == (3, "hopper-medium-v2")


def test_download(tmp_path: Path) -> None:
    (tmp_path / "remote").mkdir()
    write_h5(tmp_path / "remote" / NAME, table())
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "remote"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        download(url + NAME, tmp_path / "cache" / NAME)
        with pytest.raises(UserError, match="could not be downloaded: File not found"):
            download(url + "nothing", tmp_path / "cache" / "nothing")
        server.shutdown()
    assert load_dataset(f"d4rl:{tmp_path}/cache/{NAME}").num_episodes == 3
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [NAME]


PAGE = b"<!DOCTYPE html><html><body>Please sign in</body></html>"


@pytest.mark.parametrize("content", [PAGE, b"", b'{"error": 404}', b"\x89HDF\r\n\x1a\n" + bytes(200), "cut"])
def test_an_answer_that_is_no_data_set_is_not_kept(tmp_path: Path, content: bytes | str) -> None:
    (tmp_path / "remote").mkdir()
    whole = write_h5(tmp_path / "remote" / NAME, table()).read_bytes()
    (tmp_path / "remote" / NAME).write_bytes(whole[:-200] if isinstance(content, str) else content)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "remote"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(UserError, match=r"could not be downloaded: the server's answer is .*, expected an HDF5"):
            download(f"http://127.0.0.1:{server.server_port}/{NAME}", tmp_path / "cache" / NAME)
        server.shutdown()
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    "page",
    [PAGE, gzip.compress(PAGE, mtime=0), b'{"error": 404}', b"404: Not Found", b""],
    ids=["page", "compressed", "json", "text", "empty"],  # the same in every worker of pytest-xdist
)
def test_a_page_in_the_cache_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: bytes) -> None:
    (tmp_path / "d4rl").mkdir()
    (tmp_path / "d4rl" / NAME).write_bytes(page)
    monkeypatch.setenv("EVA_RL_CACHE", str(tmp_path))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "none"))
    (tmp_path / "gym_mujoco_v2").mkdir()
    write_h5(tmp_path / "gym_mujoco_v2" / NAME, table())
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("D4RL_BASE_URL", f"http://127.0.0.1:{server.server_port}/")
        assert load_dataset("d4rl:hopper-medium-v2").num_episodes == 3
        server.shutdown()


def test_antmaze_is_known_through_a_link_and_missed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    terminals = np.isin(np.arange(12), [2, 3, 4, 8])
    arrays = table(terminals=terminals, timeouts=np.isin(np.arange(12), [5, 11]))
    real = write_h5(tmp_path / "antmaze-umaze-v2.hdf5", arrays)
    (tmp_path / "link.hdf5").symlink_to(real)
    assert starts_and_ends(tmp_path / "link.hdf5") == starts_and_ends(real) == [(0, 2), (6, 8)]
    assert "of one env step" not in caplog.text
    renamed = write_h5(tmp_path / "mine.hdf5", arrays)
    with caplog.at_level(logging.WARNING):
        assert len(starts_and_ends(renamed)) == 6
    assert "2 episodes of one env step" in caplog.text
    assert "antmaze-....hdf5" in caplog.text


def test_leaving_out_damaged_episodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.skip_damaged=true: .* is one table"):
        load_dataset(f"d4rl:{write_h5(tmp_path / NAME, table())}", skip_damaged=True)
