"""How far the closed form holds: error of the final latent, forecast in open loop and measured, schedule by schedule.

    python bench/open_closed.py              docs/figures/open-closed.svg and bench/open_closed.json, five minutes

The schedules are planned ones, even ones, and random ones, each with reuse, extrapolation and hindsight; the runs are
the calibrated ones themselves, so that the closed form is not asked about prompts it has not seen.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from methods import MODEL, Setting, extrapolated
from tqdm import tqdm

from stepcache import Plan, PlanFile, Uniform
from stepcache.files import write_atomically
from stepcache.hosts.diffusers import accelerate
from stepcache.measure.generation import load_pipeline
from stepcache.planning.calibration import Calibration
from stepcache.planning.costs import plan_error, plan_hindsight
from stepcache.planning.replay import rank_agreement

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("reuse", "extrapolation", "hindsight")


def schedules(calibration: Calibration, rng: random.Random) -> list[tuple[int, ...]]:
    """Planned, even and random schedules of five budgets."""
    found = []
    for budget in (25, 20, 17, 14, 10):
        planned, even = plan_hindsight(calibration, budget).plan, Uniform(budget).plan(calibration.num_steps)
        found += [planned.computed, even.computed]
        inner = rng.sample(range(1, calibration.num_steps - 1), budget - 2)
        found.append((0, *sorted(inner), calibration.num_steps - 1))
    return found


def as_kind(computed: tuple[int, ...], steps: int, kind: str) -> PlanFile:
    """The schedule with outputs reused or extrapolated, or followed by hindsight."""
    plan = Plan(steps, computed)
    return PlanFile(extrapolated(plan, 1) if kind == "extrapolation" else plan, kind)


@torch.no_grad()
def latents(pipe, texts: list[str], seeds: list[int], setting: Setting) -> torch.Tensor:  # noqa: ANN001
    """Final latents of a batch."""
    return pipe(
        prompt=texts,
        height=setting.size,
        width=setting.size,
        num_frames=17,
        num_inference_steps=setting.steps,
        guidance_scale=setting.guidance,
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        output_type="latent",
    ).frames.float()


def main() -> None:
    """Measure, save, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", default=str(MODEL / "calibration.json"))
    args = parser.parse_args()
    calibration = Calibration.load(args.calibration)
    pipe = load_pipeline(str(MODEL), "cpu")
    pipe.set_progress_bar_config(disable=True)
    texts, seeds = [r.prompt for r in calibration.runs], [r.seed for r in calibration.runs]
    setting = Setting(calibration.num_steps, float(calibration.guidance or 1))
    truth = latents(pipe, texts, seeds, setting)
    rows = []
    todo = [(c, k) for c in schedules(calibration, random.Random(0)) for k in KINDS]
    for computed, kind in tqdm(todo, desc="schedules", dynamic_ncols=True):
        plan = as_kind(computed, calibration.num_steps, kind)
        forecast = plan_error(calibration, plan)
        with accelerate(pipe, plan):
            found = latents(pipe, texts, seeds, setting)
        measured = ((found - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).tolist()
        rows.append({"kind": kind, "computed": computed, "open": forecast.tolist(), "closed": measured})
    write_atomically(ROOT / "bench" / "open_closed.json", json.dumps(rows) + "\n")
    for kind in KINDS:
        of_kind = [r for r in rows if r["kind"] == kind]
        means = [[float(np.mean(r[side])) for r in of_kind] for side in ("open", "closed")]
        edges = [{(0, i + 2): v for i, v in enumerate(values)} for values in means]
        ratio = np.exp(np.mean(np.log(np.array(means[1]) / np.array(means[0]))))
        print(f"{kind}: rank correlation of means {rank_agreement(*edges):.2f}, measured over forecast {ratio:.1f}")
    draw(rows)


def draw(rows: list[dict]) -> None:
    """The scatter plot: one dot a schedule and run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for kind, mark in zip(KINDS, "os^", strict=True):
        of_kind = [r for r in rows if r["kind"] == kind]
        x, y = (np.concatenate([r[side] for r in of_kind]) for side in ("open", "closed"))
        axes.scatter(x, y, s=9, marker=mark, alpha=0.6, label=kind)
    ends = axes.get_xlim()
    axes.plot(ends, ends, color="0.6", linewidth=0.9)
    axes.set(xscale="log", yscale="log", xlabel="forecast (open loop)", ylabel="measured (closed loop)")
    axes.set_title("relative error of the final latent, one dot a schedule and prompt", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    (ROOT / "docs" / "figures").mkdir(exist_ok=True)
    figure.savefig(ROOT / "docs" / "figures" / "open-closed.svg")
    figure.savefig(ROOT / "docs" / "figures" / "open-closed.png", dpi=120)


if __name__ == "__main__":
    main()
