"""`stepcache demo`: the same clips uncached and with every method, at equal numbers of computed steps.

One process, several prompts, the same seeds and noise for all. EasyCache and MagCache have no budget: their thresholds
are searched to match it. Clips, a sheet of differences, an animation and the table go to the output folder.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stepcache.bench.labels import label
from stepcache.bench.methods import Contender, Method, Search, help_text, make, read, read_list, single
from stepcache.bench.results import REFERENCE, slug
from stepcache.commands.flags import EMBEDDED, Flags, check_embedded, request_from
from stepcache.core.plan import computed_steps, timeline
from stepcache.core.strategy import Policy
from stepcache.core.summary import RunSummary
from stepcache.core.trajectory import Trajectory
from stepcache.files import check_writable, read_text, write_atomically
from stepcache.fleet.places import alone
from stepcache.measure.generation import Request, check_policy, generate
from stepcache.measure.metrics import mean_psnr, psnr, ssim
from stepcache.measure.pipelines import Inputs, load_pipeline, model_defaults, model_inputs
from stepcache.measure.video import animation, contact_sheet, write_clip
from stepcache.methods import Off

RATIOS_FILE = "magcache_ratios.json"
BORROWED = "wan2.1-t2v-1.3B"
"""The model whose published schedule the embedded model borrows: it is of the same family."""
SHARES = (0.5, 0.28)
"""Of the steps: the two budgets, 25 and 14 of 50."""
PROMPTS, SEARCH_PROMPTS, SEARCH_TRIALS = 8, 2, 9
AMPLIFIED = 8
"""Factor of the differences on the sheet."""
OURS = "hindsight"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache demo`."""
    parser.description = __doc__
    parser.epilog = "methods (`@14` searches the threshold that computes 14 steps):\n" + help_text(bench=False)
    flags = Flags(parser)
    flags.add("--model", default=str(EMBEDDED), help="default: the embedded model")
    flags.add("--prompt", help=f"one prompt (default: {PROMPTS} of the embedded model's evaluation prompts)")
    flags.add("--seed", type=int, default=0, help="of the first prompt; the others count up from it (0)")
    flags.add("--steps", type=int, default=50, help="steps of the loop (50, as in LeMiCa's table)")
    flags.add(
        "--policies",
        metavar="LIST",
        help="other methods to show, separated by spaces: see below (default: uniform reuse, LeMiCa, EasyCache, "
        "MagCache and Hindsight, at half of the steps and at 28 %% of them)",
    )
    flags.add("--out", default="outputs/demo", help="folder for clips, sheet and table (outputs/demo)")
    flags.add_gone(
        {
            "--budget": 'write --policies "lemica:25 hindsight:25"',
            "--thresh": "write --policies easycache:0.05",
            "--boundary": 'write --policies "lemica:25,boundary=blocks"',
        }
    )


def usual_methods(model: Path, steps: int) -> list[Method]:
    """At two budgets: uniform reuse, LeMiCa's borrowed list, EasyCache and MagCache searched, Hindsight."""
    found = []
    for share in SHARES:
        budget = computed_steps(share, steps)
        magcache = read(f"magcache:@{budget},K=6,R=0.1,interp=product")
        ratios = model / RATIOS_FILE
        own = ("ratios", str(ratios)) if ratios.is_file() else ("table", BORROWED)
        found += [
            read(f"uniform:{budget}"),
            read(f"lemica:{budget},table={BORROWED},resample=1"),
            read(f"easycache:@{budget},ret_steps={max(1, min(10, budget // 3))}"),
            replace(magcache, options=(*magcache.options, own)),
            read(f"{OURS}:{budget}"),
        ]
    return found


@dataclass(frozen=True)
class Shown:
    """A method of the demo: its name in files and JSON, its label in the table, its policy or the search for one."""

    name: str
    label: str
    policy: Policy | Search


@dataclass(frozen=True)
class Result:
    """A method on all prompts: the first one's clip and run, and figures per prompt."""

    shown: Shown
    frames: np.ndarray
    summary: RunSummary
    computed: tuple[int, ...]
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]

    @property
    def count(self) -> float:
        """Computed steps, mean of the prompts."""
        return sum(self.computed) / len(self.computed)


def shown(methods: list[Method]) -> list[Shown]:
    """One per method, with the shortest distinct names."""
    kinds = [method.name for method in methods]
    found = []
    for method in methods:
        if method.name == REFERENCE:
            continue
        text = f"{method.name}:{method.value}" if method.value else method.name
        name = method.name if kinds.count(method.name) == 1 else text.replace("@", "")
        if method.value.startswith("@"):
            search = make(method)
            if isinstance(search, Search):
                found.append(Shown(name, text, search))
            continue
        policy, schedule = single(method)
        found.append(Shown(name, label(name, schedule).row, policy))
    return found


