r"""`stepcache bench`: every method on every prompt and seed, against the uncached run; here, in shards, or on Ray.

    stepcache bench --model DIR --prompts prompts.txt --out results \
        --policies "lemica:25 easycache:@25 magcache:0.12,K=4 plan:plan.json steps:25"
    stepcache report results

One JSON an item (a method on a prompt and seed), written whole or not at all: interrupt at will, `--resume` goes on.
"""

from __future__ import annotations

import argparse
import functools
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from stepcache.bench.methods import Contender, Search, help_text, parse
from stepcache.bench.results import REFERENCE, Folder, Item, merge
from stepcache.bench.runs import Runner
from stepcache.commands.calibrate import read_seeds
from stepcache.commands.generate import request_from
from stepcache.fleet import cluster
from stepcache.fleet.jobs import Alone, Job, Jobs, Outcome, Pair, Settle
from stepcache.fleet.places import check_writable, is_remote, is_there, place
from stepcache.fleet.shards import merge_folders, part, shard_from
from stepcache.measure.generation import Request, load_pipeline, model_defaults
from stepcache.measure.lpips import find_lpips
from stepcache.measure.prompts import clip_name, read_prompts


class Crew(Protocol):
    """Whoever does the jobs: this process (`jobs.Alone`), or workers on a cluster (`cluster.Fleet`)."""

    @property
    def running(self) -> int:
        """Jobs under way."""

    def run(self, jobs: Jobs, settle: Settle) -> None:
        """Do them all, and tell `settle` of each."""


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
    add(
        "--out", required=True, metavar="DIR", help="folder for items, clips and the table; or an address such as s3://"
    )
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
        "--shard",
        metavar="I/N",
        help="run every N-th prompt and seed from the I-th on; auto, auto/N: as Slurm or torchrun say",
    )
    add("--merge", nargs="+", metavar="DIR", help="merge the folders of shards into --out instead of running anything")
    add("--vbench", action="store_true", help="name the clips PROMPT-SEED.mp4, as VBench expects them")
    cluster.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked, load, run what is not there yet, merge; 1 if a method failed."""
    folder = Folder(place(args.out))
    if args.merge:
        missing = merge_folders([place(path) for path in args.merge], folder.root)
        print(merge(folder))
        print(f"{missing} item(s) are missing; run their shards." if missing else "all items are there")
        return 1 if missing else 0
    if not (args.model and args.prompts and args.policies is not None):
        raise ValueError("give --model, --prompts and --policies, or --merge DIRS.")
    shard = shard_from(args.shard) if args.shard else (0, 1)
    prompts, seeds = read_prompts(args.prompts), read_seeds(args.seeds)
    contenders = parse(args.policies)
    request = request_from(args, model_defaults(args.model))
    if args.vbench:
        for prompt in prompts:
            clip_name(prompt, seeds[0])
    check_writable(folder.root)
    description = resumed(folder, args, request, prompts, seeds, shard)
    pairs: list[Pair] = part([(i, prompt, seed) for i, prompt in enumerate(prompts) for seed in seeds], shard)
    if not pairs:
        print(f"shard {shard[0]} of {shard[1]} has none of the {len(prompts) * len(seeds)} prompts and seeds.")
        return 0
    crew_of = _on_ray if cluster.asked(args) else _alone
    began = time.perf_counter()
    with crew_of(args, request, prompts, contenders) as (crew, about):
        known = {k: v for k, v in description.items() if k in ("searched", "ceiling")}
        bench = Bench(folder, contenders, {**description, **about, **known}, shared=cluster.asked(args))
        folder.write(bench.description)
        try:
            bench.run(crew, pairs, args.max_retries)
        except KeyboardInterrupt:
            if any((folder.root / "items").glob("*/*.json")):
                print(merge(folder))
            print(f"interrupted; everything finished is in {args.out}, --resume goes on.")
            return 130
    total = time.perf_counter() - began
    print(merge(folder))
    share = "" if cluster.asked(args) else f", {bench.other_seconds / total:.1%} of it for metrics and clips"
    print(f"{total:.0f} s{share}; look at it: stepcache report {args.out}")
    if bench.failed:
        print(f"{bench.failed} item(s) failed; their JSON says why, --resume tries them again.")
    return 1 if bench.failed else 0


def resumed(
    folder: Folder,
    args: argparse.Namespace,
    request: Request,
    prompts: list[str],
    seeds: list[int],
    shard: tuple[int, int],
) -> dict[str, Any]:
    """The folder's description: new, or the one that is there if it is of the same benchmark.

    Raises:
        ValueError: there are results and `--resume` is not given, or they are of another benchmark.
    """
    sizes = {k: v for k, v in asdict(request).items() if k not in ("prompt", "seed")}
    key = {"model": args.model, "request": sizes, "prompts": prompts, "seeds": seeds, "shard": list(shard)}
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


Known = tuple[Runner, dict[str, Any]]
"""What does the jobs, and what there is to say about it."""


def made_runner(
    args: argparse.Namespace, request: Request, prompts: list[str], contenders: list[Contender | Search]
) -> Known:
    """The pipeline and all that a process needs to do jobs.

    Raises:
        ValueError, OSError, ImportError: the model, a method or the device cannot be used; the sentence says which.
    """
    lpips, lpips_note = find_lpips(args.lpips_backbone)
    pipe = load_pipeline(args.model, args.device, args.dtype)
    pipe.set_progress_bar_config(disable=True)
    fps = float(args.fps or model_defaults(args.model).get("fps", 16.0))
    folder, seed = Folder(place(args.out)), read_seeds(args.seeds)[0]
    shared = cluster.asked(args)
    runner = Runner(pipe, request, folder, contenders, prompts, seed, fps, lpips, args.vbench, shared)
    runner.check()
    runner.warm_up()
    return runner, {"fps": fps, **runner.about(lpips_note)}


@contextmanager
def _alone(
    args: argparse.Namespace, request: Request, prompts: list[str], contenders: list[Contender | Search]
) -> Iterator[tuple[Crew, dict[str, Any]]]:
    runner, about = made_runner(args, request, prompts, contenders)
    yield Alone(runner), about


def _on_ray(
    args: argparse.Namespace, request: Request, prompts: list[str], contenders: list[Contender | Search]
) -> AbstractContextManager[tuple[Crew, dict[str, Any]]]:
    """Workers run elsewhere: prompts and methods travel with them, paths are made absolute."""
    flags, root = cluster.for_workers(args, "model", "lpips_backbone"), place(args.out)
    if not is_remote(root):
        root = root.absolute()
        flags.out = str(root)
    return cluster.fleet(functools.partial(made_runner, flags, request, prompts, contenders), args, root)


@dataclass
class Bench:
    """A benchmark under way, seen from where it is directed.

    Args:
        folder: where the results go.
        contenders: the methods.
        description: what is run; thresholds and the ceiling are added as they are found.
        shared: whether several workers share uncached runs through the folder.
    """

    folder: Folder
    contenders: list[Contender | Search]
    description: dict[str, Any]
    shared: bool = False
    other_seconds: float = 0.0
    failed: int = 0
    _todo: set[tuple[Pair, str]] = field(default_factory=set)
    _left: Counter[Pair] = field(default_factory=Counter)

    def run(self, crew: Crew, pairs: list[Pair], retries: int = 0) -> None:
        """Find the thresholds that are asked for, then run what is not there yet."""
        self._search(crew, retries)
        names = list(dict.fromkeys([REFERENCE, *(c.name for c in self.contenders)]))
        present = {(i.method, i.index, i.seed) for i in self.folder.items() if not i.error}
        todo = [(pair, name) for pair in pairs for name in names if (name, pair[0], pair[2]) not in present]
        jobs = [self._job(pair, name) for pair, name in todo]
        if jobs and "ceiling" not in self.description:
            jobs.insert(0, Job("ceiling", todo[0][0]))
        self._todo, self._left = set(todo), Counter(pair for pair, _ in todo)
        self.folder.tidy(needed=[self._kept(pair) for pair in self._left])
        there = [p for p in self._left if (p, REFERENCE) not in self._todo and self._kept(p).exists()]
        total = len(pairs) * len(names)
        with tqdm(total=total, initial=total - len(todo), desc="bench", unit="item", dynamic_ncols=True) as bar:
            self._crew, self._bar = crew, bar
            crew.run(Jobs(jobs, there, retries), self._settle)
        self.folder.tidy()

    def _job(self, pair: Pair, name: str) -> Job:
        if name == REFERENCE:
            return Job("reference", pair)
        return Job("item", pair, name, self.description["searched"].get(name))

    def _search(self, crew: Crew, retries: int) -> None:
        names = [c.name for c in self.contenders if isinstance(c, Search)]
        jobs = [Job("search", method=n) for n in names if n not in self.description["searched"]]
        with tqdm(total=len(jobs), desc="thresholds", unit="method", dynamic_ncols=True, disable=not jobs) as bar:

            def found(job: Job, outcome: Outcome) -> None:
                if outcome.error:
                    raise ValueError(f"{job.method}: no threshold was found: {outcome.error}")
                self.description["searched"][job.method] = outcome.value
                self.folder.write(self.description)
                bar.update()

            crew.run(Jobs(jobs, retries=retries), found)

    def _settle(self, job: Job, outcome: Outcome) -> None:
        """Note what came of a job; those that no worker could record are recorded here."""
        if job.pair is None:
            return
        self.other_seconds += outcome.other_seconds
        if job.task == "ceiling":
            if outcome.value is None:
                warnings.warn(f"the uncached run was not compared with itself: {outcome.error}", stacklevel=2)
            else:
                self.description["ceiling"] = outcome.value
                self.folder.write(self.description)
            return
        name = REFERENCE if job.task == "reference" else job.method
        if (job.pair, name) not in self._todo:
            return  # an uncached run that others needed and whose item was there
        if outcome.error:
            self.failed += 1
            path = self.folder.item(name, job.pair[0], job.pair[2])
            if not is_there(path):
                Item(name, *job.pair, error=outcome.error[:2000]).save(path)
        self._left[job.pair] -= 1
        if self.shared and not self._left[job.pair]:
            with suppress(OSError):  # tidied up at the end, or by the next run
                self._kept(job.pair).unlink(missing_ok=True)
        self._bar.set_postfix_str(f"{self._crew.running} running, {self.failed} failed", refresh=False)
        self._bar.update()

    def _kept(self, pair: Pair) -> Path:
        return self.folder.reference(pair[0], pair[2])
