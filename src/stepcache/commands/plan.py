"""`stepcache plan`: a plan for a calibrated model.

    stepcache plan --calibration calibration.json --budget 20 --refine 16 --model DIR --out plan.json
    stepcache generate --model DIR --prompt "..." --plan plan.json --output clip.mp4

With `--refine`, schedules are tried on the calibrated prompts, beginning with Hindsight's own. Without it that schedule
is written with its expected errors, in seconds and without the model. Instead of a budget, a target can be given:
`--target-speedup 2.5`, or `--target-psnr 35` (estimated from the calibration).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stepcache.commands.flags import SIZES, Flags, add_device_flags, add_size_flags, request_from
from stepcache.core.trajectory import BOUNDARIES
from stepcache.files import check_writable, read_text
from stepcache.fleet.places import alone
from stepcache.hosts.diffusers import accelerate, model_name
from stepcache.measure.device import find_device
from stepcache.measure.generation import Request, sample_latent
from stepcache.measure.pipelines import load_pipeline, pipeline_kind
from stepcache.methods.magcache import RATIOS_SCHEMA, Ratios
from stepcache.planning.calibration import Calibration, Recorder
from stepcache.planning.costs import (
    LONGEST_GAP,
    finished,
    gram_edges,
    magcache_ratios,
    plan_error,
    plan_hindsight,
    plan_lemica,
    plan_magcache,
)
from stepcache.planning.forecasts import forecasts, psnr_of
from stepcache.planning.paths import OBJECTIVES
from stepcache.planning.plan_file import PlanFile
from stepcache.planning.refine import load_trials, refined, trials_key
from stepcache.planning.replay import MeasuredEdges, measured_edges, rank_agreement, replays

METHODS = ("hindsight", "lemica", "magcache")


FEW_RUNS = 2
"""Below this many calibrated runs a plan may overfit them."""


RUNNING = ("--refine", "--edges replay")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache plan`."""
    parser.description = __doc__
    flags = Flags(parser, _modes)
    flags.add(
        "--calibration",
        required=True,
        metavar="FILE",
        help="from stepcache calibrate, or --calibration of hindsight_generate.py; for --method magcache also ratios, "
        "from generate --policy magcache-calibration:FILE or --magcache_calibration of MagCache4Wan2.1",
    )
    flags.add("--out", required=True, metavar="FILE", help="the plan, a JSON file")
    goal = parser.add_mutually_exclusive_group(required=True)
    flags.add("--budget", type=int, group=goal, help="computed steps")
    flags.add(
        "--target-speedup", type=float, metavar="X", group=goal, help="the largest budget with this ideal speed-up"
    )
    flags.add("--target-psnr", type=float, metavar="DB", group=goal, help="the smallest budget estimated to reach it")
    flags.add(
        "--method",
        type=_method,
        choices=METHODS,
        default="hindsight",
        help="hindsight: ours (default); lemica, magcache: as published, with this model's measurements",
    )
    flags.add(
        "--longest",
        type=int,
        default=LONGEST_GAP,
        needs=("--edges gram", "--edges replay"),
        help=f"most steps from one computed step to the next in LeMiCa's graph ({LONGEST_GAP})",
    )
    _add_method_flags(flags)
    group = flags.group("running the model (--edges replay, --refine)")
    add = functools.partial(flags.add, group=group, needs=RUNNING)
    add("--model", metavar="DIR_OR_ID", help="the model that was calibrated")
    add("--negative_prompt", help="as calibrated")
    add_device_flags(flags, group=group, needs=RUNNING)
    add_size_flags(flags, "as calibrated; default: the model's", group=group, needs=RUNNING)
    instead = "hindsight has a single mode now; leave it out"
    flags.add_gone({"--mode": instead, "--bands": instead, "--basis": instead})


