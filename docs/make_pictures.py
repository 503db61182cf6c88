"""Makes docs/pictures/push-v3.gif, the README's moving picture: ``python docs/make_pictures.py [RUN_DIR]``.

Without RUN_DIR it makes a run like the README's first command, with smaller batches. Rendering needs EGL or Debian's
libosmesa6.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageSequence

from eva_rl.finetune import command as finetune

SETTINGS = ("env=push-v3", "video=true", "algo.updates=150", "algo.batch_size=16", "eval.episodes=4", "eval.every=0")
OUT = Path(__file__).parent / "pictures" / "push-v3.gif"
COLOURS, KEEP, MILLISECONDS = 96, 2, 80
"""Colours of the palette; each so-manieth frame is kept, and shown for so long."""


def main(run_dir: Path) -> None:
    """Make the picture from a run, which is made where it is not there."""
    videos = run_dir / "videos"
    if not videos.exists() and finetune.main([*SETTINGS, f"run_dir={run_dir}"]):
        raise SystemExit("the run failed")
    (video,) = videos.glob("*.gif")
    with Image.open(video) as film:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(film)]
    kept = [*frames[:-1:KEEP], frames[-1]]
    palette = kept[len(kept) // 2].quantize(COLOURS)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in kept]
    OUT.parent.mkdir(exist_ok=True)
    durations = [MILLISECONDS] * (len(kept) - 1) + [1500]
    first.save(OUT, save_all=True, append_images=others, duration=durations, loop=0, optimize=True)
    sys.stdout.write(f"{OUT}: {OUT.stat().st_size / 2**20:.2f} MB, {len(kept)} frames\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with TemporaryDirectory() as folder:
            main(Path(folder) / "run")
