"""The linear response of a sampler: every latent of a run as a sum of the first one and the model's outputs.

Euler, UniPC, DPM++ and most other samplers without noise are linear in the outputs v_s (with guidance: the guided
ones): x_k = a_k x_0 + sum over s < k of R[k, s] v_s. The numbers come from pushing unit vectors through a copy of the
scheduler itself, so they are exact for whatever order, corrector and noise levels it was set to.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Hashable
from typing import Any

import torch


def response(scheduler: Any, steps: int | None = None) -> torch.Tensor:
    """Push unit vectors through a copy of a scheduler, on the CPU, whatever device its own tensors are on.

    Neither the scheduler nor the global random state is touched.

    Args:
        scheduler: with its timesteps set, and its begin index where the run starts later (image to image).
        steps: of the run, where it has no begin index and walks only the last of its timesteps; default: all.

    Returns:
        float64 (S + 1, S + 1): row k is the latent before step k over (x_0, v_0, ..., v_(S-1)); the last row is the
        final latent's.

    Raises:
        ValueError: the sampler is not linear in the outputs alone (it adds noise, or clips), or has timesteps at which
            it does not step.
    """
    parameters = inspect.signature(scheduler.step).parameters.values()
    if sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) > 3:
        raise ValueError(f"{type(scheduler).__name__} is not stepped by output, timestep and sample alone")
    try:
        with torch.random.fork_rng(devices=[]):
            once, tripled = (_push(scheduler, scale, steps) for scale in (1.0, 3.0))
    except IndexError as error:  # its last timestep is an end, not a step
        raise ValueError(f"{type(scheduler).__name__} has no step for each of its timesteps") from error
    if not torch.allclose(3 * once, tripled, rtol=1e-4, atol=1e-6):  # noise does not triple, clipping is not linear
        raise ValueError(
            f"{type(scheduler).__name__} is not linear in the model's outputs (it adds noise or clips at every step)"
        )
    return once


_RESPONSES: dict[Hashable, torch.Tensor] = {}  # of the last four samplers: small, and a function of the key alone


def remembered(scheduler: Any, steps: int | None = None) -> torch.Tensor:
    """`response`, computed once for equal samplers: of one class, with equal settings and noise levels."""
    if hasattr(scheduler, "answers"):  # `Evaluations`: computed already
        return torch.as_tensor(scheduler.answers())
    config, begin = getattr(scheduler, "config", None), getattr(scheduler, "begin_index", None)
    levels = [x for x in (scheduler.timesteps, getattr(scheduler, "sigmas", None)) if x is not None]
    key = (type(scheduler), str(config), begin, steps, str([torch.as_tensor(x).tolist() for x in levels]))
    if config is None or key not in _RESPONSES:
        while len(_RESPONSES) >= 4:
            del _RESPONSES[next(iter(_RESPONSES))]
        _RESPONSES[key] = response(scheduler, steps)
    return _RESPONSES[key]


def _push(scheduler: Any, scale: float, steps: int | None) -> torch.Tensor:
    sampler = on_cpu(copy.deepcopy(scheduler))
    vars(sampler).pop("step", None)  # a host's, which came along
    begin = getattr(sampler, "begin_index", None)
    timesteps = sampler.timesteps[-(steps or 0) if begin is None else begin :]
    # "sample" 0 carries x_0, the others one output each
    x = torch.zeros(len(timesteps) + 1, 1, 1, 1, dtype=torch.float64, device="cpu")
    x[0] = scale
    rows = [x.flatten().clone()]
    for k, t in enumerate(timesteps):
        output = torch.zeros_like(x)
        output[k + 1] = scale
        x = sampler.step(output, t, x, return_dict=False)[0].double()
        rows.append(x.flatten().clone())
    return torch.stack(rows)


def on_cpu(sampler: Any) -> Any:
    """The sampler itself with every tensor it holds moved to the CPU; for a copy that is to be probed."""
    for name, value in vars(sampler).items():
        if isinstance(value, torch.Tensor):
            setattr(sampler, name, value.cpu())
        elif isinstance(value, list | tuple) and any(isinstance(v, torch.Tensor) for v in value):
            moved = [v.cpu() if isinstance(v, torch.Tensor) else v for v in value]
            setattr(sampler, name, type(value)(moved))
    return sampler
