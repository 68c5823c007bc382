"""`stepcache calibrate`: one uncached run per prompt and seed; records what plans are made from.

The output file is rewritten after every run, whole or not at all: interrupt at any time, and the same command continues
where it stopped. Calibrations made on several machines can be merged:

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
from stepcache.commands.flags import (
    Flags,
    absolute,
    add_device_flags,
    add_ray_flags,
    add_request_flags,
    request_from,
    resources_from,
)
from stepcache.files import check_writable
from stepcache.fleet import cluster
from stepcache.fleet.jobs import Job, Jobs, Outcome
from stepcache.fleet.places import alone
from stepcache.hosts.diffusers import model_name
from stepcache.measure.generation import Request, sample_both, sample_latent, shows_latents
from stepcache.measure.pipelines import Inputs, inputs_of, load_pipeline, model_inputs
from stepcache.measure.prompts import read_prompts, read_seeds
from stepcache.planning.calibrate import calibrate, describe
from stepcache.planning.calibration import MOST_STEPS, Calibration

STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


RUN = "runs (no --merge)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache calibrate`."""
    parser.description = __doc__
    flags = Flags(parser, _modes)
    add = functools.partial(flags.add, needs=RUN)
    add("--model", metavar="DIR_OR_ID", help="folder or hub id of a diffusers pipeline")
    add("--prompts", metavar="FILE", help="text file, one prompt per line; eight are plenty")
    flags.add(
        "--out", required=True, metavar="FILE", help="the calibration, a JSON file; an unfinished one is continued"
    )
    add("--seeds", default="0", help="seeds for every prompt, separated by commas (0)")
    add_request_flags(flags, needs=RUN)
    add_device_flags(flags, needs=RUN)
    add("--store", metavar="FOLDER", help="store a run's outputs in a file there instead of in memory")
    add("--store_dtype", choices=tuple(STORED), default="float32", help="precision of the stored outputs (float32)")
    add("--no-decode", action="store_true", default=False, help="omit the accelerated run that PSNR estimates need")
    flags.add("--merge", nargs="+", metavar="FILE", help="merge calibrations instead of running anything")
    add_ray_flags(flags, needs=RUN)


def _modes(args: argparse.Namespace) -> set[str]:
    return (set() if args.merge else {RUN}) | ({"--ray"} if args.ray is not None else set())


def run(args: argparse.Namespace) -> int:
    """Merge or record, with the file to ourselves."""
    check_writable(args.out)
    with alone(Path(args.out), folder=False):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    """Merge, or check everything that can be checked, load, record, save."""
    if args.merge:
        first, *others = [Calibration.load(path) for path in args.merge]
        merged = first.merged(*others)
        merged.save(args.out)
        print(describe(merged))
        return 0
    if not (args.model and args.prompts):
        raise ValueError("give --model and --prompts, or --merge FILES.")
    prompts, seeds = read_prompts(args.prompts), read_seeds(args.seeds)
    request, resources = request_from(args), resources_from(args)
    if not 2 <= request.steps <= MOST_STEPS:
        raise ValueError(f"--steps is {request.steps}; a calibration has 2 to {MOST_STEPS} steps.")
    if args.store:
        _check_store(Path(args.store))
    known = Calibration.load(args.out) if Path(args.out).exists() else None
    if known is not None:
        check_same(known, asked_of(model_inputs(args.model), request), args.out)
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    done = known.done if known else set()
    todo = [pair for pair in pairs if pair not in done]
    if known is not None:
        print(f"{args.out} has {len(known.runs)} run(s); {len(todo)} of {len(pairs)} remain.")
    if not todo:
        print(describe(known) if known else "")
        return 0
    save = functools.partial(_save, args, request, pairs)
    if resources is not None:
        calibration = _on_ray(args, resources, request, todo, known, save)
        print(describe(calibration))
        print(f"wrote {args.out}")
        return 0
    started = time.perf_counter()
    recording = Recording(args, request, known)
    calibration = recording.calibrate(tqdm(todo, desc="calibrate", unit="run", dynamic_ncols=True), known, save)
    seconds = sum(recording.seconds.values())
    extra = (time.perf_counter() - started - recording.loading) / seconds - 1
    print(describe(calibration))
    print(f"{len(recording.seconds)} uncached run(s) in {seconds:.1f} s, {extra:.1%} overhead; wrote {args.out}")
    return 0


