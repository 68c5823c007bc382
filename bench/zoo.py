"""Every method on every model of the zoo, at equal numbers of computed steps: the figures of docs/results.md.

    python bench/zoo.py                       hours on two cores; interrupt at any time, it resumes
    python bench/zoo.py --model emoji         one model
    python bench/zoo.py --only "hindsight;uniform reuse"
    python bench/zoo.py --pages               write docs/results.md from bench/zoo.json, run nothing

One process, one machine; for all methods of a cell the same prompts, seeds and noise. PSNR of decoded pictures against
the model's own uncached run. What is calibrated or tuned sees the calibration prompts only, and nothing of the method
was chosen on the evaluation prompts. Methods whose decisions are known beforehand run in one batch; those that decide
while running take one prompt at a time.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import Rows, draw, page
from rivals import DMD, VDE, Following, Replay, hicache, spectrum_schedule, taylor, zeus
from subjects import FOLDERS, ROOT, Peer, Series, Setting, Subject
from tqdm import tqdm

import stepcache
from stepcache import EasyCache, Hindsight, LeMiCa, Plan, PlanFile, Uniform
from stepcache.bench import peers
from stepcache.core.plan import even
from stepcache.files import check_writable, write_atomically
from stepcache.methods.spectrum import spectrum_weights
from stepcache.planning.calibration import Calibration
from stepcache.planning.costs import gram_edges, magcache_ratios, own_schedule, plan_lemica, plan_magcache
from stepcache.planning.refine import climb
from stepcache.planning.replay import MeasuredEdges

OUT, QUALITY = ROOT / "bench" / "zoo.json", ROOT / "bench" / "quality.json"
FEW_STEPS = {20: (14, 10, 7), 8: (6, 5, 4)}
BUDGETS, FEWER_BUDGETS = {50: (25, 20, 14, 10), 28: (14, 10)}, (25, 14)
OWN = (Setting(50), Setting(28))
MORE = {"tiny-wan": (Setting(50, 4.0), Setting(50, 7.0), Setting(50, sampler="euler"), Setting(50, sampler="dpm++"))}
CALIBRATION_RUNS, TRIALS = 8, 16


@dataclass
class Bench:
    """One model under one setting: what all its methods share."""

    subject: Subject
    setting: Setting
    prompts: int
    _trials: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)

    @cached_property
    def evaluation(self) -> Series:
        """The prompts that count."""
        return Series(self.subject, self.setting, "evaluation", self.prompts)

    @cached_property
    def tuning(self) -> Series:
        """The prompts on which other methods are tuned, and from which plans are made."""
        return Series(self.subject, self.setting, "calibration", CALIBRATION_RUNS)

    @cached_property
    def calibration(self) -> Calibration:
        """Uncached runs of the tuning prompts."""
        return self.tuning.calibration()

    @property
    def edges(self) -> MeasuredEdges:
        """LeMiCa's graph, measured on this model (by `stepcache plan --method lemica --edges replay`); ValueError."""
        found = MeasuredEdges.load(Path(__file__).parent / "edges-output.json")
        found.check(self.calibration)
        return found

    @property
    def steps(self) -> int:
        """Of a run."""
        return self.setting.steps

    def own(self, budget: int) -> Plan:
        """Hindsight's own schedule."""
        return own_schedule(self.calibration, budget).plan

    def planned(self, budget: int, prompts: int = CALIBRATION_RUNS) -> Plan:
        """The best of `TRIALS` schedules on the first of the tuning prompts."""
        tuning = self.tuning if prompts == self.tuning.count else replace(self.tuning, count=prompts)

        def errors_of(computed: tuple[int, ...]) -> tuple[float, ...]:
            rows = tuning.score(PlanFile(Plan(self.steps, computed), "hindsight"))
            return tuple(10 ** (-row["psnr"] / 20) for row in rows)

        best, _ = climb(self.own(budget), errors_of, TRIALS)
        return Plan(self.steps, best.computed)

    def magcache(self, budget: int) -> Rows:
        """Own ratios; of the settings (K, retention) that reach the budget the best on the tuning prompts."""
        ratios, found = magcache_ratios(self.calibration), {}
        for k, retention in itertools.product((2, 4, 6, 10), (0.2, 0.1, 0.04)):
            try:
                plan = plan_magcache(ratios, budget, k, retention).plan
            except ValueError:  # no threshold reaches this budget
                continue
            found[plan.computed] = plan
        if not found:
            return []
        scores = {c: np.mean([row["psnr"] for row in self.tuning.score(plan)]) for c, plan in found.items()}
        return self.evaluation.score(found[max(scores, key=lambda c: scores[c])])

    def easycache(self, budget: int) -> Rows:
        """The better of two ret_steps."""
        rets = [r for r in (10, 5) if r < budget - 1]
        return self._searched({f"EasyCache {r}": functools.partial(EasyCache, ret_steps=r) for r in rets}, budget)

    def _searched(self, kinds: dict[str, Callable[[float], Any]], budget: int) -> Rows:
        """The threshold whose mean count on the tuning prompts is nearest the budget; of several kinds the best."""
        thresholds = [float(t) for t in np.geomspace(1e-3, 5, 218)]
        best: tuple[float, Any] | None = None
        for kind, make in kinds.items():
            low, high = 0, len(thresholds) - 1
            while high - low > 1:
                middle = (low + high) // 2
                if (kind, middle) not in self._trials:
                    rows = self.tuning.score(make(thresholds[middle]), alone=True)
                    self._trials[kind, middle] = mean(rows, "computed"), mean(rows, "psnr")
                count, quality = self._trials[kind, middle]
                low, high = (middle, high) if count > budget else (low, middle)
                if abs(count - budget) <= 0.7 and (best is None or quality > best[0]):
                    best = quality, make(thresholds[middle])
        return self.evaluation.score(best[1], alone=True) if best else []

    def replayed(self, policy: Any) -> Rows:
        """A run, and the same run again with its skipped outputs interpolated."""
        replay = Replay(policy)
        _, counts = self.evaluation.clips(replay.first)
        clips, _ = self.evaluation.clips(replay.again)
        return self.evaluation.compared(clips, counts)


