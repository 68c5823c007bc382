"""`stepcache report`: a benchmark's folder as one page that needs nothing else: no network, no server, no other file.

stepcache report results                 results/report.html, and figures/*.svg and *.png beside it
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stepcache.bench.report import charts
from stepcache.bench.results import REFERENCE, Folder, Item, Row, table
from stepcache.fleet.places import at_hand
from stepcache.measure.video import open_clip, write_preview

HERE = Path(__file__).parent


WIDTH = 320
"""Pixels to which clips are shrunk for the page; smaller ones stay as they are."""


@dataclass(frozen=True)
class Results:
    """A benchmark as the page shows it: rows of the table, and items by method."""

    description: dict[str, Any]
    rows: list[Row]
    items: dict[str, list[Item]]

    @property
    def methods(self) -> list[Row]:
        """The rows with a result, the uncached one left out."""
        return [r for r in self.rows if r.method != REFERENCE and r.failed < r.items]


def read(folder: Folder) -> Results:
    """What a folder holds.

    Raises:
        FileNotFoundError: it is no benchmark's.
        ValueError: it holds no results yet, or a broken item.
    """
    description, items = folder.read(), folder.items()
    if not items:
        raise ValueError(f"{folder.root} holds no items yet; run stepcache bench first.")
    rows = table(folder)
    by_method = {r.method: [i for i in items if i.method == r.method and not i.error] for r in rows}
    return Results(description, rows, by_method)


def load_clips(folder: Folder, results: Results, width: int, count: int | None) -> tuple[dict[str, str], list[str]]:
    """Clips as base64 of small MP4s, "method|index|seed" -> text, and what could not be read."""
    items = [i for group in results.items.values() for i in group if i.clip and (count is None or i.index < count)]
    found, missing = {}, []
    with tempfile.TemporaryDirectory(prefix="stepcache-") as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = [(folder.root / item.clip, Path(scratch) / f"{n}.mp4", width) for n, item in enumerate(items)]
        bar = tqdm(
            pool.map(_shrunk, paths), total=len(items), desc="clips", unit="clip", dynamic_ncols=True, leave=False
        )
        for item, content in zip(items, bar, strict=True):
            if content is None:
                missing.append(item.clip)
            else:
                found[f"{item.method}|{item.index}|{item.seed}"] = base64.b64encode(content).decode()
    return found, missing


def _shrunk(task: tuple[Path, Path, int]) -> bytes | None:
    """A small copy of a clip, made in a scratch file; `None` if it cannot be read."""
    path, scratch, width = task
    try:
        with at_hand(path) as local:
            write_preview(scratch, open_clip(local), width)
        content = scratch.read_bytes()
        scratch.unlink()
    except (OSError, ValueError):
        return None
    return content


def page(results: Results, clips: dict[str, str]) -> str:
    """The page's HTML."""
    try:
        from jinja2 import Environment, FileSystemLoader, select_autoescape
    except ImportError as error:
        raise ImportError("the report needs Jinja2: pip install 'stepcache[report]'.") from error
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True
    )
    colours = charts.colours([r.method for r in results.methods])
    return environment.get_template("page.html").render(
        about=results.description,
        rows=results.rows,
        methods=results.methods,
        reference=REFERENCE,
        headline=headline(results),
        charts=drawings(results, colours),
        colours=colours,
        families={charts.family(method): colour for method, colour in colours.items()},
        label=charts.label,
        failures=[r for r in results.rows if r.failed],
        style=(HERE / "style.css").read_text(encoding="utf-8"),
        script=(HERE / "player.js").read_text(encoding="utf-8"),
        data=embedded(player_data(results, clips)),
        clips=clips,
    )


