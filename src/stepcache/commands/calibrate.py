"""`stepcache calibrate`: one uncached run a prompt and seed, and all that plans need is known.

The output file is rewritten after every run, whole or not at all: interrupt at will, and the same command goes on
where it stopped. Calibrations made on several machines merge:

    stepcache calibrate --merge a.json b.json --out all.json
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from stepcache import __version__
from stepcache.commands.generate import request_from
from stepcache.files import check_writable
from stepcache.fleet import cluster
from stepcache.fleet.jobs import Job, Jobs, Outcome
from stepcache.measure.generation import Request, decode_latent, load_pipeline, model_defaults, sample_latent
from stepcache.measure.prompts import read_prompts
from stepcache.planning.calibrate import calibrate, describe
from stepcache.planning.calibration import Calibration

STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache calibrate`."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--model", metavar="DIR_OR_ID", help="folder or hub id of a diffusers Wan pipeline")
    add("--prompts", metavar="FILE", help="text file, one prompt a line; eight are plenty")
    add("--out", required=True, metavar="FILE", help="the calibration, a JSON file; an unfinished one is continued")
    add("--seeds", default="0", help="seeds for every prompt, separated by commas (0)")
    add("--negative_prompt", default="")
    add("--steps", type=int, default=50, help="steps of the denoising loop (50)")
    add("--guidance", type=float, help="guidance scale (default: the model's, else 5)")
    for name in ("height", "width", "num_frames"):
        add(f"--{name}", type=int, help="default: the model's")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=tuple(STORED), help="of the model: default bfloat16 on cuda, float32 on cpu")
    add("--store", metavar="FOLDER", help="hold a run's outputs in a file there instead of in memory")
    add("--store_dtype", choices=tuple(STORED), default="float32", help="precision of the outputs held (float32)")
    add("--no-decode", action="store_true", help="no accelerated run to learn what PSNR forecasts come to")
    add("--merge", nargs="+", metavar="FILE", help="merge calibrations instead of running anything")
    cluster.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Merge, or check everything that can be checked, load, record, save."""
    check_writable(Path(args.out))
    if args.merge:
        first, *others = [Calibration.load(path) for path in args.merge]
        merged = first.merged(*others)
        merged.save(args.out)
        print(describe(merged))
        return 0
    if not (args.model and args.prompts):
        raise ValueError("give --model and --prompts, or --merge FILES.")
    prompts, seeds = read_prompts(args.prompts), read_seeds(args.seeds)
    request = request_from(args, model_defaults(args.model))
    known = Calibration.load(args.out) if Path(args.out).exists() else None
    if known is not None:
        check_same(known, request, args.out)
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    done = known.done if known else set()
    todo = [pair for pair in pairs if pair not in done]
    if known is not None:
        print(f"{args.out} has {len(known.runs)} run(s); {len(todo)} of {len(pairs)} are still to do.")
    if not todo:
        print(describe(known) if known else "")
        return 0
    save = functools.partial(_save, args, pairs)
    if cluster.asked(args):
        calibration = _on_ray(args, request, todo, known, save)
        print(describe(calibration))
        print(f"wrote {args.out}")
        return 0
    started = time.perf_counter()
    recording = Recording(args, request)
    calibration = recording.calibrate(tqdm(todo, desc="calibrate", unit="run", dynamic_ncols=True), known, save)
    seconds = sum(recording.seconds.values())
    extra = (time.perf_counter() - started - recording.loading) / seconds - 1
    print(describe(calibration))
    print(f"{len(recording.seconds)} uncached run(s) in {seconds:.1f} s, {extra:.1%} on top; wrote {args.out}")
    return 0


