"""A calibration: recorded uncached runs, a small file from which plans are made without another evaluation.

Stored for a run of S steps:

- the Gram matrix of the guided outputs v_0..v_(S-1), what the pipeline hands to its sampler, and of the first latent
  x_0: any prediction of an output from other outputs is a sum of them, so its error, and the error of a whole plan,
  are sums over inner products. Whatever the guidance (plain, rescaled, interval, none), the guided output is one
  tensor per step;
- for every branch the change of magnitude from step to step (MagCache's ratios) and the transformation rates
  (EasyCache's k).

A sampler that is linear in the outputs makes x_k = a_k x_0 + sum over s < k of R[k, s] v_s. The numbers a and R, the
*response*, come from pushing unit vectors through the scheduler itself, so they are exact for Euler, UniPC, DPM++ and
any other linear sampler. That the latents obey them is verified.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import math
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepcache.core.strategy import Call, Strategy
from stepcache.core.tensors import narrow
from stepcache.core.trajectory import Boundary, Trajectory
from stepcache.files import parse_document, read_text, write_atomically
from stepcache.hindsight.response import remembered
from stepcache.hindsight.schedule import noise_levels_of
from stepcache.planning.plan_file import math_close

CALIBRATION_SCHEMA, CALIBRATION_VERSION = "stepcache.calibration", 2


LARGEST_FILE = 512 * 2**20
"""Bytes; a calibration has some 30 KB a run. More is not one."""


MOST_STEPS = 1000


NOT_LINEAR = 0.05
"""Relative error of a latent rebuilt from outputs above which the sampler is not what it was taken for."""


@dataclass(frozen=True)
class CalibratedRun:
    """What one uncached run left.

    Args:
        prompt, seed: which run.
        gram: float64 (S + 1, S + 1), inner products of the guided outputs v_0..v_(S-1) and the first latent x_0.
        mismatch: largest relative error of a latent the model was fed, rebuilt from x_0 and the outputs.
        magnitude: branch -> float64 (S, 3): mean over positions of |v_k| / |v_(k-1)| (norms over channels), its
            spread, and 1 - cosine; the first row is (1, 0, 0).
        rates: branch -> float64 (S,): mean |v_k - v_(k-1)| / mean |x_k - x_(k-1)|, the first 0.
        anchors: (budget, relative error of the final latent, PSNR in dB of the decoded clip) of accelerated runs of
            this prompt, `Hindsight` on a uniform schedule: what forecasts are scaled to. None if none was made.
    """

    prompt: str
    seed: int
    gram: np.ndarray
    mismatch: float
    magnitude: dict[str, np.ndarray]
    rates: dict[str, np.ndarray]
    anchors: tuple[tuple[int, float, float], ...] = ()


@dataclass(frozen=True)
class Calibration:
    """Calibrated runs of one model under one sampler.

    Args:
        num_steps: S.
        model, scheduler, shift, guidance, timesteps: what was run; the key of all plans made from it.
        branches: names of those that magnitudes and rates are known of.
        levels: noise levels of the steps, in [0, 1]; empty where they are not known.
        response: float64 (S + 1, S + 1): row k is the latent x_k over (x_0, v_0, ..., v_(S-1)).
        size: shape of the latent, batch dimension left out.
        runs: one a prompt and seed.

    Raises:
        ValueError: if shapes or numbers do not fit each other.
    """

    num_steps: int
    model: str | None
    scheduler: str | None
    shift: float | None
    guidance: float | None
    timesteps: tuple[float, ...]
    branches: tuple[str, ...]
    response: np.ndarray
    size: tuple[int, ...]
    runs: tuple[CalibratedRun, ...] = ()
    levels: tuple[float, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps, rows = self.num_steps, self.num_steps + 1
        if not 2 <= steps <= MOST_STEPS:
            raise ValueError(f"a calibration of {steps} steps; expected 2 to {MOST_STEPS}.")
        if len(self.timesteps) != steps or len(self.levels) not in (0, steps) or not self.branches:
            raise ValueError("timesteps or noise levels do not fit the step count, or no branch is named.")
        if self.response.shape != (steps + 1, steps + 1) or not np.isfinite(self.response).all():
            raise ValueError(f"the sampler's response is not a finite {steps + 1} x {steps + 1} matrix.")
        for run in self.runs:
            if run.gram.shape != (rows, rows) or not np.isfinite(run.gram).all():
                raise ValueError(f"the Gram matrix of {run.prompt!r} is not a finite {rows} x {rows} matrix.")

    @property
    def influence(self) -> np.ndarray:
        """(S,): how much the final latent moves per unit of each step's guided output, the other outputs unchanged."""
        return np.asarray(self.response[-1, 1:])

    @property
    def done(self) -> set[tuple[str, int]]:
        """(prompt, seed) of the runs it has."""
        return {(run.prompt, run.seed) for run in self.runs}

    @functools.cached_property
    def grams(self) -> np.ndarray:
        """(runs, S + 1, S + 1), float64."""
        return np.stack([run.gram for run in self.runs])

    def norms(self, vector: np.ndarray) -> np.ndarray:
        """(runs,): norm of a sum of the recorded vectors, with the weights of `vector`, (S + 1,)."""
        return np.asarray(np.sqrt(quadratic(vector, self.grams)))

    @property
    def final_norms(self) -> np.ndarray:
        """(runs,): the norm of each run's final latent."""
        return self.norms(self.state_vector(self.num_steps))

    def state_vector(self, step: int) -> np.ndarray:
        """(S + 1,): latent x_step over the Gram matrix's vectors."""
        return np.concatenate([self.response[step, 1:], self.response[step, :1]])

    def verified(self) -> Calibration:
        """Itself; ValueError if a recorded latent is not what sampler and guided outputs make of it."""
        if self.runs and (worst := max(run.mismatch for run in self.runs)) > NOT_LINEAR:
            raise ValueError(
                f"the recorded latents differ by {worst:.1%} from what {self.scheduler} makes of the guided outputs: "
                "the sampler adds noise, or something changes the latent between steps. Plans from such a run would "
                "be wrong; calibrate with a plain sampler."
            )
        return self

    def key(self) -> dict[str, Any]:
        """What two calibrations must share to be merged, and a resumed one must not change."""
        names = ("model", "scheduler", "num_steps", "shift", "guidance", "branches", "size")
        return {name: getattr(self, name) for name in names}

    def differences(self, other: Calibration) -> list[str]:
        """In words, how the other's key differs."""
        mine, theirs = self.key(), other.key()
        found = [f"{name} {mine[name]} and {theirs[name]}" for name in mine if mine[name] != theirs[name]]
        if not found and not all(map(math_close, self.timesteps, other.timesteps)):
            found.append("other timesteps")
        return found

    def merged(self, *others: Calibration) -> Calibration:
        """All runs together, each prompt and seed once.

        Raises:
            ValueError: the calibrations are of different models, samplers, step counts, guidance or sizes.
        """
        runs = {(run.prompt, run.seed): run for run in self.runs}
        for other in others:
            if found := self.differences(other):
                raise ValueError(f"these calibrations cannot be merged: {'; '.join(found)}.")
            for run in other.runs:
                runs.setdefault((run.prompt, run.seed), run)
        return replace(self, runs=tuple(runs.values()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON (matrices as base64 of little-endian float64, upper triangles only), whole or not at all."""
        names = ("num_steps", "model", "scheduler", "shift", "guidance", "timesteps", "levels", "branches", "size")
        document: dict[str, Any] = {"schema": CALIBRATION_SCHEMA, "version": CALIBRATION_VERSION}
        document |= {name: getattr(self, name) for name in names} | {"about": self.about}
        document["response"] = _pack(self.response)
        document["runs"] = [
            {
                "prompt": run.prompt,
                "seed": run.seed,
                "gram": _pack(run.gram[np.triu_indices(len(run.gram))]),
                "mismatch": run.mismatch,
                "magnitude": {name: rows.tolist() for name, rows in run.magnitude.items()},
                "rates": {name: row.tolist() for name, row in run.rates.items()},
                "anchors": run.anchors,
            }
            for run in self.runs
        ]
        write_atomically(path, json.dumps(document, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read `save`'s file; nothing in it is executed, and sizes are checked before anything is allocated.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a calibration, damaged, or of absurd size.
        """
        name = os.fspath(path)
        if Path(path).is_file() and (size := Path(path).stat().st_size) > LARGEST_FILE:
            raise ValueError(f"calibration file {name!r} has {size} bytes; at most {LARGEST_FILE} are read.")
        text = read_text(path, "calibration")
        try:
            return cls._from_document(parse_document(text, CALIBRATION_SCHEMA, CALIBRATION_VERSION))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"calibration file {name!r}: not a valid calibration ({error!r:.200}).") from error

    @classmethod
    def _from_document(cls, data: dict[str, Any]) -> Calibration:
        steps = data["num_steps"]
        if type(steps) is not int or not 2 <= steps <= MOST_STEPS:
            raise ValueError(f"num_steps is {steps!r}")
        branches = tuple(str(name) for name in data["branches"])
        runs = tuple(_run_from(entry, steps, branches) for entry in data.pop("runs"))
        response = _unpack(data.pop("response"), (steps + 1) ** 2).reshape(steps + 1, steps + 1)
        data |= {"branches": branches, "timesteps": tuple(map(float, data["timesteps"]))}
        data |= {"size": tuple(map(int, data["size"])), "levels": tuple(map(float, data["levels"]))}
        return cls(**data, response=response, runs=runs)


def added(path: str | os.PathLike[str], found: Calibration) -> Calibration:
    """Add a calibration to the file, which may not exist yet; returns what the file holds. ValueError, OSError."""
    whole = Calibration.load(path).merged(found) if Path(path).exists() else found
    whole.save(path)
    return whole


def _run_from(entry: dict[str, Any], steps: int, branches: tuple[str, ...]) -> CalibratedRun:
    rows = steps + 1
    gram = np.zeros((rows, rows))
    gram[np.triu_indices(rows)] = _unpack(entry["gram"], rows * (rows + 1) // 2)
    gram = gram + np.triu(gram, 1).T
    magnitude = {name: np.asarray(entry["magnitude"][name], float).reshape(steps, 3) for name in branches}
    rates = {name: np.asarray(entry["rates"][name], float).reshape(steps) for name in branches}
    anchors = tuple((int(budget), float(error), float(psnr)) for budget, error, psnr in entry["anchors"])
    return CalibratedRun(
        str(entry["prompt"]), int(entry["seed"]), gram, float(entry["mismatch"]), magnitude, rates, anchors
    )


def _pack(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, "<f8").tobytes()).decode("ascii")


def _unpack(text: str, count: int) -> np.ndarray:
    if not isinstance(text, str) or len(text) != 4 * math.ceil(8 * count / 3):
        raise ValueError(f"a matrix does not have its {count} numbers")
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<f8").astype(float)
    except binascii.Error as error:
        raise ValueError(f"a matrix is damaged: {error}") from error


class Recorder:
    """A policy that computes every step and records what a calibration needs.

    Guided outputs are streamed to `folder` (a temporary file there) or, without one, to the CPU's memory; on the
    device the model runs on, nothing is kept but one output a branch.

    Args:
        dtype: of what is stored until the run ends, float32 or a half-precision type.
        folder: where temporary files go, e.g. a fast disc; default: memory.
        size: shape of the latent that is expected, batch dimension left out; another one is an error at the first step.
        channels: which dimension of the latents the channels are: 1 behind a batch dimension, 0 without one.
    """

    boundary: Boundary = "output"

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        folder: str | os.PathLike[str] | None = None,
        size: tuple[int, ...] | None = None,
        channels: int = 1,
    ) -> None:
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"outputs are stored as {dtype}; expected float32, float16 or bfloat16.")
        self.dtype, self.folder, self.size, self.channels = dtype, folder, size, channels
        self.current: _Recording | None = None

    def begin(self, run: Trajectory) -> Strategy:
        """Record one more run; an unfinished one is dropped."""
        if run.num_steps > MOST_STEPS:
            raise ValueError(f"a run of {run.num_steps} steps; at most {MOST_STEPS} can be calibrated.")
        self.current = _Recording(run, self)
        return self.current

    def finish(self, *pairs: tuple[str, int]) -> Calibration:
        """The last run as a calibration: one run for each sample of its batch.

        Args:
            pairs: prompt and seed of every sample.

        Raises:
            ValueError: the run did not come to its end, had other than so many samples, or its latents are not what
                the sampler makes of its outputs.
        """
        if self.current is None or not self.current.complete:
            raise ValueError("the run did not come to its end, so there is nothing to learn from it.")
        return self.current.calibration(pairs)

    def combined(self, vector: np.ndarray) -> torch.Tensor:
        """The last run's outputs and first latent summed with the weights of `vector`, (S + 1,): float32.

        With `Calibration.state_vector(S)` that is the final latent; with a plan's `costs.final_error` added, the
        final latent that plan leads to in open loop.
        """
        if self.current is None:
            raise ValueError("nothing was recorded.")
        return self.current.combined(vector)

    def __str__(self) -> str:
        return "calibration"