def drawings(results: Results, colours: dict[str, int]) -> list[tuple[str, str, str]]:
    """(title, explanation, SVG) of every chart there is data for."""
    steps = results.description["request"]["steps"]
    found = [
        (
            "Quality against cost",
            "PSNR to the uncached clip over computed steps; dots are means over prompts, thin lines reach down to the "
            "worst prompt. Up and to the left is better.",
            charts.quality(results.methods, colours, "psnr", "PSNR, dB", steps),
        )
    ]
    if any(r.lpips is not None for r in results.methods):
        drawn = charts.quality(results.methods, colours, "lpips", "LPIPS", steps)
        found.append(("Perceptual distance", "LPIPS to the uncached clip; lower is better.", drawn))
    else:
        drawn = charts.quality(results.methods, colours, "ssim", "SSIM", steps)
        found.append(("Structure", "SSIM to the uncached clip; higher is better. (LPIPS was not measured.)", drawn))
    found.append(
        (
            "Speed-up, measured against ideal",
            "Time of the uncached denoising loop over the method's; on the line a predicted step costs nothing.",
            charts.speed(results.methods, colours),
        )
    )
    errors = {r.method: mean_errors(results.items[r.method]) for r in results.methods}
    if any(len(e) for e in errors.values()):
        drawn = charts.errors({m: e for m, e in errors.items() if len(e)}, colours)
        text = "Distance of the latent from the uncached run's after every step, relative, mean over prompts."
        found.append(("Error along the trajectory", text, drawn))
    lines = {r.method: mean_steps(results.items[r.method], steps) for r in results.rows if r.failed < r.items}
    text = "One row a method, one cell a step of the sampler: the darker, the more of the transformer was evaluated."
    found.append(("Which steps are computed", text, charts.timelines(lines, colours)))
    spread = {r.method: [i.psnr for i in results.items[r.method] if i.psnr is not None] for r in results.methods}
    found.append(
        ("Prompt by prompt", "PSNR of every prompt and seed; the line is the mean.", charts.spread(spread, colours))
    )
    return found


def mean_errors(items: Sequence[Item]) -> np.ndarray:
    """(S,): mean over items of the latent's relative error after every step; empty if the steps are not comparable."""
    rows = [i.step_errors for i in items if i.step_errors]
    return np.mean(rows, 0) if rows else np.zeros(0)


def mean_steps(items: Sequence[Item], steps: int) -> np.ndarray:
    """(n,): mean over items of what share of the transformer every step evaluated; n is the sampler's step count."""
    longest = max((len(i.per_step) for i in items), default=steps)
    rows = [i.per_step for i in items if len(i.per_step) == longest]
    return np.mean(rows, 0) if rows else np.zeros(0)


def headline(results: Results) -> str:
    """One sentence: the best method at the lowest cost that still looks good, or at any."""
    good = [r for r in results.methods if r.psnr is not None and r.psnr_worst is not None]
    if not good:
        return ""
    steps = results.description["request"]["steps"]
    half = [r for r in good if r.computed <= steps / 2 + 0.5] or good
    best = max(half, key=lambda r: (r.psnr or 0, r.psnr_worst or 0))
    cost = f"With at most half of the {steps} steps computed" if best in half and half != good else "Of all methods"
    return (
        f"{cost}, {charts.label(best.method)} is closest to the uncached clips: "
        f"{best.psnr:.1f} dB on average, {best.psnr_worst:.1f} dB on the worst prompt, "
        f"{best.speedup:.2f}x faster ({best.computed:.1f} steps)."
    )


def player_data(results: Results, clips: dict[str, str]) -> dict[str, Any]:
    """What the players need to know: prompts, methods, and which clips there are."""
    items = [i for group in results.items.values() for i in group]
    prompts = {(i.index, i.seed): i.prompt for i in items}
    figures_of = {f"{i.method}|{i.index}|{i.seed}": [i.psnr, i.ssim, round(i.computed, 1), i.identical] for i in items}
    return {
        "prompts": [{"index": i, "seed": s, "text": text} for (i, s), text in sorted(prompts.items())],
        "methods": [r.method for r in results.rows if r.failed < r.items],
        "reference": REFERENCE,
        "labels": {r.method: charts.label(r.method) for r in results.rows},
        "figures": figures_of,
        "clips": sorted(clips),
        "frames": {f"{i.method}|{i.index}|{i.seed}": len(i.psnr_per_frame) for i in items},
        "fps": results.description["fps"],
    }


def embedded(data: Any) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(data, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
