"""Data files that lead to other files, claim more than they hold, or never end: one error, in little memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eva_rl.data import load_dataset, save_minari, write_episodes, write_store
from eva_rl.errors import UserError
from tests.data.making import differences, random_trajectories, table, write_h5

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore::UserWarning:minari")]
LITTLE = 64 << 20
"""Bytes that refusing a file may take."""
FILES = {"d4rl": "hopper_medium-v2.hdf5", "episodes": "a.h5", "robomimic": "demos.hdf5", "d3rlpy": "buffer.h5"}
KEYS = {
    "d4rl": ["observations", "actions", "rewards", "terminals", "timeouts", "next_observations"],
    "episodes": [f"episode_1/{key}" for key in ("observations", "rewards", "truncations", "infos/success")],
    "robomimic": ["data/demo_0/obs/state", "data/demo_0/actions", "data/demo_0/rewards"],
    "d3rlpy": ["observations_0", "actions_1", "terminated_0"],
}
MEMBERS = [(layout, key) for layout, keys in KEYS.items() for key in keys]


def make(layout: str, folder: Path) -> Path:
    """A sound file of a layout."""
    path, data = folder / FILES[layout], random_trajectories((4, 3))
    if layout == "d4rl":
        return write_h5(path, table())
    if layout == "episodes":
        write_episodes(path, data)
        return path
    arrays: dict[str, Any] = {}
    for index in range(data.num_episodes):
        episode = data.episode(index)
        if layout == "d3rlpy":
            arrays[f"observations_{index}"], arrays[f"actions_{index}"] = episode.observations[:-1], episode.actions
            arrays[f"rewards_{index}"], arrays[f"terminated_{index}"] = episode.rewards[:, None], True
        else:
            arrays[f"data/demo_{index}/obs/state"] = episode.observations[:-1]
            arrays[f"data/demo_{index}/actions"] = episode.actions
            arrays[f"data/demo_{index}/rewards"] = episode.rewards
    return write_h5(path, arrays)


def load(layout: str, path: Path) -> Any:
    return load_dataset(f"d4rl:{path}" if layout == "d4rl" else str(path))


def replace(path: Path, key: str, put: Callable[[h5py.File, str, np.ndarray], None]) -> None:
    """Put something else in the place of an array."""
    with h5py.File(path, "a") as file:
        content = np.asarray(file[key][()])
        del file[key]
        put(file, key, content)


def elsewhere(path: Path, content: np.ndarray) -> Path:
    """Another file with the same array."""
    return write_h5(path.with_name("secret.h5"), {"secret": content})


def external_link(path: Path) -> Callable[[h5py.File, str, np.ndarray], None]:
    def put(file: h5py.File, key: str, content: np.ndarray) -> None:
        file[key] = h5py.ExternalLink(str(elsewhere(path, content)), "/secret")

    return put


def soft_link_to_external(path: Path) -> Callable[[h5py.File, str, np.ndarray], None]:
    def put(file: h5py.File, key: str, content: np.ndarray) -> None:
        file["hidden/link"] = h5py.ExternalLink(str(elsewhere(path, content)), "/secret")
        file[key] = h5py.SoftLink("/hidden/link")

    return put


def external_storage(path: Path) -> Callable[[h5py.File, str, np.ndarray], None]:
    def put(file: h5py.File, key: str, content: np.ndarray) -> None:
        path.with_name("secret.bin").write_bytes(content.tobytes() or b"x")
        outside = [(str(path.with_name("secret.bin")), 0, content.nbytes)]
        file.create_dataset(key, shape=content.shape, dtype=content.dtype, external=outside)

    return put


def virtual(path: Path) -> Callable[[h5py.File, str, np.ndarray], None]:
    def put(file: h5py.File, key: str, content: np.ndarray) -> None:
        layout = h5py.VirtualLayout(content.shape, content.dtype)
        layout[...] = h5py.VirtualSource(str(elsewhere(path, content)), "secret", content.shape)
        file.create_virtual_dataset(key, layout)

    return put


def virtual_of_virtual(path: Path) -> Callable[[h5py.File, str, np.ndarray], None]:
    def put(file: h5py.File, key: str, content: np.ndarray) -> None:
        virtual(path)(file, "hidden/inner", content)
        layout = h5py.VirtualLayout(content.shape, content.dtype)
        layout[...] = h5py.VirtualSource(".", "hidden/inner", content.shape)
        file.create_virtual_dataset(key, layout)

    return put


WAYS_OUT = [external_link, soft_link_to_external, external_storage, virtual, virtual_of_virtual]


@pytest.mark.parametrize(("layout", "key"), MEMBERS)
@pytest.mark.parametrize("way", WAYS_OUT)
def test_no_other_file_is_read(tmp_path: Path, layout: str, key: str, way: Any) -> None:
    path = make(layout, tmp_path)
    scalar = key.startswith("terminated")
    if scalar and way not in (external_link, soft_link_to_external):
        pytest.skip("one number has no other storage")
    replace(path, key, way(path))
    with pytest.raises(UserError, match=r"link to another file|other files|was changed|are not read"):
        load(layout, path)


@pytest.mark.parametrize("group", ["episode_0", "episode_1/infos", "data", "data/demo_0", "virtual", "virtual/0"])
def test_groups_lead_nowhere_else(tmp_path: Path, group: str) -> None:
    arrays = {f"{group}/{key}": value for key, value in table().items()}
    other = write_h5(tmp_path / "secret.h5", {f"x/{key}": value for key, value in table().items()})
    path = write_h5(
        tmp_path / "a.hdf5", arrays | {"episode_1/rewards": np.zeros(3), "data/demo_1/rewards": np.zeros(3)}
    )
    with h5py.File(path, "a") as file:
        del file[group]
        file[group] = h5py.ExternalLink(str(other), "/x")
    with pytest.raises(UserError):
        load_dataset(f"{'d4rl:' if group.startswith('virtual') else ''}{path}")


def test_links_and_virtual_data_sets_within_the_file_are_followed(tmp_path: Path) -> None:
    path = make("d4rl", tmp_path)
    expected = load("d4rl", path)
    with h5py.File(path, "a") as file:
        for key in ("observations", "rewards"):
            file.move(key, f"parts/{key}")
        file["observations"] = h5py.SoftLink("/parts/observations")
        layout = h5py.VirtualLayout((12,), np.float32)
        layout[...] = h5py.VirtualSource(file["parts/rewards"])
        file.create_virtual_dataset("rewards", layout)
    assert differences(load("d4rl", path), expected) == []


def test_links_in_a_circle(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "a.hdf5", table(rewards=None))
    with h5py.File(path, "a") as file:
        file["rewards"], file["again"] = h5py.SoftLink("/again"), h5py.SoftLink("/rewards")
    with pytest.raises(UserError, match="leads through too many others"):
        load_dataset(f"d4rl:{path}")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        group = file.create_group("episode_0")
        for key, array in {"actions": np.zeros((2, 1)), "rewards": np.zeros(2), "terminations": np.zeros(2)}.items():
            group[key] = array
        group["truncations"] = np.zeros(2)
        inner = group.create_group("observations")
        inner["observations"] = inner
    with pytest.raises(UserError, match="lies in more than"):
        load_dataset(str(tmp_path / "b.h5"))


def unwritten(file: h5py.File, key: str, rows: int) -> None:
    file.create_dataset(key, (rows, 2), np.float64, chunks=(1000, 2))


def unwritten_compressed(file: h5py.File, key: str, rows: int) -> None:
    file.create_dataset(key, (rows, 2), np.float64, chunks=(1000, 2), compression="gzip")
    file[key][:1000] = 1


def unwritten_contiguous(file: h5py.File, key: str, rows: int) -> None:
    file.create_dataset(key, (rows, 2), np.float64)


def twice_compressed(file: h5py.File, key: str, rows: int) -> None:
    """Zeros whose compressed form is compressed again: a million times smaller than what comes out."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((rows, 2))
    plan.set_deflate(9)
    plan.set_filter(h5py.h5z.FILTER_DEFLATE, h5py.h5z.FLAG_OPTIONAL, (9,))
    space = h5py.h5s.create_simple((rows, 2))
    made = h5py.h5d.create(file.id, key.encode(), h5py.h5t.IEEE_F64LE, space, plan)
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.zeros((rows, 2)))


