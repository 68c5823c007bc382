"""Samplers that are functions of a denoiser, written plainly for the tests."""

import itertools

import torch


def levels(sigmas, x):
    """Pairs of successive noise levels, the first as a tensor a sample."""
    return [(a, b, a * x.new_ones(len(x))) for a, b in itertools.pairwise(sigmas)]


def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for a, b, now in levels(sigmas, x):
        x = x + (x - model(x, now, **(extra_args or {}))) / a * (b - a)
    return x


def heun(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for a, b, now in levels(sigmas, x):
        d = (x - model(x, now, **(extra_args or {}))) / a
        if b > 0:
            y = x + d * (b - a)
            d = (d + (y - model(y, b * x.new_ones(len(x)), **(extra_args or {}))) / b) / 2
        x = x + d * (b - a)
    return x


def two_step(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Adams and Bashforth's second order."""
    before = None
    for a, b, now in levels(sigmas, x):
        d = (x - model(x, now, **(extra_args or {}))) / a
        x = x + (b - a) * (d if before is None else 1.5 * d - 0.5 * before)
        before = d
    return x


def ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for a, b, now in levels(sigmas, x):
        up = 0.5 * b
        down = (b**2 - up**2) ** 0.5
        x = x + (x - model(x, now, **(extra_args or {}))) / a * (down - a) + torch.randn_like(x) * up
    return x


def adaptive(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Halves a step where the output is large: its evaluations depend on the data."""
    for a, b, now in levels(sigmas, x):
        d = (x - model(x, now, **(extra_args or {}))) / a
        if float(d.abs().max()) > 1:
            x = x + d * (b - a) / 2
            middle = (a + b) / 2
            d = (x - model(x, middle * x.new_ones(len(x)), **(extra_args or {}))) / middle
            x = x + d * (b - a) / 2
        else:
            x = x + d * (b - a)
    return x


def aside(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Asks for the unconditional output as well, as CFG++ does."""
    seen = {}
    options = {**(extra_args or {}).get("model_options", {}), "sampler_post_cfg_function": [seen.update]}
    for a, b, now in levels(sigmas, x):
        denoised = model(x, now, **{**(extra_args or {}), "model_options": options})
        x = denoised + (x - seen["uncond"]) / a * b
    return x


MEANS = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))


def posterior_mean(x, sigma):
    """The exact denoiser of five Gaussians of width 0.2, x = x_0 + sigma n."""
    sigma, flat = sigma.view(-1, 1), x.flatten(1)
    spread = sigma**2 + 0.04
    weights = torch.softmax(-((flat[:, None] - MEANS) ** 2).sum(-1) / (2 * spread), -1)
    mean = weights @ MEANS
    return (mean + (flat - mean) * 0.04 / spread).view(x.shape)


def karras(count, low=0.02, high=10.0):
    """Noise levels as in Karras and others (2022), and 0."""
    ramp = torch.linspace(high ** (1 / 7), low ** (1 / 7), count) ** 7
    return torch.cat([ramp, torch.zeros(1)])
