"""A sampler that is a function of a denoiser, as in k-diffusion, with a third of its evaluations.

    python examples/kdiffusion.py

The denoiser is the exact one of a mixture of Gaussians, so nothing needs to be downloaded; put your own in its place.
"""

from __future__ import annotations

import itertools

import torch

import stepcache
from stepcache import Hindsight, Uniform

MEANS = torch.randn(8, 3 * 16 * 16, generator=torch.Generator().manual_seed(0))


def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[x_0 | x] for x = x_0 + sigma n, x_0 around one of eight means; x (N, 3, 16, 16), sigma (N,)."""
    flat, spread = x.flatten(1), sigma.view(-1, 1) ** 2 + 0.04
    weights = torch.softmax(-((flat[:, None] - MEANS) ** 2).sum(-1) / (2 * spread), 1)
    mean = weights @ MEANS
    return (mean + (flat - mean) * 0.04 / spread).view(x.shape)


def sample_heun(model: stepcache.hosts.denoiser.Denoiser, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Heun's method (Karras and others 2022, algorithm 1 without noise): two evaluations a step, one in the last."""
    for sigma, following in itertools.pairwise(sigmas):
        slope = (x - model(x, sigma * x.new_ones(len(x)))) / sigma
        if following > 0:
            there = x + slope * (following - sigma)
            slope = (slope + (there - model(there, following * x.new_ones(len(x)))) / following) / 2
        x = x + slope * (following - sigma)
    return x


def main() -> None:
    """Uncached, reuse, Hindsight."""
    sigmas = torch.cat([torch.linspace(20 ** (1 / 7), 0.02 ** (1 / 7), 24) ** 7, torch.zeros(1)])
    start = sigmas[0] * torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    uncached = sample_heun(denoiser, start, sigmas)
    for policy in (Uniform(16), Hindsight(16)):
        with stepcache.accelerate(denoiser, policy, sampler=sample_heun, sigmas=sigmas) as run:
            found = sample_heun(run, start, sigmas)
        error = float((found - uncached).norm() / uncached.norm())
        done = run.summary()
        print(f"{policy}: {len(done.computed)} of {done.num_steps} evaluations computed, off by {error:.2%}")


if __name__ == "__main__":
    main()
