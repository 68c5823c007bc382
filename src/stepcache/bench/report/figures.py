"""The main charts as files for papers, drawn by matplotlib: PSNR, SSIM or LPIPS over computed steps, and speed-up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepcache.bench.report.charts import family, label, shortened
from stepcache.bench.results import REFERENCE, Row
from stepcache.files import replacing

LABELS = {"psnr": "PSNR to the uncached clip, dB", "ssim": "SSIM", "lpips": "LPIPS"}


MARKS = "osD^vP*Xph"


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw what there is data for as .svg and .png; returns the paths.

    Raises:
        ImportError: matplotlib is missing.
    """
    os.environ.setdefault("MPLBACKEND", "agg")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'stepcache[report]' (or --no-figures).") from error
    usable = [r for r in rows if r.method != REFERENCE and r.failed < r.items]
    drawn: dict[str, Any] = {}
    for metric in LABELS:
        having = [r for r in usable if getattr(r, metric) is not None]
        if having:
            drawn[metric] = Figure(figsize=(6.4, 4.2), layout="constrained")
            _quality(drawn[metric].add_subplot(), having, metric)
    drawn["speedup"] = Figure(figsize=(6.4, 4.2), layout="constrained")
    _speedup(drawn["speedup"].add_subplot(), usable)
    paths = []
    for name, figure in drawn.items():
        for suffix in ("svg", "png"):
            path = folder / f"{name}.{suffix}"
            with replacing(path) as temporary:
                figure.savefig(temporary, format=suffix, dpi=160)
            paths.append(path)
    return paths


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    names = dict.fromkeys(family(r.method) for r in rows)
    return {n: sorted((r for r in rows if family(r.method) == n), key=lambda r: r.computed) for n in names}


def _quality(axes: Any, rows: Sequence[Row], metric: str) -> None:
    for number, (name, group) in enumerate(_groups(rows).items()):
        x, mean = [r.computed for r in group], [getattr(r, metric) for r in group]
        mark = MARKS[number % len(MARKS)]
        (drawn,) = axes.plot(x, mean, marker=mark, label=shortened(label(name), 28), linewidth=1.5, markersize=5)
        worst = [getattr(r, f"{metric}_worst") for r in group]
        axes.plot(x, worst, linestyle=":", linewidth=0.9, marker=mark, markersize=2.5, color=drawn.get_color())
    axes.set_xlabel("computed steps (dotted: the worst prompt)")
    axes.set_ylabel(LABELS[metric])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)


def _speedup(axes: Any, rows: Sequence[Row]) -> None:
    for number, (name, group) in enumerate(_groups(rows).items()):
        x, y = [r.ideal for r in group], [r.speedup for r in group]
        axes.plot(
            x, y, marker=MARKS[number % len(MARKS)], linestyle="none", label=shortened(label(name), 28), markersize=5
        )
    ends = [1.0, max([r.ideal for r in rows] + [r.speedup for r in rows] + [1.1])]
    axes.plot(ends, ends, color="0.6", linewidth=0.9)
    axes.set_xlabel("steps over computed steps")
    axes.set_ylabel("measured speed-up of the loop")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
