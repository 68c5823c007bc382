"""Results of evidence: a row per method, `evidence.json`, and several of these as one table."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepcache.bench.evidence.setup import SCHEMA, VERSION, Setup
from stepcache.bench.labels import labels
from stepcache.bench.results import REFERENCE, Folder, Item
from stepcache.files import parse_document, read_text
from stepcache.measure.metrics import finite, mean_psnr


@dataclass(frozen=True)
class Row:
    """A method over the prompts on which all were run: times in seconds; PSNR in dB over the pairs that differ.

    `psnr` is None where all are identical, `psnr_std` where fewer than two differ, `identical` how many are.
    """

    method: str
    label: str
    prompts: int
    failed: int
    computed: float = 0.0
    ideal: float = 0.0
    psnr: float | None = None
    psnr_std: float | None = None
    psnr_worst: float | None = None
    identical: int = 0
    ssim: float | None = None
    lpips: float | None = None
    clip_score: float | None = None
    loop_seconds: float = 0.0
    seconds: float = 0.0
    loop_speedup: float = 0.0
    speedup: float = 0.0
    peak_bytes: int | None = None


def rows_of(folder: Folder, setup: Setup) -> list[Row]:
    """Every method over the prompts on which all have been run: the uncached run first, then by cost and quality."""
    items: dict[str, list[Item]] = {}
    for item in folder.items():
        items.setdefault(item.method, []).append(item)
    about = folder.read()
    wanted = [m for m in (REFERENCE, *setup.methods) if m not in about.get("unsearched", {})]
    done = [{i.index for i in items.get(method, ())} for method in wanted]
    common = set.intersection(*done) if done else set()
    steps, names = about["request"]["steps"], labels(wanted, about.get("schedules", {}))
    truth = {i.index: i for i in items.get(REFERENCE, ()) if i.index in common}
    if not common:
        return []
    rows = [_row(m, names[m].row, [i for i in items[m] if i.index in common], truth, steps) for m in wanted]
    return sorted(rows, key=lambda r: (r.method != REFERENCE, -round(r.computed), -(r.psnr or 0.0)))


def _row(method: str, label: str, items: list[Item], truth: Mapping[int, Item], steps: int) -> Row:
    good = [item for item in items if not item.error]
    if not good:
        return Row(method, label, len(items), len(items))
    psnr = [math.inf if item.psnr is None else item.psnr for item in good]
    lpips = [item.lpips for item in good if item.lpips is not None]
    scores = [item.clip_score for item in good if item.clip_score is not None]
    computed = statistics.fmean(item.computed for item in good)
    differing = [value for value in psnr if math.isfinite(value)]
    pairs = [(item, truth[item.index]) for item in good]
    return Row(
        method,
        label,
        len(items),
        len(items) - len(good),
        computed,
        steps / computed,
        finite(mean_psnr(psnr)),
        statistics.stdev(differing) if len(differing) > 1 else None,
        finite(min(psnr)),
        len(psnr) - len(differing),
        statistics.fmean(item.ssim or 0.0 for item in good),
        statistics.fmean(lpips) if lpips else None,
        statistics.fmean(scores) if scores else None,
        statistics.median(item.loop_seconds for item in good),
        statistics.median(item.seconds for item in good),
        statistics.median(before.loop_seconds / item.loop_seconds for item, before in pairs),
        statistics.median(before.seconds / item.seconds for item, before in pairs),
        max((item.peak_bytes for item in good if item.peak_bytes is not None), default=None),
    )


def as_table(rows: Sequence[Row]) -> str:
    """For the terminal."""
    width = max((len(r.label) for r in rows), default=6)
    head = f"{'method':<{width}}  prompts  computed  ideal   loop  end to end  PSNR mean    std  worst    SSIM   LPIPS"
    head += "   CLIP"
    lines = [head, "-" * len(head)]
    for r in rows:
        if r.failed == r.prompts:
            lines.append(f"{r.label:<{width}}  failed on all {r.prompts} prompts")
            continue
        own = r.method == REFERENCE
        quality = ("-",) * 5 if own else (_cell(r.psnr, 2), _cell(r.psnr_std, 1, "-"), _cell(r.psnr_worst, 1))
        quality = quality if own else (*quality, _cell(r.ssim, 4), _cell(r.lpips, 4, "n/a"))
        cells = [f"{c:>{w}}" for c, w in zip(quality, (9, 5, 5, 6, 6), strict=True)]
        times = f"{r.ideal:>5.2f}x {r.loop_speedup:>5.2f}x {r.speedup:>10.2f}x"
        cells.append(f"{_cell(r.clip_score, 2, 'n/a'):>5}")
        failed = f"  ({r.identical} identical, not in the mean)" if r.identical and r.psnr is not None else ""
        failed += f"  ({r.failed} failed)" if r.failed else ""
        lines.append(f"{r.label:<{width}}  {r.prompts:>7}  {r.computed:>8.1f} {times}  {'  '.join(cells)}{failed}")
    return "\n".join(lines)


def _cell(value: float | None, digits: int, otherwise: str = "same") -> str:
    return otherwise if value is None else f"{value:.{digits}f}"


def hashed(text: str) -> str:
    """What stands for a text that is nobody's business."""
    return hashlib.sha256(text.encode()).hexdigest()


