"""The response of real schedulers: latents rebuilt from it, noise levels read off it, samplers that have none."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from stepcache.hindsight.response import noise_levels, response

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
    assert noise_levels(answers) == pytest.approx(scheduler.sigmas.tolist(), abs=2e-4)


def test_asking_leaves_the_scheduler_as_it_is():
    scheduler = FLOW["unipc"]()
    scheduler.set_timesteps(8)
    response(scheduler)
    assert scheduler.step_index is None
    assert scheduler.model_outputs == [None, None]


def test_other_parametrisations_have_no_flow_noise_levels():
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    assert noise_levels(response(scheduler)) is None


def test_noise_is_not_linear():
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="is not linear in the model's outputs"):
        response(scheduler)
