"""Quality apart from closeness: whether the clips of every method show what the embedded video model was asked for.

    python bench/quality.py --out bench/quality.json     an hour on two cores; interrupt at any time, it resumes

The measurement of tools/eval_tiny_wan.py: whether a clip shows the requested colour, and moves in the requested
direction. Prompts are held-out scenes; other methods are tuned, as in bench/zoo.py, on the calibration prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from subjects import ROOT, Series, Setting, Subject
from tqdm import tqdm
from zoo import METHODS, Bench, mean

from stepcache.files import check_writable, write_atomically

sys.path.insert(0, str(ROOT / "tools"))
from eval_tiny_wan import held_out_scenes, judge
from tiny_wan_clips import Scene, caption

OUT = ROOT / "bench" / "quality.json"
BUDGETS = (25, 20, 14, 10)
SHOWN = (
    "fewer steps",
    "uniform reuse",
    "LeMiCa, published list",
    "LeMiCa, closed form",
    "MagCache",
    "extrapolation, order 1",
    "Spectrum, w = 0.5",
    "ZEUS",
    "VDE",
    "DMD",
    "HiCache",
    "hindsight",
)


class Judged(Series):
    """Held-out scenes; a row also says whether colour and direction are as asked."""

    def __post_init__(self) -> None:
        self.scenes: list[Scene] = held_out_scenes(self.count, 0)
        self.texts = [caption(scene) for scene in self.scenes]
        self.seeds = list(range(self.count))

    def compared(self, clips: np.ndarray, counts: list[int]) -> list[dict[str, float]]:
        """A row a prompt."""
        verdicts = judge([(clip * 255).round().astype(np.uint8) for clip in clips], self.scenes)
        rows = super().compared(clips, counts)
        return [{**r, "colour": v["colour"], "direction": v["direction"]} for r, v in zip(rows, verdicts, strict=True)]


class Quality(Bench):
    """The benchmark's methods on those scenes."""

    @cached_property
    def evaluation(self) -> Series:
        """The scenes."""
        return Judged(self.subject, self.setting, "evaluation", self.prompts)


def run(results: dict[str, Any], prompts: int, save: Any) -> None:
    """What is not there yet; `save` is called after every row."""
    bench = Quality(Subject("tiny-wan"), Setting(50), prompts)
    done = results["rows"]
    wanted = [(name, budget) for name in SHOWN for budget in BUDGETS if str(budget) not in done.get(name, {})]
    if "uncached" not in done:
        truth = bench.evaluation.truth
        done["uncached"] = {"50": summary(bench.evaluation.compared(truth, [50] * prompts))}
        save()
    for name, budget in tqdm(wanted, desc="quality", unit="row", dynamic_ncols=True):
        rows = METHODS[name](bench, budget)
        done.setdefault(name, {})[str(budget)] = summary(rows) if rows else None
        save()


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Shares of clips, mean PSNR (dB, at most 100), mean computed steps."""
    found = {name: mean(rows, name) for name in ("colour", "direction", "computed")}
    return {**found, "psnr": float(np.mean([min(row["psnr"], 100) for row in rows]))}


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--prompts", type=int, default=48)
    args = parser.parse_args()
    check_writable(args.out)
    results = json.loads(args.out.read_text()) if args.out.exists() else {"prompts": args.prompts, "rows": {}}
    if results["prompts"] != args.prompts:
        sys.exit(f"{args.out} has {results['prompts']} prompts; go on with as many, or choose another --out.")
    try:
        run(results, args.prompts, lambda: write_atomically(args.out, json.dumps(results, indent=1) + "\n"))
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted; {args.out} has all finished cells; the same command resumes.")
    except OSError as error:
        sys.exit(f"bench/quality.py: {error}")


if __name__ == "__main__":
    main()
