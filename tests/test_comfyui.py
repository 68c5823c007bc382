"""The ComfyUI host against a small fake of our own: hooks, guider, samplers. (The real one: bench/comfyui.py.)"""

import logging

import pytest
import samplers
import torch

from stepcache import Hindsight, Off, Uniform
from stepcache.hosts.comfyui import Patch, is_flow, patched
from stepcache.planning.calibration import Recorder

SIGMAS = torch.linspace(1, 0, 21)


class Patcher:
    """A model as nodes hand it on: options, and wrappers by kind and key."""

    def __init__(self, options=None, wrappers=None):
        self.model_options = options or {"transformer_options": {}}
        self.wrappers = wrappers or {}

    def clone(self):
        options = {**self.model_options, "transformer_options": dict(self.model_options["transformer_options"])}
        return Patcher(options, {kind: dict(found) for kind, found in self.wrappers.items()})

    def add_wrapper_with_key(self, kind, key, function):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(function)

    def get_wrappers(self, kind, key):
        return self.wrappers.get(kind, {}).get(key, [])

    def chain(self, kind, owner, function):
        """`function` inside all wrappers of a kind."""
        for wrapper in [w for found in self.wrappers.get(kind, {}).values() for w in found]:
            function = Executor(owner, wrapper, function)
        return function


class Executor:
    """What a wrapper gets: it goes on when it is called."""

    def __init__(self, owner, wrapper, inner):
        self.class_obj, self._wrapper, self._inner = owner, wrapper, inner
        inner_call = inner if not isinstance(inner, Executor) else inner.enter
        self._go_on = inner_call

    def __call__(self, *args, **kwargs):
        return self._go_on(*args, **kwargs)

    def enter(self, *args, **kwargs):
        return self._wrapper(self, *args, **kwargs)


class Flow:
    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return sigma * noise + (1 - sigma) * latent


class Epsilon:
    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return latent + sigma * noise


class Inner:
    def __init__(self, sampling):
        self.model_sampling = sampling


class Guider:
    """Two branches mixed, in one call or split."""

    def __init__(self, patcher, sampling, cfg=3.0, split=False):
        self.patcher, self.inner_model, self.cfg, self.split = patcher, Inner(sampling), cfg, split
        self.evaluations = 0

    def predict_noise(self, x, sigma, model_options=None, seed=None):
        self.evaluations += 1
        scale = (1 - sigma).clamp_min(1e-3) if isinstance(self.inner_model.model_sampling, Flow) else torch.ones(1)
        x, sigma = x / scale.view(-1, 1, 1, 1), sigma / scale
        if self.split:
            parts = [samplers.posterior_mean(x, s) for s in (sigma, 1.3 * sigma)]
        else:
            parts = samplers.posterior_mean(torch.cat([x, x]), torch.cat([sigma, 1.3 * sigma])).chunk(2)
        return parts[1] + self.cfg * (parts[0] - parts[1])

    def __call__(self, x, sigma, model_options=None, seed=None):
        found = self.patcher.chain("predict_noise", self, self.predict_noise)
        call = found.enter if isinstance(found, Executor) else found
        return call(x, sigma, model_options, seed)


class Sampler:
    """A sampler function with its options."""

    def __init__(self, function, **options):
        self.sampler_function, self.extra_options = function, options

    def sample(self, guider, sigmas, extra, callback, noise, latent=None, mask=None, disable=False):
        return self.sampler_function(guider, noise, sigmas, extra_args=extra, callback=callback, **self.extra_options)


def noise(seed=0, batch=2):
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def run(patcher, function=samplers.euler, sigmas=SIGMAS, sampling=None, seed=0, split=False, batch=2):
    """A sampler's run as ComfyUI begins it; the latent and how many evaluations it took."""
    guider = Guider(patcher, sampling or Flow(), split=split)
    options = patcher.clone().model_options
    sampler = Sampler(function)
    found = patcher.chain("sampler_sample", sampler, sampler.sample)
    call = found.enter if isinstance(found, Executor) else found
    extra = {"model_options": options, "seed": seed}
    result = call(guider, sigmas.clone(), extra, None, sigmas[0] * noise(seed, batch), None, None, True)
    assert "stepcache" not in options["transformer_options"], "nothing is held after the run"
    return result, guider.evaluations


