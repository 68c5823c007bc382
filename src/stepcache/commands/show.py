"""`stepcache show`: print a plan or a calibration and, with --out, draw it (PNG or SVG).

A plan: its timeline, sources and weights, and the expected error of every step. A calibration: its contents, and
the trade-off curve error(B) for every budget, with its knee.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from stepcache.commands.flags import Flags
from stepcache.files import check_writable, read_text
from stepcache.hindsight.corrector import order_one
from stepcache.measure.drawing import LINE, colour, drawing, save
from stepcache.planning.calibrate import describe
from stepcache.planning.calibration import CALIBRATION_SCHEMA, Calibration
from stepcache.planning.forecasts import Forecast, forecasts, knee
from stepcache.planning.plan_file import PlanFile

BAR = 40
"""Width of the widest bar, in characters."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache show`."""
    parser.description = __doc__
    flags = Flags(parser)
    flags.add("file", help="a plan or a calibration")
    flags.add("--out", metavar="FILE", help="also draw it: a name ending in .png or .svg")


def run(args: argparse.Namespace) -> int:
    """Find out what the file is, print it, draw it."""
    if args.out:
        if Path(args.out).suffix not in (".png", ".svg"):
            raise ValueError(f"--out is {args.out!r}; expected a name ending in .png or .svg.")
        check_writable(Path(args.out))
    text = read_text(args.file, "plan or calibration")
    try:
        schema = json.loads(text).get("schema")
    except (json.JSONDecodeError, AttributeError):
        schema = None
    if schema == CALIBRATION_SCHEMA:
        calibration = Calibration.load(args.file)
        curve = forecasts(calibration)
        print(describe(calibration))
        print(curve_text(curve))
        draw = lambda: draw_calibration(calibration, curve, args.out)  # noqa: E731
    else:
        plan = PlanFile.load(args.file)
        print(plan_text(plan))
        draw = lambda: draw_plan(plan, args.out)  # noqa: E731
    if args.out:
        draw()
        print(f"wrote {args.out}")
    return 0


def plan_text(plan: PlanFile) -> str:
    """Timeline, key, and one line a skipped step: sources, weights, predicted error."""
    lines = [plan.text()]
    names = ("scheduler", "shift", "guidance", "guidance_range", "boundary", "source")
    lines += [f"  {name}: {value}" for name in names if (value := getattr(plan, name)) not in (None, "")]
    lines += [f"  {name}: {value:.4g}" for name, value in plan.figures]
    errors, rows = dict(plan.errors), dict(plan.plan.weights)
    widest = max(errors.values(), default=0.0) or 1.0
    lines.append("  step  predicted from (weights)               relative error of the output")
    for step in plan.plan.skipped:
        sources = [k for k in plan.plan.computed if k < step][::-1]
        weights = order_one(step, sources) if plan.method == "hindsight" else rows.get(step, (1.0,))
        made_of = " ".join(f"{k}:{w:+.3f}" for k, w in zip(sources, weights, strict=False))
        error = f"{errors[step]:.4f} {'█' * round(BAR * errors[step] / widest)}" if step in errors else ""
        lines.append(f"  {step:>4}  {made_of:38} {error}".rstrip())
    return "\n".join(lines)


def curve_text(curve: list[Forecast]) -> str:
    """One line a budget: error, PSNR forecast, bar; the knee is marked."""
    best = knee(curve)
    widest = max(f.error for f in curve) or 1.0
    lines = ["  budget  speed-up   final latent error  about PSNR   (open loop)"]
    for f in curve:
        psnr = "" if f.psnr is None or not np.isfinite(f.psnr) else f"{f.psnr:.1f} dB"
        mark = "  <- knee" if f is best else ""
        bar = "█" * round(BAR * f.error / widest)
        lines.append(f"  {f.budget:>6}  {f.plan.plan.ideal_speedup:>7.2f}x  {f.error:>19.3%}  {psnr:>10}   {bar}{mark}")
    return "\n".join(lines)


def draw_plan(plan: PlanFile, path: str) -> None:
    """Timeline above the predicted error of every step."""
    with drawing() as make:
        figure = make(figsize=(9, 4.4), layout="constrained")
        top, bottom = figure.subplots(2, 1, height_ratios=(1, 4), sharex=True)
        top.bar(plan.plan.computed, 1, width=0.9, color=colour(0), label="computed")
        top.bar(plan.plan.skipped, 1, width=0.9, color=LINE, label="skipped")
        top.set(yticks=[])
        figure.suptitle(plan.describe(), fontsize=11)
        top.legend(loc="upper left", bbox_to_anchor=(1, 1))
        steps, errors = ([e[i] for e in plan.errors] for i in (0, 1))
        bottom.bar(steps, errors, width=0.9, color=colour(6))
        bottom.set(xlabel="step", ylabel="relative error of the output")
        save(figure, path)


def draw_calibration(calibration: Calibration, curve: list[Forecast], path: str) -> None:
    """The trade-off curve with its knee, and magnitude ratios over the steps."""
    shown, best = [f for f in curve if f.error > 0], knee(curve)
    with drawing() as make:
        figure = make(figsize=(12, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.semilogy([f.budget for f in shown], [f.error for f in shown], ".-", color=colour(0))
        left.plot([best.budget], [best.error], "o", color=colour(6), label=f"knee: {best.budget} steps")
        left.set(xlabel="computed steps", ylabel="relative error of the final latent", title="estimate, open loop")
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter("")
        left.legend()
        steps = np.arange(1, calibration.num_steps)
        for number, branch in enumerate(calibration.branches):
            ratios = np.stack([run.magnitude[branch][1:, 0] for run in calibration.runs])
            right.plot(steps, ratios.mean(0), color=colour(number), label=f"{branch}: magnitude ratio")
            right.fill_between(steps, ratios.min(0), ratios.max(0), color=colour(number), alpha=0.2, linewidth=0)
        right.set(xlabel="step", title="change of the output's magnitude")
        figure.suptitle(f"{calibration.model}, {len(calibration.runs)} run(s)", fontsize=11)
        right.legend()
        save(figure, path)