def _add_method_flags(flags: Flags) -> None:
    flags.add(
        "--refine",
        type=int,
        metavar="TRIALS",
        group=flags.group("hindsight"),
        needs="--method hindsight",
        help="try this many schedules on the calibrated prompts (16 are enough) and keep the one that is best on the "
        "worst quarter of them (needs --model; one trial takes budget/steps of a calibration's time; resumes)",
    )
    add = functools.partial(flags.add, group=flags.group("lemica"))
    add(
        "--edges",
        default="gram",
        metavar="gram|replay|FILE",
        needs="--method lemica",
        help="the graph: in closed form (gram, default); measured by replays, exactly as published (replay: needs "
        "--model, takes the time of hundreds of runs, resumes); or from a FILE of measured edges",
    )
    add("--boundary", choices=BOUNDARIES, default="output", needs="--edges replay", help="where replays reuse (output)")
    add("--replay-runs", type=int, needs="--edges replay", help="replay only this many runs (default: all)")
    add(
        "--objective",
        choices=OBJECTIVES,
        default="lexminimax",
        needs="--method lemica",
        help="objective of the path (lexminimax)",
    )
    add("--gamma", type=float, default=2.0, needs="--objective power", help="exponent of the power objective (2)")
    add = functools.partial(flags.add, group=flags.group("magcache"), needs="--method magcache")
    add("--magcache_K", type=int, default=2, help="most consecutive skipped steps (2)")
    add("--retention_ratio", type=float, default=0.2, help="share computed at the start (0.2)")


def _method(text: str) -> str:
    if text == "checked":
        raise argparse.ArgumentTypeError("checked is now called hindsight; write --method hindsight")
    return text


def _modes(args: argparse.Namespace) -> set[str]:
    modes = {f"--method {args.method}"}
    if args.method == "lemica":
        modes |= {f"--edges {args.edges}", f"--objective {args.objective}"}
    if args.method == "hindsight" and args.refine is not None:
        modes.add("--refine")
    return modes


def run(args: argparse.Namespace) -> int:
    """Read, plan, print the expected error, save; with the output file locked."""
    check_flags(args)
    check_writable(args.out)
    with alone(Path(args.out), folder=False):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    if is_ratios(args.calibration):
        return run_on_ratios(args)
    calibration = Calibration.load(args.calibration)
    if not calibration.runs:
        raise ValueError(f"{args.calibration} holds no runs; calibrate first.")
    budget = budget_from(args, calibration)
    check_budget(budget, calibration.num_steps)
    make = {"hindsight": hindsight, "lemica": lemica, "magcache": magcache}[args.method]
    plan = make(args, calibration, budget)
    if len(calibration.runs) < FEW_RUNS:
        note = f"planned from only {len(calibration.runs)} run; calibrate more prompts for a more reliable plan"
        plan = replace(plan, notes=(*plan.notes, note))
    plan.save(args.out)
    print(plan.text())
    error = float(plan_error(calibration, plan).mean())
    forecast = psnr_of(calibration, error)
    in_decibel = "" if forecast is None else f", about {forecast:.1f} dB"
    print(f"estimate (open loop): error of the final latent {error:.2%}{in_decibel}; wrote {args.out}")
    print(
        "(the estimate leaves out how later outputs respond to earlier errors: runs are usually worse; bench measures)"
    )
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """ValueError for numbers out of range and for what is missing; said before anything is read."""
    for name, least in (("--longest", 1), ("--replay-runs", 1), ("--refine", 1)):
        value = getattr(args, name[2:].replace("-", "_"))
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more.")
    for name, value in (("--target-psnr", args.target_psnr), ("--gamma", args.gamma)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} is {value}; expected a number.")
    running = [flag for flag in RUNNING if flag in _modes(args)]
    if not running:
        return
    if not args.model:
        raise ValueError(f"{running[0]} needs --model, the model that was calibrated.")
    pipeline_kind(args.model)
    if args.device:
        find_device(args.device)


