"""Results of a benchmark on disk: one JSON an item, merged into a table."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stepcache.bench.labels import labels
from stepcache.files import parse_document, read_text
from stepcache.fleet.places import below, files_below, is_remote, write_text
from stepcache.measure.metrics import finite, mean_psnr
from stepcache.measure.prompts import clip_name

BENCH_SCHEMA, ITEM_SCHEMA, VERSION = "stepcache.bench", "stepcache.bench_item", 1


REFERENCE = "uncached"


@dataclass(frozen=True)
class Item:
    """What one method did on one prompt and seed.

    Args:
        method: the contender's name.
        index, prompt, seed: which prompt of the file.
        computed: evaluations of transformer blocks over those of one uncached step: whole steps where steps are
            computed or not, fractions where single blocks always run.
        per_step: the same for every step of the sampler, in [0, 1].
        branches: branch -> steps computed in it, where the method is one of ours.
        loop_seconds: first call of the transformer to the end of the last step.
        seconds: the whole call of the pipeline.
        reference_seconds: the same of the uncached run it is compared with.
        seconds_per_computed_step, seconds_per_reused_step (of a skipped one), cache_bytes: of our methods.
        peak_bytes: most memory allocated on the GPU during the run; None on a CPU.
        psnr, ssim, lpips: against the uncached clip, means over frames; psnr None where the clips are identical.
        clip_score: how well the frames fit the prompt, 0 to 100; None where CLIP's weights were not at hand.
        psnr_per_frame: dB; None where a frame is identical.
        step_errors: |x - x_uncached| / |x_uncached| of the latent after every step; empty if the steps are others.
        clip: path of the clip below the folder.
        error: why there is no result.
    """

    method: str
    index: int
    prompt: str
    seed: int
    computed: float = 0.0
    per_step: tuple[float, ...] = ()
    branches: dict[str, tuple[int, ...]] = field(default_factory=dict)
    loop_seconds: float = 0.0
    seconds: float = 0.0
    reference_seconds: float = 0.0
    seconds_per_computed_step: float | None = None
    seconds_per_reused_step: float | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    clip_score: float | None = None
    identical: bool = False
    psnr_per_frame: tuple[float | None, ...] = ()
    step_errors: tuple[float, ...] = ()
    clip: str = ""
    error: str = ""

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        document = {"schema": ITEM_SCHEMA, "version": VERSION, **asdict(self)}
        write_text(path, json.dumps(document, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Item:
        """Read `save`'s file; ValueError, naming it, if it is none."""
        try:
            data = parse_document(read_text(path, "item"), ITEM_SCHEMA, VERSION)
            for name in ("per_step", "psnr_per_frame", "step_errors"):
                data[name] = tuple(data[name])
            data["branches"] = {name: tuple(steps) for name, steps in data["branches"].items()}
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"item {str(path)!r}: not valid ({error}); remove it and resume.") from error


@dataclass
class Folder:
    """Where a benchmark's results lie: a local folder, or a place of `places.place`."""

    root: Path

    @property
    def description(self) -> Path:
        """What was run."""
        return self.root / "bench.json"

    def item(self, method: str, index: int, seed: int) -> Path:
        """The JSON of one item."""
        return self.root / "items" / slug(method) / f"{index:04d}-{seed}.json"

    def clip(self, method: str, index: int, prompt: str, seed: int, by_prompt: bool) -> Path:
        """The clip of one item; named by its prompt where VBench is to find it."""
        name = clip_name(prompt, seed) if by_prompt else f"{index:04d}-{seed}.mp4"
        return self.root / "clips" / slug(method) / name

    def reference(self, index: int, seed: int) -> Path:
        """The uncached run of a prompt and seed, while workers on several machines share it."""
        return self.root / "references" / f"{index:04d}-{seed}.npz"

    def items(self) -> list[Item]:
        """All items there are, by method, prompt and seed."""
        with ThreadPoolExecutor(16) as pool:  # of use where every file is a request to somewhere else
            return list(pool.map(Item.load, files_below(self.root / "items", "*/*.json")))

    def tidy(self, needed: Collection[Path] = ()) -> None:
        """Remove uncached runs that nobody needs any more, whoever left them; errors of the disc are passed over."""
        folder = self.root / "references"
        wanted = {str(path) for path in needed}
        with suppress(OSError):
            for path in (*folder.glob("*"), *folder.glob(".*.tmp")):
                if str(path) not in wanted:
                    path.unlink(missing_ok=True)
        if not wanted and not is_remote(folder):
            with suppress(OSError):
                folder.rmdir()

    def below(self, path: Path) -> str:
        """A path as it is written in an item."""
        return below(path, self.root)

    def read(self) -> dict[str, Any]:
        """The description; FileNotFoundError or ValueError if this is no benchmark's folder."""
        return parse_document(read_text(self.description, "benchmark"), BENCH_SCHEMA, VERSION)

    def write(self, description: dict[str, Any]) -> None:
        """Write the description, whole or not at all."""
        document = {"schema": BENCH_SCHEMA, "version": VERSION, **description}
        write_text(self.description, json.dumps(document, indent=1) + "\n")


def slug(method: str) -> str:
    """A method's name as a folder's: what is not a letter, digit, dot, dash or equals sign becomes a low line."""
    return "".join(c if c.isalnum() or c in ".-=@" else "_" for c in method)


