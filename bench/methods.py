"""Every method side by side on the embedded model, at equal numbers of computed steps: the figures of docs/planning.md.

    python bench/methods.py --out bench/methods.json            about an hour on two cores; resumes
    python bench/methods.py --out bench/methods.json --table    print the tables only

Another guidance scale, step count, shift or size asks whether a plan carries over: rivals are tuned there
(`--calibration`), our plan comes from elsewhere (`--plan-calibration`).

One process, one machine, the same prompts, seeds and noise for all; PSNR of decoded frames against the uncached run.
What is tuned or planned has seen eight calibration prompts and their seeds only; the evaluation prompts are others.
Plans run in batches, since their decisions do not depend on data; methods that decide while running take one prompt at
a time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from tiny_wan_clips import FRAMES, SIZE, caption, random_scene

import stepcache
from stepcache import EasyCache, Hindsight, LeMiCa, Off, Plan, PlanFile, TeaCache, Uniform
from stepcache.core.plan import spread
from stepcache.core.strategy import Policy
from stepcache.files import write_atomically
from stepcache.hosts.diffusers import _trajectory, accelerate
from stepcache.measure.generation import load_pipeline
from stepcache.measure.metrics import psnr
from stepcache.methods.taylorseer import taylor_weights
from stepcache.planning.calibration import Calibration
from stepcache.planning.costs import gram_edges, magcache_ratios, plan_hindsight, plan_lemica, plan_magcache
from stepcache.planning.replay import MeasuredEdges

MODEL = ROOT / "assets" / "tiny-wan"
BATCH = 16
CALIBRATION_SEED, EVALUATION_SEED = 5000, 9000
WAN = "wan2.1-t2v-1.3B"


def prompts(count: int, name: str, held_out: bool) -> list[str]:
    """Prompts of the embedded model's grammar, drawn from a generator of that name."""
    rng, found = random.Random(name), []
    while len(found) < count:
        text = caption(random_scene(rng, held_out=held_out))
        if text not in found:
            found.append(text)
    return found


@dataclass(frozen=True)
class Setting:
    """How clips are made: steps, guidance scale, edge in pixels."""

    steps: int = 50
    guidance: float = 5.0
    size: int = SIZE


@dataclass
class Bench:
    """A pipeline, its prompts, and what uncached runs of them gave."""

    pipe: Any
    setting: Setting
    texts: list[str]
    seeds: list[int]
    frames: list[np.ndarray]

    def run(self, policy: Policy | Plan, steps: int | None = None, alone: bool = False) -> list[dict[str, Any]]:
        """Run all prompts under a policy: computed steps and PSNR (mean over frames) of each."""
        rows: list[dict[str, Any]] = []
        size, setting = 1 if alone else BATCH, replace(self.setting, steps=steps or self.setting.steps)
        for i in range(0, len(self.texts), size):
            with accelerate(self.pipe, policy) as run:
                clips = sample(self.pipe, self.texts[i : i + size], self.seeds[i : i + size], setting)
            computed = len(run.summary().computed)
            for clip, truth in zip(clips, self.frames[i : i + size], strict=True):
                rows.append({"computed": computed, "psnr": float(psnr(truth, clip).mean())})
        return rows


@torch.no_grad()
def sample(pipe: Any, texts: list[str], seeds: list[int], setting: Setting) -> list[np.ndarray]:
    """Clips, float32 [T, H, W, 3] in [0, 1]."""
    videos = pipe(
        prompt=texts,
        height=setting.size,
        width=setting.size,
        num_frames=FRAMES,
        num_inference_steps=setting.steps,
        guidance_scale=setting.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).frames
    return [np.clip(video, 0, 1).astype(np.float32) for video in videos]


def prepared(pipe: Any, texts: list[str], first_seed: int, setting: Setting) -> Bench:
    """Uncached clips of the prompts."""
    seeds = [first_seed + i for i in range(len(texts))]
    frames: list[np.ndarray] = []
    for i in range(0, len(texts), BATCH):
        frames += sample(pipe, texts[i : i + BATCH], seeds[i : i + BATCH], setting)
    return Bench(pipe, setting, texts, seeds, frames)


