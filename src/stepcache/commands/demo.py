"""`stepcache demo`: the embedded model makes the same clip uncached and with LeMiCa, EasyCache, MagCache and Hindsight.

Same process, same seed, same prompt. Clips, a contact sheet and the table go to the output folder.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stepcache.core.plan import timeline
from stepcache.core.strategy import Policy
from stepcache.core.summary import RunSummary
from stepcache.files import write_atomically
from stepcache.measure.generation import Request, check_policy, check_request, generate, load_pipeline, model_defaults
from stepcache.measure.metrics import mean_psnr, psnr, ssim
from stepcache.measure.video import contact_sheet, write_clip
from stepcache.methods import EasyCache, Hindsight, LeMiCa, MagCache, Off, Ratios

EMBEDDED = Path(__file__).resolve().parents[3] / "assets" / "tiny-wan"


RATIOS_FILE = "magcache_ratios.json"


PROMPT = "a big red circle moving right over a slate striped background"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache demo`."""
    parser.description = __doc__
    parser.set_defaults(run=run)
    parser.add_argument("--model", default=str(EMBEDDED), help="default: the embedded model of the clone")
    parser.add_argument("--prompt", default=PROMPT, help=f'default: "{PROMPT}"')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50, help="steps of the loop (50, what LeMiCa's table is for)")
    parser.add_argument("--budget", type=int, default=25, help="computed steps of LeMiCa and Hindsight (25)")
    parser.add_argument("--thresh", type=float, default=0.05, help="EasyCache's threshold (0.05)")
    parser.add_argument("--boundary", choices=("output", "blocks"), default="output", help="what is reused (output)")
    parser.add_argument("--out", default="outputs/demo", help="folder for clips, sheet and table (outputs/demo)")


def policies(args: argparse.Namespace, ratios: Ratios | None) -> dict[str, Policy]:
    """The five runs. LeMiCa borrows the schedule published for Wan2.1-T2V-1.3B; MagCache has the model's own ratios."""
    borrowed = "wan2.1-t2v-1.3B"
    mag = MagCache(0.12, 2, 0.2, None if ratios else borrowed, ratios, "product", args.boundary)
    return {
        "uncached": Off(),
        "lemica": LeMiCa(args.budget, borrowed, args.steps != 50, args.boundary),
        "easycache": EasyCache(args.thresh, boundary=args.boundary),
        "magcache": mag,
        "hindsight": Hindsight(args.budget, boundary=args.boundary),
    }


def run(args: argparse.Namespace) -> int:
    """Five runs, a table, five clips, one sheet."""
    if not Path(args.model).is_dir() and args.model == str(EMBEDDED):
        raise FileNotFoundError(
            "the embedded model lies in a clone of the project (assets/tiny-wan); give --model DIR."
        )
    defaults = model_defaults(args.model)
    sizes = {k: defaults[k] for k in ("height", "width", "num_frames") if k in defaults}
    request = Request(args.prompt, "", args.steps, defaults.get("guidance", 5.0), args.seed, **sizes)
    own = Path(args.model) / RATIOS_FILE
    runs = policies(args, Ratios.load(own) if own.is_file() else None)
    check_request(request)
    pipe = load_pipeline(args.model)
    for policy in runs.values():
        check_policy(policy, pipe, request)
    print(f'prompt: "{request.prompt}", {request.steps} steps, guidance {request.guidance:g}, seed {request.seed}')
    generate(pipe, replace(request, steps=2), Off())  # warm-up: allocators and kernels, not measured
    results: dict[str, tuple[np.ndarray, RunSummary]] = {}
    for name, policy in runs.items():
        pipe.set_progress_bar_config(desc=f"{name:>9}", leave=True)
        results[name] = generate(pipe, request, policy)
    rows = [_row(name, results) for name in results]
    text = table(rows)
    print("\n" + text)
    for name, (_, summary) in results.items():
        print(f"{name:>9} {timeline(request.steps, summary.computed)}")
    out = Path(args.out)
    write_outputs(out, results, rows, text, defaults.get("fps", 8.0))
    print(f"\nclips, contact sheet and table are in {out}/: open {out / 'sheet.png'}")
    return 0


def _row(name: str, results: dict[str, tuple[np.ndarray, RunSummary]]) -> dict[str, Any]:
    reference, baseline = results["uncached"]
    frames, summary = results[name]
    same = name == "uncached"
    return {
        "method": name,
        "computed": len(summary.computed),
        "reused": len(summary.reused),
        "loop_seconds": summary.loop_seconds,
        "speedup": baseline.loop_seconds / summary.loop_seconds,
        "ideal": summary.ideal_speedup,
        "psnr": None if same else mean_psnr(psnr(reference, frames).tolist()),
        "ssim": None if same else float(ssim(reference, frames).mean()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The comparison as text; PSNR and SSIM against the uncached run."""
    columns = (("method", 9), ("computed", 9), ("reused", 7), ("loop s", 8), ("speed-up", 9), ("ideal", 6))
    head = " ".join(f"{name:>{width}}" for name, width in (*columns, ("PSNR dB", 8), ("SSIM", 7)))
    lines = [head, "-" * len(head)]
    for r in rows:
        quality = f"{'-':>8} {'-':>7}"
        if r["psnr"] is not None:
            quality = f"{'inf' if math.isinf(r['psnr']) else format(r['psnr'], '.2f'):>8} {r['ssim']:7.4f}"
        lines.append(
            f"{r['method']:>9} {r['computed']:>9} {r['reused']:>7} {r['loop_seconds']:8.2f} "
            f"{r['speedup']:>8.2f}x {r['ideal']:>5.2f}x {quality}"
        )
    return "\n".join(lines)


def write_outputs(
    out: Path, results: dict[str, tuple[np.ndarray, RunSummary]], rows: list[dict[str, Any]], text: str, fps: float
) -> None:
    """Clips (mp4 for viewing, mkv lossless), contact sheet, table as text and JSON."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (frames, _) in results.items():
        large = frames.repeat(4, axis=1).repeat(4, axis=2) if frames.shape[1] <= 128 else frames
        write_clip(out / f"{name}.mp4", large, fps)
        write_clip(out / f"{name}.mkv", frames, fps)
    labels = {r["method"]: f"{r['method']}  {r['computed']} of {r['computed'] + r['reused']}" for r in rows}
    contact_sheet([(labels[name], frames) for name, (frames, _) in results.items()], out / "sheet.png", columns=9)
    write_atomically(out / "table.txt", text + "\n")
    document = [{k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in r.items()} for r in rows]
    write_atomically(out / "table.json", json.dumps(document, indent=1) + "\n")
