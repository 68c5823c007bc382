"""The work of a benchmark in one process: uncached runs, methods compared with them, threshold searches."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepcache import __version__
from stepcache.bench.meter import Result, run_once
from stepcache.bench.methods import Contender, Search
from stepcache.bench.results import REFERENCE, Folder, Item
from stepcache.fleet.jobs import Job, Outcome, Pair
from stepcache.fleet.places import arriving, at_hand, is_remote
from stepcache.hosts.diffusers import accelerate, model_name
from stepcache.measure.device import machine_name
from stepcache.measure.generation import Request
from stepcache.measure.lpips import LPIPS
from stepcache.measure.metrics import compare_clips, finite
from stepcache.measure.video import write_clip
from stepcache.methods import Off

UNCACHED = Contender(REFERENCE, lambda pipe, _: accelerate(pipe, Off()), policy=Off())


SEARCH_PROMPTS, SEARCH_TRIALS = 3, 10
"""A threshold is searched on the first prompts, by so many bisections of its logarithm."""


FAILURES = (ValueError, RuntimeError, ImportError, AssertionError, TypeError, AttributeError, LookupError)
"""What a method may fail with; the disc's and the network's errors are not the method's."""


@dataclass
class Runner:
    """Does the jobs of a benchmark.

    Args:
        pipe: the pipeline.
        request: what all runs have in common.
        folder: where items and clips go.
        contenders: the methods.
        prompts, seed: of the search for thresholds, which takes the first few of them.
        fps: of the clips.
        lpips: its network, if there is one.
        by_prompt: whether clips are named as VBench wants it.
        score: of frames and a prompt without a reference, where there is one (`measure.clip_score`).
        shared: whether others need the uncached runs made here: they are then kept in the folder.
    """

    pipe: Any
    request: Request
    folder: Folder
    contenders: Sequence[Contender | Search]
    prompts: Sequence[str]
    seed: int
    fps: float = 16.0
    lpips: LPIPS | None = None
    by_prompt: bool = False
    shared: bool = False
    score: Callable[[np.ndarray, str], float] | None = None
    _latest: tuple[Pair, Result] | None = field(default=None, repr=False)

    def __call__(self, job: Job) -> Outcome:
        """Do a job. What it finds is in the folder afterwards; a method's own errors are recorded there."""
        if job.task == "search":
            try:
                return Outcome(value=self.searched(job.method))
            except FAILURES as error:
                return _outcome(error)
        if job.pair is None:
            raise ValueError(f"a job of the kind {job.task!r} needs a prompt and seed.")
        if job.task == "reference":
            return self.make_reference(job.pair)
        if job.task == "ceiling":
            reference = self.reference(job.pair)
            return Outcome(value=ceiling(reference, self._run(UNCACHED, job.pair)))
        if done(self.folder.item(job.method, job.pair[0], job.pair[2])):
            return Outcome()
        return self.item(self._contender(job), job.pair)

    def make_reference(self, pair: Pair) -> Outcome:
        """The uncached run of a pair: kept at hand, and an item like the others."""
        path = self.folder.item(REFERENCE, pair[0], pair[2])
        try:
            reference = self._run(UNCACHED, pair)
        except FAILURES as error:
            outcome = _outcome(error)
            if not done(path):
                self._save(replace(_bare(REFERENCE, pair), error=outcome.error))
            return outcome
        self._latest = (pair, reference)
        began = time.perf_counter()
        if self.shared:
            save_reference(self.folder.reference(pair[0], pair[2]), reference)
        if not done(path):
            self._finish(_bare(REFERENCE, pair), reference, reference)
        return Outcome(other_seconds=time.perf_counter() - began)

    def reference(self, pair: Pair) -> Result:
        """The pair's uncached run: at hand, or of the folder, or made now."""
        if self._latest is None or self._latest[0] != pair:
            self._latest = None  # one pair's at a time
            found = load_reference(self.folder.reference(pair[0], pair[2])) if self.shared else None
            self._latest = (pair, found or self._run(UNCACHED, pair))
        return self._latest[1]

    def item(self, contender: Contender, pair: Pair) -> Outcome:
        """Run one method once, measure it, write clip and JSON."""
        bare = _bare(contender.name, pair)
        try:
            reference = self.reference(pair)
            result = self._run(contender, pair)
        except FAILURES as error:
            outcome = _outcome(error)
            self._save(replace(bare, error=outcome.error))
            return outcome
        began = time.perf_counter()
        self._finish(bare, result, reference)
        return Outcome(other_seconds=time.perf_counter() - began)

    def _run(self, contender: Contender, pair: Pair) -> Result:
        return run_once(self.pipe, replace(self.request, prompt=pair[1], seed=pair[2]), contender)

    def _contender(self, job: Job) -> Contender:
        found = next(c for c in self.contenders if c.name == job.method)
        if isinstance(found, Contender):
            return found
        if job.threshold is None:
            raise ValueError(f"{job.method}: its threshold has not been found yet.")
        return replace(found.make(job.threshold), name=found.name)

    def _finish(self, item: Item, result: Result, reference: Result) -> None:
        measured = self._measured(item, result, reference)
        clip = self.folder.clip(item.method, item.index, item.prompt, item.seed, self.by_prompt)
        if is_remote(clip):
            with arriving(clip) as local:
                write_clip(local, result.frames, self.fps)
        else:
            write_clip(clip, result.frames, self.fps)
        self._save(replace(measured, clip=self.folder.below(clip)))

    def _save(self, item: Item) -> None:
        item.save(self.folder.item(item.method, item.index, item.seed))

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
            branches={} if summary is None else {b.name: tuple(b.computed) for b in summary.branches},
            loop_seconds=result.loop_seconds,
            seconds=result.seconds,
            reference_seconds=reference.loop_seconds,
            seconds_per_computed_step=None if summary is None else summary.seconds_per_computed_step,
            seconds_per_reused_step=None if summary is None else summary.seconds_per_skipped_step,
            cache_bytes=None if summary is None else summary.cache_bytes,
            peak_bytes=result.peak_bytes,
            psnr=finite(distance.psnr),
            ssim=distance.ssim,
            lpips=distance.lpips,
            clip_score=None if self.score is None else round(self.score(result.frames, item.prompt), 3),
            identical=distance.identical,
            psnr_per_frame=tuple(None if v is None else round(v, 3) for v in map(finite, distance.psnr_per_frame)),
            step_errors=tuple(float(f"{float((a - b).norm() / b.norm()):.4g}") for a, b in pairs),
        )

    def searched(self, method: str) -> float:
        """The threshold whose mean of computed steps is nearest the target; tries SEARCH_TRIALS of them."""
        search = next(c for c in self.contenders if c.name == method)
        if isinstance(search, Contender):
            raise ValueError(f"{method} has nothing to search for.")
        whole = 0

        def count(contender: Contender) -> float:
            nonlocal whole
            counts = []
            for prompt in self.prompts[:SEARCH_PROMPTS]:
                result = self._run(contender, (0, prompt, self.seed))
                whole = whole or max(result.executed)  # the first step is always computed
                counts.append(sum(result.executed) / whole)
            return float(np.mean(counts))

        return min(search.trials(count, SEARCH_TRIALS))[1]

    def warm_up(self) -> tuple[float, float]:
        """Two steps, not measured: allocators, kernels, caches of the file system. Then two that are.

        Returns:
            seconds an uncached run will take, about: its loop, and what is around it.
        """
        steps = min(2, self.request.steps)
        short = replace(self.request, steps=steps, prompt=self.prompts[0], seed=self.seed)
        run_once(self.pipe, short, UNCACHED)
        began = time.perf_counter()
        result = run_once(self.pipe, short, UNCACHED)
        seconds = time.perf_counter() - began
        return result.loop_seconds * self.request.steps / steps, max(seconds - result.loop_seconds, 0.0)

    def about(self, lpips_note: str) -> dict[str, Any]:
        """Where and with what it runs."""
        import diffusers

        pipe = self.pipe
        return {
            "structure": model_name(pipe),
            "sampler": type(pipe.scheduler).__name__,
            "device": str(pipe.device),
            "machine": machine_name(pipe.device),
            "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
            "versions": {"stepcache": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
            "date": time.strftime("%Y-%m-%d"),
            "lpips": lpips_note,
            "measures_lpips": self.lpips is not None,
        }


def _bare(method: str, pair: Pair) -> Item:
    return Item(method, *pair)


def _outcome(error: Exception) -> Outcome:
    again = isinstance(error, RuntimeError)  # out of memory, say, on a card that others use
    return Outcome(f"{type(error).__name__}: {error}"[:2000], again=again)


def done(path: Path) -> bool:
    """Whether an item is there and has a result."""
    return path.exists() and not Item.load(path).error


def ceiling(first: Result, second: Result) -> dict[str, float | None]:
    """How well the uncached run agrees with itself: what no method can be better than. PSNR None: bit-identical."""
    pair = compare_clips(first.frames, second.frames)
    return {"psnr": finite(pair.psnr), "ssim": pair.ssim, "loop_ratio": second.loop_seconds / first.loop_seconds}


def save_reference(path: Path, result: Result) -> None:
    """Keep an uncached run for others: frames, latents, blocks executed, seconds; bit-exact, no pickle."""
    with arriving(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            frames=result.frames,
            latents=torch.stack(result.latents).numpy(),
            executed=np.array(result.executed),
            loop_seconds=np.array(result.loop_seconds),
            seconds=np.array(result.seconds),
        )


def load_reference(path: Path) -> Result | None:
    """An uncached run of `save_reference`; None if it is not there or damaged: then it is made once more."""
    try:
        with at_hand(path) as local, np.load(local, allow_pickle=False) as file:
            latents = tuple(torch.from_numpy(x) for x in file["latents"])
            executed = tuple(int(n) for n in file["executed"])
            seconds = float(file["seconds"])
            return Result(file["frames"], latents, executed, float(file["loop_seconds"]), None, None, seconds)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