def on_grid(scheduler: Any, computed: tuple[int, ...], steps: int) -> Any:
    """A sampler on the noise levels of the computed steps, instead of as many levels of its own."""
    sampler = copy.deepcopy(scheduler)
    original = sampler.set_timesteps

    def set_timesteps(num_inference_steps: int, *args: Any, **kwargs: Any) -> None:
        original(steps, *args, **kwargs)
        sampler.sigmas = sampler.sigmas[[*computed, steps]]
        sampler.timesteps = sampler.timesteps[list(computed)]
        sampler.num_inference_steps = len(computed)

    sampler.set_timesteps = set_timesteps
    return sampler


def anywhere(plan: PlanFile) -> PlanFile:
    """The plan without what it was made for: here it is asked what it does elsewhere."""
    free = replace(plan, model=None, timesteps=None, shift=None, scheduler=None)
    return replace(free, guidance=None, guidance_range=None)


def extrapolated(plan: Plan, order: int) -> Plan:
    """TaylorSeer's prediction on a schedule."""
    return replace(plan, weights=taylor_weights(plan.computed, plan.num_steps, order))


def hindsight(plan: Plan | None) -> PlanFile | None:
    """Hindsight on a schedule."""
    return None if plan is None else PlanFile(replace(plan, weights=()), "hindsight")


Method = Callable[["Methods", int], list[dict[str, Any]]]