def mean(rows: Rows, name: str) -> float:
    """Of a column."""
    return float(np.mean([row[name] for row in rows]))


Method = Callable[[Bench, int], Rows]


def on(make: Callable[[Bench, int], Any]) -> Method:
    """A method whose decisions are known beforehand: a policy or plan; ValueError where it has none."""

    def method(bench: Bench, budget: int) -> Rows:
        try:
            policy = make(bench, budget)
        except ValueError:  # published lists exist for some budgets and step counts
            return []
        return bench.evaluation.score(policy)

    return method


METHODS: dict[str, Method] = {
    "fewer steps": lambda b, n: b.evaluation.on_grid(n),
    "uniform reuse": on(lambda b, n: Uniform(n)),
    "LeMiCa, published list": on(lambda b, n: LeMiCa(n).plan("wan2.1-t2v-1.3B", b.steps)),
    "LeMiCa, closed form": on(lambda b, n: plan_lemica(b.calibration, n, gram_edges(b.calibration)).plan),
    "LeMiCa, measured edges": on(lambda b, n: plan_lemica(b.calibration, n, b.edges.mean()).plan),
    "MagCache": Bench.magcache,
    "EasyCache": Bench.easycache,
    "cache-dit, TaylorSeer": on(lambda b, n: Peer(peers.dbcache_on(even(b.steps, n).computed, "taylorseer"))),
    "cache-dit, DMD": on(lambda b, n: Peer(peers.dbcache_on(even(b.steps, n).computed, "dmd"))),
    "cache-dit, FoCa": on(lambda b, n: Peer(peers.dbcache_on(even(b.steps, n).computed, "foca"))),
    "extrapolation, order 1": on(lambda b, n: taylor(even(b.steps, n), 1)),
    "extrapolation, order 2": on(lambda b, n: taylor(even(b.steps, n), 2)),
    "Spectrum, w = 0.5": on(lambda b, n: spectrum_weights(even(b.steps, n), 0.5)),
    "Spectrum, w = 1": on(lambda b, n: spectrum_weights(even(b.steps, n), 1.0)),
    "Spectrum, w = 0.5, its schedule": on(lambda b, n: spectrum_weights(spectrum_schedule(b.steps, n), 0.5)),
    "ZEUS": on(lambda b, n: zeus(even(b.steps, n))),
    "HiCache": on(lambda b, n: hicache(even(b.steps, n), 2)),
    "VDE": on(lambda b, n: Following(even(b.steps, n), VDE)),
    "DMD": on(lambda b, n: Following(even(b.steps, n), DMD)),
    "extrapolation, order 1, replayed": lambda b, n: b.replayed(taylor(even(b.steps, n), 1)),
    "our steps: sampler alone": lambda b, n: b.evaluation.on_grid(b.own(n).computed),
    "our steps: extrapolation": on(lambda b, n: taylor(b.own(n), 1)),
    "our steps: extrapolation, replayed": lambda b, n: b.replayed(taylor(b.own(n), 1)),
    "hindsight": on(lambda b, n: Hindsight(n)),
    "hindsight, replayed": lambda b, n: b.replayed(Hindsight(n)),
    "hindsight, planned": on(lambda b, n: PlanFile(b.planned(n), "hindsight")),
    "hindsight, planned on 4 prompts": on(lambda b, n: PlanFile(b.planned(n, 4), "hindsight")),
}
"""Names that begin with "hindsight" are ours; methods on "our steps" have hindsight's own schedule (`pages`)."""