def is_ratios(path: str) -> bool:
    """Whether a file holds MagCache's ratios and nothing else."""
    try:
        data = json.loads(read_text(path, "calibration"))
    except json.JSONDecodeError:
        return False
    return isinstance(data, dict) and data.get("schema") == RATIOS_SCHEMA


def run_on_ratios(args: argparse.Namespace) -> int:
    """A MagCache plan from a ratios file; nothing else can be planned or forecast from it."""
    if args.method != "magcache" or args.target_psnr is not None:
        what = "--target-psnr" if args.method == "magcache" else f"--method {args.method}"
        raise ValueError(
            f"{args.calibration} holds MagCache's ratios only, enough for --method magcache with a budget or speed-up; "
            f"{what} needs a calibration (stepcache calibrate)."
        )
    ratios = Ratios.load(args.calibration)
    budget = budget_at_speedup(args, ratios.num_steps) if args.budget is None else args.budget
    check_budget(budget, ratios.num_steps)
    plan = plan_magcache(ratios, budget, args.magcache_K, args.retention_ratio)
    plan = replace(plan, boundary="blocks")  # what --magcache_calibration measures: the block stack's residual
    plan.save(args.out)
    print(f"{plan.text()}\nwrote {args.out}")
    return 0


def check_budget(budget: int, num_steps: int) -> None:
    """ValueError for a budget no run of this length has."""
    if not 2 <= budget <= num_steps:
        raise ValueError(f"--budget is {budget}; expected 2 to {num_steps}, the calibration's step count.")


def budget_from(args: argparse.Namespace, calibration: Calibration) -> int:
    """The budget, or the one that the target asks for."""
    steps = calibration.num_steps
    if args.budget is not None:
        return int(args.budget)
    if args.target_speedup is not None:
        return budget_at_speedup(args, steps)
    curve = forecasts(calibration)
    if any(f.psnr is None for f in curve):
        raise ValueError(
            "the calibration has no accelerated run, so no PSNR can be estimated; calibrate without --no-decode."
        )
    for forecast in curve:
        if forecast.psnr is not None and forecast.psnr >= args.target_psnr:
            return forecast.budget
    raise ValueError(f"no budget is estimated to reach {args.target_psnr:g} dB.")


def budget_at_speedup(args: argparse.Namespace, steps: int) -> int:
    """The largest budget whose ideal speed-up S / B is the one asked for."""
    if not 1 <= args.target_speedup <= steps / 2:
        raise ValueError(f"--target-speedup is {args.target_speedup}; expected 1 to {steps / 2:g} for {steps} steps.")
    return int(steps / args.target_speedup)


def hindsight(args: argparse.Namespace, calibration: Calibration, budget: int) -> PlanFile:
    """Our plan by the flags."""
    plan = plan_hindsight(calibration, budget)
    return plan if args.refine is None else searched(args, calibration, plan)


def searched(args: argparse.Namespace, calibration: Calibration, plan: PlanFile) -> PlanFile:
    """The plan after closed-loop trials; OUT.trials.json holds the finished ones and is continued."""
    path = Path(args.out).with_suffix(".trials.json")
    load_trials(
        path, trials_key(plan, [(r.prompt, r.seed) for r in calibration.runs])
    )  # if it is another search, say so now
    pipe, sample = runner(args, calibration)
    truths = {}
    for run in tqdm(calibration.runs, desc="uncached", unit="run", dynamic_ncols=True):
        truths[run.prompt, run.seed] = sample(run.prompt, run.seed)
    found, trials = refined(pipe, plan, truths, sample, args.refine, path)
    first = next(t for t in trials if t.computed == plan.plan.computed)
    print(
        f"{len(trials)} schedules tried: worst quarter {first.score:.1f} dB before, "
        f"{dict(found.figures)['measured_snr_worst_quarter_db']:.1f} dB after (latent signal to noise)"
    )
    return replace(found, errors=plan.errors if found.plan.computed == plan.plan.computed else ())


