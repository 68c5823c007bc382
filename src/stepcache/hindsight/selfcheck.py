"""The self-check: how much of a predicted change to believe, measured at every computed step at no extra evaluation.

A plan predicts an output as o_1 + P: the last computed output and an increment (for first-order extrapolation
P = c (o_1 - o_2)). Where steps are few, a low-frequency mode of the guidance difference makes multistep samplers
unstable under such predictions, and some prompts are lost. So when a step *is* computed, the increment A = o - o_1
that happened is compared with the P that would have been predicted there, for every sample, branch and frequency band:

    gain = clip(<A, P> / <P, P>, 0, 1),  averaged with the last gain

and until the next computed step the prediction is o_1 + sum over bands of gain * band(P). It never leaves the span
between reuse (gain 0) and the plan's own prediction (gain 1); a gain that is not a number means reuse. Where looking
back (`stepcache.hindsight`) keeps the sampler stable, gains may be believed to be `floor` at least.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stepcache.core.plan import Check


@dataclass(frozen=True)
class Increment:
    """What the output of one branch did at a computed step, and what the plan would have predicted; equal shapes."""

    happened: torch.Tensor
    predicted: torch.Tensor


class SelfCheck:
    """Gains of one trajectory.

    Args:
        check: the settings.
        batched: the first dimension counts samples, each with gains of its own; else all is one sample.
        grid: height and width of the latent where it comes as tokens (batch, frames * height * width, channels).
            Unknown, such latents have one band.
    """

    def __init__(self, check: Check, batched: bool = True, grid: tuple[int, int] | None = None) -> None:
        self.check, self.batched, self.grid = check, batched, grid
        self.floor = 0.0
        self._gains: dict[str, list[torch.Tensor]] = {}
        self._named: tuple[str, ...] = ()

    @property
    def together(self) -> tuple[str, ...]:
        """Branches whose increments `damp` needs beside the branch's own."""
        return () if self.check.basis == "branch" else self._named

    def learn(self, increments: dict[str, Increment]) -> None:
        """Update the gains by a computed step; branches that are not named lose theirs."""
        happened = self._turn({name: i.happened for name, i in increments.items()})
        predicted = self._turn({name: i.predicted for name, i in increments.items()})
        before, self._gains, self._named = self._gains, {}, tuple(increments)
        for name, change in happened.items():
            pairs = zip(self._split(change), self._split(predicted[name]), strict=True)
            gains = [self._gain(a, p) for a, p in pairs]
            last = before.get(name)
            if last is not None and last[0].shape == gains[0].shape:
                share = self.check.average
                gains = [share * old + (1 - share) * new for old, new in zip(last, gains, strict=True)]
            self._gains[name] = gains

    def damp(self, branch: str, increments: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The believed part of the branch's predicted increment, given those of all branches; `None`: none of it."""
        turned = self._turn(increments)
        if not all(name in self._gains for name in turned):
            return None
        names = [branch] if branch in turned else list(turned)  # the first branch is difference plus second
        believed = {}
        for name in names:
            parts = zip(self._gains[name], self._split(turned[name]), strict=True)
            believed[name] = torch.stack([gain.clamp_min(self.floor) * part for gain, part in parts]).sum(0)
        return believed[branch] if branch in turned else believed["difference"] + believed[list(increments)[1]]

    def _split(self, x: torch.Tensor) -> list[torch.Tensor]:
        return split_bands(x, self.check.bands, self.grid)

    def _gain(self, happened: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        over = list(range(1 if self.batched else 0, happened.ndim))
        gain = (happened * predicted).sum(over, keepdim=True) / predicted.square().sum(over, keepdim=True)
        return gain.clamp(0, 1).nan_to_num(0.0)

    def _turn(self, by_branch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Two branches as (difference, second) in the guidance basis; anything else as it is."""
        if self.check.basis == "branch" or len(by_branch) != 2:
            return by_branch
        (_, first), (name, second) = by_branch.items()
        return {"difference": first - second, name: second}


def split_bands(x: torch.Tensor, edges: tuple[int, ...], grid: tuple[int, int] | None) -> list[torch.Tensor]:
    """Frequency bands of a latent that add up to it, coarse first.

    Args:
        x: (..., height, width), or tokens (batch, frames * height * width, channels) of a known grid; any other shape
            is one band.
        edges: of the mean filters in latent pixels, falling; one band each, and what the finest filter leaves.
        grid: height and width in tokens.
    """
    gridded = grid is not None and x.ndim == 3 and x.shape[1] % (grid[0] * grid[1]) == 0
    if not edges or not (x.ndim >= 4 or gridded):
        return [x]
    smooth = [_mean(x, edge, grid) for edge in edges]
    return [smooth[0], *(fine - coarse for coarse, fine in itertools.pairwise(smooth)), x - smooth[-1]]


def _mean(x: torch.Tensor, edge: int, grid: tuple[int, int] | None) -> torch.Tensor:
    """Mean over edge x edge latent pixels, fewer at the border."""
    if x.ndim == 3 and grid:
        image = x.transpose(1, 2).unflatten(2, (-1, *grid))
        return _mean(image, edge, grid).flatten(2).transpose(1, 2)
    flat = x.reshape(-1, 1, *x.shape[-2:])
    return F.avg_pool2d(flat, edge, stride=1, padding=edge // 2, count_include_pad=False).view(x.shape)
