"""One video on several ranks: diffusers' own context parallelism, and a cache whose ranks decide together.

    torchrun --nproc_per_node=2 -m stepcache generate ...

Attention is split over the ranks (arXiv 2309.14509, Ulysses; arXiv 2310.01889, ring); latents and outputs are whole on
each. A plan is the same on all ranks. A method that decides at run time puts each decision to a vote (`StepCache`,
`group`), because a rank that computes alone would wait forever for the others' attention.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from stepcache.measure.generation import Request

Parallel = Literal["ulysses", "ring"]


LONGEST = 31 * 86400.0
"""Seconds; no rank is waited for longer."""


@dataclass(frozen=True)
class Ranks:
    """Which of the processes that make one video this is.

    Args:
        rank, world: which of how many.
        device: this rank's; None if there is one process, which takes its own.
        group: of all of them; None if there is one.
    """

    rank: int = 0
    world: int = 1
    device: str | None = None
    group: dist.ProcessGroup | None = None

    def split(self, pipe: Any, kind: Parallel, request: Request) -> None:
        """Let the ranks share the attention of the pipeline's transformer; nothing if there is one.

        Args:
            pipe: a diffusers pipeline whose transformer knows context parallelism.
            kind: "ulysses" exchanges heads, "ring" passes keys and values round.
            request: what will be made; its tokens are split.

        Raises:
            ValueError: heads or tokens cannot be divided, or this diffusers or attention cannot do it.
        """
        if self.world == 1:
            return
        try:
            from diffusers import ContextParallelConfig
        except ImportError as error:
            raise ValueError("several ranks need diffusers 0.36 or later.") from error
        transformer, heads = pipe.transformer, pipe.transformer.config.num_attention_heads
        if kind == "ulysses" and heads % self.world:
            raise ValueError(f"{heads} attention heads cannot be divided over {self.world} ranks; use --parallel ring.")
        tokens = video_tokens(pipe, request)
        if tokens is not None and tokens % self.world:
            raise ValueError(f"{tokens} tokens cannot be divided over {self.world} ranks; use another size or number.")
        try:
            with _counted_device():
                transformer.enable_parallelism(config=ContextParallelConfig(**{f"{kind}_degree": self.world}))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"--parallel {kind}: {error}") from error


def world_size() -> int:
    """How many ranks a launcher such as torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def together(timeout: float, device: str | None = None) -> Iterator[Ranks]:
    """The ranks a launcher started (WORLD_SIZE, RANK, LOCAL_RANK), connected while the context lasts.

    Args:
        timeout: seconds after which a rank that does not answer is given up.
        device: "cpu" or "cuda"; default cuda if there is one.

    Raises:
        ValueError: a timeout that is not positive.
        ConnectionError: this rank failed, or another was lost.
    """
    if not 0 < timeout < LONGEST:
        raise ValueError(f"--rank_timeout is {timeout:g}; expected a number of seconds above 0, at most a month.")
    world, rank = world_size(), int(os.environ.get("RANK", 0))
    if world == 1:
        yield Ranks()
        return
    cuda = (device or "cuda").startswith("cuda") and torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
        yield Ranks(rank, world, f"cuda:{local}" if cuda else "cpu", dist.group.WORLD)
    except RuntimeError as error:
        raise ConnectionError(f"rank {rank} of {world} failed, or another was lost: {error}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _counted_device() -> Iterator[None]:
    """Where there is no accelerator, count the CPU as one: diffusers 0.42 divides by the number of accelerators."""
    count = torch.accelerator.device_count
    if count() == 0:
        torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count


def video_tokens(pipe: Any, request: Request) -> int | None:
    """Tokens of a clip in a Wan transformer; None for other models and sizes that are left to the pipeline."""
    sizes = (request.num_frames, request.height, request.width)
    if not type(pipe).__name__.startswith("Wan") or None in sizes:
        return None
    frames, height, width = (int(size) for size in sizes if size is not None)
    frames = (frames - 1) // pipe.vae_scale_factor_temporal + 1
    t, h, w = pipe.transformer.config.patch_size
    space = pipe.vae_scale_factor_spatial
    return int((frames // t) * (height // space // h) * (width // space // w))
