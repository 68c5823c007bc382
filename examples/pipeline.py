"""A diffusers pipeline, uncached and with half of its steps, and how close the clips are.

    python examples/pipeline.py

The small video model of this repository; put your own pipeline in its place.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

import stepcache
from stepcache.measure.metrics import psnr
from stepcache.measure.video import write_clip

MODEL = Path(__file__).resolve().parent.parent / "assets" / "tiny-wan"
PROMPT = "a big red circle moving right over a slate striped background"


def main() -> None:
    """Two clips, a summary, one number."""
    pipe = DiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)

    def run() -> np.ndarray:
        seed = torch.Generator().manual_seed(0)
        return pipe(PROMPT, height=64, width=64, num_frames=17, generator=seed, output_type="np").frames[0]

    uncached = run()
    with stepcache.accelerate(pipe, "hindsight:0.5") as accelerated:
        cached = run()
    print(accelerated.summary())
    print(f"{psnr(uncached, cached).mean():.1f} dB from the uncached clip")
    write_clip("uncached.mp4", uncached, fps=8)
    write_clip("cached.mp4", cached, fps=8)


if __name__ == "__main__":
    main()
