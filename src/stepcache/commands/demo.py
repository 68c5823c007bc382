"""`stepcache demo`: the embedded model makes the same clip uncached and with LeMiCa, EasyCache, MagCache and Hindsight.

Same process, same seed, same prompt. Clips, a contact sheet and the table go to the output folder.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stepcache.bench.labels import label
from stepcache.bench.methods import Method, help_text, read, read_list, single
from stepcache.bench.results import REFERENCE, slug
from stepcache.commands.flags import Flags, request_from
from stepcache.core.plan import timeline
from stepcache.core.strategy import Policy
from stepcache.core.summary import RunSummary
from stepcache.files import check_writable, write_atomically
from stepcache.measure.generation import check_policy, generate, load_pipeline, model_defaults, pipeline_kind
from stepcache.measure.metrics import mean_psnr, psnr, ssim
from stepcache.measure.video import contact_sheet, write_clip
from stepcache.methods import Off

EMBEDDED = Path(__file__).resolve().parents[3] / "assets" / "tiny-wan"


RATIOS_FILE = "magcache_ratios.json"


BORROWED = "wan2.1-t2v-1.3B"
"""Whose published figures the embedded model borrows: it is of the same family."""


PROMPT = "a big red circle moving right over a slate striped background"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache demo`."""
    parser.description = __doc__
    parser.epilog = "methods:\n" + help_text(bench=False)
    flags = Flags(parser)
    flags.add("--model", default=str(EMBEDDED), help="default: the embedded model of the clone")
    flags.add("--prompt", default=PROMPT, help=f'default: "{PROMPT}"')
    flags.add("--seed", type=int, default=0)
    flags.add("--steps", type=int, default=50, help="steps of the loop (50, what LeMiCa's table is for)")
    flags.add(
        "--policies",
        metavar="LIST",
        help="other methods to show, separated by spaces: see below (default: LeMiCa and Hindsight with half of the "
        "steps computed, EasyCache, MagCache)",
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
    """LeMiCa on a borrowed schedule, EasyCache, MagCache with the model's own ratios (else borrowed), Hindsight."""
    half = max(2, steps // 2)
    ratios = model / RATIOS_FILE
    magcache = read("magcache:0.12,K=2,R=0.2,interp=product")
    own = ("ratios", str(ratios)) if ratios.is_file() else ("table", BORROWED)
    return [
        read(f"lemica:{half},table={BORROWED},resample=1"),
        read("easycache:0.05"),
        replace(magcache, options=(*magcache.options, own)),
        read(f"hindsight:{half}"),
    ]


@dataclass(frozen=True)
class Shown:
    """One run of the demo: its name in files and JSON, its label in the table, its policy."""

    name: str
    label: str
    policy: Policy


def shown(methods: list[Method]) -> list[Shown]:
    """The uncached run and one a method, named as short as they can be told apart."""
    kinds = [method.name for method in methods]
    found = [Shown(REFERENCE, REFERENCE, Off())]
    for method in methods:
        name = method.name if kinds.count(method.name) == 1 else method.text
        policy, schedule = single(method)
        if name != REFERENCE:
            found.append(Shown(name, label(name, schedule).row, policy))
    return found


def run(args: argparse.Namespace) -> int:
    """A run a method, a table, clips, one sheet."""
    if not Path(args.model).is_dir() and args.model == str(EMBEDDED):
        raise FileNotFoundError(
            "the embedded model lies in a clone of the project (assets/tiny-wan); give --model DIR."
        )
    out = Path(args.out)
    check_writable(out, folder=True)
    pipeline_kind(args.model)
    request = request_from(args, args.prompt, args.seed)
    methods = read_list(args.policies) if args.policies is not None else usual_methods(Path(args.model), args.steps)
    runs = shown(methods)
    for each in runs:
        check_policy(each.policy, request)
    pipe = load_pipeline(args.model)
    for each in runs:
        check_policy(each.policy, request, pipe)
    print(f'prompt: "{request.prompt}", {request.steps} steps, guidance {request.guidance:g}, seed {request.seed}')
    generate(pipe, replace(request, steps=2), Off())  # warm-up: allocators and kernels, not measured
    results = []
    for each in runs:
        pipe.set_progress_bar_config(desc=each.label, leave=True)
        results.append((each, *generate(pipe, request, each.policy)))
    rows = [_row(*result, *results[0][1:]) for result in results]
    text = table(rows)
    width = max(len(each.label) for each in runs)
    print("\n" + text)
    for each, _, summary in results:
        print(f"{each.label:>{width}} {timeline(request.steps, summary.computed)}")
    fps = float(model_defaults(args.model).get("fps", 8.0))
    write_outputs(out, [(each, frames) for each, frames, _ in results], rows, text, fps)
    print(f"\nclips, contact sheet and table are in {out}/: open {out / 'sheet.png'}")
    return 0


def _row(
    run: Shown, frames: np.ndarray, summary: RunSummary, reference: np.ndarray, baseline: RunSummary
) -> dict[str, Any]:
    same = run.name == REFERENCE
    return {
        "method": run.name,
        "label": run.label,
        "computed": len(summary.computed),
        "skipped": len(summary.skipped),
        "loop_seconds": summary.loop_seconds,
        "speedup": baseline.loop_seconds / summary.loop_seconds,
        "ideal": summary.ideal_speedup,
        "psnr": None if same else mean_psnr(psnr(reference, frames).tolist()),
        "ssim": None if same else float(ssim(reference, frames).mean()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The comparison as text; PSNR and SSIM against the uncached run."""
    width = max(len(r["label"]) for r in rows)
    columns = (("method", width), ("computed", 9), ("skipped", 7), ("loop s", 8), ("speed-up", 9), ("ideal", 6))
    head = " ".join(f"{name:>{size}}" for name, size in (*columns, ("PSNR dB", 8), ("SSIM", 7)))
    lines = [head, "-" * len(head)]
    for r in rows:
        quality = f"{'-':>8} {'-':>7}"
        if r["psnr"] is not None:
            quality = f"{'inf' if math.isinf(r['psnr']) else format(r['psnr'], '.2f'):>8} {r['ssim']:7.4f}"
        lines.append(
            f"{r['label']:>{width}} {r['computed']:>9} {r['skipped']:>7} {r['loop_seconds']:8.2f} "
            f"{r['speedup']:>8.2f}x {r['ideal']:>5.2f}x {quality}"
        )
    return "\n".join(lines)


def write_outputs(
    out: Path, clips: list[tuple[Shown, np.ndarray]], rows: list[dict[str, Any]], text: str, fps: float
) -> None:
    """Clips (mp4 for viewing, mkv lossless), contact sheet, table as text and JSON."""
    for run, frames in clips:
        large = frames.repeat(4, axis=1).repeat(4, axis=2) if frames.shape[1] <= 128 else frames
        write_clip(out / f"{slug(run.name)}.mp4", large, fps)
        write_clip(out / f"{slug(run.name)}.mkv", frames, fps)
    counts = [f"{r['label']}  {r['computed']} of {r['computed'] + r['skipped']}" for r in rows]
    sheet = [(count, frames) for count, (_, frames) in zip(counts, clips, strict=True)]
    contact_sheet(sheet, out / "sheet.png", columns=9)
    write_atomically(out / "table.txt", text + "\n")
    document = [{k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in r.items()} for r in rows]
    write_atomically(out / "table.json", json.dumps(document, indent=1) + "\n")