ON_FEW = ("fewer steps", "uniform reuse", "extrapolation, order 1", "ZEUS", "hindsight")
"""Run where the whole run has few steps."""
LONG = ("EasyCache", "hindsight, planned", "hindsight, planned on 4 prompts")
"""Tuned by many runs, as long as all others together: at the model's own guidance and sampler only."""


def cells(models: Iterable[str]) -> Iterable[tuple[str, Setting, int]]:
    """(model, setting, budget): all that is measured."""
    for model in models:
        yield from ((model, setting, budget) for setting in OWN for budget in BUDGETS[setting.steps])
        yield from ((model, Setting(steps), budget) for steps, budgets in FEW_STEPS.items() for budget in budgets)
        yield from ((model, setting, budget) for setting in MORE.get(model, ()) for budget in FEWER_BUDGETS)


def methods_of(setting: Setting) -> Iterable[str]:
    """Names of the methods that are run there."""
    if setting.steps in FEW_STEPS:
        return ON_FEW
    return [name for name in METHODS if setting in OWN or name not in LONG]


def run(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Run what is not there yet; save after every row."""
    names = args.only.split(";") if args.only else list(METHODS)
    if unknown := set(names) - set(METHODS):
        raise ValueError(f"no method {', '.join(sorted(unknown))}; expected some of {', '.join(METHODS)}.")
    wanted = [(*cell, name) for cell in cells(args.model or FOLDERS) for name in names]
    wanted = [w for w in wanted if w[3] in methods_of(w[1])]
    missing = [w for w in wanted if w[3] not in results["cells"].get(key(*w[:3]), {})]
    bench: Bench | None = None
    absent: dict[str, str] = {}
    with tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc="zoo", unit="row", dynamic_ncols=True) as bar:
        for model, setting, budget, name in missing:
            if bench is None or bench.subject.name != model:
                bench = Bench(Subject(model), setting, args.prompts)
            if bench.setting != setting:
                bench = Bench(bench.subject, setting, args.prompts)
            bar.set_postfix_str(f"{model}, {setting.name}, {budget}, {name}")
            try:
                rows = METHODS[name](bench, budget)
            except ImportError as error:
                absent[name] = str(error)
                bar.update()
                continue
            results["cells"].setdefault(key(model, setting, budget), {})[name] = rows
            write_atomically(args.out, json.dumps(results) + "\n")
            bar.update()
    for name, why in absent.items():
        print(f"{name} was not run: {why}")


def key(model: str, setting: Setting, budget: int) -> str:
    """Of a cell in the file."""
    return f"{model}; {setting.name}; {budget}"


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=FOLDERS, help="only this one; may be given again")
    parser.add_argument("--only", help="methods, separated by semicolons")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--pages", action="store_true", help="write docs/results.md from --out, run nothing")
    args = parser.parse_args()
    check_writable(args.out)
    results = json.loads(args.out.read_text()) if args.out.exists() else {"cells": {}}
    if args.pages:
        quality = json.loads(QUALITY.read_text()) if QUALITY.exists() else None
        draw(results, ROOT / "docs" / "figures" / "zoo.svg")
        write_atomically(ROOT / "docs" / "results.md", page(results, quality))
        return
    results["about"] = {
        "prompts": args.prompts,
        "stepcache": stepcache.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d"),
    }
    try:
        run(args, results)
    except (ValueError, OSError) as error:
        sys.exit(f"bench/zoo.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted; {args.out} has all finished cells; the same command resumes.")


if __name__ == "__main__":
    main()
