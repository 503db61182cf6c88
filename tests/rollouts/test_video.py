from __future__ import annotations

import ctypes.util
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eva_rl.errors import UserError
from eva_rl.finetune import command as finetune
from eva_rl.rollouts.video import CAPTION_HEIGHT, GAP, Clip, _frame, side_by_side, write_video


def clip(frames: int, first_success: int | None = None) -> Clip:
    shades = [np.full((40, 60, 3), 10 * index, np.uint8) for index in range(frames)]
    return Clip(tuple(shades), 2, tuple(6.0 * index for index in range(frames)), first_success)


def test_the_shorter_episode_waits() -> None:
    frames = side_by_side(clip(3).frames, clip(5).frames)
    assert len(frames) == 5
    assert frames[0].shape == (40, 60 + GAP + 60, 3)
    assert [int(frame[0, 0, 0]) for frame in frames] == [0, 10, 20, 20, 20]
    assert [int(frame[0, -1, 0]) for frame in frames] == [0, 10, 20, 30, 40]
    assert frames[0][:, 60 : 60 + GAP].max() < 80, "nothing white between them on a dark page"


def test_the_caption_turns_green_with_the_first_frame_after_success() -> None:
    """Frame k shows the scene after 2 k env steps; success at env step 3 is seen after 4."""
    colours = [tuple(frame[0, -1]) for frame in clip(4, first_success=3).captioned("after")]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert len({tuple(frame[0, -1]) for frame in clip(4).captioned("after")}) == 1
    assert clip(1).captioned("after")[0].shape == (40 + CAPTION_HEIGHT, 60, 3)


def test_the_caption_shows_the_return_so_far_and_is_never_cut_off() -> None:
    texts = clip(3).captioned("x")
    assert not np.array_equal(texts[0][:CAPTION_HEIGHT], texts[2][:CAPTION_HEIGHT])
    wide = np.zeros((10, 240, 3), np.uint8)
    long = Clip((wide,), 2, (1234.0,), 0).captioned("button-press-topdown-wall-v3")[0]
    assert (long[:CAPTION_HEIGHT, -6:] == long[0, -1]).all(), "a margin is left"
    assert (long[:CAPTION_HEIGHT] != long[0, -1]).any()


def test_a_return_just_below_zero_is_no_minus_zero() -> None:
    frame = np.zeros((10, 240, 3), np.uint8)
    zero, below = Clip((frame, frame), 2, (0.0, -0.4), None).captioned("x")
    np.testing.assert_array_equal(zero, below)


@pytest.mark.parametrize(
    ("success", "every", "first"), [(0, 1, 1), (0, 2, 1), (1, 2, 1), (2, 2, 2), (5, 3, 2), (6, 3, 3)]
)
def test_success_shows_in_the_first_frame_after_it(success: int, every: int, first: int) -> None:
    """Frame k is drawn after k * every steps; step ``success`` (from 0) is over after success + 1 of them."""
    frames = Clip(clip(5).frames, every, clip(5).returns, success).captioned("x")
    assert [bool(frame[0, 0, 1] > frame[0, 0, 2]) for frame in frames].index(True) == first
    assert (first - 1) * every < success + 1 <= first * every


def test_a_gif_is_what_was_drawn(tmp_path: Path) -> None:
    write_video(tmp_path / "x.gif", clip(3).frames)
    with Image.open(tmp_path / "x.gif") as gif:
        shades = [np.asarray(frame.convert("RGB"))[0, 0].tolist() for frame in ImageSequence.Iterator(gif)]
        assert (shades, gif.info["duration"], gif.info["loop"]) == ([[0] * 3, [10] * 3, [20] * 3], 50, 0)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".mp4"] == ["x.gif"]


def test_gif_and_film(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    gif, film = write_video(tmp_path / "x.gif", clip(6).frames)
    assert iio.imread(gif).shape == (6, 40, 60, 3)
    played = iio.imread(film)
    assert played.shape == (6, 40, 60, 3)
    assert abs(int(played[5].mean()) - 50) < 5


@pytest.mark.slow
def test_finetuning_films_before_and_after(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ctypes.util.find_library("OSMesa") is None:
        pytest.skip("needs Debian's libosmesa6")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    run_dir = tmp_path / "run"
    small = ["env=reach-v3", "env.horizon=12", "data.episodes=2", "data.workers=1", "data.only_successes=false"]
    small += ["algo.updates=4", "algo.learning_rate=0.1", "algo.warmup_steps=0", "eval.episodes=1", "threads=1"]
    assert finetune.main([f"policy={policy_folder}", f"run_dir={run_dir}", "video=true", *small]) == 0
    frames = iio.imread(run_dir / "videos" / "metaworld-reach-v3.gif").astype(int)
    before, after = frames[:, CAPTION_HEIGHT:, :240], frames[:, CAPTION_HEIGHT:, -240:]
    assert frames.shape == (7, 240 + CAPTION_HEIGHT, 480 + GAP, 3)
    assert np.abs(before[0] - after[0]).mean() < 5, "the same episode"
    assert np.abs(before[-1] - after[-1]).mean() > np.abs(before[0] - after[0]).mean(), "ends otherwise"
    events = EventAccumulator(str(run_dir / "tb"), size_guidance={"histograms": 0})
    events.Reload()
    (image,) = events.Images("eval/before_and_after")
    assert image.encoded_image_string == (run_dir / "videos" / "metaworld-reach-v3.gif").read_bytes()
    assert [event.step for event in events.Histograms("eval/action_0")] == [0, 4]


@pytest.mark.parametrize(
    ("frame", "shape"),
    [(np.zeros((40, 60), np.uint8), (20, 30, 3)), (np.zeros((40, 60, 3)), None), (np.zeros(4, np.uint8), None)],
)
def test_frames_are_grey_or_coloured_bytes(frame: np.ndarray, shape: tuple[int, ...] | None) -> None:
    """Grey ones ended in a traceback after the evaluation, floating-point ones in a black video."""
    env = SimpleNamespace(render=lambda: frame)
    if shape is not None:
        assert _frame(env, None).shape == shape
    else:
        with pytest.raises(UserError, match=r"render\(\) returned .*expected uint8 of \(height, width, 3\)"):
            _frame(env, None)
