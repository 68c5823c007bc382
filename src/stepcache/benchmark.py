r"""`stepcache bench`: every method on every prompt and seed, in one process, against the uncached run.

    stepcache bench --model DIR --prompts prompts.txt --out results \
        --policies "lemica:25 easycache:@25 magcache:0.12,K=4 plan:plan.json steps:25"
    stepcache report results

One JSON an item (a method on a prompt and seed), written whole or not at all: interrupt at will, `--resume` goes on.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from stepcache import __version__
from stepcache.calibrate import read_seeds
from stepcache.generate import Request, check_writable, load_pipeline, model_defaults, request_from
from stepcache.hosts.diffusers import accelerate, model_name
from stepcache.lpips import LPIPS, find_lpips
from stepcache.meter import Result, run_once
from stepcache.metrics import compare_clips, finite
from stepcache.plan import Trajectory
from stepcache.policies import Off
from stepcache.prompts import clip_name, read_prompts
from stepcache.results import REFERENCE, Folder, Item, merge
from stepcache.shards import merge_folders, part, shard_from
from stepcache.specs import Contender, Search, help_text, parse
from stepcache.video import write_clip

UNCACHED = Contender(REFERENCE, lambda pipe, _: accelerate(pipe, Off()), policy=Off())
SEARCH_PROMPTS, SEARCH_TRIALS = 3, 10
"""A threshold is searched on the first prompts, by so many bisections of its logarithm."""


@dataclass
class Bench:
    """A benchmark under way."""

    pipe: Any
    request: Request
    folder: Folder
    fps: float
    lpips: LPIPS | None = None
    by_prompt: bool = False
    other_seconds: float = 0.0

    def reference(self, prompt: str, seed: int) -> Result:
        """The uncached run."""
        return run_once(self.pipe, replace(self.request, prompt=prompt, seed=seed), UNCACHED)

    def item(self, contender: Contender, index: int, prompt: str, seed: int, reference: Result) -> Item:
        """Run one method once, measure it, write clip and JSON."""
        bare = Item(contender.name, index, prompt, seed)
        try:
            same = contender.name == REFERENCE
            request = replace(self.request, prompt=prompt, seed=seed)
            result = reference if same else run_once(self.pipe, request, contender)
        except (ValueError, RuntimeError, ImportError, AssertionError, TypeError, AttributeError) as error:
            item = replace(bare, error=f"{type(error).__name__}: {error}"[:2000])
        else:
            began = time.perf_counter()
            item = self._measured(bare, result, reference)
            clip = self.folder.clip(contender.name, index, prompt, seed, self.by_prompt)
            write_clip(clip, result.frames, self.fps)
            item = replace(item, clip=str(clip.relative_to(self.folder.root)))
            self.other_seconds += time.perf_counter() - began
        item.save(self.folder.item(contender.name, index, seed))
        return item

    def _measured(self, item: Item, result: Result, reference: Result) -> Item:
        whole = reference.executed[0]
        distance = compare_clips(reference.frames, result.frames, lpips=self.lpips, device=self.pipe.device)
        summary = result.summary
        comparable = len(result.latents) == len(reference.latents)
        pairs = zip(result.latents, reference.latents, strict=True) if comparable else ()
        return replace(
            item,
            computed=sum(result.executed) / whole,
            per_step=tuple(round(n / whole, 4) for n in result.executed),
            branches={} if summary is None else {b.name: b.computed for b in summary.branches},
            loop_seconds=result.loop_seconds,
            reference_seconds=reference.loop_seconds,
            seconds_per_computed_step=None if summary is None else summary.seconds_per_computed_step,
            seconds_per_reused_step=None if summary is None else summary.seconds_per_reused_step,
            cache_bytes=None if summary is None else summary.cache_bytes,
            peak_bytes=result.peak_bytes,
            psnr=finite(distance.psnr),
            ssim=distance.ssim,
            lpips=distance.lpips,
            identical=distance.identical,
            psnr_per_frame=tuple(None if v is None else round(v, 3) for v in map(finite, distance.psnr_per_frame)),
            step_errors=tuple(float(f"{float((a - b).norm() / b.norm()):.4g}") for a, b in pairs),
        )

    def searched(self, search: Search, prompts: list[str], seed: int, progress: Callable[[], Any]) -> float:
        """The threshold whose mean of computed steps is nearest the target; tries SEARCH_TRIALS of them."""
        low, high, best = math.log(search.low), math.log(search.high), (math.inf, 0.0)
        whole = 0
        for _ in range(SEARCH_TRIALS):
            middle = (low + high) / 2
            counts = []
            for prompt in prompts[:SEARCH_PROMPTS]:
                contender = search.make(math.exp(middle))
                result = run_once(self.pipe, replace(self.request, prompt=prompt, seed=seed), contender)
                whole = whole or max(result.executed)  # the first step is always computed
                counts.append(sum(result.executed) / whole)
                progress()
            mean = float(np.mean(counts))
            best = min(best, (abs(mean - search.target), math.exp(middle)))
            low, high = (middle, high) if mean > search.target else (low, middle)
        return best[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache bench`."""
    parser.description = __doc__
    parser.epilog = "methods:\n" + help_text()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--model", metavar="DIR_OR_ID", help="folder or hub id of a diffusers Wan pipeline")
    add("--prompts", metavar="FILE", help="text file, one prompt a line; or VBench's JSON")
    add("--policies", metavar="LIST", help="methods, separated by spaces: see below")
    add("--out", required=True, metavar="DIR", help="folder for items, clips and the table")
    add("--seeds", default="0", help="seeds for every prompt, separated by commas (0)")
    add("--resume", action="store_true", help="go on with --out: what is there is not run again, failures are")
    add("--negative_prompt", default="")
    add("--steps", type=int, default=50, help="steps of the denoising loop (50)")
    add("--guidance", type=float, help="guidance scale (default: the model's, else 5)")
    for name in ("height", "width", "num_frames"):
        add(f"--{name}", type=int, help="default: the model's")
    add("--fps", type=float, help="of the clips (default: the model's, else 16)")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda, float32 on cpu")
    add("--lpips_backbone", metavar="FILE", help="AlexNet's weights (default: torch.hub's checkpoint folder)")
    add(
        "--shard", metavar="I/N", help="run every N-th prompt and seed from the I-th on; auto: as Slurm or torchrun say"
    )
    add("--merge", nargs="+", metavar="DIR", help="merge the folders of shards into --out instead of running anything")
    add("--vbench", action="store_true", help="name the clips PROMPT-SEED.mp4, as VBench expects them")


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked, load, run what is not there yet, merge; 1 if a method failed."""
    folder = Folder(Path(args.out))
    if args.merge:
        missing = merge_folders([Path(path) for path in args.merge], folder.root)
        print(merge(folder))
        print(f"{missing} item(s) are missing; run their shards." if missing else "all items are there")
        return 1 if missing else 0
    if not (args.model and args.prompts and args.policies is not None):
        raise ValueError("give --model, --prompts and --policies, or --merge DIRS.")
    shard = shard_from(args.shard) if args.shard else (0, 1)
    prompts, seeds = read_prompts(args.prompts), read_seeds(args.seeds)
    contenders = parse(args.policies)
    defaults = model_defaults(args.model)
    request = request_from(args, defaults)
    if args.vbench:
        for prompt in prompts:
            clip_name(prompt, seeds[0])
    check_writable(folder.description)
    known = resumed(folder, args, request, prompts, seeds)
    lpips, lpips_note = find_lpips(args.lpips_backbone)
    pipe = load_pipeline(args.model, args.device, args.dtype)
    pipe.set_progress_bar_config(disable=True)
    check_policies(contenders, pipe, request)
    fps = float(args.fps or defaults.get("fps", 16.0))
    bench = Bench(pipe, request, folder, fps, lpips, args.vbench)
    began = time.perf_counter()
    description = {**known, "fps": fps, **about(pipe, lpips_note)}
    folder.write(description)
    warm_up(bench, prompts[0], seeds[0])
    resolved = resolve(bench, contenders, prompts, seeds[0], description)
    pairs = part([(i, prompt, seed) for i, prompt in enumerate(prompts) for seed in seeds], shard)
    failed = run_items(bench, resolved, pairs, description)
    total = time.perf_counter() - began
    text = merge(folder)
    print(text)
    share = bench.other_seconds / total
    print(f"{total:.0f} s, {share:.1%} of it for metrics and clips; look at it: stepcache report {args.out}")
    if failed:
        print(f"{failed} item(s) failed; their JSON says why, --resume tries them again.")
    return 1 if failed else 0


def resumed(
    folder: Folder, args: argparse.Namespace, request: Request, prompts: list[str], seeds: list[int]
) -> dict[str, Any]:
    """The folder's description: new, or the one that is there if it is of the same benchmark.

    Raises:
        ValueError: there are results and `--resume` is not given, or they are of another benchmark.
    """
    sizes = {k: v for k, v in asdict(request).items() if k not in ("prompt", "seed")}
    key = {"model": args.model, "request": sizes, "prompts": prompts, "seeds": seeds}
    if not folder.description.exists():
        return {**key, "searched": {}}
    if not args.resume:
        raise ValueError(f"{args.out} holds a benchmark already; go on with it by --resume, or choose another --out.")
    known = folder.read()
    differing = [name for name in key if known.get(name) != key[name]]
    if differing:
        raise ValueError(
            f"{args.out} is another benchmark: it differs in {', '.join(differing)}; choose another --out."
        )
    return known


def check_policies(contenders: list[Contender | Search], pipe: Any, request: Request) -> None:
    """Let methods that do not fit the run say so before anything is computed (ValueError)."""
    shift, model = pipe.scheduler.config.get("flow_shift"), model_name(pipe)
    for contender in contenders:
        policy = contender.policy if isinstance(contender, Contender) else contender.make(contender.low).policy
        if policy is not None:
            trajectory = Trajectory(request.steps, model, shift, request.guidance, boundary=policy.boundary)
            try:
                policy.begin(trajectory)
            except ValueError as error:
                raise ValueError(f"{contender.name}: {error}") from error


def about(pipe: Any, lpips_note: str) -> dict[str, Any]:
    """Where and with what it runs."""
    import diffusers

    return {
        "structure": model_name(pipe),
        "sampler": type(pipe.scheduler).__name__,
        "device": str(pipe.device),
        "machine": torch.cuda.get_device_name(pipe.device)
        if pipe.device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "versions": {"stepcache": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "lpips": lpips_note,
    }


def warm_up(bench: Bench, prompt: str, seed: int) -> None:
    """Two steps, not measured: allocators, kernels, caches of the file system."""
    short = replace(bench, request=replace(bench.request, steps=min(2, bench.request.steps)))
    short.reference(prompt, seed)


def resolve(
    bench: Bench, contenders: list[Contender | Search], prompts: list[str], seed: int, description: dict[str, Any]
) -> list[Contender]:
    """The contenders with their thresholds; what was searched for is kept in the description."""
    searches = [c for c in contenders if isinstance(c, Search)]
    missing = [s for s in searches if s.name not in description["searched"]]
    total = len(missing) * SEARCH_TRIALS * min(SEARCH_PROMPTS, len(prompts))
    with tqdm(total=total, desc="thresholds", unit="run", dynamic_ncols=True, disable=not total) as bar:
        for search in missing:
            description["searched"][search.name] = bench.searched(search, prompts, seed, bar.update)
            bench.folder.write(description)
    found = []
    for contender in contenders:
        if isinstance(contender, Search):
            thresh = description["searched"][contender.name]
            contender = replace(contender.make(thresh), name=contender.name)
        found.append(contender)
    return found


def run_items(
    bench: Bench, contenders: list[Contender], pairs: list[tuple[int, str, int]], description: dict[str, Any]
) -> int:
    """Run what is not there yet of the (index, prompt, seed) pairs; the number of items that failed.

    The uncached run of a prompt and seed is made once and kept while its methods run.
    """
    everyone = list({c.name: c for c in (UNCACHED, *contenders)}.values())
    failed = 0
    with tqdm(total=len(pairs) * len(everyone), desc="bench", unit="item", dynamic_ncols=True) as bar:
        for index, prompt, seed in pairs:
            todo = [c for c in everyone if not done(bench.folder.item(c.name, index, seed))]
            bar.update(len(everyone) - len(todo))
            if not todo:
                continue
            uncached = bench.reference(prompt, seed)
            if "ceiling" not in description:
                description["ceiling"] = ceiling(uncached, bench.reference(prompt, seed))
                bench.folder.write(description)
            for contender in todo:
                bar.set_postfix_str(f"prompt {index}, {contender.name}"[:50])
                failed += bool(bench.item(contender, index, prompt, seed, uncached).error)
                bar.update(1)
    return failed


def done(path: Path) -> bool:
    """Whether an item is there and has a result."""
    return path.exists() and not Item.load(path).error


def ceiling(first: Result, second: Result) -> dict[str, float | None]:
    """How well the uncached run agrees with itself: what no method can be better than. PSNR None: bit-identical."""
    pair = compare_clips(first.frames, second.frames)
    return {"psnr": finite(pair.psnr), "ssim": pair.ssim, "loop_ratio": second.loop_seconds / first.loop_seconds}
