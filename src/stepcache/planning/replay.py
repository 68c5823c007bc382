"""LeMiCa's graph, measured: continue from a stored state with one segment reused (arXiv 2511.00090).

The weight of edge i -> j is the mean absolute change of the final latent when the steps between i and j reuse the
output of step i, and all others are computed. The uncached run is recorded once; up to j - 1 a replay takes its outputs
from the record, so that only steps from j on are evaluated. At the `blocks` boundary the block stack's residuals are
recorded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from stepcache.core.strategy import Call, Strategy
from stepcache.core.trajectory import BOUNDARIES, Boundary, Trajectory
from stepcache.files import parse_document, read_text, write_atomically
from stepcache.hosts.diffusers import accelerate
from stepcache.planning.calibration import Calibration, held
from stepcache.planning.paths import Edges

EDGES_SCHEMA, EDGES_VERSION = "stepcache.edges", 1


@dataclass(frozen=True)
class MeasuredEdges:
    """Edge weights of one model, run by run.

    Args:
        num_steps, model, guidance: what was run.
        boundary: where the segment was reused.
        longest: most steps an edge jumps.
        runs: (prompt, seed, edges) of every run; edges are (i, j, weight), weight being the mean absolute change of an
            entry of the final latent.
    """

    num_steps: int
    model: str | None
    guidance: float | None
    boundary: Boundary
    longest: int
    runs: tuple[tuple[str, int, tuple[tuple[int, int, float], ...]], ...] = ()

    @property
    def done(self) -> set[tuple[str, int]]:
        """(prompt, seed) of the runs it has."""
        return {(prompt, seed) for prompt, seed, _ in self.runs}

    def mean(self) -> dict[tuple[int, int], float]:
        """(i, j) -> weight, the mean over runs."""
        sums: dict[tuple[int, int], list[float]] = {}
        for _, _, edges in self.runs:
            for i, j, weight in edges:
                sums.setdefault((i, j), []).append(weight)
        return {edge: float(np.mean(weights)) for edge, weights in sums.items() if len(weights) == len(self.runs)}

    def check(self, calibration: Calibration) -> None:
        """ValueError if they are of another model, step count or guidance than the calibration."""
        names = ("num_steps", "model", "guidance")
        found = [
            f"{name} {getattr(self, name)} (the calibration: {getattr(calibration, name)})"
            for name in names
            if getattr(self, name) != getattr(calibration, name)
        ]
        if found:
            raise ValueError(f"the measured edges are of {', '.join(found)}.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, whole or not at all."""
        document = {"schema": EDGES_SCHEMA, "version": EDGES_VERSION, **vars(self)}
        write_atomically(path, json.dumps(document, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MeasuredEdges:
        """Read `save`'s file; FileNotFoundError or ValueError, naming the file."""
        text = read_text(path, "edges")
        try:
            data = parse_document(text, EDGES_SCHEMA, EDGES_VERSION)
            data["runs"] = tuple(
                (str(prompt), int(seed), tuple((int(i), int(j), float(w)) for i, j, w in edges))
                for prompt, seed, edges in data["runs"]
            )
            if data["boundary"] not in BOUNDARIES:
                raise ValueError(f"boundary is {data['boundary']!r}")
            return cls(**data)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"edges file {os.fspath(path)!r}: not valid ({error}).") from error


class Replay:
    """A policy that records its first run; its later runs repeat that one with one segment reused."""

    def __init__(self, boundary: Boundary, folder: str | None = None) -> None:
        self.boundary = boundary
        self.record = _Record(folder)
        self.run = Trajectory(0)
        self._segment: tuple[int, int] | None = None

    def begin(self, run: Trajectory) -> Strategy:
        """The record, or state for one replay."""
        if self._segment is None:
            self.run = run
            return self.record
        return _Segment(self.record, *self._segment)

    def segment(self, i: int, j: int) -> None:
        """The next run repeats step i between i and j."""
        self._segment = i, j

    def __str__(self) -> str:
        return "replay"


class _Record(Strategy):
    """Computes every step and keeps what each gave: (branch, step) -> output."""

    history = 0
    skips = False

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self.outputs: dict[tuple[str, int], torch.Tensor] = {}

    def compute(self, step: int, x: torch.Tensor) -> bool:
        return True

    def feature(self, call: Call, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        self.outputs[call.branch, call.step] = held(output.detach(), output.dtype, self.folder)
        return None


class _Segment(Strategy):
    """Outputs up to i from the record, i repeated up to j, all from j on computed."""

    history = 0

    def __init__(self, record: _Record, i: int, j: int) -> None:
        self.record, self.i, self.j = record, i, j

    def compute(self, step: int, x: torch.Tensor) -> bool:
        return step >= self.j

    def can_predict(self, step: int, nodes: list[int], evaluated: bool) -> bool:
        return True

    def predict(self, call: Call, kept: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return self.record.outputs[call.branch, min(call.step, self.i)].to(x.device, copy=True)


def measured_edges(
    pipe: Any,
    runs: Iterable[tuple[str, int]],
    sample: Callable[[str, int], torch.Tensor],
    *,
    longest: int,
    boundary: Boundary = "output",
    known: MeasuredEdges | None = None,
    save: Callable[[MeasuredEdges], None] | None = None,
    progress: Callable[[int], Any] | None = None,
    folder: str | None = None,
) -> MeasuredEdges:
    """Measure all edges of at most `longest` steps by replays.

    Args:
        pipe: a diffusers pipeline.
        runs: (prompt, seed) pairs; those that `known` has are left out.
        sample: runs the pipeline once and returns the final latent.
        longest: most steps an edge jumps, 2 or more.
        boundary: where the segment is reused.
        known: edges to go on with.
        save: called after every run.
        progress: called with 1 after every replay.
        folder: where the recorded outputs are held, default memory.
    """
    if longest < 2:
        raise ValueError(f"longest is {longest}; expected 2 or more, an edge over one step changes nothing.")
    edges = known
    for prompt, seed in runs:
        if edges is not None and (prompt, seed) in edges.done:
            continue
        found, replay = [], Replay(boundary, folder)
        with accelerate(pipe, replay):
            truth = sample(prompt, seed).float()
            run = replay.run
            for i, j in replays(run.num_steps, longest):
                replay.segment(i, j)
                change = (sample(prompt, seed).float() - truth).abs().mean()
                found.append((i, j, float(change)))
                if progress is not None:
                    progress(1)
        if edges is None:
            edges = MeasuredEdges(run.num_steps, run.model, run.guidance, boundary, longest)
        edges = replace(edges, runs=(*edges.runs, (prompt, seed, tuple(found))))
        if save is not None:
            save(edges)
    if edges is None:
        raise ValueError("no runs were asked for; give at least one prompt and seed.")
    return edges


def replays(num_steps: int, longest: int) -> list[tuple[int, int]]:
    """The edges that need a measurement: all that jump 2 to `longest` steps."""
    return [(i, j) for i in range(num_steps) for j in range(i + 2, min(i + longest, num_steps - 1) + 1)]


def rank_agreement(a: Edges, b: Edges) -> float:
    """Spearman's rank correlation of two graphs over the edges of more than one step that both have."""
    common = sorted(e for e in set(a) & set(b) if e[1] - e[0] > 1)
    if len(common) < 3:
        raise ValueError("the two graphs have fewer than three edges in common.")
    middle = (len(common) - 1) / 2
    first, second = (np.argsort(np.argsort([graph[e] for e in common])) - middle for graph in (a, b))
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))