def _check_store(folder: Path) -> None:
    if not folder.is_dir():
        raise NotADirectoryError(f"--store is {str(folder)!r}; expected a folder that exists.")
    check_writable(folder, folder=True)


class Recording:
    """A pipeline and how it is recorded; loading takes `loading` seconds, uncached runs `seconds` each.

    Raises:
        ValueError: the calibration that is continued, `known`, is of another model, sampler or size.
    """

    def __init__(self, args: argparse.Namespace, request: Request, known: Calibration | None) -> None:
        started = time.perf_counter()
        self.args, self.request = args, request
        self.pipe = load_pipeline(args.model, args.device, args.dtype)
        self.pipe.set_progress_bar_config(disable=True)
        if known is not None:
            check_same(known, key_of(self.pipe, request), args.out)
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
        shown = anchored and not self.args.no_decode and shows_latents(self.pipe)
        dtype, folder = STORED[self.args.store_dtype], self.args.store
        return calibrate(
            self.pipe,
            runs,
            self._sample,
            shown=self._shown if shown else None,
            known=known,
            save=save,
            dtype=dtype,
            folder=folder,
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

    def _shown(self, prompt: str, seed: int) -> tuple[torch.Tensor, np.ndarray]:
        started = time.perf_counter()
        both = sample_both(self.pipe, replace(self.request, prompt=prompt, seed=seed))
        self.seconds.setdefault((prompt, seed), time.perf_counter() - started)
        return both


def _save(args: argparse.Namespace, request: Request, pairs: list[tuple[str, int]], found: Calibration) -> None:
    """Write the file, runs in the requested order, whichever worker made them and when."""
    place = {pair: i for i, pair in enumerate(pairs)}
    runs = tuple(sorted(found.runs, key=lambda run: place.get((run.prompt, run.seed), -1)))
    about = {"stepcache": __version__, "model": args.model, "request": request.settings}
    replace(found, runs=runs, about=about).save(args.out)


def _on_ray(
    args: argparse.Namespace,
    resources: cluster.Resources,
    request: Request,
    todo: list[tuple[str, int]],
    known: Calibration | None,
    save: Callable[[Calibration], None],
) -> Calibration:
    """The runs, recorded by workers of a cluster; their calibrations are merged here, saved after every one."""
    calibration, failed = known, []
    flags = argparse.Namespace(**{**vars(args), "model": absolute(args.model)})
    recorder = functools.partial(_recorder, flags, request, known and replace(known, runs=()))
    anchored = known is not None and any(run.anchors for run in known.runs)
    with cluster.fleet(recorder, resources) as (fleet, _):
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


def _recorder(
    args: argparse.Namespace, request: Request, known: Calibration | None
) -> tuple[Recording, dict[str, Any]]:
    """What a worker sets up once."""
    recording = Recording(args, request, known)
    versions = {"stepcache": __version__, "torch": torch.__version__}
    return recording, {"versions": versions, "machine": str(recording.pipe.device)}


def key_of(pipe: Any, request: Request) -> dict[str, Any]:
    """The fields of a calibration of these runs, as far as they are known before the first of them."""
    known = {"model": model_name(pipe), "scheduler": type(pipe.scheduler).__name__}
    return {**known, **asked_of(inputs_of(pipe), request)}


def asked_of(inputs: Inputs, request: Request) -> dict[str, Any]:
    """The part of it that is known before the model is loaded."""
    guidance = {"guidance": request.guidance} if inputs.mixes and request.guidance is not None else {}
    return {"num_steps": request.steps, **guidance}


def check_same(known: Calibration, wanted: dict[str, Any], path: str) -> None:
    """ValueError if an existing file is of other runs than those requested now."""
    found = [
        f"{name} {getattr(known, name)} (requested: {value})"
        for name, value in wanted.items()
        if getattr(known, name) != value
    ]
    if found:
        raise ValueError(f"{path} is a calibration of {', '.join(found)}; choose another --out, or the same settings.")