@pytest.mark.parametrize("key", ["observations", "actions", "next_observations"])
@pytest.mark.parametrize("bomb", [unwritten, unwritten_compressed, unwritten_contiguous, twice_compressed])
def test_arrays_claim_no_more_than_is_stored(tmp_path: Path, key: str, bomb: Any) -> None:
    rows = 100_000 if bomb is twice_compressed else 50_000_000
    path = write_h5(tmp_path / "a.hdf5", table(**{key: None}))
    with h5py.File(path, "a") as file:
        bomb(file, key, rows)
        for name in ("rewards", "terminals", "timeouts"):
            del file[name]
            file.create_dataset(name, (rows,), np.uint8, chunks=(min(rows, 1 << 20),), compression="gzip")
    refused(lambda: load_dataset(f"d4rl:{path}"), "claims .* bytes")


def refused(load: Callable[[], Any], message: str) -> None:
    """Refused with this message, in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            load()
        assert tracemalloc.get_traced_memory()[1] < LITTLE
    finally:
        tracemalloc.stop()


def test_one_array_under_many_names(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for index in range(200):
            group = file.create_group(f"episode_{index}")
            group["actions"], group["rewards"] = np.zeros((2, 1)), np.zeros(2)
            group["terminations"] = group["truncations"] = np.zeros(2)
            group["observations"] = np.zeros((3, 2)) if index == 0 else file["episode_0/observations"]
    with pytest.raises(UserError, match="are one array"):
        load_dataset(str(tmp_path / "a.h5"))


def pickled(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


def shared_lists(depth: int) -> bytes:
    """Each list holds the one before ten times: 10 ** depth numbers in some bytes."""
    value: Any = [1.0]
    for _ in range(depth):
        value = [value] * 10
    return pickle.dumps({"observations": value, "actions": value, "rewards": value})


def copies() -> bytes:
    """Makes a list of 20,000 parts, and 20,000 copies of it."""
    first = b"cbuiltins\nlist\nq\x00](" + b"N" * 20_000 + b"eq\x01"
    return pickled(b"]", first, *[b"h\x00h\x01\x85R"] * 20_000)


def repeated_rows() -> bytes:
    row = [0.5] * 1000
    return pickle.dumps({"observations": [row] * 10_000, "actions": [row] * 10_000, "rewards": [1.0] * 10_000})


def repeated_episodes() -> bytes:
    episode = {"observations": np.zeros((1000, 9)), "actions": np.zeros((1000, 9)), "rewards": np.zeros(1000)}
    return pickle.dumps([episode] * 20_000)


def holds_itself() -> bytes:
    value: list[Any] = []
    value.append({"observations": value, "actions": value, "rewards": value})
    return pickle.dumps(value)


PICKLES = {
    "bytearray": pickled(b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R"),
    "set of a number": pickled(b"cbuiltins\nfrozenset\nJ\xff\xff\xff\x7f\x85R"),
    "shared lists": shared_lists(12),
    "copies": copies(),
    "repeated rows": repeated_rows(),
    "repeated episodes": repeated_episodes(),
    "memo": pickled(b"]r\xff\xff\xff\x7f"),
    "memo as text": b"]p4000000000\n.",
    "bytes": pickled(b"\x8e" + (1 << 50).to_bytes(8, "little") + b"abc"),
    "text": pickled(b"X\xff\xff\xff\x7fabc"),
    "itself": holds_itself(),
    "deep": pickled(b"]" * 20_000 + b"a" * 19_999),
    "long text beside short ones": pickle.dumps(
        {"observations": ["x" * 20_000, *["y"] * 20_000], "actions": [1.0], "rewards": [1.0]}
    ),
}


@pytest.mark.parametrize("bomb", PICKLES)
def test_pickles_give_no_more_than_they_hold(tmp_path: Path, bomb: str) -> None:
    (tmp_path / "a.pkl").write_bytes(PICKLES[bomb])
    refused(lambda: load_dataset(str(tmp_path / "a.pkl"), allow_pickle=True), r"a\.pkl")


OPCODES = [
    b"]",
    b"(",
    b"e",
    b"a",
    b"2",
    b"N",
    b"J\xff\xff\xff\x7f",
    b"\x85",
    b"R",
    b"q\x00",
    b"h\x00",
    b"}",
    b"s",
    b"b",
]
OPCODES += [b"0", b"cbuiltins\nlist\n", b"cnumpy\nndarray\n"]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(OPCODES), max_size=40))
def test_any_opcodes_give_data_or_one_error(tmp_path_factory: pytest.TempPathFactory, opcodes: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("pickle") / "a.pkl"
    path.write_bytes(pickled(*opcodes))
    with pytest.raises(UserError, match=r"a\.pkl"):
        load_dataset(str(path), allow_pickle=True)


def npz(path: Path, header: dict[str, Any], content: bytes, times: int = 1) -> Path:
    """An archive whose members say what the header says."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("observations", "actions", "rewards"):
            archive.writestr(f"{name}.npy", buffer.getvalue() + content * times)
    return path