def document(folder: Folder, setup: Setup, key: Mapping[str, Any], state: str) -> dict[str, Any]:
    """`evidence.json`: where and with what it was run, and every row. Prompts are given by their hash, files by name.

    Args:
        folder: of the benchmark.
        setup: what is run.
        key: what was asked for.
        state: "running", "complete", or "stopped" where not all prompts were run.
    """
    about = folder.read()
    kept = ("sampler", "date", "clip_score")
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "state": state,
        "control": "identical",
        **key,
        **{name: about.get(name) for name in kept},
        "lpips": about["lpips"] if about["measures_lpips"] else None,
        "failed_searches": sorted(about.get("unsearched", {})),
        "setup": {**asdict(setup), "prompts": len(setup.prompts), "calibration": len(setup.calibration)},
        "prompts": [hashed(prompt) for prompt in setup.prompts],
        "rows": [asdict(row) for row in rows_of(folder, setup)],
    }


def load_document(path: Path) -> dict[str, Any]:
    """Submitted evidence: `evidence.json`, or the folder that holds it; ValueError if it is none."""
    file = path / "evidence.json" if path.is_dir() else path
    text = read_text(file, "evidence")
    try:
        found = parse_document(text, SCHEMA, VERSION)
        merged([found])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no evidence, or damaged ({error}); ask for it again.") from error
    return found


def merged(documents: Sequence[Mapping[str, Any]]) -> str:
    """Several pieces of evidence as one Markdown table: a line a piece and speed-up, methods side by side."""
    lines = [
        "| model | run | computed | hindsight | planned | best other method | fewer steps | prompts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in documents:
        request = found["request"]
        size = "x".join(str(request[n]) for n in ("width", "height", "num_frames") if request.get(n))
        run = (
            f"{found['machine']}, {found['dtype']}, {size}, {request['steps']} steps, {found['versions']['stepcache']}"
        )
        rows = [Row(**row) for row in found["rows"]]
        for budget in found["setup"]["budgets"]:
            near = [r for r in rows if r.method != REFERENCE and not r.failed and abs(r.computed - budget) <= 0.5]
            ours = {f"hindsight:{budget}", f"plan:plan-{budget}.json"}
            others = [r for r in near if r.method not in ours and not r.method.startswith(("steps:", "sampler:"))]
            best = max(others, key=lambda r: math.inf if r.psnr is None else r.psnr, default=None)
            cells = [
                f"{budget} of {request['steps']}",
                *(
                    _figures(next((r for r in near if r.method == m), None))
                    for m in (f"hindsight:{budget}", f"plan:plan-{budget}.json")
                ),
                "–" if best is None else f"{_figures(best)} ({best.method.partition(':')[0].partition(',')[0]})",
                _figures(next((r for r in near if r.method == f"steps:{budget}"), None)),
                str(near[0].prompts if near else 0),
            ]
            lines.append(f"| {found['model']} | {run} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(row: Row | None) -> str:
    """Mean, standard deviation and worst PSNR of a row."""
    if row is None:
        return "–"
    if row.psnr is None or row.psnr_worst is None:
        return "identical"
    spread = "" if row.psnr_std is None else f" ± {row.psnr_std:.1f}"
    return f"{row.psnr:.1f}{spread}, worst {row.psnr_worst:.1f}"
