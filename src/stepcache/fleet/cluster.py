"""Jobs on a Ray cluster: workers that load the model once, take jobs when they are free, and may die at any time.

Ray places the workers, reports when one is lost, and starts another where there is room; results are files. Ours is
only the choice of the next job (`jobs.Jobs`) and the bookkeeping below. A worker has one job at a time, so at most one
job is lost with it.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import secrets
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stepcache import __version__
from stepcache.fleet.jobs import Job, Jobs, Outcome, Settle, settle_with
from stepcache.fleet.places import check_writable

Work = Callable[[Job], Outcome]


Make = Callable[[], tuple[Work, Mapping[str, Any]]]
"""Called once on every worker: what does its jobs, and what there is to say about it."""


LOCAL = "local"


PATIENCE = 600.0
"""Seconds to wait for room on the cluster while no worker runs."""


REACH = 15.0
"""Seconds to wait for somebody to listen at an address, and a quarter of what they have to answer as Ray does."""


BAD_STARTS = 3
"""So many workers may fail to load, for each that is wanted, before no other is started."""


SICK = 2
"""A worker that fails so many jobs in a row is replaced: it may be the worker's fault, not the jobs'."""


BAD_INPUT = (ValueError, OSError, ImportError, RuntimeError)
"""What loading raises when the model, a method or the device cannot be used, here as on every other machine."""


ALIKE = ("versions", "dtype", "fps", "structure", "sampler", "measures_lpips")
"""What all workers must say of themselves alike."""


@dataclass(frozen=True)
class Resources:
    """What is asked of Ray.

    Args:
        address: of the cluster; "auto" the one this machine is on, "local" a new one on this machine.
        workers: how many; None: as many as fit now.
        cpus, gpus: of each, fractions allowed; gpus None: 1 if the cluster has any (`fleet` finds out).
        retries: how often a job is started again whose worker was lost or that failed in a way that may be temporary.
        patience: seconds to wait for room on the cluster while no worker runs.
    """

    address: str = LOCAL
    workers: int | None = None
    cpus: float = 1.0
    gpus: float | None = 0.0
    retries: int = 3
    patience: float = PATIENCE

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers is {self.workers}; expected at least 1.")
        gpus = self.gpus or 0.0
        if not (0 <= self.cpus < math.inf and 0 <= gpus < math.inf and self.cpus + gpus > 0):
            raise ValueError(f"--cpus-per-worker {self.cpus:g} and --gpus-per-worker {gpus:g}: one must be above 0.")
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"--gpus-per-worker is {gpus:g}; expected a whole number, or a share below 1.")
        if self.retries < 0:
            raise ValueError(f"--max-retries is {self.retries}; expected 0 or more.")


@contextmanager
def fleet(make: Make, resources: Resources, folder: Path | None = None) -> Iterator[tuple[Fleet, dict[str, Any]]]:
    """Workers on a cluster, while the context lasts, and what the first of them says of itself.

    Args:
        make: called on every worker.
        resources: what is asked of Ray.
        folder: where the workers write, if they do; whether they reach it is found out before the work.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: no cluster answers at the address.
        ValueError: the workers cannot load, or cannot reach the folder.
        TimeoutError: no worker was started in time.
    """
    with connected(resources.address) as cluster:
        if resources.gpus is None:
            resources = replace(resources, gpus=1.0 if cluster.get("GPU") else 0.0)
        with Fleet(make, resources, folder) as workers:
            yield workers, dict(workers.about)


@contextmanager
def connected(address: str = LOCAL) -> Iterator[dict[str, float]]:
    """A connection to Ray; yields the cluster's resources. A cluster made here ends with it."""
    ray = _ray()
    if ray.is_initialized():  # somebody else's, who also ends it
        yield ray.cluster_resources()
        return
    _reachable(address)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ConnectionError(f"--ray {address}: could not connect: {error}") from error
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs Ray: pip install 'stepcache[cluster]'.") from error
    return ray