@dataclass
class Methods:
    """The methods: each takes a budget and gives a row a prompt."""

    evaluation: Bench
    tuning: Bench
    calibration: Calibration
    plans_from: Calibration
    edges: dict[str, MeasuredEdges]
    _trials: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps of the runs."""
        return self.evaluation.setting.steps

    def planned(self, budget: int, runs: int | None = None, through: str = "position", **settings: Any) -> Plan:
        """Our schedule, from the first `runs` of its calibration; brought to this run's steps if it is of others."""
        source = replace(self.plans_from, runs=self.plans_from.runs[:runs])
        wanted = budget if through == "sigma" else round(budget * source.num_steps / self.steps)
        file = plan_hindsight(source, wanted, **settings)
        if through == "sigma":
            return Plan(self.steps, self._at_levels(file))
        return (
            file.plan if (source.num_steps, wanted) == (self.steps, budget) else file.plan.resampled(self.steps, budget)
        )

    def _at_levels(self, file: PlanFile) -> tuple[int, ...]:
        """The steps of this run whose noise levels are nearest the plan's computed ones."""
        pipe = self.evaluation.pipe
        pipe.scheduler.set_timesteps(self.steps)
        here = pipe.scheduler.timesteps.numpy()
        wanted = [float(np.abs(here - (file.timesteps or ())[k]).argmin()) for k in file.plan.computed]
        return spread(wanted, self.steps)

    def fewer_steps(self, budget: int) -> list[dict[str, Any]]:
        """The same sampler with B steps."""
        return self.evaluation.run(Off(), budget)

    def sampler_on_lemica_grid(self, budget: int) -> list[dict[str, Any]]:
        """The sampler on the levels LeMiCa (exact, this model) computes."""
        pipe, computed = self.evaluation.pipe, self.lemica_exact(budget).plan.computed
        before = pipe.scheduler
        pipe.scheduler = on_grid(before, computed, self.steps)
        try:
            return self.evaluation.run(Off(), budget)
        finally:
            pipe.scheduler = before

    def lemica_exact(self, budget: int, boundary: str = "output", **settings: Any) -> PlanFile:
        """LeMiCa as published, on this model: measured edges (else in closed form), lexicographic minimax."""
        edges = self.edges.get(boundary)
        weights = edges.mean() if edges else gram_edges(self.calibration)
        return replace(anywhere(plan_lemica(self.calibration, budget, weights, **settings)), boundary=boundary)  # type: ignore[arg-type]

    def published(self, budget: int) -> Plan | None:
        """LeMiCa's published list for Wan2.1, where there is one."""
        try:
            return LeMiCa(budget).plan(WAN, self.steps)
        except ValueError:
            return None

    def magcache(self, budget: int) -> list[dict[str, Any]]:
        """Own ratios; of the settings (K, retention) that reach the budget the best on the calibration prompts."""
        ratios, candidates = magcache_ratios(self.calibration), {}
        for k, retention in itertools.product((2, 4, 6, 10), (0.2, 0.1, 0.04)):
            try:
                plan = plan_magcache(ratios, budget, k, retention)
            except ValueError:  # no threshold reaches this budget
                continue
            candidates[plan.plan.computed] = plan.plan
        return self._best(list(candidates.values()))

    def teacache(self, budget: int) -> list[dict[str, Any]]:
        """Own polynomials (degree 4, as the authors fit them); the best setting that hits the budget."""
        pipe = self.evaluation.pipe
        pipe.scheduler.set_timesteps(self.steps)
        run = replace(_trajectory(pipe, pipe.scheduler, pipe.scheduler.timesteps), num_steps=self.steps)
        candidates = {}
        for ret in (False, True):
            coefficients = self._polynomial(run, 1 if ret else 0)
            for thresh in np.geomspace(1e-3, 10, 300):
                plan = TeaCache(float(thresh), ret, coefficients=coefficients).plan(run)
                if plan.budget == budget:
                    candidates[plan.computed] = plan
        return self._best(list(candidates.values()))

    def _polynomial(self, run: Any, which: int) -> tuple[float, ...]:
        m = [run.modulation(t)[which].float() for t in run.timesteps]
        moved = [float((b - a).abs().mean() / a.abs().mean()) for a, b in itertools.pairwise(m)]
        gram = self.calibration.grams[:, : self.steps, : self.steps]  # the conditional branch
        size = np.diagonal(gram, axis1=1, axis2=2)
        change = size[:, 1:] + size[:, :-1] - 2 * np.diagonal(gram, 1, axis1=1, axis2=2)
        relative = np.sqrt(change.clip(0) / size[:, :-1]).mean(0)
        return tuple(float(c) for c in np.polyfit(moved, relative, 4))

    def easycache(self, budget: int) -> list[dict[str, Any]]:
        """The threshold whose mean count on the calibration prompts is nearest the budget; best of two ret_steps.

        Thresholds lie on a grid of 4 %, so that budgets share the trials.
        """
        best: tuple[float, EasyCache] | None = None
        for ret_steps in (r for r in (10, 5) if r < budget - 1):
            low, high = 0, len(self._thresholds) - 1
            while high - low > 1:
                middle = (low + high) // 2
                count, quality = self._tried(ret_steps, middle)
                low, high = (middle, high) if count > budget else (low, middle)
                if abs(count - budget) <= 0.7 and (best is None or quality > best[0]):
                    best = (quality, EasyCache(self._thresholds[middle], ret_steps))
        return self.evaluation.run(best[1], alone=True) if best else []

    @cached_property
    def _thresholds(self) -> list[float]:
        return [float(t) for t in np.geomspace(1e-3, 5, 218)]

    def _tried(self, ret_steps: int, index: int) -> tuple[float, float]:
        """Mean computed steps and PSNR of EasyCache on the calibration prompts."""
        if (ret_steps, index) not in self._trials:
            rows = self.tuning.run(EasyCache(self._thresholds[index], ret_steps), alone=True)
            found = float(np.mean([r["computed"] for r in rows])), float(np.mean([r["psnr"] for r in rows]))
            self._trials[ret_steps, index] = found
        return self._trials[ret_steps, index]

    def _best(self, plans: list[Plan]) -> list[dict[str, Any]]:
        if not plans:
            return []
        scores = [float(np.mean([r["psnr"] for r in self.tuning.run(plan)])) for plan in plans]
        return self.evaluation.run(plans[int(np.argmax(scores))])