def run(args: argparse.Namespace) -> int:
    """Uncached clips, all methods, a table, a summary, clips, a sheet."""
    check_embedded(args.model)
    out = Path(args.out)
    check_writable(out, folder=True)
    with alone(out):
        return _run(args, out)


def _run(args: argparse.Namespace, out: Path) -> int:
    requests = requests_of(args)
    methods = read_list(args.policies) if args.policies is not None else usual_methods(Path(args.model), args.steps)
    wanted = shown(methods)
    if not wanted:
        raise ValueError("--policies names no method besides the uncached run.")
    inputs = model_inputs(args.model)
    _check(wanted, requests[0], inputs)
    pipe = load_pipeline(args.model)
    _check(wanted, requests[0], inputs, pipe)
    pipe.set_progress_bar_config(disable=True)
    first = requests[0]
    guidance = "none" if first.guidance is None else f"{first.guidance:g}"
    print(f"{len(requests)} prompt(s), {first.steps} steps, guidance {guidance}, seeds from {first.seed}")
    searches = sum(isinstance(each.policy, Search) for each in wanted)
    with tqdm(total=len(requests) * (1 + len(wanted)) + searches, unit="run", dynamic_ncols=True) as bar:
        truths = [_made(bar, REFERENCE, pipe, request, Off()) for request in requests]
        results = [_result(bar, each, pipe, requests, truths) for each in wanted]
    text = table(results, first.steps)
    print("\n" + text)
    width = max(len(each.label) for each in wanted)
    print(*(f"{r.shown.label:>{width}} {timeline(first.steps, r.summary.computed)}" for r in results), sep="\n")
    said = "\n".join([*verdicts(results, first.steps), measured(args.model, len(requests))])
    print(f"\n{said}")
    fps = float(model_defaults(args.model).get("fps", 8.0))
    write_outputs(out, truths[0], results, f"{text}\n\n{said}", fps)
    print(f"\nclips, the sheet of differences and the table are in {out}/: open {out / 'sheet.png'}")
    return 0


def requests_of(args: argparse.Namespace) -> list[Request]:
    """One per prompt: the given one, or the first of the model's evaluation prompts."""
    if args.prompt is not None:
        return [request_from(args, args.prompt, args.seed)]
    path = Path(args.model) / "prompts.json"
    if not path.is_file():
        path = EMBEDDED / "prompts.json"
    prompts = json.loads(read_text(path, "prompts"))["evaluation"][:PROMPTS]
    return [request_from(args, prompt, args.seed + i) for i, prompt in enumerate(prompts)]


def _check(wanted: list[Shown], request: Request, inputs: Inputs, pipe: Any = None) -> None:
    for each in wanted:
        policy = each.policy
        if isinstance(policy, Search):
            policy = _policy(policy.easiest(request.steps))
        check_policy(policy, request, inputs, pipe)


def _policy(contender: Contender) -> Policy:
    if contender.policy is None:
        raise ValueError(f"{contender.name} is another project's cache; run it beside ours with stepcache bench.")
    return contender.policy


def _made(bar: Any, name: str, pipe: Any, request: Request, policy: Policy) -> tuple[np.ndarray, RunSummary]:
    bar.set_description_str(name)
    found = generate(pipe, request, policy)
    bar.update()
    return found


def _result(
    bar: Any, each: Shown, pipe: Any, requests: list[Request], truths: list[tuple[np.ndarray, RunSummary]]
) -> Result:
    """A method on all prompts."""
    policy = each.policy
    if isinstance(policy, Search):
        bar.set_description_str(f"{each.name}, threshold")
        policy = searched(pipe, policy, requests[:SEARCH_PROMPTS])
        bar.update()
    made = [_made(bar, each.name, pipe, request, policy) for request in requests]
    pairs = [(truth, frames) for (truth, _), (frames, _) in zip(truths, made, strict=True)]
    return Result(
        each,
        made[0][0],
        made[0][1],
        tuple(len(summary.computed) for _, summary in made),
        tuple(mean_psnr(psnr(a, b).tolist()) for a, b in pairs),
        tuple(float(ssim(a, b).mean()) for a, b in pairs),
    )


def searched(pipe: Any, search: Search, requests: list[Request]) -> Policy:
    """The threshold whose mean count of computed steps is nearest the target."""

    def count(contender: Contender) -> float:
        return sum(_count(pipe, _policy(contender), request) for request in requests) / len(requests)

    tried = []
    for trial in search.trials(count, SEARCH_TRIALS):
        tried.append(trial)
        if not trial[0]:
            break
    return _policy(search.make(min(tried, key=lambda trial: trial[0])[1]))


