"""A benchmark as its driver sees it: what is run, by which workers, and the results."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from stepcache.bench.methods import Contender, Search
from stepcache.bench.results import REFERENCE, Folder, Item
from stepcache.bench.runs import SEARCH_PROMPTS, SEARCH_TRIALS, Runner
from stepcache.fleet import cluster
from stepcache.fleet.jobs import Alone, Job, Jobs, Outcome, Pair, Settle
from stepcache.fleet.places import is_there
from stepcache.measure.generation import Request, check_policy
from stepcache.measure.lpips import find_lpips
from stepcache.measure.pipelines import load_pipeline, model_inputs


class Crew(Protocol):
    """Whoever does the jobs: this process (`jobs.Alone`), or workers on a cluster (`cluster.Fleet`)."""

    @property
    def running(self) -> int:
        """Jobs under way."""

    def run(self, jobs: Jobs, settle: Settle) -> None:
        """Do them all, and tell `settle` of each."""


def duration(seconds: float) -> str:
    """Such as "0.4 s", "12 s", "3 min", "2 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True)
class Suite:
    """What a benchmark runs, and with what.

    Args:
        model: folder or hub id of the pipeline.
        root: where the results go; absolute if workers elsewhere are to write there.
        request: what all runs have in common.
        prompts, seeds: each prompt is run with each seed.
        contenders: the methods.
        fps: of the clips.
        device, dtype: of the model; None: `load_pipeline` chooses.
        lpips_backbone: file of AlexNet's weights; None: torch.hub's checkpoint folder.
        by_prompt: whether clips are named as VBench wants it.
        fetch_lpips: whether those weights may be fetched.
    """

    model: str
    root: Path
    request: Request
    prompts: list[str]
    seeds: list[int]
    contenders: list[Contender | Search]
    fps: float = 16.0
    device: str | None = None
    dtype: str | None = None
    lpips_backbone: str | None = None
    by_prompt: bool = False
    fetch_lpips: bool = False

    def check(self, pipe: Any = None) -> None:
        """Let methods that do not fit the runs say so before anything is computed (ValueError), see `check_policy`."""
        inputs = model_inputs(self.model)
        for contender in self.contenders:
            found = contender.easiest(self.request.steps) if isinstance(contender, Search) else contender
            if found.policy is None:
                continue
            try:
                check_policy(found.policy, self.request, inputs, pipe)
            except ValueError as error:
                raise ValueError(f"{contender.name}: {error}") from error

    def runner(self, shared: bool = False) -> tuple[Runner, dict[str, Any]]:
        """The pipeline and all that a process needs to do jobs, and what there is to say about it.

        Raises:
            ValueError, OSError, ImportError: model, method or device cannot be used; the sentence says which.
        """
        lpips, lpips_note = find_lpips(self.lpips_backbone, self.fetch_lpips)
        pipe = load_pipeline(self.model, self.device, self.dtype)
        pipe.set_progress_bar_config(disable=True)
        runner = Runner(
            pipe,
            self.request,
            Folder(self.root),
            self.contenders,
            self.prompts,
            self.seeds[0],
            self.fps,
            lpips,
            self.by_prompt,
            shared,
        )
        self.check(pipe)
        return runner, {"fps": self.fps, "seconds_a_run": sum(runner.warm_up()), **runner.about(lpips_note)}

    @contextmanager
    def crew(self, resources: cluster.Resources | None) -> Iterator[tuple[Crew, dict[str, Any]]]:
        """Who does the jobs, this process or workers on Ray, and what they say of themselves."""
        if resources is None:
            runner, about = self.runner()
            yield Alone(runner), about
            return
        with cluster.fleet(functools.partial(self.runner, shared=True), resources, self.root) as (fleet, about):
            yield fleet, about

    def cost(self, seconds: float, pairs: int, there: int = 0, searched: Collection[str] = ()) -> str:
        """What is about to be run, in a sentence or two: runs, searches, and the most it can take.

        Args:
            seconds: of an uncached run.
            pairs: prompts and seeds.
            there: runs whose result is there already.
            searched: methods whose threshold is known already.
        """
        searches = [c.name for c in self.contenders if isinstance(c, Search) and c.name not in searched]
        trials = SEARCH_TRIALS * min(SEARCH_PROMPTS, len(self.prompts)) * len(searches)
        runs = pairs * (1 + len({c.name for c in self.contenders})) - there
        text = f"{runs} runs to do ({pairs} prompts and seeds, uncached and with {len(self.contenders)} methods)"
        if searches:
            text += f", and before them {trials} to search thresholds ({', '.join(searches)})"
        most = duration(seconds * (runs + trials))
        return f"{text}; an uncached run takes about {duration(seconds)}, all of them at most {most}"

    @property
    def schedules(self) -> dict[str, str]:
        """Method -> where its schedule comes from, for its label."""
        return {c.name: c.schedule for c in self.contenders if isinstance(c, Contender) and c.schedule}

    def described(self, shard: tuple[int, int], resume: bool) -> dict[str, Any]:
        """The folder's description: new, or the one that is there if it is of the same benchmark.

        Raises:
            ValueError: there are results and `resume` is not asked for, or they are of another benchmark.
        """
        key: dict[str, Any] = {
            "model": self.model,
            "request": self.request.settings,
            "prompts": self.prompts,
            "seeds": self.seeds,
        }
        key["shard"] = list(shard)
        folder = Folder(self.root)
        if not folder.description.exists():
            return {**key, "searched": {}, "schedules": self.schedules}
        if not resume:
            raise ValueError(f"{self.root} holds a benchmark already; use --resume, or choose another --out.")
        known = folder.read()
        differing = [name for name in key if known.get(name) != key[name]]
        if differing:
            raise ValueError(
                f"{self.root} is another benchmark: it differs in {', '.join(differing)}; choose another --out."
            )
        return {**known, "schedules": {**known.get("schedules", {}), **self.schedules}}


@dataclass
class Bench:
    """A benchmark under way, seen from where it is directed.

    Args:
        folder: where the results go.
        contenders: the methods.
        description: what is run; thresholds and the ceiling are added as they are found.
        shared: whether several workers share uncached runs through the folder.
        tolerant: whether a method whose threshold is not found is noted in the description and left out; else it is an
            error.
    """

    folder: Folder
    contenders: list[Contender | Search]
    description: dict[str, Any]
    shared: bool = False
    tolerant: bool = False
    other_seconds: float = 0.0
    failed: int = 0
    _todo: set[tuple[Pair, str]] = field(default_factory=set)
    _left: Counter[Pair] = field(default_factory=Counter)

    def run(self, crew: Crew, pairs: list[Pair], retries: int = 0) -> None:
        """Find the thresholds that are asked for, then run what is not there yet."""
        self.search(crew, retries)
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

    def search(self, crew: Crew, retries: int = 0) -> None:
        """Find the thresholds that are not known yet."""
        unknown = self.description.get("unsearched", {})
        self.contenders = [c for c in self.contenders if c.name not in unknown]
        names = [c.name for c in self.contenders if isinstance(c, Search)]
        jobs = [Job("search", method=n) for n in names if n not in self.description["searched"]]
        with tqdm(total=len(jobs), desc="thresholds", unit="method", dynamic_ncols=True, disable=not jobs) as bar:

            def found(job: Job, outcome: Outcome) -> None:
                if outcome.error and self.tolerant:
                    self.description.setdefault("unsearched", {})[job.method] = outcome.error
                    self.contenders = [c for c in self.contenders if c.name != job.method]
                    self.folder.write(self.description)
                    return
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
