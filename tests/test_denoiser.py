"""Samplers that are functions of a denoiser: what the probe finds, and runs that skip evaluations."""

import pytest
import samplers
import torch
from hypothesis import given
from hypothesis import strategies as st

import stepcache
from stepcache import EasyCache, Hindsight, Off, Plan, PlanFile, Uniform
from stepcache.hindsight.evaluations import probe
from stepcache.hosts.denoiser import Denoising

SIGMAS = samplers.karras(16)
LINEAR = {"euler": (samplers.euler, 16), "heun": (samplers.heun, 31), "two_step": (samplers.two_step, 16)}


def probed(sampler, sigmas=SIGMAS):
    return probe(lambda denoiser, x: sampler(denoiser, x, sigmas.clone()))


def start(seed=0, batch=3):
    return SIGMAS[0] * torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", LINEAR)
def test_evaluations_and_their_levels(name):
    sampler, count = LINEAR[name]
    found = probed(sampler)
    assert (len(found.sigmas), found.why, found.fixed) == (count, "", True)
    expected = SIGMAS[:-1].tolist() if name != "heun" else [s for s in SIGMAS[1:-1].tolist() for _ in (0, 1)]
    assert list(found.sigmas[1 if name == "heun" else 0 :]) == pytest.approx(expected)


@given(st.sampled_from(sorted(LINEAR)), st.integers(0, 2**31))
def test_every_latent_is_the_response_s_sum(name, seed):
    """With outputs that are noise, latents before every evaluation and the last are response times (x_0, v)."""
    sampler, count = LINEAR[name]
    g = torch.Generator().manual_seed(seed)
    outputs, first, seen = torch.randn(count, 2, 3, generator=g), torch.randn(2, 3, generator=g), []

    def denoiser(x, sigma):
        seen.append(x)
        return x - sigma.view(-1, 1) * outputs[len(seen) - 1]

    seen.append(sampler(denoiser, first, SIGMAS))
    sources = torch.cat([first[None], outputs]).double()
    expected = torch.einsum("ks,sij->kij", probed(sampler).answers(), sources)
    torch.testing.assert_close(torch.stack(seen).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("sampler", "fixed", "why"),
    [
        (samplers.ancestral, True, "adds noise"),
        (samplers.adaptive, False, "depends on the data"),
        (samplers.aside, False, "unconditional output"),
    ],
)
def test_what_keeps_a_sampler_from_it_is_said(sampler, fixed, why):
    state = torch.get_rng_state()
    found = probed(sampler)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.fixed, found.response) == (fixed, None)
    assert why in found.why
    with pytest.raises(ValueError, match=why):
        found.answers()
    if not fixed:
        with pytest.raises(ValueError, match="no evaluation of this sampler can be skipped"):
            Denoising(Uniform(4), found, flow=False)


def test_a_sampler_without_evaluations_or_without_end():
    with pytest.raises(ValueError, match="never evaluates"):
        probe(lambda denoiser, x: x)

    def endless(denoiser, x):
        while True:
            x = denoiser(x, x.new_ones(len(x)))

    with pytest.raises(ValueError, match="more than 2000"):
        probe(endless)


