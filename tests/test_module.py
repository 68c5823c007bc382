"""`stepcache.attach`: denoisers that are not diffusers', by the Open-Sora calling convention and others."""

import pytest
import torch

import stepcache
from stepcache import EasyCache, Off, Plan, TaylorSeer, Uniform
from stepcache.core.follow_weights import Planned


class STDiT(torch.nn.Module):
    """Called as Open-Sora calls its model: `model(z, t, y=..., mask=..., ...)`; returns mean and variance channels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inp, self.out = torch.nn.Linear(4, 16), torch.nn.Linear(16, 8)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))
        self.calls = 0

    def forward(self, x, timestep, y, mask=None, fps=None, height=None, width=None):
        self.calls += 1
        h = self.inp(x.movedim(1, -1)) + y.mean((1, 2)).view(-1, 1, 1, 1, 1) + (timestep / 1000).view(-1, 1, 1, 1, 1)
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return self.out(h).movedim(-1, 1)


@torch.no_grad()
def rectified_flow(model, steps=30, guidance=7.0, seed=0, stop=None):
    """Open-Sora's sampling loop: guidance as one batched call, first half of the channels taken."""
    z = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    args = {"y": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(9)), "fps": torch.tensor([24.0])}
    times = [1000 * (1 - i / steps) for i in range(steps)]
    for i, t in enumerate(times):
        if i == stop:
            raise KeyboardInterrupt
        both = torch.cat([z, z], 0)
        pred = model(both, torch.full((2,), t), **args).chunk(2, dim=1)[0]
        cond, uncond = pred.chunk(2, dim=0)
        z = z + (uncond + guidance * (cond - uncond)) / steps
    return z


@torch.no_grad()
def two_calls(model, steps=12, anew=False):
    """Guidance in calls of its own, everything positional; `anew`: prompts are new tensors at every call."""
    z = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    prompts = [torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    for i in range(steps):
        t = torch.tensor([1000 * (1 - i / steps)])
        cond, uncond = (model(z, t, y.clone() if anew else y).chunk(2, dim=1)[0] for y in prompts)
        z = z + (uncond + 4 * (cond - uncond)) / steps
    return z


OPEN_SORA = {"sample": "x", "timestep": "timestep", "num_steps": 30}


def test_open_sora_with_every_step_computed_is_bit_identical():
    model = STDiT()
    base = rectified_flow(model)
    with stepcache.attach(model, Off(), **OPEN_SORA):
        assert torch.equal(rectified_flow(model), base)
    assert "_compiled_call_impl" not in vars(model)


def test_open_sora_computes_the_planned_steps_and_repeats_itself():
    model, plan = STDiT(), Uniform(budget=12).plan(30)
    base = rectified_flow(model)
    model.calls = 0
    with stepcache.attach(model, plan, **OPEN_SORA) as run:
        first = rectified_flow(model)
        assert model.calls == 12
        assert torch.equal(rectified_flow(model), first)
    assert run.summary().computed == plan.computed
    assert [b.name for b in run.summary().branches] == ["all"]
    assert not torch.equal(first, base)
    assert torch.equal(rectified_flow(model), base)


def test_an_aborted_run_is_noticed_by_its_timesteps():
    model, plan = STDiT(), Uniform(budget=12).plan(30)
    with stepcache.attach(model, plan, **OPEN_SORA):
        expected = rectified_flow(model)
        with pytest.raises(KeyboardInterrupt):
            rectified_flow(model, stop=7)
        assert torch.equal(rectified_flow(model), expected)
    options = {k: v for k, v in OPEN_SORA.items() if k != "timestep"}
    with stepcache.attach(model, plan, **options) as run:
        with pytest.raises(KeyboardInterrupt):
            rectified_flow(model, stop=7)
        run.restart()
        assert torch.equal(rectified_flow(model), expected)


def test_branches_in_calls_of_their_own():
    model, plan = STDiT(), Plan(12, (0, 1, 4, 8, 11))
    with stepcache.attach(model, plan, sample="x", condition="y", num_steps=12) as run:
        two_calls(model)
    assert model.calls == 2 * 5
    assert [b.computed for b in run.summary().branches] == [plan.computed] * 2


def test_prediction_at_the_blocks_boundary():
    class Block(torch.nn.Linear):
        def forward(self, x):
            return x + torch.tanh(super().forward(x))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inp, self.out = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
            self.blocks = torch.nn.ModuleList(Block(8, 8) for _ in range(3))

        def forward(self, x, t):
            h = self.inp(x) + t
            for block in self.blocks:
                h = block(h)
            return self.out(h)

    net, xs = Net(), torch.randn(6, 2, 4)
    plan = Plan(6, (0, 1, 3, 5))
    policy = Planned(plan, "blocks")
    with torch.no_grad():
        real = [net(x, i / 6) for i, x in enumerate(xs)]
        with stepcache.attach(net, policy, sample="x", num_steps=6, blocks=list(net.blocks)):
            got = [net(x, i / 6) for i, x in enumerate(xs)]
        for i in (2, 4):
            before = net.inp(xs[i - 1]) + (i - 1) / 6
            after = before
            for block in net.blocks:
                after = block(after)
            expected = net.out(net.inp(xs[i]) + i / 6 + (after - before))
            assert torch.allclose(got[i], expected, atol=1e-6)
        for i in plan.computed:
            assert torch.equal(got[i], real[i])
    with pytest.raises(ValueError, match="boundary blocks needs the block list"):
        stepcache.attach(net, policy, sample="x", num_steps=6)


def test_reuse_of_differences_needs_alike_input_and_output():
    """Open-Sora's model returns twice the channels it is given."""
    model = STDiT()
    with (
        stepcache.attach(model, EasyCache(0.1, 2), **OPEN_SORA),
        pytest.raises(ValueError, match="use a policy that reuses the output itself"),
    ):
        rectified_flow(model)


def test_an_exception_in_the_first_call_shifts_nothing():
    model, plan = STDiT(), Uniform(budget=12).plan(30)
    with stepcache.attach(model, plan, **OPEN_SORA) as run:
        expected = rectified_flow(model)
        inp, model.inp = model.inp, torch.nn.Linear(5, 16)
        with pytest.raises(RuntimeError):
            rectified_flow(model)
        model.inp = inp
        assert torch.equal(rectified_flow(model), expected)
    assert run.summary().computed == plan.computed


@torch.no_grad()
def churned(model, steps=12):
    """Timesteps that rise a little before every fall, as samplers that add noise make them."""
    z = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    y = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))
    for i in range(steps):
        for t in (1000 - 60 * i, 1000 - 60 * i - 80):
            z = z - model(z, torch.tensor([float(t)]), y).chunk(2, dim=1)[0] / (2 * steps)
    return z