def _reachable(address: str) -> None:
    """ConnectionError if no cluster answers at host:port in time: Ray itself would try for minutes."""
    if address in (LOCAL, "auto"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--ray is {address!r}; expected host:port, auto, or nothing.")
    try:
        socket.create_connection((host, int(port)), timeout=REACH).close()
    except OSError as error:
        raise ConnectionError(f"--ray {address}: no connection ({error}).") from error
    attempt = f"import ray; ray.init(address={address!r}, log_to_driver=False, logging_level='ERROR')"
    try:
        tried = subprocess.run([sys.executable, "-c", attempt], capture_output=True, text=True, timeout=4 * REACH)
    except subprocess.TimeoutExpired as error:
        raise ConnectionError(f"--ray {address}: what listens there did not answer as a Ray cluster.") from error
    if tried.returncode:
        lines = [line for line in tried.stderr.splitlines() if line.strip()]
        why = lines[-1] if lines else f"exit code {tried.returncode}"
        raise ConnectionError(
            f"--ray {address}: could not connect: {why}. (On a machine of the cluster use --ray auto; clusters that "
            "ask for a token want RAY_AUTH_MODE=token.)"
        )


@functools.cache
def identity() -> str:
    """The version of this package and a digest of its code: workers must have the very same."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return f"{__version__} ({digest.hexdigest()[:12]})"


@dataclass(frozen=True)
class Arrival:
    """How a worker's loading went: where it is, what code it has, what it says of itself, or why it cannot work."""

    host: str
    identity: str
    about: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


class Worker:
    """The process that does jobs; Ray makes an actor of it."""

    def __init__(self, cpus: float) -> None:
        import torch

        torch.set_num_threads(max(1, int(cpus)))
        self._work: Work | None = None

    def hello(self) -> str:
        """The process runs; from now on it is loading."""
        return socket.gethostname()

    def load(self, make: Make, folder: Path | None, token: str) -> Arrival:
        """Make what does the jobs. Bad input is told, not raised, so that it arrives as one sentence."""
        host = socket.gethostname()
        try:
            if folder is not None:
                self._check(folder, token)
            self._work, about = make()
        except BAD_INPUT as error:
            return Arrival(host, identity(), error=_sentence(f"{type(error).__name__}: {error}")[:2000])
        return Arrival(host, identity(), about)

    @staticmethod
    def _check(folder: Path, token: str) -> None:
        if not (folder / token).exists():
            raise FileNotFoundError(
                f"{folder} is not the folder of that name on the machine that directs the work; choose an --out that "
                "all machines share"
            )
        check_writable(folder)

    def run(self, job: Job) -> Outcome:
        """Do one job."""
        if self._work is None:
            raise RuntimeError("this worker has not loaded.")
        return self._work(job)


@dataclass(eq=False)
class _Member:
    """A worker as the driver sees it."""

    actor: Any
    job: Job | None = None
    started: bool = False
    ready: bool = False
    failures: int = 0


class Fleet:
    """Workers on a cluster that one is connected to; use it as a context.

    Raises:
        ValueError: the workers cannot load, or cannot reach the folder.
        TimeoutError: no worker was started in time.
    """

    def __init__(self, make: Make, resources: Resources, folder: Path | None = None) -> None:
        self._ray = ray = _ray()
        self.resources, self.folder, self._gpus = resources, folder, resources.gpus or 0.0
        self.about: Mapping[str, Any] = {}
        self._make = ray.put(make)
        self._token = f".stepcache-{secrets.token_hex(8)}"
        self._flying: dict[Any, _Member] = {}
        self._idle: list[_Member] = []
        self._bad_starts = 0
        self._count = resources.workers or self._fitting()
        self._alone_since = time.monotonic()

    def __enter__(self) -> Fleet:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / self._token).write_text("")
        of = f"{self.resources.cpus:g} CPU, {self._gpus:g} GPU"
        print(f"{self._count} worker(s) of {of} are loading", file=sys.stderr)
        with ExitStack() as undo:
            undo.callback(self._dismiss)
            for _ in range(self._count):
                self._recruit()
            while not self.about:
                self._wait(None, lambda job, outcome: None)
            undo.pop_all()  # all is well
        return self

    def __exit__(self, *_: object) -> None:
        self._dismiss()

    @property
    def running(self) -> int:
        """Jobs under way."""
        return sum(member.job is not None for member in self._flying.values())

    @property
    def loaded(self) -> int:
        """Workers that have loaded and are not known to be lost."""
        return len(self._idle) + sum(member.ready for member in self._flying.values())

    def run(self, jobs: Jobs, settle: Settle) -> None:
        """Do all jobs; `settle` is told of each once, in the order in which they end."""
        while jobs:
            for member in list(self._idle):
                job = jobs.take(member)
                if job is None:
                    break
                self._idle.remove(member)
                member.job = job
                self._flying[member.actor.run.remote(job)] = member
            self._wait(jobs, settle)

    def _fitting(self) -> int:
        """How many workers the cluster has room for."""
        cluster = self._ray.cluster_resources()
        wanted = {"CPU": self.resources.cpus, "GPU": self._gpus}
        return max(1, min(int(cluster.get(kind, 0) / n) for kind, n in wanted.items() if n))

    def _recruit(self) -> None:
        remote = self._ray.remote(Worker).options(
            num_cpus=self.resources.cpus, num_gpus=self._gpus, scheduling_strategy="SPREAD", max_restarts=0
        )
        member = _Member(remote.remote(self.resources.cpus))
        self._flying[member.actor.hello.remote()] = member

    def _wait(self, jobs: Jobs | None, settle: Settle) -> None:
        """Wait for the next thing that ends, and see to it."""
        ended, _ = self._ray.wait(list(self._flying), timeout=1.0)
        for reference in ended:
            member = self._flying.pop(reference)
            try:
                result = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:  # raised by the job, or on the way to it
                self._failed(member, jobs, settle, _sentence(error.cause or error))
            except self._ray.exceptions.RayError as error:
                self._lose(member, jobs, settle, f"its worker was lost: {_sentence(error)}")
            else:
                self._landed(member, result, jobs, settle)
        self._be_patient()

    def _landed(self, member: _Member, result: Any, jobs: Jobs | None, settle: Settle) -> None:
        if isinstance(result, Arrival):
            self._welcome(member, result, jobs, settle)
        elif isinstance(result, str):
            member.started = True
            self._flying[member.actor.load.remote(self._make, self.folder, self._token)] = member
        elif isinstance(result, Outcome) and result.error and result.again:
            self._failed(member, jobs, settle, result.error)
        else:
            job, member.job, member.failures = member.job, None, 0
            self._idle.append(member)
            if job is not None and jobs is not None:
                settle_with(jobs, job, result, settle)

    def _welcome(self, member: _Member, arrival: Arrival, jobs: Jobs | None, settle: Settle) -> None:
        """Take in a worker that has loaded, if it can be used."""
        if arrival.identity != identity():
            problem = f"it has stepcache {arrival.identity}, here is {identity()}; install the same everywhere"
        elif arrival.error:
            problem = arrival.error
        else:
            other = [k for k in ALIKE if self.about and arrival.about.get(k) != self.about.get(k)]
            told = [f"{k} {arrival.about.get(k)} (the first one: {self.about.get(k)})" for k in other]
            problem = f"it has {', '.join(told)}" if told else ""
        if problem:
            self._lose(member, jobs, settle, f"the worker on {arrival.host} cannot be used: {problem}", refused=True)
            return
        if self.about and arrival.about.get("machine") != self.about.get("machine"):
            warnings.warn(
                f"workers on {arrival.about.get('machine')} and on {self.about.get('machine')}: times are not of one "
                "kind of machine.",
                stacklevel=2,
            )
        self.about = self.about or arrival.about or {"worker": arrival.host}
        member.ready, self._bad_starts = True, 0
        self._idle.append(member)

    def _failed(self, member: _Member, jobs: Jobs | None, settle: Settle, why: str) -> None:
        """A job failed in a way that may pass: it goes back, and a worker that fails often goes."""
        member.failures += 1
        if not member.ready or member.failures >= SICK:
            self._lose(member, jobs, settle, why)
        else:
            self._again(member, jobs, settle, why)
            self._idle.append(member)

    def _lose(self, member: _Member, jobs: Jobs | None, settle: Settle, why: str, *, refused: bool = False) -> None:
        """A worker is gone, or has to go (`refused`: it said itself why): its job goes back, another is asked for.

        Raises:
            ValueError: nobody has loaded yet, and this one cannot; or so many could not that no other is tried.
        """
        self._ray.kill(member.actor)
        if jobs is not None:
            jobs.forget(member)
        self._again(member, jobs, settle, why)
        if not member.ready:
            self._bad_starts += 1
            if not self.about and (self._bad_starts >= BAD_STARTS or refused):
                raise ValueError(f"{why} ({self._bad_starts} could not load, none could).")
            if self._bad_starts >= BAD_STARTS * self._count:
                if not (self._idle or self._flying):
                    raise ValueError(f"no worker is left, and others could not load: {why}.")
                return
            if refused:
                warnings.warn(f"{why}; another is tried.", stacklevel=2)
        self._recruit()

    def _again(self, member: _Member, jobs: Jobs | None, settle: Settle, why: str) -> None:
        job, member.job = member.job, None
        if job is not None and jobs is not None and not jobs.again(job):
            settle_with(jobs, job, Outcome(f"{why} (tried {jobs.retries + 1} times)"), settle)

    def _be_patient(self) -> None:
        """TimeoutError when the cluster has had no room for any worker for too long."""
        if self._idle or any(member.started for member in self._flying.values()):
            self._alone_since = time.monotonic()
        elif time.monotonic() - self._alone_since > self.resources.patience:
            have = {k: v for k, v in self._ray.cluster_resources().items() if k in ("CPU", "GPU")}
            raise TimeoutError(
                f"no worker could be started within {self.resources.patience:.0f} s: each asks for "
                f"{self.resources.cpus:g} CPU and {self._gpus:g} GPU, the cluster has {have}."
            )

    def _dismiss(self) -> None:
        for member in (*self._idle, *self._flying.values()):
            self._ray.kill(member.actor)
        self._idle, self._flying = [], {}
        if self.folder is not None:
            (self.folder / self._token).unlink(missing_ok=True)


def _sentence(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