def _count(pipe: Any, policy: Policy, request: Request) -> int:
    plan = policy.begin(Trajectory(request.steps, guidance=request.guidance, boundary=policy.boundary)).plan
    return plan.budget if plan is not None else len(generate(pipe, request, policy)[1].computed)


def table(results: list[Result], steps: int) -> str:
    """The comparison as text; PSNR and SSIM against the uncached runs."""
    width = max(len(r.shown.label) for r in results)
    columns = (("method", width), ("computed", 8), ("ideal", 6), ("PSNR dB: mean", 13), ("worst", 6), ("SSIM", 7))
    head = " ".join(f"{name:>{size}}" for name, size in columns)
    lines = [head, "-" * len(head)]
    for r in results:
        lines.append(
            f"{r.shown.label:>{width}} {r.count:>8g} {steps / r.count:>5.2f}x {np.mean(r.psnr):>13.1f} "
            f"{min(r.psnr):>6.1f} {np.mean(r.ssim):>7.4f}"
        )
    return "\n".join(lines)


def grouped(results: list[Result]) -> Iterator[tuple[Result, list[Result]]]:
    """(one of ours, the others with about as many computed steps)."""
    for ours in results:
        if ours.shown.name.startswith(OURS):
            others = [r for r in results if not r.shown.name.startswith(OURS) and abs(r.count - ours.count) <= 1]
            if others:
                yield ours, others


def verdicts(results: list[Result], steps: int) -> list[str]:
    """One line per budget: who is first by each of the table's figures, with the figure."""
    lines = []
    for ours, others in grouped(results):
        group = [ours, *others]
        first = [
            f"by {figure} {best.shown.name.partition(':')[0]} ({of(best):{form}})"
            for figure, of, form in FIGURES
            if (best := max(group, key=of))
        ]
        lines.append(f"Closest to the uncached clips at {ours.count:g} of {steps} steps: {', '.join(first)}.")
    return lines


FIGURES: tuple[tuple[str, Callable[[Result], float], str], ...] = (
    ("mean PSNR", lambda r: float(np.mean(r.psnr)), ".1f"),
    ("the worst prompt", lambda r: min(r.psnr), ".1f"),
    ("SSIM", lambda r: float(np.mean(r.ssim)), ".4f"),
)
"""Of a method's row: what it is called, how it is read, how it is written."""


def measured(model: str, prompts: int) -> str:
    """What the table measures, and what not."""
    which = "the small embedded model" if model == str(EMBEDDED) else model
    return (
        f"Measured: PSNR and SSIM of {prompts} clip(s) of {which} to its own uncached ones.\n"
        "Not measured: other models (docs/results.md has four), and time (ideal: steps over computed steps)."
    )


def write_outputs(
    out: Path, truth: tuple[np.ndarray, RunSummary], results: list[Result], text: str, fps: float
) -> None:
    """Clips (mp4 for viewing, mkv lossless), sheet of differences, animation, table as text and JSON."""
    for name, frames in ((REFERENCE, truth[0]), *((r.shown.name, r.frames) for r in results)):
        large = frames.repeat(4, axis=1).repeat(4, axis=2) if frames.shape[1] <= 128 else frames
        write_clip(out / f"{slug(name)}.mp4", large, fps)
        write_clip(out / f"{slug(name)}.mkv", frames, fps)
    least = min(r.count for r in results)
    few = [r for r in results if r.count - least <= 1.5]
    rows = [(f"{REFERENCE}, first prompt", truth[0])]
    rows += [
        (f"{r.shown.label}: difference x {AMPLIFIED}, {r.psnr[0]:.1f} dB", difference(truth[0], r.frames)) for r in few
    ]
    contact_sheet(rows, out / "sheet.png", columns=9)
    animation([(REFERENCE, truth[0]), *((r.shown.name, r.frames) for r in few)], out / "demo.webp", fps)
    write_atomically(out / "table.txt", text + "\n")
    document = [
        {
            "method": r.shown.name,
            "label": r.shown.label,
            "computed": list(r.computed),
            "psnr": [None if math.isinf(v) else v for v in r.psnr],
            "ssim": list(r.ssim),
            "loop_seconds_first": r.summary.loop_seconds,
        }
        for r in results
    ]
    write_atomically(out / "table.json", json.dumps(document, indent=1) + "\n")


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mid-grey where two clips are alike, amplified where they are not; uint8."""
    moved = 128.0 + AMPLIFIED * (b.astype(np.float64) - a.astype(np.float64))
    return np.asarray(np.clip(moved, 0, 255).round(), dtype=np.uint8)
