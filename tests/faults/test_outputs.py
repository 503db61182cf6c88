"""Output that cannot be written is refused before anything is played, trained or launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from eva_rl import collect, evaluate, export, pretrain
from eva_rl.benchmark import command as benchmark
from eva_rl.finetune import command as finetune
from eva_rl.launch.multirun import LONGEST_LABEL, label_of
from eva_rl.report import command as report

STUDY = {"tasks": ["reach-v3"], "methods": {"lora": {}, "eva": {}}, "seeds": [0]}
WORK = ("Collecting", "Episodes", "finished before", "Run directory", "Traceback")
"""What a command says as it begins to work."""


def in_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "new"


def in_no_real_folder(folder: Path) -> Path:
    return Path("/proc/new")


def too_long(folder: Path) -> Path:
    return folder / ("x" * 300)


@pytest.mark.parametrize("place", [in_a_file, in_no_real_folder, too_long])
@pytest.mark.parametrize(
    ("main", "words", "setting"),
    [
        (collect.main, ["env=reach-v3", "episodes=1", "env.horizon=20", "workers=1"], "out={}/demos.h5"),
        (collect.main, ["env=reach-v3", "episodes=1", "env.horizon=20", "workers=1"], "out={}.h5"),
        (evaluate.main, ["policy=POLICY", "eval.episodes=1", "env.horizon=20"], "out={}/found.json"),
        (export.main, ["policy=POLICY"], "out={}"),
        (benchmark.main, ["tasks=reach-v3", "methods=lora", "seeds=1", "finetune.policy=POLICY"], "out={}"),
        (benchmark.main, ["study=STUDY", "out=OUT"], "records={}"),
        (benchmark.main, ["study=STUDY"], "out={}"),
        (finetune.main, ["--multirun", "env=reach-v3", "adapter=lora,eva", "policy=POLICY"], "run_dir={}"),
        (finetune.main, ["env=reach-v3", "policy=POLICY"], "run_dir={}"),
        (pretrain.main, ["env=reach-v3", "data.episodes=1"], "run_dir={}"),
        (report.main, ["runs=[OUT]"], "out={}"),
    ],
)
def test_what_cannot_be_written(
    main: Callable[[Sequence[str]], int],
    words: list[str],
    setting: str,
    place: Callable[[Path], Path],
    policy_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | {"settings": {"policy": str(policy_folder)}}))
    names = {"POLICY": policy_folder, "STUDY": tmp_path / "study.yaml", "OUT": tmp_path / "out"}
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    assert main([*words, setting.format(place(tmp_path))]) == 2
    said = capsys.readouterr().err
    assert "cannot be written" in said
    assert f"Name another {setting.partition('=')[0]}=." in said
    assert not [word for word in WORK if word in said]


def test_a_file_in_place_of_a_folder(policy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    sweep = ["--multirun", "env=reach-v3", "adapter=lora,eva", f"policy={policy_folder}", f"run_dir={tmp_path}/file"]
    grid = ["tasks=reach-v3", "methods=lora", "seeds=1", f"finetune.policy={policy_folder}", f"out={tmp_path}/file"]
    for main, words in ((finetune.main, sweep), (benchmark.main, grid)):
        assert main(words) == 2
        assert "file cannot be written: Not a directory. Name another" in capsys.readouterr().err


def test_videos_that_cannot_be_written(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were found out after all episodes had been played."""
    (tmp_path / "videos").touch()
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([f"policy={policy_folder}", "env=reach-v3", "eval.episodes=1", "video=true"]) == 2
    said = capsys.readouterr().err
    assert "videos cannot be written: Not a directory" in said
    assert "or leave out video=true" in " ".join(said.split())
    assert not [word for word in WORK if word in said]


def test_long_names_of_a_sweep_are_shortened_and_stay_apart(tmp_path: Path) -> None:
    several = [label_of([f"data={'ä' * 200}", f"seed={seed}"]) for seed in range(3)]
    assert len(set(several)) == 3
    for label in several:
        assert len(label.encode()) <= LONGEST_LABEL
        (tmp_path / f"{label}.log.lock").touch()
    assert label_of([f"data={'a' * (LONGEST_LABEL - 5)}"]) == f"data={'a' * (LONGEST_LABEL - 5)}"