def test_a_sampler_that_goes_back_a_little_is_one_trajectory():
    model, plan = STDiT(), Uniform(interval=3).plan(24)
    with stepcache.attach(model, plan, sample="x", timestep="timestep", num_steps=24) as run:
        churned(model)
    assert run.summary().computed == plan.computed


def test_prompts_made_anew_are_known_by_their_content():
    model, plan = STDiT(), Plan(12, (0, 1, 4, 8, 11))
    with stepcache.attach(model, plan, sample="x", timestep="timestep", condition="y", num_steps=12) as run:
        assert torch.equal(two_calls(model, anew=True), two_calls(model, anew=True))
    assert [b.computed for b in run.summary().branches] == [plan.computed] * 2


def test_another_prompt_at_every_step_is_computed_and_said():
    model, plan = STDiT(), Plan(40, (0, 20, 39))
    x = torch.ones(1, 4, 1, 2, 2)
    with stepcache.attach(model, plan, sample="x", timestep="timestep", condition="y", num_steps=40) as run:
        for i in range(40):
            model(x, torch.tensor([1.0 - i / 40]), torch.full((1, 5, 16), float(i)))
    assert len(run.summary().forced) == 37
    assert any("37 calls were computed because there was nothing to predict" in w for w in run.summary().warnings)
    assert len(str(run.summary()).splitlines()) < 15


def test_calls_at_one_timestep_are_branches_by_their_order():
    model, plan = STDiT(), Plan(12, (0, 1, 4, 8, 11))
    with stepcache.attach(model, plan, sample="x", condition="y", num_steps=12):
        expected = two_calls(model)
    with stepcache.attach(model, plan, sample="x", timestep="timestep", num_steps=12) as run:
        assert torch.equal(two_calls(model), expected)
    assert [b.name for b in run.summary().branches] == ["all", "all #2"]
    assert [b.computed for b in run.summary().branches] == [plan.computed] * 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_output_may_be_written_into(mode):
    model, x = STDiT(), torch.ones(1, 4, 1, 2, 2)
    with stepcache.attach(model, Plan(12, (0, 11)), sample="x", num_steps=12), mode():
        first = model(x, torch.tensor([1.0]), torch.ones(1, 5, 16))
        expected = first.clone()
        first.mul_(2)
        for i in range(1, 11):
            output = model(x, torch.tensor([1.0 - i / 12]), torch.ones(1, 5, 16))
            assert torch.equal(output, expected)
            output.mul_(2)


def test_a_second_cache_on_a_module_is_refused_and_order_of_detaching_is_free():
    model, other = STDiT(), STDiT()
    run = stepcache.attach(model, Off(), **OPEN_SORA)
    with pytest.raises(ValueError, match="this STDiT has a cache already"):
        stepcache.attach(model, Off(), **OPEN_SORA)
    second = stepcache.attach(other, Off(), **OPEN_SORA)
    run.detach()
    second.detach()
    assert "_compiled_call_impl" not in vars(model) | vars(other)


def test_two_modules_of_one_class_share_nothing():
    first, second = STDiT(0), STDiT(1)
    plan = TaylorSeer(4, 1).plan(30)
    with stepcache.attach(first, plan, **OPEN_SORA), stepcache.attach(second, Off(), **OPEN_SORA):
        rectified_flow(first)
        rectified_flow(second)
    assert (first.calls, second.calls) == (plan.budget, 30)


def test_bad_names_and_plans():
    model = STDiT()
    with pytest.raises(ValueError, match=r"STDiT.forward has no argument 'z'; its arguments are x, timestep, y"):
        stepcache.attach(model, Off(), sample="z", num_steps=30)
    with pytest.raises(ValueError, match=r"the plan is of 12 steps and the run has 30"):
        stepcache.attach(model, Plan(12, (0, 11)), sample="x", num_steps=30)
    with pytest.raises(TypeError, match="not a policy"):
        stepcache.attach(model, 25, sample="x", num_steps=30)
    assert "_compiled_call_impl" not in vars(model)
