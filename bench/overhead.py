"""What skipped steps cost and gain on the embedded model, as ratios within one process.

    python bench/overhead.py --out bench/overhead.json

For each policy and boundary, `--repeats` runs interleaved with uncached ones, after a warm-up: the cost of a skipped
step as a share of a computed one, the loop's speed-up over the uncached loop (medians), cache memory, and what is
held after the run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

import stepcache
from stepcache import EasyCache, Hindsight, LeMiCa, MagCache, Off
from stepcache.core.strategy import Policy
from stepcache.core.summary import RunSummary
from stepcache.files import write_atomically
from stepcache.measure.generation import load_pipeline, model_defaults

EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "tiny-wan"
PROMPT = "a big red circle moving right over a slate striped background"
TABLE = "wan2.1-t2v-1.3B"


def once(pipe: Any, policy: Policy, sizes: dict[str, int], seed: int) -> tuple[RunSummary, int]:
    """One generation: its summary and the number of tensors still held afterwards."""
    with stepcache.accelerate(pipe, policy) as run:
        pipe(
            PROMPT, num_inference_steps=50, generator=torch.Generator().manual_seed(seed), output_type="latent", **sizes
        )
        held = sum(len(b.kept) for b in run.cache._branches.values()) + len(run.cache.strategy.tensors())
        return run.summary(), held


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    defaults = model_defaults(args.model)
    sizes = {k: defaults[k] for k in ("height", "width", "num_frames")}
    pipe = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    policies: dict[str, Policy] = {}
    for boundary in ("output", "blocks"):
        policies[f"lemica 25, {boundary}"] = LeMiCa(25, TABLE, boundary=boundary)
        policies[f"magcache 0.12 K2, {boundary}"] = MagCache(0.12, 2, 0.2, TABLE, boundary=boundary)
    policies["easycache 0.05, output"] = EasyCache(0.05)
    policies["hindsight 25, even"] = Hindsight(25)
    once(pipe, Off(), sizes, 0)
    rows = []
    for name, policy in policies.items():
        pairs = []
        for seed in range(args.repeats):
            base, _ = once(pipe, Off(), sizes, seed)
            pairs.append((base, *once(pipe, policy, sizes, seed)))
        mine = [p[1] for p in pairs]
        share = [s.seconds_per_skipped_step / s.seconds_per_computed_step for s in mine if s.seconds_per_skipped_step]
        rows.append(
            {
                "policy": name,
                "computed": len(mine[0].computed),
                "ideal": mine[0].ideal_speedup,
                "loop_speedup": statistics.median(b.loop_seconds / s.loop_seconds for b, s, _ in pairs),
                "skipped_step_share": statistics.median(share) if share else None,
                "cache_bytes": max(s.cache_bytes for s in mine),
                "tensors_held_after": max(p[2] for p in pairs),
            }
        )
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    write_atomically(args.out, json.dumps({"about": about, "repeats": args.repeats, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
