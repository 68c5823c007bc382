"""What skipped steps cost and gain on the embedded model, as ratios within one process.

    python bench/overhead.py --out bench/overhead.json

For each policy and boundary, `--repeats` runs interleaved with uncached ones, after a warm-up: the cost of a skipped
step as a share of a computed one, the loop's speed-up over the uncached loop (medians), cache memory, and what is
held after the run. And at true size (a latent of Wan2.1 at 480p, a transformer that costs nothing): operations on
whole latents that a policy adds to a step, and latents held.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch.utils._python_dispatch import TorchDispatchMode

import stepcache
from stepcache import EasyCache, Hindsight, LeMiCa, MagCache, Off, Uniform
from stepcache.core.strategy import Policy
from stepcache.core.summary import RunSummary
from stepcache.files import write_atomically
from stepcache.measure.pipelines import load_pipeline, model_defaults

EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "tiny-wan"
PROMPT = "a big red circle moving right over a slate striped background"
TABLE = "wan2.1-t2v-1.3B"
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}


def once(pipe: Any, policy: Policy, sizes: dict[str, int], seed: int) -> tuple[RunSummary, int]:
    """One generation: its summary and the number of tensors still held afterwards."""
    with stepcache.accelerate(pipe, policy) as run:
        pipe(
            PROMPT, num_inference_steps=50, generator=torch.Generator().manual_seed(seed), output_type="latent", **sizes
        )
        held = sum(len(b.kept) for b in run.cache._branches.values()) + len(run.cache.strategy.tensors())
        return run.summary(), held


class Free(torch.nn.Module):
    """A transformer that costs nothing: it returns what it was told to."""

    outputs: list[torch.Tensor]

    def forward(self, x: torch.Tensor, step: int, branch: int) -> torch.Tensor:
        """The output of a step and branch."""
        return self.outputs[branch] * (1 + step / 50)


class Operations(TorchDispatchMode):
    """Counts operations that read or write a whole latent, and those that make the host wait for the device."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count, self.waits = numel, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        sizes = [t.numel() for t in (*args, result) if isinstance(t, torch.Tensor)]
        views = ("view", "detach", "expand", "alias", "select", "slice", "unsqueeze", "reshape")
        self.count += max(sizes, default=0) >= self.numel and not any(v in name for v in views)
        self.waits += "_local_scalar_dense" in name
        return result


@torch.no_grad()
def _loop(policy: Policy | None) -> tuple[list[int], int, set[int], int]:
    """A run: operations of every step, times the host waited after step 1, computed steps, latents held at most."""
    latent, counts, waits, held = torch.zeros(1, 16, 21, 60, 104), [], 0, 0
    net, scheduler, run = Free(), UniPCMultistepScheduler(**FLOW), None
    net.outputs = [torch.randn_like(latent) for _ in range(2)]
    if policy is not None:
        run = stepcache.attach(net, policy, sample="x", num_steps=50, scheduler=scheduler, guidance=5.0)
    scheduler.set_timesteps(50)
    x = torch.randn_like(latent)
    for k, t in enumerate(scheduler.timesteps):
        with Operations(latent.numel()) as seen:
            cond, uncond = net(x, k, 0), net(x, k, 1)
            x = scheduler.step(uncond + 5.0 * (cond - uncond), t, x, return_dict=False)[0]
        counts.append(seen.count)
        waits += seen.waits if k > 1 else 0
        if run is not None:
            kept = sum(len(b.kept) for b in run.cache._branches.values())
            held = max(held, kept + len(run.cache.strategy.tensors()))
    return counts, waits, set() if run is None else set(run.summary().computed), held


def at_true_size(policy: Policy) -> dict[str, Any]:
    """What a policy adds to a computed and to a skipped step of Wan2.1 at 480p, 50 steps, two branches, UniPC."""
    bare, *_ = _loop(None)
    counts, waits, computed, held = _loop(policy)
    added: dict[bool, list[int]] = {True: [], False: []}
    for k in range(5, 45):
        added[k in computed].append(counts[k] - bare[k])
    return {
        "policy": str(policy),
        "operations_added_to_a_computed_step": max(added[True]),
        "operations_added_to_a_skipped_step": max(added[False]) + 2,  # the free model's own two
        "latents_held": held,
        "waits_after_step_1": waits,
    }


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
    policies["hindsight 25"] = Hindsight(25)
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
    size = [at_true_size(policy) for policy in (Uniform(25), EasyCache(0.05), Hindsight(25))]
    for row in size:
        print(row)
    document = {"about": about, "repeats": args.repeats, "rows": rows, "at_true_size": size}
    write_atomically(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