@pytest.mark.parametrize("shape", [(10**9, 3), (10**15,), (3, 10**9), (2**62, 4)])
@pytest.mark.parametrize("descr", ["<f8", "|b1", "|u1"])
def test_archives_claim_no_more_than_they_hold(tmp_path: Path, shape: tuple[int, ...], descr: str) -> None:
    path = npz(tmp_path / "a.npz", {"descr": descr, "fortran_order": False, "shape": shape}, b"\0" * 100)
    refused(lambda: load_dataset(str(path)), "claims .* bytes, the archive holds")


def test_archives_are_not_larger_than_their_compression_allows(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", {"descr": "|u1", "fortran_order": False, "shape": (10,)}, b"\0" * 10)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        size = archive.infolist()[0].file_size
    path.write_bytes(content.replace(size.to_bytes(4, "little"), (1 << 30).to_bytes(4, "little")))
    refused(lambda: load_dataset(str(path)), "claims 1073741824 bytes, more than the file can hold")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    return tmp_path / "minari"


PIPES = ["a.hdf5", "a.h5", "a.npz", "a.pkl", "folder/0.npz", "folder/1.h5", "folder/episode_lengths.json"]
STORED = ["trajectories.json", "observations.npy", "offsets.npy"]


@pytest.mark.parametrize("kind", ["", "d4rl:"])
@pytest.mark.parametrize("name", PIPES)
def test_pipes_are_not_opened(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    if path.parent.name == "folder" and path.suffix == ".json":
        np.savez(path.parent / "0.npz", observations=np.eye(2), actions=np.eye(2), rewards=np.ones(2))
    with pytest.raises(UserError, match=r"is a pipe, a socket or a device|is a folder"):
        load_dataset(f"{kind}{path.parent if path.parent.name == 'folder' else path}", allow_pickle=True)


@pytest.mark.parametrize("name", STORED)
def test_stores_have_no_pipes(tmp_path: Path, name: str) -> None:
    write_store(tmp_path / "store", [random_trajectories()], "x")
    (tmp_path / "store" / name).unlink()
    os.mkfifo(tmp_path / "store" / name)
    with pytest.raises(UserError, match=r"is a pipe, a socket or a device|holds no episodes"):
        load_dataset(str(tmp_path / "store"))


@pytest.mark.parametrize("name", ["metadata.json", "main_data.hdf5"])
def test_minari_sets_have_no_pipes(root: Path, name: str) -> None:
    save_minari(random_trajectories(), "a-v0")
    (root / "a-v0" / "data" / name).unlink()
    os.mkfifo(root / "a-v0" / "data" / name)
    with pytest.raises(UserError, match="is a pipe, a socket or a device"):
        load_dataset("minari:a-v0")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/stdin", "/dev/null"])
def test_devices_are_not_read(device: str) -> None:
    with pytest.raises(UserError, match=r"is a pipe, a socket or a device|expected a file"):
        load_dataset(device)


DEEP = "[" * 100_000
NESTED_SPACE = '{"type": "Dict", "subspaces": {"a": ' * 500 + "1" + "}}" * 500


@pytest.mark.parametrize(
    "content",
    [
        DEEP,
        json.dumps({"observation_space": DEEP}),
        json.dumps({"observation_space": NESTED_SPACE}),
        json.dumps({"env_spec": DEEP, "action_space": "null"}),
    ],
)
def test_deep_json_of_minari(root: Path, content: str) -> None:
    save_minari(random_trajectories(), "a-v0")
    (root / "a-v0" / "data" / "metadata.json").write_text(content)
    with pytest.raises(UserError, match=r"metadata\.json"):
        load_dataset("minari:a-v0")


def test_deep_json_beside_our_own(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [random_trajectories()], "x")
    (tmp_path / "store" / "trajectories.json").write_text(DEEP)
    with pytest.raises(UserError, match=r"trajectories\.json"):
        load_dataset(str(tmp_path / "store"))
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "folder" / "0.npz", observations=np.eye(2), actions=np.eye(2), rewards=np.ones(2))
    (tmp_path / "folder" / "episode_lengths.json").write_text(DEEP)
    with pytest.raises(UserError, match=r"episode_lengths\.json"):
        load_dataset(str(tmp_path / "folder"))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "/" + "a/" * 5000])
def test_impossible_paths(name: str) -> None:
    for kind in ("", "d4rl:", "minari:"):
        with pytest.raises(UserError):
            load_dataset(kind + name)


def test_a_list_of_many_names_stays_short(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "a.hdf5", {f"array_{i}": np.zeros(1) for i in range(500)})
    with pytest.raises(UserError) as caught:
        load_dataset(f"d4rl:{path}")
    assert len(str(caught.value)) < 1000
