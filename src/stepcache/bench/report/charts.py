"""The charts of a benchmark, drawn once for the page and for files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stepcache.bench.labels import Label
from stepcache.bench.report.contents import Results, mean_errors, mean_steps
from stepcache.bench.results import Row
from stepcache.measure.drawing import GREY, TEXT, WIDTH, Tips, drawing, line_style, save

LONGEST_NAME = 38
"""Characters of a name in a chart; the table has it in full."""


PLOT, ROW, LEGEND = 200, 38, 20
"""Heights in points: of a plot within its axes, of a method's row, of a line of the legend."""


ABOVE, BELOW, LEFT, RIGHT = 28, 46, 54, 14
"""Points around a plot. They are the same in every chart, so that those over the same steps compare by eye."""


KEY = (34, 12)
"""Width and height in points of a line with its mark, beside a name."""


SMALLEST_ERROR = 1e-7
"""Relative errors below are rounding, and not drawn."""


Look = dict[str, Any]
"""Settings of a line of matplotlib's: colour, mark, dashes."""


UNCACHED: Look = {"color": GREY, "linestyle": "-"}


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
    """Labels and lines of the methods, the same in every chart and in the table.

    Args:
        labels: method -> label.
        numbers: method -> number of its curve, which has a colour and a mark; and which of the curve's settings it is.
    """

    labels: Mapping[str, Label]
    numbers: Mapping[str, tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        curves = list(dict.fromkeys(label.curve for label in self.labels.values()))
        settings: Counter[str] = Counter()
        numbers = {}
        for method, label in self.labels.items():
            numbers[method] = curves.index(label.curve), settings[label.curve]
            settings[label.curve] += 1
        object.__setattr__(self, "numbers", numbers)

    def look(self, method: str) -> Look:
        """The line of a method and setting; grey for the uncached run."""
        return line_style(*self.numbers[method]) if method in self.numbers else UNCACHED

    def row(self, method: str) -> str:
        """The method's name in full."""
        return self.labels[method].row if method in self.labels else method

    def groups(self, rows: Sequence[Row]) -> list[tuple[str, Look, list[Row]]]:
        """(name, line, its rows by computed steps) of every curve."""
        found: dict[str, list[Row]] = {}
        for r in rows:
            found.setdefault(self.labels[r.method].curve, []).append(r)
        return [
            (curve, line_style(self.numbers[group[0].method][0]), sorted(group, key=lambda r: r.computed))
            for curve, group in found.items()
        ]


def named_methods(results: Results) -> Named:
    """The methods that have a result."""
    names = results.labels
    return Named({r.method: names[r.method] for r in results.methods})


def charts(results: Results) -> list[Chart]:
    """Every chart there is data for, the most telling first."""
    named = named_methods(results)
    rows, steps = results.methods, results.description["request"]["steps"]
    found = []
    for metric, unit, title, text in (
        (
            "psnr",
            "PSNR, dB",
            "Quality against cost",
            "PSNR to the uncached clip over computed steps; marks are means, thin lines reach to the worst "
            "prompt. Up and to the left is better.",
        ),
        ("ssim", "SSIM", "Structure", "SSIM to the uncached clip; higher is better."),
        ("lpips", "LPIPS", "Perceptual distance", "LPIPS to the uncached clip; lower is better."),
    ):
        if any(getattr(r, metric) is not None for r in rows):
            draw = partial(quality, rows=rows, named=named, metric=metric, unit=unit, steps=steps)
            found.append(Chart(metric, title, text, draw))
    if rows:
        found.append(
            Chart(
                "speedup",
                "Speed-up, measured against ideal",
                "Time of the uncached denoising loop over the method's; on the line a skipped step costs nothing, "
                "above it is noise.",
                partial(speed, rows=rows, named=named, steps=steps),
            )
        )
    errors = {r.method: curve for r in rows if len(curve := mean_errors(results.items[r.method]))}
    shares = {r.method: mean_steps(results.items[r.method], steps) for r in results.rows if r.failed < r.items}
    longest = max([steps, *map(len, errors.values()), *map(len, shares.values())])  # some samplers take more
    if errors:
        found.append(
            Chart(
                "errors",
                "Error along the trajectory",
                "Distance of the latent from the uncached run's after every step, relative, mean over prompts.",
                partial(curves, errors=errors, named=named, steps=longest),
            )
        )
    if shares:
        found.append(
            Chart(
                "steps",
                "Which steps are computed",
                "One row a method, one cell a step: the stronger its colour, the more of the transformer was "
                "evaluated. Fewer steps are wider ones.",
                partial(timelines, shares=shares, named=named, steps=longest),
            )
        )
    psnr = {r.method: [i.psnr for i in results.items[r.method] if i.psnr is not None] for r in rows}
    measured = {method: values for method, values in psnr.items() if values}
    if measured:
        found.append(
            Chart(
                "prompts",
                "Prompt by prompt",
                "PSNR of every prompt and seed; the line is the mean.",
                partial(spread, values=measured, named=named),
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


def key(make: Any, look: Look) -> Any:
    """A method's line with its mark, and nothing else."""
    from matplotlib.lines import Line2D

    figure = make(figsize=(KEY[0] / 72, KEY[1] / 72))
    figure.add_artist(Line2D([0, 0.5, 1], [0.5] * 3, markevery=[1], **look))
    return figure


def _axes(make: Any, unit: str, plot: float, legend: Mapping[str, Look]) -> tuple[Any, Any]:
    """A figure and its axes, with a plot so many points high, what goes up above it, and a legend below.

    Args:
        make: matplotlib's Figure.
        unit: what is drawn upwards.
        plot: points.
        legend: name -> how its line looks.
    """
    from matplotlib.lines import Line2D

    below = BELOW + LEGEND * len(legend) + 6
    height = (ABOVE if unit else 0) + plot + below
    figure = make(figsize=(WIDTH / 72, height / 72))
    axes = figure.add_axes((LEFT / WIDTH, below / height, 1 - (LEFT + RIGHT) / WIDTH, plot / height))
    axes.set_title(unit, loc="left", fontsize=TEXT)
    handles = [Line2D([], [], label=_short(name), **look) for name, look in legend.items()]
    figure.legend(handles=handles, loc="lower left", labelspacing=LEGEND / TEXT - 1, borderpad=0)
    return figure, axes


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _over_computed(axes: Any, rows: Sequence[Row]) -> tuple[float, float]:
    """Let axes go over the computed steps of all rows; returns from where to where."""
    low, high = min(r.computed for r in rows), max(r.computed for r in rows)
    space = 0.06 * (high - low) or 1
    ends = max(low - space, low / 2), high + space
    axes.set(xlim=ends, xlabel="computed steps")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return ends


def quality(make: Any, tips: Tips, rows: Sequence[Row], named: Named, metric: str, unit: str, steps: int) -> Any:
    """A metric over computed steps: a curve for the settings of a method, thin lines to the worst prompt."""
    groups = named.groups([r for r in rows if getattr(r, metric) is not None])
    figure, axes = _axes(make, unit, PLOT, {curve: look for curve, look, _ in groups})
    _over_computed(axes, rows)
    places: Counter[tuple[float, float]] = Counter()
    for _, look, group in groups:
        axes.plot([r.computed for r in group], [getattr(r, metric) for r in group], **look | {"marker": ""}, zorder=2)
        for r in group:
            mean, worst = getattr(r, metric), getattr(r, f"{metric}_worst")
            if worst is not None:
                axes.plot([r.computed] * 2, [mean, worst], color=look["color"], linewidth=1.2, alpha=0.6, zorder=2)
            size = 11 - 4 * min(places[r.computed, mean], 1)  # the same results twice: one mark within the other
            places[r.computed, mean] += 1
            (dot,) = axes.plot(r.computed, mean, **look | {"linestyle": "none", "markersize": size}, zorder=3)
            low = "-" if worst is None else f"{worst:.4g}"
            tips.add(dot, f"{named.row(r.method)}: {mean:.4g} {unit}, worst {low}, {r.computed:.1f} of {steps} steps")
    return figure


def speed(make: Any, tips: Tips, rows: Sequence[Row], named: Named, steps: int) -> Any:
    """Measured speed-up over computed steps, with the ideal one as a line."""
    groups = named.groups(rows)
    ideal = {"color": GREY, "linewidth": 1.2, "linestyle": "--"}
    looks = {curve: look | {"linestyle": "none"} for curve, look, _ in groups}
    figure, axes = _axes(make, "speed-up", PLOT, {**looks, "ideal: steps over computed steps": ideal})
    along = np.linspace(*_over_computed(axes, rows), 100)
    axes.plot(along, steps / along, zorder=1, **ideal)
    for curve, _, group in groups:
        for r in group:
            (dot,) = axes.plot(r.computed, r.speedup, zorder=3, **looks[curve])
            tips.add(dot, f"{named.row(r.method)}: {r.speedup:.2f}x, ideal {r.ideal:.2f}x")
    return figure


def curves(make: Any, tips: Tips, errors: Mapping[str, np.ndarray], named: Named, steps: int) -> Any:
    """Relative error of the latent after every step, logarithmic."""
    figure, axes = _axes(make, "relative error of the latent", PLOT, {named.row(m): named.look(m) for m in errors})
    axes.set(xlabel="steps done", xlim=(0, steps), yscale="log")
    apart = max(steps // 5, 1)
    for number, (method, curve) in enumerate(errors.items()):
        drawn = np.flatnonzero(curve > SMALLEST_ERROR)
        if len(drawn):
            marks = (number % apart, apart)
            (line,) = axes.plot(drawn + 1, curve[drawn], markevery=marks, markersize=6, **named.look(method))
            tips.add(line, named.row(method))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    return figure


def _rows(make: Any, methods: Sequence[str], named: Named, legend: Mapping[str, Look]) -> tuple[Any, Any]:
    """A figure with one row a method, its line and name above it; row i lies between -i - 0.9 and -i - 0.5."""
    from matplotlib.transforms import blended_transform_factory

    figure, axes = _axes(make, "", ROW * len(methods), legend)
    axes.set(ylim=(-len(methods), 0.05), yticks=[])
    axes.spines["left"].set_visible(False)
    whole = blended_transform_factory(figure.transFigure, axes.transData)
    for i, method in enumerate(methods):
        ends = np.array([0, 0.5, 1]) * KEY[0] / WIDTH
        axes.plot(ends, [-i - 0.24] * 3, transform=whole, clip_on=False, markevery=[1], **named.look(method))
        axes.text((KEY[0] + 8) / WIDTH, -i - 0.24, _short(named.row(method)), transform=whole, va="center")
    return figure, axes


def timelines(make: Any, tips: Tips, shares: Mapping[str, np.ndarray], named: Named, steps: int) -> Any:
    """One row of cells a method; runs with fewer steps are stretched to the same length."""
    from matplotlib.patches import PathPatch, Rectangle

    legend: dict[str, Look] = {
        "computed": {"color": GREY, "marker": "s", "linestyle": "none"},
        "skipped": {"color": GREY, "marker": "s", "linestyle": "none", "alpha": 0.2},
    }
    figure, axes = _rows(make, list(shares), named, legend)
    axes.grid(False)
    axes.set(xlim=(0, steps), xlabel="step")
    for i, (method, row) in enumerate(shares.items()):
        colour, width = named.look(method)["color"], steps / max(len(row), 1)
        band = Rectangle((0, -i - 0.9), steps, 0.4, facecolor=colour, alpha=0.12, linewidth=0)
        tips.add(axes.add_patch(band), f"{named.row(method)}: {float(np.sum(row)):.1f} steps")
        for share in sorted({round(float(s), 1) for s in row} - {0.0}):
            cells = [k for k, s in enumerate(row) if round(float(s), 1) == share]
            path = _cells([k * width for k in cells], 0.85 * width, -i - 0.9, 0.4)
            axes.add_patch(PathPatch(path, facecolor=colour, alpha=share, linewidth=0))
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
    """A strip of marks a method, its mean as a line."""
    legend: dict[str, Look] = {
        "a prompt and seed": {"color": GREY, "marker": "o", "linestyle": "none"},
        "their mean": {"color": GREY, "marker": "|", "markersize": 14, "markeredgewidth": 2, "linestyle": "none"},
    }
    figure, axes = _rows(make, list(values), named, legend)
    axes.set(xlabel="PSNR, dB")
    axes.grid(axis="y", visible=False)
    for i, (method, row) in enumerate(values.items()):
        look = named.look(method)
        (dots,) = axes.plot(row, [-i - 0.7] * len(row), **look | {"linestyle": "none", "alpha": 0.7})
        mean = float(np.mean(row))
        tips.add(dots, f"{named.row(method)}: {mean:.2f} dB, from {min(row):.2f} to {max(row):.2f}")
        axes.plot([mean] * 2, [-i - 0.95, -i - 0.45], color=look["color"])
    return figure
