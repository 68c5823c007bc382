"""The response of real schedulers: latents rebuilt from it, noise levels, samplers that have none."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from stepcache.core.trajectory import Trajectory
from stepcache.hindsight.response import response
from stepcache.hindsight.schedule import noise_levels_of

FLOW = {
    "unipc": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    "unipc 3": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=3
    ),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
    "dpm++": lambda: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}


@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize("steps", [4, 17, 50])
def test_latents_are_sums_and_noise_levels_are_the_scheduler_s(name, steps):
    scheduler = FLOW[name]()
    scheduler.set_timesteps(steps)
    answers = response(scheduler)
    g = torch.Generator().manual_seed(steps)
    start = x = torch.randn(1, 2, 3, 4, generator=g)
    outputs = torch.randn(steps, 1, 2, 3, 4, generator=g)
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(outputs[k], t, x, return_dict=False)[0]
        rebuilt = answers[k + 1, 0] * start + torch.einsum("s,s...->...", answers[k + 1, 1:], outputs.double())
        torch.testing.assert_close(rebuilt.float(), x, rtol=1e-3, atol=1e-4)
    run = Trajectory(steps, timesteps=tuple(map(float, scheduler.timesteps)), sampler=scheduler)
    assert noise_levels_of(run) == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-3)


def test_asking_leaves_the_scheduler_as_it_is():
    scheduler = FLOW["unipc"]()
    scheduler.set_timesteps(8)
    response(scheduler)
    assert scheduler.step_index is None
    assert scheduler.model_outputs == [None, None]


def test_noise_levels_of_other_parametrisations():
    """x = a x_0 + b n is, but for a factor, (1 - sigma) x_0 + sigma n with sigma = b / (a + b)."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    run = Trajectory(10, timesteps=tuple(map(float, scheduler.timesteps)), sampler=scheduler)
    clean = scheduler.alphas_cumprod[scheduler.timesteps].double()
    expected = (1 - clean).sqrt() / (clean.sqrt() + (1 - clean).sqrt())
    assert noise_levels_of(run) == pytest.approx(expected.tolist(), rel=1e-5)
    assert noise_levels_of(Trajectory(10)) is None
    assert noise_levels_of(Trajectory(2, timesteps=(80.0, 0.5))) == pytest.approx([0.08, 0.0005])
    assert noise_levels_of(Trajectory(2, timesteps=(8000.0, 0.5))) is None


def test_noise_is_not_linear():
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="is not linear in the model's outputs"):
        response(scheduler)