@dataclass(frozen=True)
class Row:
    """One method over all its items; None where nothing was measured. Speed-ups: the median, lowest and highest."""

    method: str
    items: int
    failed: int
    computed: float
    speedup: float
    ideal: float
    psnr: float | None
    psnr_worst: float | None
    ssim: float | None
    ssim_worst: float | None
    lpips: float | None
    lpips_worst: float | None
    reused_cost: float | None
    cache_bytes: int | None
    peak_bytes: int | None
    speedup_low: float = 0.0
    speedup_high: float = 0.0

    @property
    def noise(self) -> bool:
        """Whether the speed-up is above the ideal, which no skipping explains."""
        return round(self.speedup, 2) > round(self.ideal, 2)


def table(folder: Folder) -> list[Row]:
    """A row per method: the uncached one first, then by the number of computed steps, descending."""
    by_method: dict[str, list[Item]] = {}
    for item in folder.items():
        by_method.setdefault(item.method, []).append(item)
    steps = folder.read()["request"]["steps"]
    rows = [row(method, items, steps) for method, items in by_method.items()]
    return sorted(rows, key=lambda r: (r.method != REFERENCE, -round(r.computed, 1), -(r.psnr or 0)))


def row(method: str, items: list[Item], steps: int) -> Row:
    """Means and worst values of one method."""
    good = [item for item in items if not item.error]
    if not good:
        return Row(method, len(items), len(items), *[0.0] * 3, *[None] * 9)  # type: ignore[arg-type]
    psnr = [math.inf if item.psnr is None else item.psnr for item in good]
    ssim = [item.ssim for item in good if item.ssim is not None]
    lpips = [item.lpips for item in good if item.lpips is not None]
    costs = [
        item.seconds_per_reused_step / item.seconds_per_computed_step
        for item in good
        if item.seconds_per_computed_step and item.seconds_per_reused_step is not None
    ]
    computed = float(np.mean([item.computed for item in good]))
    speedups = [item.reference_seconds / item.loop_seconds for item in good]
    return Row(
        method,
        items=len(items),
        failed=len(items) - len(good),
        computed=computed,
        speedup=float(np.median(speedups)),
        ideal=steps / computed,
        psnr=finite(mean_psnr(psnr)),
        psnr_worst=finite(min(psnr)),
        ssim=float(np.mean(ssim)),
        ssim_worst=min(ssim),
        lpips=float(np.mean(lpips)) if lpips else None,
        lpips_worst=max(lpips) if lpips else None,
        reused_cost=float(np.median(costs)) if costs else None,
        cache_bytes=max((item.cache_bytes for item in good if item.cache_bytes is not None), default=None),
        peak_bytes=max((item.peak_bytes for item in good if item.peak_bytes is not None), default=None),
        speedup_low=min(speedups),
        speedup_high=max(speedups),
    )


def merge(folder: Folder) -> str:
    """Write table.json and table.txt from the items; returns the text."""
    rows, description = table(folder), folder.read()
    lines = [as_text(rows, description.get("schedules", {}))]
    for name, thresh in description["searched"].items():
        lines.append(f"{name}: threshold {thresh:.4g}")
    if "ceiling" in description:
        psnr = description["ceiling"]["psnr"]
        same = "bit-identical" if psnr is None else f"{psnr:.2f} dB"
        lines.append(f"the uncached run against itself: {same}")
    if rows and all(r.lpips is None for r in rows):
        lines.append(f"LPIPS n/a: {description['lpips']}")
    text = "\n".join(lines)
    write_text(folder.root / "table.json", json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    write_text(folder.root / "table.txt", text + "\n")
    return text


def as_text(rows: list[Row], schedules: Mapping[str, str]) -> str:
    """The table for the terminal; `schedules` says where those of the methods come from (see `labels`)."""
    names = {method: label.row for method, label in labels((r.method for r in rows), schedules).items()}
    width = max((len(name) for name in names.values()), default=6)
    lines = [
        f"{'method':<{width}}  items  computed  speed-up  ideal  PSNR mean  worst   SSIM   worst  LPIPS   worst"
        "  skipped"
    ]
    lines.append("-" * len(lines[0]))
    for r in rows:
        if r.failed == r.items:
            lines.append(f"{names[r.method]:<{width}}  failed on all {r.items} item(s)")
            continue
        own = r.method == REFERENCE
        cells = [
            f"{r.items - r.failed:>5}",
            f"{r.computed:>8.1f}",
            f"{r.speedup:>6.2f}x{'*' if r.noise else ' '}",
            f"{r.ideal:>5.2f}x",
            f"{'-' if own else _cell(r.psnr, 2, 'same'):>8}",
            f"{'-' if own else _cell(r.psnr_worst, 2, 'same'):>6}",
            f"{'-' if own else _cell(r.ssim, 4):>6}",
            f"{'-' if own else _cell(r.ssim_worst, 4):>6}",
            f"{'-' if own else _cell(r.lpips, 4):>6}",
            f"{'-' if own else _cell(r.lpips_worst, 4):>6}",
            f"{'-' if r.reused_cost is None else f'{r.reused_cost:.1%}':>7}",
        ]
        failed = f"  ({r.failed} failed)" if r.failed else ""
        lines.append(f"{names[r.method]:<{width}}  " + "  ".join(cells) + failed)
    if noisy := [f"{names[r.method]} {r.speedup_low:.2f}x to {r.speedup_high:.2f}x" for r in rows if r.noise]:
        lines.append(f"* above the ideal: noise of timing; over the items {'; '.join(noisy)}")
    return "\n".join(lines)


def _cell(value: float | None, digits: int, otherwise: str = "n/a") -> str:
    return otherwise if value is None else f"{value:.{digits}f}"