class Recording:
    """A pipeline and how it is recorded; loading takes `loading` seconds, uncached runs `seconds` each."""

    def __init__(self, args: argparse.Namespace, request: Request) -> None:
        started = time.perf_counter()
        self.args, self.request = args, request
        self.pipe = load_pipeline(args.model, args.device, args.dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.seconds: dict[tuple[str, int], float] = {}
        self.loading = time.perf_counter() - started

    def calibrate(
        self,
        runs: Iterable[tuple[str, int]],
        known: Calibration | None = None,
        save: Callable[[Calibration], None] | None = None,
        anchored: bool = True,
    ) -> Calibration:
        """Record runs; `anchored`: the first one also in a fifth of its steps, if nothing is known yet."""
        decode = None if self.args.no_decode or not anchored else self._decode
        dtype, folder = STORED[self.args.store_dtype], self.args.store
        return calibrate(
            self.pipe, runs, self._sample, decode=decode, known=known, save=save, dtype=dtype, folder=folder
        )

    def __call__(self, job: Job) -> Outcome:
        """One run, as a job of a fleet."""
        if job.pair is None:
            raise ValueError("a run needs a prompt and seed.")
        try:
            return Outcome(value=self.calibrate([(job.pair[1], job.pair[2])], anchored=job.first))
        except RuntimeError as error:
            return Outcome(f"{type(error).__name__}: {error}", again=True)
        except ValueError as error:
            return Outcome(str(error))

    def _sample(self, prompt: str, seed: int) -> torch.Tensor:
        started = time.perf_counter()
        latent = sample_latent(self.pipe, replace(self.request, prompt=prompt, seed=seed))
        self.seconds.setdefault((prompt, seed), time.perf_counter() - started)
        return latent

    def _decode(self, latent: torch.Tensor) -> np.ndarray:
        return decode_latent(self.pipe, latent)


def _save(args: argparse.Namespace, pairs: list[tuple[str, int]], found: Calibration) -> None:
    """Write the file, runs in the order in which they were asked for: whoever made them, and whenever."""
    place = {pair: i for i, pair in enumerate(pairs)}
    runs = tuple(sorted(found.runs, key=lambda run: place.get((run.prompt, run.seed), -1)))
    replace(found, runs=runs, about={"stepcache": __version__, "model": args.model}).save(args.out)


def _on_ray(
    args: argparse.Namespace,
    request: Request,
    todo: list[tuple[str, int]],
    known: Calibration | None,
    save: Callable[[Calibration], None],
) -> Calibration:
    """The runs, recorded by workers of a cluster; their calibrations are merged here, saved after every one."""
    calibration, failed = known, []
    recorder = functools.partial(_recorder, cluster.for_workers(args, "model"), request)
    anchored = known is not None and any(run.anchors for run in known.runs)
    with cluster.fleet(recorder, args) as (fleet, _):
        jobs = [Job("run", (i, *pair), first=i == 0 and not anchored) for i, pair in enumerate(todo)]
        with tqdm(total=len(jobs), desc="calibrate", unit="run", dynamic_ncols=True) as bar:

            def settle(job: Job, outcome: Outcome) -> None:
                nonlocal calibration
                bar.update()
                if outcome.error:
                    failed.append(outcome.error)
                    return
                calibration = outcome.value if calibration is None else calibration.merged(outcome.value)
                save(calibration)

            fleet.run(Jobs(jobs, retries=args.max_retries), settle)
    if failed or calibration is None:
        raise ValueError(f"{len(failed)} of {len(jobs)} run(s) failed: {failed[0]}; the others are in {args.out}.")
    return calibration


def _recorder(args: argparse.Namespace, request: Request) -> tuple[Recording, dict[str, Any]]:
    """What a worker makes once."""
    recording = Recording(args, request)
    versions = {"stepcache": __version__, "torch": torch.__version__}
    return recording, {"versions": versions, "machine": str(recording.pipe.device)}


def read_seeds(text: str) -> list[int]:
    """Seeds from "0,1,2"; ValueError otherwise."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds is {text!r}; expected whole numbers separated by commas, such as 0,1,2.") from None
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds is {text!r}; each seed once.")
    return seeds


def check_same(known: Calibration, request: Request, path: str) -> None:
    """ValueError if an existing file is of another step count or guidance than what is asked for now."""
    wanted = {"num_steps": request.steps, "guidance": request.guidance}
    found = [
        f"{name} {getattr(known, name)} (asked for: {v})" for name, v in wanted.items() if getattr(known, name) != v
    ]
    if found:
        raise ValueError(f"{path} is a calibration of {', '.join(found)}; choose another --out, or the same settings.")
