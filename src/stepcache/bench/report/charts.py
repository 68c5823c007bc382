"""The charts of a benchmark, drawn once for the page and for files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stepcache.bench.labels import Label
from stepcache.bench.report.contents import Results, mean_errors, mean_steps
from stepcache.bench.results import Row
from stepcache.measure.drawing import CARD, GREY, TEXT, WIDTH, Tips, colour, drawing, mark, save

LONGEST_NAME = 40
"""Characters of a name in a legend; the table has it in full."""


ROW, AXES, LEGEND = 38, 250, 20
"""Heights in points: of a method's row, of a plot with its axes, of a line of the legend."""


SMALLEST_ERROR = 1e-7
"""Relative errors below are rounding, and not drawn."""


@dataclass(frozen=True)
class Chart:
    """One chart: its file's name, a title, a sentence on how to read it, and how it is drawn."""

    name: str
    title: str
    text: str
    draw: Callable[[Any, Tips], Any]
    """(matplotlib's Figure, tips) -> the figure; to be called within `drawing`."""


@dataclass(frozen=True)
class Named:
    """Labels and colours of the methods, the same in every chart.

    Args:
        labels: method -> label.
        numbers: method -> number of its colour and mark, one a curve.
    """

    labels: Mapping[str, Label]
    numbers: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        curves = list(dict.fromkeys(label.curve for label in self.labels.values()))
        object.__setattr__(self, "numbers", {m: curves.index(label.curve) for m, label in self.labels.items()})

    def colour(self, method: str) -> str:
        """Of a method; grey for the uncached run."""
        return colour(self.numbers[method]) if method in self.numbers else GREY

    def row(self, method: str) -> str:
        """The method's name in full."""
        return self.labels[method].row if method in self.labels else method

    def groups(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        """Curve -> its rows, by computed steps."""
        curves = dict.fromkeys(self.labels[r.method].curve for r in rows)
        by_cost = sorted(rows, key=lambda r: r.computed)
        return {c: [r for r in by_cost if self.labels[r.method].curve == c] for c in curves}


def named_methods(results: Results) -> Named:
    """The methods that have a result."""
    names = results.labels
    return Named({r.method: names[r.method] for r in results.methods})


def charts(results: Results) -> list[Chart]:
    """Every chart there is data for, the most telling first."""
    named = named_methods(results)
    rows, steps = results.methods, results.description["request"]["steps"]
    found = [
        Chart(
            "psnr",
            "Quality against cost",
            "PSNR to the uncached clip over computed steps; marks are means, thin lines reach to the worst "
            "prompt. Up and to the left is better.",
            lambda make, tips: quality(make, tips, rows, named, "psnr", "PSNR, dB", steps),
        )
    ]
    for metric, title, text in (
        ("ssim", "Structure", "SSIM to the uncached clip; higher is better."),
        ("lpips", "Perceptual distance", "LPIPS to the uncached clip; lower is better."),
    ):
        if any(getattr(r, metric) is not None for r in rows):
            found.append(Chart(metric, title, text, _quality_of(rows, named, metric, metric.upper(), steps)))
    found.append(
        Chart(
            "speedup",
            "Speed-up, measured against ideal",
            "Time of the uncached denoising loop over the method's; on the line a skipped step costs nothing.",
            lambda make, tips: speed(make, tips, rows, named),
        )
    )
    errors = {r.method: mean_errors(results.items[r.method]) for r in rows}
    if any(map(len, errors.values())):
        kept = {method: curve for method, curve in errors.items() if len(curve)}
        found.append(
            Chart(
                "errors",
                "Error along the trajectory",
                "Distance of the latent from the uncached run's after every step, relative, mean over prompts.",
                lambda make, tips: curves(make, tips, kept, named),
            )
        )
    shares = {r.method: mean_steps(results.items[r.method], steps) for r in results.rows if r.failed < r.items}
    found.append(
        Chart(
            "steps",
            "Which steps are computed",
            "One row a method, one cell a step: the stronger its colour, the more of the transformer was evaluated.",
            lambda make, tips: timelines(make, tips, shares, named),
        )
    )
    psnr = {r.method: [i.psnr for i in results.items[r.method] if i.psnr is not None] for r in rows}
    if any(psnr.values()):
        measured = {method: values for method, values in psnr.items() if values}
        found.append(
            Chart(
                "prompts",
                "Prompt by prompt",
                "PSNR of every prompt and seed; the line is the mean.",
                lambda make, tips: spread(make, tips, measured, named),
            )
        )
    return found


def write(results: Results, folder: Path) -> list[Path]:
    """Draw every chart into a folder, as .svg and .png; returns the paths.

    Raises:
        ImportError: matplotlib is missing.
    """
    paths = []
    with drawing() as figure:
        for chart in charts(results):
            drawn = chart.draw(figure, Tips())
            for suffix in ("svg", "png"):
                paths.append(folder / f"{chart.name}.{suffix}")
                save(drawn, paths[-1])
    return paths


def _quality_of(rows: Sequence[Row], named: Named, metric: str, unit: str, steps: int) -> Callable[[Any, Tips], Any]:
    return lambda make, tips: quality(make, tips, rows, named, metric, unit, steps)


def _axes(make: Any, height: float, legend: int = 0) -> tuple[Any, Any]:
    """A figure and its axes, with room for so many lines of a legend below."""
    figure = make(figsize=(WIDTH / 72, (height + LEGEND * legend) / 72), layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Any, entries: Mapping[str, dict[str, Any]]) -> None:
    """Name -> how its line looks, one a line, below the plot."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=_short(name), **look) for name, look in entries.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=1)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def quality(make: Any, tips: Tips, rows: Sequence[Row], named: Named, metric: str, unit: str, steps: int) -> Any:
    """A metric over computed steps: a curve for the settings of a method, thin lines to the worst prompt."""
    groups = named.groups([r for r in rows if getattr(r, metric) is not None])
    figure, axes = _axes(make, AXES, len(groups))
    looks = {}
    for curve, group in groups.items():
        number = named.numbers[group[0].method]
        look = {"color": colour(number), "marker": mark(number), "markeredgecolor": CARD}
        looks[curve] = look
        axes.plot([r.computed for r in group], [getattr(r, metric) for r in group], color=colour(number), zorder=2)
        for r in group:
            mean, worst = getattr(r, metric), getattr(r, f"{metric}_worst")
            if worst is not None:
                axes.plot([r.computed] * 2, [mean, worst], color=colour(number), linewidth=1.2, alpha=0.6, zorder=2)
            (dot,) = axes.plot(r.computed, mean, linestyle="none", zorder=3, **look)
            low = "-" if worst is None else f"{worst:.4g}"
            tips.add(dot, f"{named.row(r.method)}: {mean:.4g} {unit}, worst {low}, {r.computed:.1f} of {steps} steps")
    axes.set(xlabel="computed steps", ylabel=unit)
    _legend(figure, looks)
    return figure


def speed(make: Any, tips: Tips, rows: Sequence[Row], named: Named) -> Any:
    """Measured over ideal speed-up with the diagonal."""
    groups = named.groups(rows)
    figure, axes = _axes(make, AXES, len(groups) + 1)
    ends = [min([1.0, *(r.ideal for r in rows)]), max([1.1, *(r.ideal for r in rows)])]
    ideal = {"color": GREY, "linewidth": 1.2, "linestyle": "--"}
    axes.plot(ends, ends, zorder=1, **ideal)
    looks = {}
    for curve, group in groups.items():
        number = named.numbers[group[0].method]
        looks[curve] = {"color": colour(number), "marker": mark(number), "markeredgecolor": CARD, "linestyle": "none"}
        for r in group:
            (dot,) = axes.plot(r.ideal, r.speedup, zorder=3, **looks[curve])
            tips.add(dot, f"{named.row(r.method)}: {r.speedup:.2f}x, ideal {r.ideal:.2f}x")
    axes.set(xlabel="steps over computed steps", ylabel="measured speed-up")
    _legend(figure, {**looks, "ideal": ideal})
    return figure


def curves(make: Any, tips: Tips, errors: Mapping[str, np.ndarray], named: Named) -> Any:
    """Relative error of the latent after every step, logarithmic."""
    figure, axes = _axes(make, AXES, len(errors))
    looks, dashes = {}, ("-", "--", ":", "-.")
    seen: dict[int, int] = {}
    for method, curve in errors.items():
        number = named.numbers[method]
        again = seen[number] = seen.get(number, -1) + 1  # one colour, several settings
        look = {"color": colour(number), "linestyle": dashes[again % len(dashes)]}
        steps = np.flatnonzero(curve > SMALLEST_ERROR)
        if len(steps):
            (line,) = axes.plot(steps, curve[steps], **look)
            tips.add(line, named.row(method))
        looks[named.row(method)] = look
    axes.set(xlabel="step", ylabel="relative error of the latent", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    _legend(figure, looks)
    return figure


def _rows(make: Any, names: Sequence[str], height: float) -> tuple[Any, Any]:
    """A figure with one row a method, its name above it; row i lies between -i - 0.9 and -i - 0.5."""
    figure, axes = _axes(make, ROW * len(names) + 36, 1)
    axes.set(ylim=(-len(names), 0.05), yticks=[])
    axes.spines["left"].set_visible(False)
    for i, name in enumerate(names):
        axes.text(0, -i - height, _short(name), transform=axes.get_yaxis_transform(), va="center", fontsize=TEXT)
    return figure, axes


def timelines(make: Any, tips: Tips, shares: Mapping[str, np.ndarray], named: Named) -> Any:
    """One row of cells a method; runs with fewer steps are stretched to the same length."""
    from matplotlib.patches import PathPatch, Rectangle

    longest = max((len(r) for r in shares.values()), default=1)
    figure, axes = _rows(make, [named.row(m) for m in shares], 0.24)
    axes.grid(False)
    axes.set(xlim=(0, longest), xlabel="step")
    for i, (method, row) in enumerate(shares.items()):
        width = longest / max(len(row), 1)
        band = Rectangle((0, -i - 0.9), longest, 0.4, facecolor=named.colour(method), alpha=0.12, linewidth=0)
        tips.add(axes.add_patch(band), f"{named.row(method)}: {float(np.sum(row)):.1f} steps")
        for share in sorted({round(float(s), 1) for s in row} - {0.0}):
            cells = [k for k, s in enumerate(row) if round(float(s), 1) == share]
            path = _cells([k * width for k in cells], 0.85 * width, -i - 0.9, 0.4)
            axes.add_patch(PathPatch(path, facecolor=named.colour(method), alpha=share, linewidth=0))
    looks = {"color": GREY, "marker": "s", "linestyle": "none"}
    _legend(figure, {"computed; faint: skipped": looks})
    return figure


def _cells(lefts: Sequence[float], width: float, bottom: float, height: float) -> Any:
    """Rectangles as one path."""
    from matplotlib.path import Path as Outline

    corners = [
        corner
        for left in lefts
        for corner in (
            (left, bottom),
            (left + width, bottom),
            (left + width, bottom + height),
            (left, bottom + height),
            (left, bottom),
        )
    ]
    return Outline(corners, [Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY] * len(lefts))


def spread(make: Any, tips: Tips, values: Mapping[str, Sequence[float]], named: Named) -> Any:
    """A strip of dots a method, its mean as a line."""
    figure, axes = _rows(make, [named.row(m) for m in values], 0.24)
    axes.set(xlabel="PSNR, dB")
    axes.grid(axis="y", visible=False)
    for i, (method, row) in enumerate(values.items()):
        (dots,) = axes.plot(
            row, [-i - 0.7] * len(row), "o", color=named.colour(method), alpha=0.6, markersize=6, markeredgewidth=0
        )
        mean = float(np.mean(row))
        tips.add(dots, f"{named.row(method)}: {mean:.2f} dB, from {min(row):.2f} to {max(row):.2f}")
        axes.plot([mean] * 2, [-i - 0.95, -i - 0.45], color=named.colour(method))
    _legend(figure, {"a prompt and seed; line: the mean": {"color": GREY, "marker": "o", "linestyle": "none"}})
    return figure
