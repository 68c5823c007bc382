"""A pair of clips as one page: the players, how far the clips are apart, what the run did."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from stepcache.bench.pairs import Made
from stepcache.bench.report.page import embedded, rendered
from stepcache.bench.results import REFERENCE
from stepcache.measure.generation import Request
from stepcache.measure.metrics import compare_clips, finite

WIDTH = 416
"""Pixels to which wider clips are shrunk for the page."""


def page_of(plain: Made, cached: Made, name: str, request: Request, fps: float) -> str:
    """The page's HTML; `name`: what the method is called. It is as high as its content in a frame of another page."""
    apart, count = compare_clips(plain.frames, cached.frames), len(plain.frames)
    clips = {"plain": plain, "cached": cached}
    keys = {of: f"{of}|0|{request.seed}" for of in clips}
    data = {
        "prompts": [{"index": 0, "seed": request.seed, "text": request.prompt}],
        "methods": list(clips),
        "reference": "plain",
        "labels": {"plain": REFERENCE, "cached": name},
        "figures": {
            keys[of]: [finite(apart.psnr), apart.ssim, made.computed, apart.identical] for of, made in clips.items()
        },
        "clips": list(keys.values()),
        "frames": dict.fromkeys(keys.values(), count),
        "fps": fps,
        "lossless": True,
    }
    closeness = "The same clip" if apart.identical else f"PSNR {apart.psnr:.2f} dB, SSIM {apart.ssim:.4f}"
    return rendered(
        "clips.html",
        method=name,
        lossless=True,
        frames=count,
        figures=f"{closeness}{f' (mean of {count} frames)' if count > 1 else ''}: computed {cached.computed} of "
        f"{request.steps} steps, loop {plain.loop_seconds / cached.loop_seconds:.2f}x faster as measured once "
        f"({plain.loop_seconds:.2f} s to {cached.loop_seconds:.2f} s), ideal {cached.ideal_speedup:.2f}x.",
        shrunk=WIDTH if plain.frames.shape[2] > WIDTH else None,
        summary=cached.summary,
        data=embedded(data),
        clips={keys[of]: pictures(made.frames) for of, made in clips.items()},
    )


def pictures(frames: np.ndarray) -> str:
    """Frames [T, H, W, 3] uint8 as base64 of lossless pictures, one a line: the difference view shows no codec."""
    lines = []
    for frame in frames:
        picture, content = Image.fromarray(frame), io.BytesIO()
        if picture.width > WIDTH:
            picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)))
        picture.save(content, "WEBP", lossless=True, method=0)
        lines.append(base64.b64encode(content.getvalue()).decode())
    return "\n".join(lines)
