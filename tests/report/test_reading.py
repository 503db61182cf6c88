"""What is read of files that may be damaged, foreign, or of episodes that were stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eva_rl.errors import UserError
from eva_rl.report.reading import (
    MOST_CHARACTERS,
    clean_summary,
    episodes_by_seed,
    one_line,
    read_rows,
)
from eva_rl.rollouts.episodes import EpisodeRecord
from eva_rl.rollouts.evaluation import EvaluationResult

SUMMARY = {"env": "metaworld/reach-v3", "method": "eva", "seed": 3, "eval/success_rate": 0.5}


def written(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "file"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@given(st.text())
def test_a_name_is_on_one_short_line(text: str) -> None:
    found = one_line(text)
    assert found.isprintable()
    assert found == found.strip()
    assert len(found) <= MOST_CHARACTERS
    assert one_line(found) == found


def test_names_by_hand() -> None:
    assert one_line("  a\n\tb\u00a0 c ") == "a b c"
    assert one_line("a\x1b[31mb\u202ec") == "a\ufffd[31mb\ufffdc", "no escape sequence, no change of direction"
    long = one_line("x" * 200 + "y" * 200)
    assert (long[:3], long[-3:], "..." in long) == ("xxx", "yyy", True)
    assert one_line("n" * MOST_CHARACTERS) == "n" * MOST_CHARACTERS
    assert one_line(None) == "None"


def test_rows_keep_their_numbers_and_count_the_rest(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "wall_time": 2, "a": 3, "b": null, "c": "x", "d": NaN, "e": true}',
        "",
        '{"step": 1, "a": 3}',
        '{"step": NaN, "wall_time": 2}',
        "[]",
        '{"step": 2, "wall_t',
    ]
    rows, damaged = read_rows(written(tmp_path, "\n".join(lines)))
    assert rows == [{"step": 1.0, "wall_time": 2.0, "a": 3.0}]
    assert damaged == 4


def test_a_summary_is_cleaned() -> None:
    raw = SUMMARY | {
        "eval/mean_reward": float("nan"),
        "env": "a\nb",
        "seconds": {"train": 1.5},
        "data": {"source": "x\ty", "episodes": 25},
        "policy": "p" * 500,
        "deep": {"inner": {"leaf": 1}, "kept": 2},
        "flag": True,
    }
    found = clean_summary(raw, Path("summary.json"))
    assert (found["env"], found["seed"], found["eval/success_rate"]) == ("a b", 3, 0.5)
    assert "eval/mean_reward" not in found, "what is not finite was not measured"
    assert (found["seconds"], found["data"]) == ({"train": 1.5}, {"source": "x y", "episodes": 25.0})
    assert len(found["policy"]) <= MOST_CHARACTERS
    assert found["deep"] == {"kept": 2.0}
    assert "flag" not in found


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"eval/success_rate": None}, "expected a finite number, or an eval/success_rate"),
        ({"eval/success_rate": 1.5}, "eval/success_rate"),
        ({"seed": "3"}, "seed"),
        ({"seed": True}, "seed"),
        ({"env": ""}, "env"),
        ({"method": 7}, "method"),
        ({"seconds": {"train": -1}}, "train"),
        ({"data": {"episodes": "many"}}, "episodes"),
    ],
)
def test_a_summary_that_is_none_names_the_key(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as raised:
        clean_summary(SUMMARY | change, Path("here/summary.json"))
    assert "here/summary.json" in str(raised.value)


def evaluation(*episodes: EpisodeRecord) -> dict[str, Any]:
    """As ``evaluation.json`` holds it."""
    record = {"after": EvaluationResult("t", episodes, "", True).record()}
    back: dict[str, Any] = json.loads(json.dumps(record))
    return back


def episode(seed: int, success: bool, stopped: bool = False) -> EpisodeRecord:
    return EpisodeRecord("t", seed, 12.5, 80, success, False, 79 if success else -1, stopped=stopped)


def test_episodes_that_were_stopped_at_success_count() -> None:
    """They have no return. Every run of a benchmark is stopped so: none of its goals was once read."""
    found = episodes_by_seed(evaluation(episode(7, False), episode(8, True, stopped=True)), "t")
    assert found == {7: {"success": 0.0, "episode_return": 12.5}, 8: {"success": 1.0}}


def test_episodes_that_are_all_alike_are_in_no_test_over_goals() -> None:
    """They would be taken for independent goals."""
    alike = (replace(episode(seed, False), start=1) for seed in (7, 8, 9))
    assert episodes_by_seed(evaluation(*alike), "t") == {}


@pytest.mark.parametrize(
    "change",
    [{"episode_return": None}, {"episode_return": "x", "stopped": True}, {"episode_seed": "7"}, {"env_id": "u"}],
)
def test_one_damaged_episode_is_no_part_of_a_test(change: dict[str, Any]) -> None:
    record = evaluation(episode(7, False), episode(8, True))
    record["after"]["episodes"][0] |= change
    with pytest.raises(ValueError, match="1 of 2 episodes are sound"):
        episodes_by_seed(record, "t")
    for nothing in ({}, {"after": None}, {"after": {"episodes": {}}}, {"after": {"episodes": [3]}}):
        with pytest.raises(ValueError, match="0 of"):
            episodes_by_seed(nothing, "t")
