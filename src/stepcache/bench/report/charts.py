"""The page's charts as SVG text: drawn here rather than by a library, so that they follow the page's colours."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stepcache.bench.results import Row

PALETTE = 10
"""Colours of the page's style sheet, --c0 to --c9; further methods repeat them with another mark."""


WIDTH, HEIGHT = 640, 380


LEFT, RIGHT, TOP, BOTTOM = 56, 16, 12, 44


def family(method: str) -> str:
    """The method without its budget or threshold: what a curve is drawn of ("lemica" of "lemica:25")."""
    head, *options = method.split(",")
    return ",".join([head.partition(":")[0], *options])


def label(method: str) -> str:
    """The method for the eye: of files only the name, not the folders."""
    return re.sub(r"[^:=,]*/", "", method)


def shortened(text: str, longest: int = 30) -> str:
    """At most so many characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def colours(methods: Sequence[str]) -> dict[str, int]:
    """Method -> number of its colour, one a family, in the order of first appearance."""
    families = list(dict.fromkeys(family(m) for m in methods))
    return {m: families.index(family(m)) % PALETTE for m in methods}


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Pixel of a value."""
        low, high, v = (
            (math.log10(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (v - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values, five or so."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            return [10.0**d for d in decades if self.low * 0.999 <= 10.0**d <= self.high * 1.001]
        rough = (self.high - self.low) / 5
        size = 10 ** math.floor(math.log10(rough))
        step = next(s * size for s in (1, 2, 5, 10) if s * size >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 10) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def padded(values: Sequence[float], share: float = 0.06, log: bool = False) -> tuple[float, float]:
    """Ends of an axis that holds all values with some room."""
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    low, high = (min(finite), max(finite)) if finite else (1.0, 2.0)
    if log:
        return low / 1.3, high * 1.3
    room = (high - low) * share or abs(high) * 0.05 or 1.0
    return low - room, high + room


def frame(x: Axis, y: Axis, x_label: str, y_label: str, body: str, height: int = HEIGHT) -> str:
    """Axes, ticks and labels around a drawing."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" class="chart">']
    for value in y.ticks():
        at = y.at(value)
        parts.append(f'<line class="grid" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{x.start - 8:.1f}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x.ticks():
        at = x.at(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{y.start:.1f}" y2="{y.end:.1f}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{y.start + 18:.1f}" text-anchor="middle">{value:g}</text>')
    middle = (x.start + x.end) / 2
    parts.append(f'<text class="label" x="{middle:.1f}" y="{height - 6}" text-anchor="middle">{x_label}</text>')
    parts.append(
        f'<text class="label" transform="translate(14 {(y.start + y.end) / 2:.1f}) rotate(-90)" '
        f'text-anchor="middle">{y_label}</text>'
    )
    return "".join([*parts, body, "</svg>"])


def dot(x: float, y: float, colour: int, title: str, radius: float = 5) -> str:
    """A dot that says what it is when pointed at."""
    return (
        f'<circle class="dot c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" tabindex="0">'
        f"<title>{html.escape(title)}</title></circle>"
    )


def line(points: Sequence[tuple[float, float]], colour: int, kind: str = "line") -> str:
    """A polyline."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind} c{colour}" points="{path}"/>'


def quality(rows: Sequence[Row], colour: Mapping[str, int], metric: str, unit: str, steps: int) -> str:
    """A metric over computed steps: one curve a family of methods, a whisker to the worst prompt."""
    usable = [r for r in rows if getattr(r, metric) is not None]
    worst = {r.method: getattr(r, f"{metric}_worst") for r in usable}
    values = [getattr(r, metric) for r in usable] + [w for w in worst.values() if w is not None]
    x = Axis(*padded([r.computed for r in usable]), LEFT, WIDTH - RIGHT)
    y = Axis(*padded(values), HEIGHT - BOTTOM, TOP)
    body = []
    for name in dict.fromkeys(family(r.method) for r in usable):
        group = sorted((r for r in usable if family(r.method) == name), key=lambda r: r.computed)
        number = colour[group[0].method]
        if len(group) > 1:
            body.append(line([(x.at(r.computed), y.at(getattr(r, metric))) for r in group], number))
        for r in group:
            at, mean, low = x.at(r.computed), getattr(r, metric), worst[r.method]
            if low is not None:
                body.append(line([(at, y.at(mean)), (at, y.at(low))], number, "whisker"))
            text = f"{label(r.method)}: {mean:.4g} {unit}, worst {'-' if low is None else format(low, '.4g')}, "
            body.append(dot(at, y.at(mean), number, f"{text}{r.computed:.1f} of {steps} steps"))
    return frame(x, y, "computed steps", unit, "".join(body))


def speed(rows: Sequence[Row], colour: Mapping[str, int]) -> str:
    """Measured over ideal speed-up with the diagonal."""
    low, high = padded([v for r in rows for v in (r.ideal, r.speedup)])
    x, y = Axis(low, high, LEFT, WIDTH - RIGHT), Axis(low, high, HEIGHT - BOTTOM, TOP)
    ends = [(x.at(low), y.at(low)), (x.at(high), y.at(high))]
    body = [line(ends, 0, "diagonal")]
    for r in rows:
        text = f"{label(r.method)}: {r.speedup:.2f}x, ideal {r.ideal:.2f}x"
        body.append(dot(x.at(r.ideal), y.at(r.speedup), colour[r.method], text))
    return frame(x, y, "steps over computed steps", "measured speed-up of the loop", "".join(body))


def errors(curves: Mapping[str, np.ndarray], colour: Mapping[str, int]) -> str:
    """Relative error of the latent after every step, logarithmic."""
    values = [float(v) for curve in curves.values() for v in curve if v > 1e-7]
    x = Axis(0, max(len(c) for c in curves.values()) - 1, LEFT, WIDTH - RIGHT)
    y = Axis(*padded(values, log=True), HEIGHT - BOTTOM, TOP, log=True)
    body = []
    for method, curve in curves.items():
        points = [(x.at(k), y.at(float(v))) for k, v in enumerate(curve) if v > 1e-7]
        if points:
            title = f"<title>{html.escape(label(method))}</title>"
            body.append(f"<g>{title}{line(points, colour[method])}</g>")
    return frame(x, y, "step", "relative error of the latent", "".join(body))


def timelines(rows: Mapping[str, np.ndarray], colour: Mapping[str, int]) -> str:
    """One row of cells a method; runs with fewer steps are stretched to the same length."""
    names = max((len(label(m)) for m in rows), default=1)
    left, cell = min(220, 7 * min(names, 30) + 12), 16
    height = cell * len(rows) + 30
    longest = max((len(r) for r in rows.values()), default=1)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" class="chart">']
    for number, (method, shares) in enumerate(rows.items()):
        top = number * cell + 4
        shown = shortened(label(method))
        title = f"<title>{html.escape(method)}: {float(np.sum(shares)):.1f} steps</title>"
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{top + 11}" text-anchor="end">{html.escape(shown)}{title}</text>'
        )
        width = (WIDTH - RIGHT - left) / max(len(shares), 1)
        for k, share in enumerate(shares):
            opacity = 0.08 + 0.92 * float(share)
            parts.append(
                f'<rect class="cell c{colour.get(method, 0)}{"" if method in colour else " plain"}" '
                f'x="{left + k * width:.2f}" y="{top}" width="{max(width - 0.8, 0.4):.2f}" height="{cell - 4}" '
                f'fill-opacity="{opacity:.2f}"/>'
            )
    bottom = len(rows) * cell + 20
    for k in range(0, longest + 1, 10):
        at = left + k * (WIDTH - RIGHT - left) / longest
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom}" text-anchor="middle">{k}</text>')
    return "".join([*parts, "</svg>"])


def spread(values: Mapping[str, Sequence[float]], colour: Mapping[str, int]) -> str:
    """A strip of dots a method, its mean as a line."""
    rows = {m: v for m, v in values.items() if v}
    names = max((len(label(m)) for m in rows), default=1)
    left, cell = min(220, 7 * min(names, 30) + 12), 20
    height = cell * len(rows) + BOTTOM
    x = Axis(*padded([v for row in rows.values() for v in row]), left, WIDTH - RIGHT)
    body = []
    for number, (method, row) in enumerate(rows.items()):
        at = number * cell + cell / 2 + 2
        shown = shortened(label(method))
        body.append(
            f'<text class="tick" x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{html.escape(shown)}'
            f"<title>{html.escape(method)}</title></text>"
        )
        body += [dot(x.at(v), at, colour[method], f"{label(method)}: {v:.2f} dB", 3) for v in row]
        mean = x.at(float(np.mean(row)))
        body.append(line([(mean, at - 8), (mean, at + 8)], colour[method]))
    y = Axis(0, 1, height - BOTTOM, 0)
    ticks = "".join(
        f'<line class="grid" x1="{x.at(v):.1f}" x2="{x.at(v):.1f}" y1="0" y2="{y.start:.1f}"/>'
        f'<text class="tick" x="{x.at(v):.1f}" y="{y.start + 18:.1f}" text-anchor="middle">{v:g}</text>'
        for v in x.ticks()
    )
    caption = f'<text class="label" x="{(left + WIDTH) / 2:.0f}" y="{height - 6}" text-anchor="middle">PSNR, dB</text>'
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" class="chart">'
    return "".join([head, ticks, *body, caption, "</svg>"])
