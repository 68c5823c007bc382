"""One run measured from outside, the same way for every method: blocks executed per step, latents, time, memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from stepcache.bench.methods import Contender
from stepcache.core.summary import RunSummary, elapsed, timestamp
from stepcache.measure.generation import Request, generated_frames, shows_latents


class Meter:
    """Watches one run from outside, the same for everyone's method: blocks executed in every step, latents, time."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        modules = [m for n, m in pipe.components.items() if n.startswith("transformer") and m is not None]
        self.blocks = [b for m in modules for name in block_lists(m) for b in getattr(m, name)]
        self.executed: list[int] = [0]
        self.latents: list[torch.Tensor] = []
        self.started: Any = None
        self.ended: Any = None

    @contextmanager
    def watching(self) -> Iterator[Meter]:
        """Count executions below whatever else is put around the blocks: enter this first."""
        before = [vars(block).get("forward") for block in self.blocks]
        for block in self.blocks:
            vars(block)["forward"] = self._counted(block.forward)
        try:
            yield self
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                if own is None:
                    vars(block).pop("forward", None)
                else:
                    vars(block)["forward"] = own

    def _counted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.started is None:
                tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
                self.started = timestamp(next(tensors))
            self.executed[-1] += 1
            return forward(*args, **kwargs)

        return counted

    @contextmanager
    def stepping(self) -> Iterator[dict[str, Any]]:
        """See every step end; yields what the pipeline's call is given for that.

        Pipelines whose call takes no callback (HunyuanVideo-1.5's, PixArt's) are seen through their sampler.
        """
        if shows_latents(self.pipe):

            def ended(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                self._step_ended(tensors["latents"])
                return {}

            yield {"callback_on_step_end": ended, "callback_on_step_end_tensor_inputs": ["latents"]}
            return
        scheduler = self.pipe.scheduler
        step = scheduler.step

        @functools.wraps(step)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            found = step(*args, **kwargs)
            self._step_ended(found[0])
            return found

        scheduler.step = stepped
        try:
            yield {}
        finally:
            del scheduler.step

    def _step_ended(self, latents: torch.Tensor) -> None:
        self.executed.append(0)
        self.latents.append(latents.detach().clone())
        self.ended = timestamp(latents)

    @property
    def loop_seconds(self) -> float:
        """First block to the end of the last step."""
        return elapsed(self.started, self.ended)


def block_lists(module: torch.nn.Module) -> list[str]:
    """Names of a transformer's block lists: its lists of modules that call themselves blocks."""
    lists = {n: m for n, m in module.named_children() if isinstance(m, torch.nn.ModuleList) and len(m)}
    found = [n for n, m in lists.items() if "block" in n.lower() or "Block" in type(m[0]).__name__]
    if not found:
        raise ValueError(f"{type(module).__name__} has no list of blocks to count; looked at {', '.join(lists)}.")
    return found


@dataclass(frozen=True)
class Result:
    """What one run gave.

    Args:
        frames: [T, H, W, 3] uint8.
        latents: float32 on the CPU, after every step.
        executed: blocks executed in every step.
        loop_seconds: first block to the end of the last step.
        summary: of our own methods.
        peak_bytes: most memory allocated on the GPU; None on a CPU.
        seconds: the whole call, text encoder and VAE included.
    """

    frames: np.ndarray
    latents: tuple[torch.Tensor, ...]
    executed: tuple[int, ...]
    loop_seconds: float
    summary: RunSummary | None
    peak_bytes: int | None
    seconds: float = 0.0


def run_once(pipe: Any, request: Request, contender: Contender) -> Result:
    """One run of the pipeline under a method."""
    cuda = pipe.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(pipe.device)
    asked = replace(request, steps=contender.steps or request.steps)
    meter, began = Meter(pipe), time.perf_counter()
    with meter.watching(), meter.stepping() as inputs, contender.enter(pipe, asked.steps) as run:
        frames = generated_frames(pipe, asked, **inputs)
        summary = run.summary() if run is not None else None
    return Result(
        frames,
        tuple(x.to("cpu", torch.float32) for x in meter.latents),
        tuple(meter.executed[:-1]),
        meter.loop_seconds,
        summary,
        torch.cuda.max_memory_allocated(pipe.device) if cuda else None,
        time.perf_counter() - began,
    )