def _planned(make: Callable[[Methods, int], Policy | Plan | None]) -> Method:
    def method(methods: Methods, budget: int) -> list[dict[str, Any]]:
        plan = make(methods, budget)
        return [] if plan is None else methods.evaluation.run(plan)

    return method


METHODS: dict[str, Method] = {
    "fewer steps": Methods.fewer_steps,
    "sampler on LeMiCa's grid": Methods.sampler_on_lemica_grid,
    "uniform reuse": _planned(lambda m, b: Uniform(b)),
    "uniform reuse (blocks)": _planned(lambda m, b: Uniform(b, boundary="blocks")),
    "LeMiCa published": _planned(lambda m, b: m.published(b)),
    "LeMiCa exact": _planned(lambda m, b: m.lemica_exact(b)),
    "LeMiCa exact (blocks)": _planned(lambda m, b: m.lemica_exact(b, "blocks") if "blocks" in m.edges else None),
    "MagCache": Methods.magcache,
    "TeaCache": Methods.teacache,
    "EasyCache": Methods.easycache,
    "extrapolation order 1, even": _planned(lambda m, b: extrapolated(Uniform(b).plan(m.steps), 1)),
    "extrapolation order 2, even": _planned(lambda m, b: extrapolated(Uniform(b).plan(m.steps), 2)),
    "extrapolation order 1, planned": _planned(lambda m, b: extrapolated(m.planned(b), 1)),
    "hindsight, even": _planned(lambda m, b: Hindsight(b)),
    "hindsight, published list": _planned(lambda m, b: hindsight(m.published(b))),
    "hindsight, planned": _planned(lambda m, b: hindsight(m.planned(b))),
}
VARIANTS: dict[str, Method] = {
    "uniform reuse on planned steps": _planned(lambda m, b: m.planned(b)),
    "hindsight, planned from 4 runs": _planned(lambda m, b: hindsight(m.planned(b, 4))),
    "hindsight, planned from 2 runs": _planned(lambda m, b: hindsight(m.planned(b, 2))),
    "hindsight, planned from 1 run": _planned(lambda m, b: hindsight(m.planned(b, 1))),
    "hindsight, planned, costs to the first power": _planned(lambda m, b: hindsight(m.planned(b, power=1.0))),
    "hindsight, planned, costs to the fourth power": _planned(lambda m, b: hindsight(m.planned(b, power=4.0))),
    "hindsight, planned, through sigma": _planned(lambda m, b: hindsight(m.planned(b, through="sigma"))),
    "LeMiCa closed form": _planned(lambda m, b: anywhere(plan_lemica(m.calibration, b, gram_edges(m.calibration)))),
    "LeMiCa exact sum": _planned(lambda m, b: m.lemica_exact(b, objective="sum")),
    "LeMiCa exact power": _planned(lambda m, b: m.lemica_exact(b, objective="power")),
}
"""Other choices in the methods above, run when they are named (--only)."""


