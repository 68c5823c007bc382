"""Small things done to latents and features."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def weighted(weights: tuple[float, ...], features: list[torch.Tensor]) -> torch.Tensor:
    """The weighted sum of features: one with cancellation, so never in half precision."""
    total = as_float(features[0]) * weights[0]
    for weight, feature in zip(weights[1:], features[1:], strict=True):
        total = torch.add(total, feature, alpha=weight)
    return total


def narrow(x: torch.Tensor, shape: torch.Size | None, last: bool = False) -> torch.Tensor:
    """The first entries of `x` along every dimension in which `shape` is smaller, the batch (first) dimension excepted.

    Pipelines append conditions to the latent, as channels (image to video) or as tokens (editing). `last`: of the
    second dimension the last entries; some put the text's tokens before the latent's.
    """
    if shape is None or x.ndim != len(shape) or any(a < b for a, b in zip(x.shape[1:], shape[1:], strict=True)):
        return x
    for dim in range(1, x.ndim):
        if x.shape[dim] != shape[dim]:
            x = x.narrow(dim, x.shape[dim] - shape[dim] if last and dim == 1 else 0, shape[dim])
    return x


def arrived(output: torch.Tensor) -> torch.Tensor:
    """The tensor behind what torch's functional collectives give, which has no memory of its own to keep or weigh."""
    wait = getattr(output, "trigger_wait", None)
    return output if wait is None else wait()


def as_float(x: torch.Tensor) -> torch.Tensor:
    """Differences of half-precision tensors are taken in float32: they are small against what is subtracted."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def vote(compute: bool, x: torch.Tensor, group: Any) -> bool:
    """Whether any rank of `group` wants to compute; this process's own wish if there is no group. On `x`'s device."""
    if group is None:
        return compute
    votes = torch.tensor([int(compute)], device=x.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)
    return bool(votes.item())
