"""What a benchmark's page shows: its rows and items, and what is said of them in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepcache.bench.labels import Label, labels
from stepcache.bench.results import REFERENCE, Folder, Item, Row, table

NONE = "–"


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

    @property
    def labels(self) -> dict[str, Label]:
        """Method -> what it is called here."""
        return labels([r.method for r in self.rows], self.description.get("schedules", {}))


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
        f"{cost}, the closest to the uncached clips is {results.labels[best.method].row}: "
        f"{best.psnr:.1f} dB on average, {best.psnr_worst:.1f} dB on the worst prompt, "
        f"{best.speedup:.2f}x faster ({best.computed:.1f} steps)."
    )


def columns(results: Results) -> dict[str, list[str]]:
    """The table: name of a column -> a cell for every row that has a result; columns without a value are left out."""
    rows = [r for r in results.rows if r.failed < r.items]
    found = {
        "computed steps": [f"{r.computed:.1f}" for r in rows],
        "speed-up": [_speedup(r, results.items[r.method]) for r in rows],
        "ideal": [f"{r.ideal:.2f}×" for r in rows],
        "PSNR mean": [_metric(r, r.psnr, 2, "same") for r in rows],
        "PSNR worst": [_metric(r, r.psnr_worst, 2, "same") for r in rows],
        "SSIM mean": [_metric(r, r.ssim, 4) for r in rows],
        "SSIM worst": [_metric(r, r.ssim_worst, 4) for r in rows],
        "LPIPS mean": [_metric(r, r.lpips, 4) for r in rows],
        "LPIPS worst": [_metric(r, r.lpips_worst, 4) for r in rows],
        "skipped step": [NONE if r.reused_cost is None else f"{r.reused_cost:.1%}" for r in rows],
        "cache": [NONE if r.cache_bytes is None else f"{r.cache_bytes / 2**20:.1f} MiB" for r in rows],
        "items": [str(r.items - r.failed) for r in rows],
    }
    return {name: cells for name, cells in found.items() if set(cells) - {NONE}}


def _metric(row: Row, value: float | None, digits: int, otherwise: str = NONE) -> str:
    if row.method == REFERENCE:
        return NONE
    return otherwise if value is None else f"{value:.{digits}f}"


def _speedup(row: Row, items: Sequence[Item]) -> str:
    """Measured; one that no skipping explains is noise, and its spread over the items says how much."""
    if not row.noise:
        return f"{row.speedup:.2f}×"
    return f"{row.speedup:.2f}×\nnoise:\n{row.speedup_low:.2f}–{row.speedup_high:.2f}×"