def runner(args: argparse.Namespace, calibration: Calibration) -> tuple[Any, Callable[[str, int], torch.Tensor]]:
    """The calibrated model's pipeline, and a function that runs it as it was calibrated.

    Raises:
        ValueError: the model or the size is not the calibrated one.
    """
    asked = calibration.about.get("request") or {"guidance": calibration.guidance}
    names = ("negative_prompt", *SIZES)
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    request = request_from(
        argparse.Namespace(**{**asked, **given, "model": args.model, "steps": calibration.num_steps})
    )
    pipe = load_pipeline(args.model, args.device, args.dtype)
    pipe.set_progress_bar_config(disable=True)
    if (name := model_name(pipe)) != calibration.model:
        raise ValueError(
            f"{args.calibration} is a calibration of model {calibration.model} (here: {name}); use the calibrated "
            "model."
        )
    check_size(pipe, calibration, request)
    return pipe, lambda prompt, seed: sample_latent(pipe, replace(request, prompt=prompt, seed=seed))


def check_size(pipe: Any, calibration: Calibration, request: Request) -> None:
    """ValueError, after one step of the model, if the request's latent is not of the calibrated size."""
    run = calibration.runs[0]
    with accelerate(pipe, Recorder(size=calibration.size)):
        sample_latent(pipe, replace(request, prompt=run.prompt, seed=run.seed, steps=2))


def magcache(args: argparse.Namespace, calibration: Calibration, budget: int) -> PlanFile:
    """MagCache's plan from the calibration's own ratios."""
    plan = plan_magcache(magcache_ratios(calibration), budget, args.magcache_K, args.retention_ratio)
    return finished(calibration, plan)


def lemica(args: argparse.Namespace, calibration: Calibration, budget: int) -> PlanFile:
    """LeMiCa's plan by the flags, and how well the closed form agrees with measured edges."""
    settings = {"objective": args.objective, "gamma": args.gamma}
    if args.edges == "gram":
        closed = gram_edges(calibration, args.longest)
        source = "LeMiCa's graph (arXiv 2511.00090) in closed form"
        return plan_lemica(calibration, budget, closed, source=source, **settings)
    measured = replayed(args, calibration) if args.edges == "replay" else MeasuredEdges.load(args.edges)
    measured.check(calibration)
    closed, mean = gram_edges(calibration, measured.longest), measured.mean()
    print(f"closed form and measured edges: rank correlation {rank_agreement(closed, mean):.3f} over {len(mean)} edges")
    source = f"LeMiCa's graph (arXiv 2511.00090), {len(mean)} edges measured over {len(measured.runs)} run(s)"
    return replace(plan_lemica(calibration, budget, mean, source=source, **settings), boundary=measured.boundary)


def replayed(args: argparse.Namespace, calibration: Calibration) -> MeasuredEdges:
    """Measure the edges now; OUT.edges.json holds the finished ones and is continued."""
    path = Path(args.out).with_suffix(".edges.json")
    known = MeasuredEdges.load(path) if path.exists() else None
    if known is not None:
        known.check(calibration)
        if (known.boundary, known.longest) != (args.boundary, args.longest):
            raise ValueError(f"{path} is of boundary {known.boundary}, longest {known.longest}; choose another --out.")
    pairs = [(r.prompt, r.seed) for r in calibration.runs][: args.replay_runs]
    done = known.done if known else set()
    todo = [pair for pair in pairs if pair not in done]
    if not todo and known is not None:
        return known
    pipe, sample = runner(args, calibration)
    total = len(todo) * len(replays(calibration.num_steps, args.longest))
    with tqdm(total=total, desc="replays", unit="run", dynamic_ncols=True) as bar:
        return measured_edges(
            pipe,
            todo,
            sample,
            longest=args.longest,
            boundary=args.boundary,
            known=known,
            save=lambda edges: edges.save(path),
            progress=bar.update,
        )