def tables(results: dict[str, Any]) -> str:
    """Mean, worst-quarter and worst PSNR of every method and budget, as Markdown."""
    budgets = sorted({int(b) for rows in results["methods"].values() for b in rows}, reverse=True)
    lines = ["| mean / worst quarter / worst, dB | " + " | ".join(f"B={b}" for b in budgets) + " |"]
    lines.append("|---" * (len(budgets) + 1) + "|")
    for name, by_budget in results["methods"].items():
        cells = []
        for b in budgets:
            rows = by_budget.get(str(b)) or []
            values = np.sort([r["psnr"] for r in rows])
            count = np.mean([r["computed"] for r in rows]) if rows else b
            other = f" (n={count:.1f})" if rows and abs(count - b) > 0.01 else ""
            quarter = values[: max(1, len(values) // 4)].mean() if rows else 0.0
            cells.append(f"{values.mean():.1f} / {quarter:.1f} / {values[0]:.1f}{other}" if rows else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Mean PSNR over computed steps, one line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, by_budget) in enumerate(results["methods"].items()):
        means = {b: [(r["computed"], r["psnr"]) for r in rows] for b, rows in by_budget.items() if rows}
        points = sorted(tuple(np.mean(pairs, 0)) for pairs in means.values())
        ours = name.startswith("hindsight")
        style = {"linewidth": 2.4 if ours else 1.2, "linestyle": "-" if ours else "--"}
        axes.plot(*zip(*points, strict=True), marker="os^Dv<>Pp*Xhd8"[number % 14], markersize=4, label=name, **style)
    axes.set(xlabel="computed steps of 50", ylabel="PSNR to the uncached clip, dB (mean of 32 prompts)")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right center")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def prepared_methods(args: argparse.Namespace) -> Methods:
    """Pipeline, uncached clips, and what was calibrated."""
    pipe = load_pipeline(str(MODEL), "cpu")
    pipe.set_progress_bar_config(disable=True)
    if args.shift:
        pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, flow_shift=args.shift)
    setting = Setting(args.steps, args.guidance, args.size)
    evaluation = prepared(pipe, prompts(args.prompts, "methods", held_out=True), EVALUATION_SEED, setting)
    calibration = Calibration.load(args.calibration)
    texts = [run.prompt for run in calibration.runs]
    if common := set(texts) & set(evaluation.texts):
        raise ValueError(f"calibration and evaluation share prompts: {common}")
    tuning = prepared(pipe, texts, CALIBRATION_SEED, setting)
    plans_from = Calibration.load(args.plan_calibration or args.calibration)
    folder = Path(__file__).parent  # made by `stepcache plan --method lemica --edges replay`
    edges = {b: MeasuredEdges.load(p) for b in ("output", "blocks") if (p := folder / f"edges-{b}.json").exists()}
    fitting = {b: e for b, e in edges.items() if (e.num_steps, e.guidance) == (args.steps, args.guidance)}
    return Methods(evaluation, tuning, calibration, plans_from, {} if args.shift else fitting)


def main() -> None:
    """Run what is not there yet, save after every method and budget, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", default="25,20,17,14,10")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--shift", type=float, help="of the sampler's noise levels (the model's: 5)")
    parser.add_argument("--size", type=int, default=SIZE, help=f"edge of the clips in pixels ({SIZE})")
    parser.add_argument("--calibration", type=Path, default=MODEL / "calibration.json", help="for the rivals")
    parser.add_argument("--plan-calibration", type=Path, help="for our plans, if another")
    parser.add_argument("--only", help=f"methods, separated by semicolons; beside those: {'; '.join(VARIANTS)}")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw what is in --out, and stop")
    parser.add_argument("--table", action="store_true", help="print the tables of --out and stop")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {"methods": {}}
    if args.figure:
        draw(results, args.figure)
    if args.table or args.figure:
        print(tables(results))
        return
    methods = prepared_methods(args)
    results["about"] = {
        "guidance": args.guidance,
        "steps": args.steps,
        "shift": args.shift,
        "size": args.size,
        "prompts": methods.evaluation.texts,
        "sampler": type(methods.evaluation.pipe.scheduler).__name__,
        "stepcache": stepcache.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d"),
    }
    chosen = args.only.split(";") if args.only else list(METHODS)
    known = {**METHODS, **VARIANTS}
    if unknown := set(chosen) - set(known):
        raise ValueError(f"no method {', '.join(sorted(unknown))}; expected some of {', '.join(known)}.")
    cells = [(name, int(b)) for b in args.budgets.split(",") for name in chosen]
    for name, budget in tqdm(cells, desc="methods", dynamic_ncols=True):
        by_budget = results["methods"].setdefault(name, {})
        if str(budget) not in by_budget:
            by_budget[str(budget)] = known[name](methods, budget)
            write_atomically(args.out, json.dumps(results, indent=1) + "\n")
    print(tables(results))


if __name__ == "__main__":
    main()