def half(policy=Hindsight):
    return Patch(lambda evaluations: policy(evaluations // 2))


@pytest.mark.parametrize("function", [samplers.euler, samplers.heun, samplers.two_step])
def test_half_the_evaluations(function, caplog):
    plain = Patcher()
    truth, whole = run(plain, function)
    errors = {}
    for policy in (Hindsight, Uniform):
        with caplog.at_level(logging.INFO, "stepcache"):
            found, count = run(patched(plain, half(policy)), function)
        assert count == whole // 2
        assert f"{count} of {whole} evaluations computed" in caplog.text
        errors[policy] = float((found - truth).norm() / truth.norm())
    assert errors[Hindsight] < 0.7 * errors[Uniform]
    assert run(plain, function)[1] == whole, "the model that was given stays as it is"


def test_nothing_skipped_changes_nothing():
    assert torch.equal(run(patched(Patcher(), Patch(lambda n: Off())))[0], run(Patcher())[0])


def test_batched_and_split_calls_are_one_evaluation():
    model = patched(Patcher(), half())
    torch.testing.assert_close(run(model)[0], run(model, split=True)[0], rtol=1e-5, atol=1e-5)


def test_models_whose_noise_is_added_are_not_flow_matching():
    assert (is_flow(Flow()), is_flow(Epsilon())) == (True, False)
    sigmas = samplers.karras(20)
    truth, whole = run(Patcher(), samplers.euler, sigmas, Epsilon())
    found, count = run(patched(Patcher(), half()), samplers.euler, sigmas, Epsilon())
    assert (whole, count) == (20, 10)
    assert float((found - truth).norm() / truth.norm()) < 0.05


def test_parts_of_a_run_are_trajectories_of_their_own():
    model = patched(Patcher(), half())
    assert [run(model, sigmas=part)[1] for part in (SIGMAS[:9], SIGMAS[8:])] == [4, 6]


def test_two_runs_of_one_model_do_not_meet():
    """One run begins and ends inside the other: both are as they are alone."""
    model, inner = patched(Patcher(), half()), []

    def nested(denoiser, x, sigmas, extra_args=None, callback=None, **options):
        if not inner and isinstance(denoiser, Guider):
            inner.append(run(model, seed=1)[0])
        return samplers.euler(denoiser, x, sigmas, extra_args, callback)

    assert torch.equal(run(model, nested)[0], run(model)[0])
    assert torch.equal(inner[0], run(model, seed=1)[0])


def test_an_abort_leaves_nothing_behind():
    model = patched(Patcher(), half())
    expected = run(model)[0]

    def stops(denoiser, x, sigmas, extra_args=None, callback=None, **options):
        if isinstance(denoiser, Guider):
            samplers.euler(denoiser, x, sigmas[:7], extra_args, callback)
            raise InterruptedError("cancelled")
        return samplers.euler(denoiser, x, sigmas, extra_args, callback)

    with pytest.raises(InterruptedError):
        run(model, stops)
    assert torch.equal(run(model)[0], expected)


def test_samplers_that_cannot_skip_compute_and_say_so(caplog):
    def looks_aside(denoiser, x, sigmas, extra_args=None, callback=None, **options):
        if isinstance(denoiser, Guider):
            return samplers.euler(denoiser, x, sigmas, extra_args, callback)
        return samplers.aside(denoiser, x, sigmas, extra_args, callback)

    model = patched(Patcher(), half())
    assert run(model, looks_aside)[1] == 20
    assert "it looks at the unconditional output as well" in caplog.text
    _, count = run(model, samplers.ancestral)
    assert count == 10


def test_a_calibration_is_recorded():
    found = []
    patch = Patch(lambda n: Recorder(), ended=lambda recorder: found.append(recorder.finish(("a", 0), ("b", 1))))
    truth, whole = run(Patcher())
    latent, count = run(patched(Patcher(), patch))
    assert count == whole == 20
    torch.testing.assert_close(latent, truth)
    assert found[0].num_steps == 20
    assert [run.mismatch < 1e-3 for run in found[0].runs] == [True, True]


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match=r"update it to 0\.3\.64 or newer"):
        patched(object(), half())
    with pytest.raises(ValueError, match="carries a StepCache already"):
        patched(patched(Patcher(), half()), half())
    native = Patcher({"transformer_options": {"easycache": object()}})
    with pytest.raises(ValueError, match="carries the native EasyCache or LazyCache"):
        patched(native, half())
    late = patched(Patcher(), half())
    late.model_options["transformer_options"]["easycache"] = object()
    with pytest.raises(ValueError, match="carries the native"):
        run(late)
    with pytest.raises(ValueError, match="context windows"):
        patched(Patcher({"transformer_options": {}, "context_handler": object()}), half())
    with pytest.raises(ValueError, match="does not fit 20 steps"):
        run(patched(Patcher(), Patch(lambda n: Hindsight(30))))
