"""Makes the documentation's pictures: ``python docs/make_pictures.py film figures``.

``film`` is docs/pictures/push-v3.gif, the README's moving picture, from ``--run`` or from a run like the README's first
command, with smaller batches. Rendering needs EGL or Debian's libosmesa6. ``figures`` are those of docs/results, drawn
from the records beside them. The metrics of mt40's pretraining are not committed: its figure, which
benchmarks/policies/report.py drew, only loses its white background.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageColor, ImageSequence

DOCS = Path(__file__).parent
sys.path.append(str(DOCS.parent))
SETTINGS = ("env=push-v3", "video=true", "algo.updates=150", "algo.batch_size=16", "eval.episodes=4", "eval.every=0")
OUT, RESULTS = DOCS / "pictures" / "push-v3.gif", DOCS / "results"
COLOURS, KEEP, MILLISECONDS = 96, 2, 80
"""Colours of the palette; each so-manieth frame is kept, and shown for so long."""


def main() -> None:
    """Make what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("film", "figures"))
    parser.add_argument("--run", type=Path, help="a run made with video=true")
    options = parser.parse_args()
    if "film" in options.what:
        with TemporaryDirectory() as folder:
            film(options.run or Path(folder) / "run")
    if "figures" in options.what:
        figures()


def film(run_dir: Path) -> None:
    """Make the moving picture from a run, which is made where it is not there."""
    from eva_rl.finetune import command as finetune

    videos = run_dir / "videos"
    if not videos.exists() and finetune.main([*SETTINGS, f"run_dir={run_dir}"]):
        raise SystemExit("the run failed")
    (video,) = videos.glob("*.gif")
    with Image.open(video) as moving:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(moving)]
    kept = [*frames[:-1:KEEP], frames[-1]]
    palette = kept[len(kept) // 2].quantize(COLOURS)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in kept]
    OUT.parent.mkdir(exist_ok=True)
    durations = [MILLISECONDS] * (len(kept) - 1) + [1500]
    first.save(OUT, save_all=True, append_images=others, duration=durations, loop=0, optimize=True)
    sys.stdout.write(f"{OUT}: {OUT.stat().st_size / 2**20:.2f} MB, {len(kept)} frames\n")


def figures() -> None:
    """Draw the figures of docs/results anew."""
    from benchmarks import pictures
    from benchmarks.comparisons import learning_rates_report, verdict
    from benchmarks.online import cw10

    for study in verdict.STUDIES:
        verdict.draw(study)
    rates = [json.loads(line) for line in (RESULTS / "learning_rates.jsonl").read_text().splitlines()]
    curves = learning_rates_report.curves(rates, "loss")
    pictures.save(learning_rates_report.draw(curves, "loss"), RESULTS / "learning_rates.png", dpi=120)
    cw10.draw(json.loads((RESULTS / "online-cw10.json").read_text()), RESULTS / "online-cw10.png")
    without_background(RESULTS / "mt40-curve.png", pictures.INK)


def without_background(path: Path, ink: str, line: str = "#1f77b4") -> None:
    """Turn white into transparency and black into `ink`; what has a colour is `line`, as before on white."""
    with Image.open(path) as image:
        if image.mode == "RGBA" and image.getchannel("A").getextrema()[0] == 0:
            return
        shades = np.asarray(image.convert("RGB"), dtype=float) / 255  # (H, W, 3)
    opacity = 1 - shades.min(axis=-1, keepdims=True)
    coloured = np.ptp(shades, axis=-1, keepdims=True) > 0.02
    grey, hue = (np.array(ImageColor.getrgb(name)) / 255 for name in (ink, line))
    opacity = np.where(coloured, opacity / (1 - hue.min()), opacity)
    pixels = np.concatenate([np.where(coloured, hue, grey), opacity], axis=-1).clip(0, 1) * 255
    Image.fromarray(pixels.round().astype(np.uint8)).save(path, optimize=True)


if __name__ == "__main__":
    main()