class _Recording(Strategy):
    """The guided outputs of one run, and the figures a branch that need whole tensors."""

    history = 0
    skips = False
    predicts_guided = True

    def __init__(self, run: Trajectory, recorder: Recorder) -> None:
        self.run, self._recorder = run, recorder
        self._outputs: list[torch.Tensor] = []
        self._begun: torch.Tensor | None = None  # what the first step was fed
        self._first: torch.Tensor | None = None  # the latent of that: pipelines append conditions
        self._response: np.ndarray | None = None
        self._mismatch = np.zeros(1)  # of every sample
        self._shape = torch.Size()
        self._last: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._magnitude: dict[str, list[torch.Tensor]] = {}  # a step: (rows, 3)
        self._rates: dict[str, list[torch.Tensor]] = {}  # a step: (rows,)

    @property
    def complete(self) -> bool:
        return len(self._outputs) == self.run.num_steps

    def compute(self, step: int, x: torch.Tensor) -> bool:
        if step == 0:
            self._begun = x.detach()
        elif self._response is not None:
            self._compare(step, x.detach(), self._response[step])
        return True

    def feature(self, call: Call, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        x, output = (self._samples(t.detach().float()) for t in (narrow(x, output.shape), output))
        magnitude, rate = torch.tensor([1.0, 0.0, 0.0]).repeat(len(x), 1), torch.zeros(len(x))
        if call.branch in self._last:
            before, x_before = self._last[call.branch]
            over = 1 if output.ndim > 3 else -1
            ratio = (output.norm(dim=over) / before.norm(dim=over)).flatten(1)
            cosine = torch.cosine_similarity(output, before, dim=over).flatten(1)
            magnitude = torch.stack([ratio.mean(1), ratio.std(1), 1 - cosine.mean(1)], 1)
            rate = (output - before).abs().flatten(1).mean(1) / (x - x_before).abs().flatten(1).mean(1)
        self._last[call.branch] = output, x
        self._magnitude.setdefault(call.branch, []).append(magnitude.cpu())
        self._rates.setdefault(call.branch, []).append(rate.cpu())
        return None

    def guided(self, step: int, output: torch.Tensor, computed: bool, sampler: Any) -> torch.Tensor:
        if step == 0 and self._begun is not None:
            self._shape = output.shape
            self._check_size()
            self._response = self._answers(sampler)
            self._first, self._begun = self._store(narrow(self._begun, output.shape)), None
        elif output.shape != self._shape:
            raise ValueError(f"the latent changes from {list(self._shape)} to {list(output.shape)} in mid-run.")
        self._outputs.append(self._store(output.detach()))
        return output

    def release(self) -> None:
        self._last.clear()
        self._begun = None

    @property
    def _size(self) -> tuple[int, ...]:
        """Shape of the latent, batch dimension left out."""
        return tuple(self._shape[1:] if self._recorder.channels else self._shape)

    def _check_size(self) -> None:
        wanted = self._recorder.size
        if wanted is not None and self._size != wanted:
            raise ValueError(
                f"the run's latent is {list(self._size)} and the calibration's {list(wanted)}; calibrate the same "
                "height, width and number of frames, or write to another file."
            )

    def _compare(self, step: int, x: torch.Tensor, row: np.ndarray) -> None:
        """Note by how much a latent differs from what the sampler makes of the outputs before it."""
        vectors = self._vectors()
        truth = self._samples(narrow(x, self._shape)).flatten(1)[: len(vectors[0])].to("cpu", torch.float64)
        if truth.shape == vectors[-1].shape:
            error = _weighted(np.append(row[1 : step + 1], row[0]), vectors) - truth
            self._mismatch = np.maximum(self._mismatch, (error.norm(dim=1) / truth.norm(dim=1)).numpy())

    def _answers(self, sampler: Any) -> np.ndarray:
        if sampler is None:
            raise ValueError("the sampler's response is not known; name the scheduler.")
        try:
            return np.asarray(remembered(sampler))
        except ValueError as error:
            raise ValueError(
                f"{error}, so no error of a plan can be foreseen from its runs; calibrate with a deterministic sampler."
            ) from error

    def _samples(self, x: torch.Tensor) -> torch.Tensor:
        """With a batch dimension."""
        return x if self._recorder.channels else x[None]

    def _store(self, x: torch.Tensor) -> torch.Tensor:
        return held(self._samples(x).flatten(1), self._recorder.dtype, self._recorder.folder)

    def _vectors(self) -> list[torch.Tensor]:
        """Guided outputs and first latent, (samples, elements) each; of batched guidance the latent comes twice."""
        first = self._first if self._first is not None else self._outputs[0]
        return [*self._outputs, first[: len(self._outputs[0])]]

    def calibration(self, pairs: tuple[tuple[str, int], ...]) -> Calibration:
        run, vectors = self.run, self._vectors()
        if len(vectors[0]) != len(pairs) or vectors[0].shape[1] != vectors[-1].shape[1] or self._response is None:
            raise ValueError(
                f"the run gave its sampler {list(vectors[0].shape)} and was fed {list(vectors[-1].shape)} (samples, "
                f"elements) for {len(pairs)} prompt(s); only like shapes are calibrated."
            )
        return Calibration(
            num_steps=run.num_steps,
            model=run.model,
            scheduler=run.scheduler,
            shift=run.shift,
            guidance=run.guidance,
            timesteps=run.timesteps or tuple(float(k) for k in range(run.num_steps)),
            branches=tuple(self._magnitude),
            response=self._response,
            size=self._size,
            levels=tuple(noise_levels_of(run) or ()),
            runs=tuple(self._of_sample(i, prompt, seed) for i, (prompt, seed) in enumerate(pairs)),
        ).verified()

    def _of_sample(self, i: int, prompt: str, seed: int) -> CalibratedRun:
        rows, samples = [v[i] for v in self._vectors()], len(self._outputs[0])
        return CalibratedRun(
            prompt,
            seed,
            gram_matrix(rows),
            float(self._mismatch[i]),
            {n: _sample(torch.stack(steps), i, samples) for n, steps in self._magnitude.items()},
            {n: _sample(torch.stack(steps), i, samples) for n, steps in self._rates.items()},
        )

    def combined(self, vector: np.ndarray) -> torch.Tensor:
        return _weighted(vector, self._vectors()).float().view(self._shape)


def held(x: torch.Tensor, dtype: torch.dtype, folder: str | os.PathLike[str] | None) -> torch.Tensor:
    """A copy in the CPU's memory or, with a folder, in a file there that vanishes with the process."""
    if folder is None:
        return x.to("cpu", dtype, copy=True)
    x = x.to("cpu", dtype)
    size = x.numel() * x.element_size()
    with tempfile.TemporaryFile(dir=folder) as file:  # has no name: nothing is left after a crash
        if hasattr(os, "posix_fallocate"):  # a full disc is an error here, not a crash on the first write
            os.posix_fallocate(file.fileno(), 0, size)
        mapped = np.memmap(file, np.uint8, "w+", shape=(size,))
    stored = torch.from_numpy(mapped).view(dtype).view(x.shape)
    return stored.copy_(x)


def _weighted(vector: np.ndarray, rows: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(rows[0], dtype=torch.float64)
    for weight, row in zip(vector, rows, strict=True):
        if weight:
            total.add_(row.double(), alpha=float(weight))
    return total


def _sample(steps: torch.Tensor, i: int, samples: int) -> np.ndarray:
    """What (S, rows, ...) says of sample i; of batched guidance, where it has several rows, their mean."""
    return np.asarray(steps[:, i::samples].double().mean(1))


def quadratic(vector: np.ndarray, grams: np.ndarray) -> np.ndarray:
    """(runs,): squared norm of a sum of vectors, weights `vector` (n,), inner products `grams` (runs, n, n)."""
    return np.asarray(np.einsum("a,rab,b->r", vector, grams, vector).clip(0))


def gram_matrix(rows: list[torch.Tensor], chunk: int = 2**18) -> np.ndarray:
    """Inner products of flat vectors, in float64, `chunk` columns at a time."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, rows[0].numel(), chunk):
        part = torch.stack([row[start : start + chunk].double() for row in rows])
        total += part @ part.T
    return ((total + total.T) / 2).numpy()  # symmetric to the last bit
