"""The runs of evidence: a control, a calibration and plans, then prompt by prompt every method."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stepcache import __version__
from stepcache.bench.evidence.rows import as_table, document, hashed, rows_of
from stepcache.bench.evidence.setup import (
    Cost,
    Setup,
    another_sampler,
    budgets_of,
    control,
    decided,
    load_setup,
    published,
    save_setup,
)
from stepcache.bench.methods import Contender, Search, parse_one
from stepcache.bench.report.contents import read
from stepcache.bench.report.page import WIDTH, load_clips, page
from stepcache.bench.results import REFERENCE, Folder, merge
from stepcache.bench.runs import Runner, ceiling
from stepcache.bench.suite import Bench, Suite, duration
from stepcache.files import replacing, write_atomically
from stepcache.fleet.jobs import Alone
from stepcache.hosts.diffusers import model_name
from stepcache.measure.clip_score import find_clip_score
from stepcache.measure.generation import Request, sample_latent
from stepcache.measure.lpips import find_lpips
from stepcache.measure.pipelines import load_pipeline, model_defaults
from stepcache.planning.calibrate import calibrate
from stepcache.planning.calibration import Calibration
from stepcache.planning.costs import plan_hindsight
from stepcache.planning.refine import refined

CALIBRATION_SEED = 1000
"""Of the first prompt that schedules are tried on; evaluation has seed 0."""


@dataclass
class Session:
    """One session of a folder of evidence.

    Args:
        model: folder or hub id.
        folder: of the evidence.
        request: what all runs have in common.
        prompts: for evaluation, and for planning; the latter may be none.
        where: device, dtype, and whether parts are offloaded (`load_pipeline`).
        hours: after which no further prompt is begun; None: none of that.
        lpips: whether its weights may be fetched.
        say: told what happens, a line or a table at a time.
    """

    model: str
    folder: Path
    request: Request
    prompts: tuple[Sequence[str], Sequence[str]]
    where: tuple[str | None, str | None, bool] = (None, None, False)
    hours: float | None = None
    lpips: bool = False
    say: Callable[[str], None] = print

    def run(self) -> int:
        """Everything, in order; 1 if the control row is not identical, or a method failed."""
        self.began, self.results = time.monotonic(), Folder(self.folder)
        lpips, note = find_lpips(None, fetch=self.lpips)
        self.pipe = load_pipeline(self.model, *self.where)
        self.pipe.set_progress_bar_config(disable=True)
        fps = float(model_defaults(self.model).get("fps", 16.0))
        score, scored = find_clip_score()
        self.runner = Runner(
            self.pipe, self.request, self.results, [], self.prompts[0], 0, fps, lpips, shared=True, score=score
        )
        self.about = self.runner.about(note) | {"fps": fps, "clip_score": scored, "clock": clock(self.pipe.device)}
        cost = self.measured()
        setup = self.setup(cost)
        self.runner.prompts = setup.prompts
        contenders = self.contenders(setup)
        suite = Suite(self.model, self.folder, self.request, list(setup.prompts), [0], contenders, fps)
        description = suite.described((0, 1), resume=True) | self.about
        self.say(self.estimate(setup, cost, description))
        if "ceiling" not in description:
            why, runs = control(self.pipe, replace(self.request, prompt=setup.prompts[0], seed=0))
            if why is not None:
                self.say(f"the control row is not identical: {why}. Nothing else was run.")
                return 1
            description["ceiling"] = ceiling(*runs)
            self.results.write(description)
        self.say("control: with all steps computed, reuse and Hindsight are bit-identical to the uncached run")
        self.plan(setup)
        self.runner.contenders = contenders = self.contenders(setup, made=True)
        description["schedules"] = {c.name: c.schedule for c in contenders if isinstance(c, Contender) and c.schedule}
        bench = Bench(self.results, contenders, description, shared=True, tolerant=True)
        complete = self.evaluate(bench, setup, cost)
        self.write(setup, "complete" if complete else "stopped")
        return 1 if bench.failed else 0

    def measured(self) -> Cost:
        """Seconds of an uncached run, from one of two steps; ValueError if the size does not fit."""
        try:
            return Cost(*self.runner.warm_up(), self.request.steps)
        except torch.OutOfMemoryError as error:
            raise ValueError(self.too_large()) from error

    def too_large(self) -> str:
        """What does not fit, and what would: sizes smaller by a quarter of each side, tried with one step."""
        defaults = model_defaults(self.model)
        asked = [int(getattr(self.request, n) or defaults.get(n) or 1024) for n in ("width", "height")]
        width, height = asked
        while min(width, height) > 128:
            width, height = (max(16, round(0.75 * side / 16) * 16) for side in (width, height))
            try:
                sample_latent(self.pipe, replace(self.request, prompt="a", steps=1, width=width, height=height))
            except torch.OutOfMemoryError:
                continue
            fits = f"--width {width} --height {height} fits"
            return f"{asked[0]} x {asked[1]} needs more memory than {self.pipe.device} has; {fits}, or use --offload."
        return (
            f"{asked[0]} x {asked[1]} needs more memory than {self.pipe.device} has; use --offload or a smaller model."
        )

    @property
    def key(self) -> dict[str, Any]:
        """What a folder's evidence must have in common."""
        request = {k: v for k, v in self.request.settings.items() if k != "negative_prompt"}
        folder = Path(self.model).expanduser()
        return {
            "model": folder.resolve().name if folder.is_dir() else self.model,
            **{name: self.about[name] for name in ("structure", "dtype", "machine", "clock", "versions")},
            "offload": self.where[2],
            "request": request,
            "prompts": hashed("\n".join([*self.prompts[0], "", *self.prompts[1], "", self.request.negative_prompt])),
        }

    def setup(self, cost: Cost) -> Setup:
        """What is run: as decided in an earlier session, or now."""
        path = self.folder / "setup.json"
        if path.is_file():
            return load_setup(path, self.key)
        budgets = budgets_of(self.request.steps)
        own = [*published(model_name(self.pipe), budgets, self.request.steps)]
        own.append(f"sampler:{another_sampler(self.pipe.scheduler)}")
        peers = [f"fbcache:@{budgets[0]}"]
        if importlib.util.find_spec("cache_dit"):
            peers.append(f"cachedit:@{budgets[0]}")
        spent = time.monotonic() - self.began
        setup = decided(self.request.steps, own, peers, self.prompts, cost, self.hours, spent)
        out = [peer for peer in peers if peer not in setup.methods] + ([] if setup.planned else ["planned schedules"])
        if out:
            self.say(f"left out, for want of hours or of prompts for planning: {', '.join(out)}")
        save_setup(path, setup, self.key)
        return setup

    def estimate(self, setup: Setup, cost: Cost, description: dict[str, Any]) -> str:
        """What is still to come, and how long it takes."""
        known = {*description["searched"], *description.get("unsearched", {})}
        searched = [m for m in setup.methods if m not in known]
        planned = all((self.folder / name).exists() for _, name in setup.planned)
        before = cost.searching(searched) + (0.0 if planned else cost.planning(setup))
        before += 0.0 if "ceiling" in description else cost.control()
        there = {item.index for item in self.results.items() if item.method == REFERENCE}
        left, prompt = len(setup.prompts) - len(there), cost.prompt(setup.methods)
        total = duration(before + left * prompt)
        return (
            f"{self.model}, {self.request.steps} steps: an uncached run takes about {duration(cost.run(cost.steps))}. "
            f"Before the prompts (control, {setup.trials} schedules a budget, thresholds): {duration(before)}; then "
            f"{left} prompts with {len(setup.methods)} methods, {duration(prompt)} each; {total} in all, "
            "or as far as the hours go."
        )

    def contenders(self, setup: Setup, made: bool = False) -> list[Contender | Search]:
        """The methods; plans only once they are made."""
        found: list[Contender | Search] = []
        for method in setup.methods:
            if not method.startswith("plan:"):
                found.append(parse_one(method))
            elif made:
                found.append(replace(parse_one(f"plan:{self.folder / method.partition(':')[2]}"), name=method))
        return found

    def plan(self, setup: Setup) -> None:
        """The calibration, and for every budget the best of the schedules that are tried; each is kept when made."""
        todo = [(b, self.folder / name) for b, name in setup.planned if not (self.folder / name).exists()]
        if not todo:
            return
        pairs = [(prompt, CALIBRATION_SEED + i) for i, prompt in enumerate(setup.calibration)]
        path, latents = self.folder / "calibration.json", self.folder / "uncached.safetensors"
        known = Calibration.load(path) if path.exists() else None
        truths = _loaded(latents)

        def sample(prompt: str, seed: int) -> torch.Tensor:
            return sample_latent(self.pipe, replace(self.request, prompt=prompt, seed=seed))

        def recorded(prompt: str, seed: int) -> torch.Tensor:
            latent = sample(prompt, seed)
            truths[str(seed)] = latent.float().cpu().contiguous()
            _save(truths, latents)
            return latent

        def save(found: Calibration) -> None:
            about = {"stepcache": __version__, "model": self.model, "request": self.request.settings}
            replace(found, about=about).save(path)

        runs = tqdm(pairs, desc="calibration", unit="run", dynamic_ncols=True)
        calibration = calibrate(self.pipe, runs, recorded, known=known, save=save)
        for prompt, seed in pairs:
            if str(seed) not in truths:  # lost with the file
                recorded(prompt, seed)
        kept = {(p, s): truths[str(s)].to(self.pipe.device) for p, s in pairs}
        for budget, target in todo:
            start = plan_hindsight(calibration, budget)
            trials, label = target.with_suffix(".trials.json"), f"plans of {budget} steps"
            best, _ = refined(self.pipe, start, kept, sample, setup.trials, trials, label)
            best.save(target)

    def evaluate(self, bench: Bench, setup: Setup, cost: Cost) -> bool:
        """Prompt by prompt, every method, while there is time; whether all were run."""
        self.results.write(bench.description)
        bench.search(Alone(self.runner))
        longest = cost.prompt(setup.methods)
        there = {item.index for item in self.results.items()}
        for i, prompt in enumerate(setup.prompts):
            left = (math.inf if self.hours is None else 3600 * self.hours) - (time.monotonic() - self.began)
            if i and i not in there and left < longest:
                self.say(
                    f"stopped after {i} of {len(setup.prompts)} prompts: the next one would take {duration(longest)}"
                )
                return False
            began = time.monotonic()
            bench.run(Alone(self.runner), [(i, prompt, 0)])
            if i not in there:
                longest = max(time.monotonic() - began, longest / 2)
            self.write(setup, "running", quiet=True)
        return True

    def write(self, setup: Setup, state: str, quiet: bool = False) -> None:
        """evidence.json; at the end also the table and the page."""
        found = document(self.results, setup, self.key, state)
        write_atomically(self.folder / "evidence.json", json.dumps(found, indent=1, default=str) + "\n")
        if quiet:
            return
        text = as_table(rows_of(self.results, setup))
        merge(self.results)
        write_atomically(self.folder / "evidence.txt", text + "\n")
        results = read(self.results)
        clips, _ = load_clips(self.results, results, WIDTH, 4)
        write_atomically(self.folder / "report.html", page(results, clips))
        self.say(
            f"\n{text}\n\nwrote {self.folder}: evidence.json, evidence.txt, report.html. How to submit it: "
            "docs/evidence.md"
        )


def clock(device: torch.device) -> str | None:
    """A card's highest clock and its limit of power, as its driver says; None on a CPU or without its tool."""
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        return None
    asked = "--query-gpu=clocks.max.sm,power.limit,driver_version"
    words = ["nvidia-smi", asked, "--format=csv,noheader", f"--id={device.index or 0}"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or None


def _loaded(path: Path) -> dict[str, torch.Tensor]:
    """Latents by seed; none where the file is missing or damaged: they are made once more."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path)) if path.exists() else {}
    except SafetensorError:
        return {}


def _save(latents: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(latents, temporary)
