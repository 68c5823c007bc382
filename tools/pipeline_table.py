"""Which diffusers pipelines work: run every one of `tiny_pipelines` and `tiny_modular` with and without a cache.

    python tools/pipeline_table.py --out docs/pipelines.md

For each pipeline, in one process and on the same noise: uncached; every step computed through the cache (must be the
same to the bit); every second step reused, twice (transformer calls are counted by hooks outside of the cache, and the
second run must repeat the first); every third step extrapolated (TaylorSeer, order 1: two outputs are needed); reuse
decided while running (EasyCache: output minus input is reused); and uncached again after the cache was taken out. The
first and the last of these also at the `blocks` boundary, where the transformer's blocks are known.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_modular import MODULAR
from tiny_modular import NOT_RUN as MODULAR_NOT_RUN
from tiny_newer import NEWER
from tiny_newer import NOT_RUN as NEWER_NOT_RUN
from tiny_pipelines import PIPELINES, Tiny
from tqdm import tqdm

try:
    import stepcache
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
    import stepcache

from stepcache.files import write_atomically
from stepcache.hosts.diffusers import BLOCKS, is_transformer

STEPS = 12
ALL = [*PIPELINES, *NEWER, *MODULAR]
NOT_RUN = {**NEWER_NOT_RUN, **MODULAR_NOT_RUN}
UNEQUAL = (
    "QwenImage21ModularPipeline",
    "QwenImage21Pipeline",
    "QwenImage21Pipeline (an image)",
    "Flux2KleinKVPipeline",
)
"""Where the first call has another shape (text or reference tokens too), so that a step more is computed."""


@dataclass(frozen=True)
class Row:
    """What was seen of one pipeline; `output` and `blocks` are "yes" or the reason why not."""

    name: str
    transformer: str
    branches: int
    computed: int
    steps: int
    output: str
    blocks: str
    easycache: str
    hindsight: str


def examine(tiny: Tiny) -> Row:
    """Run one pipeline in all ways."""
    try:
        pipe = tiny.build()
    except (ImportError, AttributeError) as error:
        return Row(tiny.name, "", 0, 0, 0, f"not in this diffusers ({error})", "", "", "")
    transformer = type(pipe.transformer).__name__
    base = tiny.call(pipe, STEPS, 0)
    output, computed, steps = _try(tiny, pipe, base, "output")
    blocks = "not known" if transformer not in BLOCKS else _try(tiny, pipe, base, "blocks")[0]
    if output == "yes":
        output = _extrapolated(tiny, pipe, steps)
    hindsight = _hindsight(tiny, pipe, steps)
    return Row(tiny.name, transformer, tiny.branches, computed, steps, output, blocks, _decided(tiny, pipe), hindsight)


def _extrapolated(tiny: Tiny, pipe: Any, steps: int) -> str:
    """Either "yes", for extrapolation at the model call, or what went wrong."""
    plan = stepcache.TaylorSeer(3, 1, 2).plan(steps)
    with stepcache.accelerate(pipe, plan) as run:
        result = tiny.call(pipe, STEPS, 0)
    return _followed(tiny, plan, run.summary(), result) or "yes"


def _hindsight(tiny: Tiny, pipe: Any, steps: int) -> str:
    """Either "yes", for forecasts and corrections at the sampler step, or what the run says against it."""
    policy = stepcache.Hindsight(max(3, steps // 2))
    with stepcache.accelerate(pipe, policy) as run:
        result = tiny.call(pipe, STEPS, 0)
    summary = run.summary()
    wrong = _followed(tiny, summary.plan or policy.plan(steps), summary, result)
    return wrong or "; ".join(w for w in summary.strategy.warnings()) or "yes"


def _followed(tiny: Tiny, plan: stepcache.Plan, summary: stepcache.RunSummary, result: torch.Tensor) -> str:
    """Empty if the planned steps were computed and the result is finite, else what went wrong."""
    extra = set(summary.computed) - set(plan.computed)  # where a second transformer takes over: up to a gap
    missing = set(plan.computed) - set(summary.computed)
    if missing or len(extra) > (3 if "experts" in tiny.name or tiny.name in UNEQUAL else 0):
        return f"computed {list(summary.computed)} instead of {list(plan.computed)}"
    return "" if torch.isfinite(result).all() else "the result is not finite"


def _decided(tiny: Tiny, pipe: Any) -> str:
    """Either "yes" or why EasyCache cannot be used."""
    try:
        with stepcache.accelerate(pipe, stepcache.EasyCache(1e9, 2)) as run:
            result = tiny.call(pipe, STEPS, 0)
    except ValueError as error:
        if "reuses the difference of output and input" not in str(error):
            raise
        return "no: output and input are not alike"
    reused = run.summary().skipped
    return "yes" if reused and torch.isfinite(result).all() else f"nothing reused {run.summary().warnings}"


def _try(tiny: Tiny, pipe: Any, base: torch.Tensor, boundary: Any) -> tuple[str, int, int]:
    """("yes" or what went wrong, computed steps, steps) at a boundary."""
    with stepcache.accelerate(pipe, stepcache.Off(boundary)) as run:
        same = torch.equal(tiny.call(pipe, STEPS, 0), base)
    num_steps = run.summary().num_steps
    plan = stepcache.Uniform(interval=2).plan(num_steps)
    counted, hooks = [0], []
    for name, module in pipe.components.items():
        if is_transformer(name) and isinstance(module, torch.nn.Module):
            inner = getattr(module, BLOCKS[type(module).__name__].lists[0])[0] if boundary == "blocks" else module
            hooks.append(inner.register_forward_hook(lambda *_: counted.__setitem__(0, counted[0] + 1)))
    with stepcache.accelerate(pipe, plan, boundary=boundary) as run:
        first = tiny.call(pipe, STEPS, 0)
        once = counted[0]
        repeated = torch.equal(tiny.call(pipe, STEPS, 0), first)
    for hook in hooks:
        hook.remove()
    summary = run.summary()
    if not same:
        return "computing every step changes the result", 0, num_steps
    if set(plan.computed) - set(summary.computed) or len(summary.computed) > len(plan.computed) + 1:
        return f"computed {list(summary.computed)} instead of {list(plan.computed)}", 0, num_steps
    if once != sum(len(b.computed) for b in summary.branches):
        return f"{once} calls counted, {sum(len(b.computed) for b in summary.branches)} reported", 0, num_steps
    if torch.equal(first, base) or not torch.isfinite(first).all():
        return "nothing was reused", 0, num_steps
    if not repeated:
        return "a second run differs from the first", 0, num_steps
    if not torch.equal(tiny.call(pipe, STEPS, 0), base):
        return "the pipeline is not as it was before", 0, num_steps
    return "yes", len(summary.computed), num_steps


def table(rows: list[Row]) -> str:
    """The page."""
    import diffusers

    torch_version = torch.__version__.split("+")[0]
    works = [r for r in rows if r.output == "yes"]
    lines = [
        "# Pipelines",
        "",
        "Made by `python tools/pipeline_table.py --out docs/pipelines.md`, which really runs every pipeline below with",
        "a small random transformer: uncached; through the cache with every step computed (bit-identical); with every",
        "second step reused, twice (calls counted by hooks, the second run equal to the first); with two of three",
        "steps extrapolated; with EasyCache; with Hindsight at half of the steps; uncached again.",
        f"diffusers {diffusers.__version__}, torch {torch_version}: {len(works)} of {len(rows)} work.",
        "",
        "`output` needs no code for a model. `blocks` needs one row of `BLOCKS` in `stepcache/hosts/diffusers.py`.",
        "Branches: transformer calls a step (guidance in a call of its own makes two).",
        "",
        "| pipeline | transformer | branches | computed / steps | `output` | `blocks` | EasyCache | Hindsight |",
        "|---|---|---|---|---|---|---|---|",
        *map(_line, rows),
        "",
        "Not run, most of them variants (other conditions, the same transformer and loop) of one above: "
        + ", ".join(left_out(rows))
        + ".",
        "",
        *(f"{name} {why}" for name, why in NOT_RUN.items()),
        "OmniGen could not be tried: its pipeline takes no ready-made embeddings and its processor needs torchvision.",
        "Pipelines whose model is no transformer (`unet`) are refused. EasyCache reuses output minus input, so it",
        "needs a model whose output has the latent's shape; DiT, PixArt, Latte and others return more, LTX2 pictures",
        "and sound.",
    ]
    return "\n".join(lines) + "\n"


def left_out(rows: list[Row]) -> list[str]:
    """Pipelines of this diffusers that have a transformer and are in no row."""
    import diffusers

    known = {r.name.split(" ")[0] for r in rows}
    found = []
    for name in sorted(n for n in dir(diffusers) if n.endswith("Pipeline") and n not in known):
        try:
            parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        except (ImportError, RuntimeError):  # needs something that is not installed
            continue
        if "transformer" in parameters:
            found.append(name)
    return found


def _line(r: Row) -> str:
    counts = f"{r.computed} / {r.steps}"
    return f"| {' | '.join((r.name, r.transformer, str(r.branches), counts, *_verdicts(r)))} |"


def _verdicts(r: Row) -> tuple[str, str, str, str]:
    return r.output, r.blocks, r.easycache, r.hindsight


def main() -> int:
    """Run all, write, and exit 1 if one of them does not work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args()
    rows = [examine(tiny) for tiny in tqdm(ALL, dynamic_ncols=True)]
    write_atomically(args.out, table(sorted(rows, key=lambda r: r.name)))
    failed = [r for r in rows if r.output != "yes" or r.blocks not in ("yes", "not known")]
    for r in failed:
        print(f"{r.name}: {'; '.join(_verdicts(r))}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