@pytest.mark.parametrize("name", LINEAR)
def test_half_the_evaluations(name):
    sampler, count = LINEAR[name]
    calls, truth = [], sampler(samplers.posterior_mean, start(), SIGMAS)

    def counted(x, sigma):
        calls.append(sigma)
        return samplers.posterior_mean(x, sigma)

    errors = {}
    for policy in (Uniform(count // 2), Hindsight(count // 2)):
        calls.clear()
        with stepcache.accelerate(counted, policy, sampler=sampler, sigmas=SIGMAS) as run:
            found = sampler(run, start(), SIGMAS)
        assert len(calls) == len(run.summary().computed) == count // 2
        assert run.summary().warnings == ()
        errors[type(policy).__name__] = float((found - truth).norm() / truth.norm())
    assert errors["Hindsight"] < 0.5 * errors["Uniform"] < 0.2


def test_flow_matching_s_levels_are_known_as_such():
    """Levels up to 1 are those of flow matching; Hindsight's schedule is the one of those noise levels."""
    sigmas = torch.linspace(1, 0, 17)
    with stepcache.accelerate(lambda x, s: 0.5 * x, Hindsight(6), sampler=samplers.euler, sigmas=sigmas) as run:
        samplers.euler(run, start(), sigmas)
    assert run.summary().computed == Hindsight(6).plan(16, sigmas[:-1].tolist()).computed
    with stepcache.accelerate(samplers.posterior_mean, Hindsight(6), sampler=samplers.euler, sigmas=SIGMAS) as run:
        samplers.euler(run, start(), SIGMAS)
    shares = [s / (1 + s) for s in SIGMAS[:-1].tolist()]
    assert run.summary().computed == Hindsight(6).plan(16, shares).computed


@pytest.mark.parametrize("policy", [Off(), Uniform(16), EasyCache(1e-9)])
def test_nothing_skipped_changes_nothing(policy):
    truth = samplers.heun(samplers.posterior_mean, start(), SIGMAS[-17:])
    with stepcache.accelerate(samplers.posterior_mean, policy, sampler=samplers.euler, sigmas=SIGMAS) as run:
        assert torch.equal(
            samplers.euler(run, start(), SIGMAS), samplers.euler(samplers.posterior_mean, start(), SIGMAS)
        )
    assert truth.isfinite().all()


def test_runs_follow_one_another_and_may_be_aborted():
    with stepcache.accelerate(samplers.posterior_mean, Hindsight(7), sampler=samplers.heun, sigmas=SIGMAS) as run:
        first = samplers.heun(run, start(), SIGMAS)
        assert torch.equal(samplers.heun(run, start(), SIGMAS), first)
        with pytest.raises(RuntimeError, match="enough"):
            samplers.heun(stopped(run, 9), start(), SIGMAS)
        assert torch.equal(samplers.heun(run, start(), SIGMAS), first)
    assert run.cache.strategy.tensors() == []


def stopped(denoiser, after):
    calls = []

    def call(x, sigma):
        calls.append(1)
        if len(calls) > after:
            raise RuntimeError("enough")
        return denoiser(x, sigma)

    return call


def test_bfloat16_stays_bfloat16():
    def rounded(x, sigma):
        return samplers.posterior_mean(x.float(), sigma.float()).to(x.dtype)

    x = start().bfloat16()
    truth = samplers.euler(rounded, x, SIGMAS)
    with stepcache.accelerate(rounded, Hindsight(8), sampler=samplers.euler, sigmas=SIGMAS) as run:
        found = samplers.euler(run, x, SIGMAS)
    assert found.dtype == truth.dtype
    assert float((found - truth).float().norm() / truth.float().norm()) < 0.1


def test_what_does_not_fit_is_said():
    with (
        pytest.raises(ValueError, match="a budget of 17 does not fit 16 steps"),
        stepcache.accelerate(samplers.posterior_mean, Hindsight(17), sampler=samplers.euler, sigmas=SIGMAS),
    ):
        pass
    with (
        stepcache.accelerate(samplers.posterior_mean, Uniform(8), sampler=samplers.euler, sigmas=SIGMAS) as run,
        pytest.raises(ValueError, match="Give it the ones that run"),
    ):
        samplers.heun(run, start(), SIGMAS)
    other = PlanFile(Plan(16, (0, 5, 15)), scheduler="heun")
    with (
        pytest.raises(ValueError, match="heun"),
        stepcache.accelerate(samplers.posterior_mean, other, sampler=samplers.euler, sigmas=SIGMAS),
    ):
        pass


def test_the_denoiser_s_own_attributes_are_seen_through():
    class Wrapped:
        sigma_data = 1.0

        def __call__(self, x, sigma):
            return samplers.posterior_mean(x, sigma)

    with stepcache.accelerate(Wrapped(), Uniform(8), sampler=samplers.euler, sigmas=SIGMAS) as run:
        assert run.sigma_data == 1.0


def test_the_example_runs(capsys):
    import runpy
    from pathlib import Path

    runpy.run_path(str(Path(__file__).parent.parent / "examples" / "kdiffusion.py"), run_name="__main__")
    reuse, ours = capsys.readouterr().out.splitlines()
    assert "16 of 47 evaluations computed" in ours
    assert float(ours.rsplit(" ", 1)[1][:-1]) < float(reuse.rsplit(" ", 1)[1][:-1])


def test_a_skipped_evaluation_costs_next_to_nothing():
    """At Wan's latents of 81 frames of 832x480; the fake model is a thirtieth of a block of the 1.3B."""
    x = torch.randn(1, 16, 21, 60, 104, generator=torch.Generator().manual_seed(0))
    weight = torch.eye(1536, 512)

    def denoiser(x, sigma):
        tokens = torch.zeros(32760, 1536)
        tokens[:, :64] = x.view(32760, 64)
        return (1 - sigma.view(-1, 1, 1, 1, 1)) * (tokens @ weight)[:, :64].reshape(x.shape)

    sigmas = torch.linspace(1, 0, 7)
    with stepcache.accelerate(denoiser, Hindsight(3), sampler=samplers.euler, sigmas=sigmas) as run:
        samplers.euler(run, x, sigmas)
    told = run.summary()
    assert len(told.computed) == 3
    assert told.seconds_per_skipped_step < 0.02 * told.seconds_per_computed_step
