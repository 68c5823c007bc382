"""What users do to a run: windows, other loops, guidance switched, control residuals, writes in place, NaN, dtypes.

Every test here re-enacts a report on a caching project (docs/methods.md names the kinds).
"""

import contextlib

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UniPCMultistepScheduler,
)
from tiny import sample, tiny_pipe, tiny_scheduler

import stepcache
from stepcache import EasyCache, Hindsight, Off, Plan, PlanFile, TeaCache, Uniform
from stepcache.core.cache import StepCache
from stepcache.core.follow_weights import Planned
from stepcache.core.trajectory import Trajectory
from stepcache.hosts.diffusers import _block_stack
from stepcache.hosts.patching import LastingPatches, TreeEntrance
from stepcache.planning.calibration import Recorder
from stepcache.planning.costs import plan_hindsight

POLICIES = [Uniform(6), Hindsight(6), EasyCache(0.2, 3)]


# ------------------------------------------------------------------------------------------- windows and other loops


@torch.no_grad()
def windowed(pipe, windows, named, steps=12, guidance=5.0):
    """A loop of a user's own: every step evaluates both branches on several windows of the latent."""
    g = torch.Generator().manual_seed(0)
    texts = {"cond": torch.randn(1, 8, 32, generator=g), "uncond": torch.randn(1, 8, 32, generator=g)}
    x = torch.randn(1, 16, 2 * windows, 4, 4, generator=g)
    pipe._guidance_scale = guidance
    pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps:
        parts = []
        for part in x.chunk(windows, 2):
            found = {}
            for name, text in texts.items():
                with pipe.transformer.cache_context(name) if named else contextlib.nullcontext():
                    found[name] = pipe.transformer(part, t[None], text, return_dict=False)[0]
            parts.append(found["uncond"] + guidance * (found["cond"] - found["uncond"]))
        x = pipe.scheduler.step(torch.cat(parts, 2), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("policy", [Off(), *POLICIES], ids=str)
def test_windows_are_branches_of_their_own(named, policy):
    pipe = tiny_pipe()
    base = windowed(pipe, 3, named)
    with stepcache.accelerate(pipe, policy) as run:
        result = windowed(pipe, 3, named)
    summary = run.summary()
    assert [len(b.computed) + len(b.skipped) for b in summary.branches] == [12] * 6
    assert len({b.computed for b in summary.branches}) == 1
    assert not summary.warnings or "never allowed" in summary.warnings[0]
    if isinstance(policy, Off):
        assert torch.equal(result, base)


def test_a_window_is_never_served_from_another_one():
    """With the same input at every step, what a window reuses is what it would have computed."""
    pipe = tiny_pipe()
    pipe.scheduler = Still()
    base = windowed(pipe, 3, True)
    with stepcache.accelerate(pipe, Uniform(6)):
        assert torch.allclose(windowed(pipe, 3, True), base, atol=1e-6)


class Still(UniPCMultistepScheduler):
    """A sampler that stays where it is, at one timestep."""

    def __init__(self):
        super().__init__(prediction_type="flow_prediction", use_flow_sigmas=True)

    def set_timesteps(self, steps, device=None, **_):
        self.timesteps = torch.full((steps,), 500.0)
        self.last = None

    def step(self, model_output, timestep, sample, return_dict=False, **_):
        self.last = model_output
        return (sample,)


@torch.no_grad()
def test_another_pipeline_with_its_own_scheduler_is_left_alone():
    ours, theirs = tiny_pipe(), tiny_pipe()
    theirs.transformer = ours.transformer
    expected = sample(theirs)
    with stepcache.accelerate(ours, Uniform(4)) as run:
        assert torch.equal(sample(theirs), expected), "before any run of ours"
        first = sample(ours)
        assert torch.equal(sample(theirs), expected), "after one"
        assert run.summary().warnings == ()
        with pytest.raises(ZeroDivisionError):
            sample(ours, callback_on_step_end=lambda pipe, step, t, kwargs: 1 / 0 if step == 5 else kwargs)
        assert torch.equal(sample(theirs), expected), "and after one that was aborted"
        assert torch.equal(sample(ours), first)


@torch.no_grad()
def test_another_pipeline_that_shares_our_scheduler_is_left_alone():
    ours, theirs = tiny_pipe(), tiny_pipe(seed=1)
    theirs.scheduler = ours.scheduler
    expected, base = sample(theirs), sample(ours)
    with stepcache.accelerate(ours, Hindsight(4)) as run:
        first = sample(ours)
        assert torch.equal(sample(theirs), expected)
        assert torch.equal(sample(ours), first)
    assert not torch.equal(first, base)
    assert run.summary().warnings == ()


@torch.no_grad()
def test_a_scheduler_put_away_and_back_is_watched_once():
    pipe = tiny_pipe()
    watched, other = pipe.scheduler, tiny_scheduler()
    with stepcache.accelerate(pipe, Hindsight(6)) as run:
        expected = sample(pipe)
        pipe.scheduler = other
        sample(pipe)
        pipe.scheduler = watched
        assert torch.equal(sample(pipe), expected)
    assert run.summary().warnings == ()
    assert "step" not in vars(watched)
    assert "step" not in vars(other)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_more_rows_than_timesteps_are_computed(policy):
    pipe = tiny_pipe()
    with stepcache.accelerate(pipe, policy) as run, torch.no_grad():
        sample(pipe)
        before = run.summary().branches
        x, text = torch.zeros(1, 16, 2, 4, 4), torch.zeros(1, 8, 32)
        for _ in range(3):
            expected = type(pipe.transformer).forward(pipe.transformer, x, torch.ones(1), text, return_dict=False)[0]
            assert torch.equal(pipe.transformer(x, torch.ones(1), text, return_dict=False)[0], expected)
    assert run.summary().branches == before
    assert "3 calls came after the last of 12 steps" in " ".join(run.summary().warnings)


# ------------------------------------------------------------------------------- guidance and shapes that change


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("first", [5.0, 1.0])
def test_guidance_switched_in_the_run(policy, first):
    pipe = tiny_pipe()

    def switch(pipe, step, t, inputs):
        if step == 6:
            pipe._guidance_scale = 6.0 - first
        return inputs

    with stepcache.accelerate(pipe, policy) as run:
        result = sample(pipe, guidance=5.0, callback_on_step_end=switch)
    assert result.isfinite().all()
    assert len(run.summary().branches[0].computed) + len(run.summary().branches[0].skipped) == 12


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("change", ["grows", "halves", "more frames", "axes swap", "batch"])
def test_a_latent_that_changes_its_shape_in_the_run(policy, change):
    pipe = tiny_pipe()
    shapes = {
        "grows": (1, 16, 2, 6, 6),
        "halves": (1, 16, 2, 2, 2),
        "more frames": (1, 16, 4, 4, 4),
        "axes swap": (1, 16, 2, 8, 2),
        "batch": (2, 16, 2, 4, 4),
    }
    x, other = torch.randn(1, 16, 2, 4, 4), torch.randn(shapes[change])
    pipe.scheduler = tiny_euler()
    pipe.scheduler.set_timesteps(12)
    with stepcache.accelerate(pipe, policy) as run, torch.no_grad():
        pipe.scheduler.set_timesteps(12)
        for k, t in enumerate(pipe.scheduler.timesteps):
            x = other if k == 7 else x
            text = torch.ones(len(x), 8, 32)
            v = pipe.transformer(x, t.expand(len(x)), text, return_dict=False)[0]
            assert v.shape == x.shape
            x = pipe.scheduler.step(v, t, x, return_dict=False)[0]
    assert x.isfinite().all()
    assert 7 in run.summary().computed
    if change != "batch":  # prompts of another batch size are branches of their own
        assert any("changed its shape at step 7" in w for w in run.summary().warnings)


def tiny_euler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


# ----------------------------------------------------------------------------- things added between blocks, in place


def shaken(model):
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, 0, 0.1)
    return model.eval()


G = torch.Generator().manual_seed(1)


def random(*shape):
    return torch.randn(*shape, generator=G)


def flux():
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    inputs = {
        "hidden_states": random(1, 16, 4), "encoder_hidden_states": random(1, 8, 32),
        "pooled_projections": random(1, 32), "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3), "guidance": torch.tensor([3.5]),
    }  # fmt: skip
    return shaken(model), inputs


def sd3():
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4,
    )  # fmt: skip
    inputs = {
        "hidden_states": random(1, 4, 8, 8), "encoder_hidden_states": random(1, 8, 32),
        "pooled_projections": random(1, 32), "timestep": torch.tensor([500]),
    }  # fmt: skip
    return shaken(model), inputs


def qwen():
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {
        "hidden_states": random(1, 16, 16), "encoder_hidden_states": random(1, 7, 16),
        "encoder_hidden_states_mask": torch.ones(1, 7).long(), "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
    }  # fmt: skip
    return shaken(model), inputs


CONTROLS = {
    "flux": (flux, {}),
    "flux, double blocks": (flux, {"controlnet_block_samples": 2}),
    "flux, single blocks": (flux, {"controlnet_single_block_samples": 2}),
    "sd3": (sd3, {}),
    "sd3, controlled": (sd3, {"block_controlnet_hidden_states": 3}),
    "qwen": (qwen, {}),
    "qwen, controlled": (qwen, {"controlnet_block_samples": 2}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CONTROLS)
def test_control_residuals_are_counted_once(name):
    """The second call has the very inputs of the first, so what is reused must be what is computed."""
    make, control = CONTROLS[name]
    model, inputs = make()
    tokens = 64 if make is sd3 else 16
    inputs |= {key: [random(1, tokens, 32) for _ in range(count)] for key, count in control.items()}
    truth = model(**inputs, return_dict=False)[0]
    cache, patches = StepCache(Planned(Plan(3, (0, 2)), "blocks")), LastingPatches()
    entrance = TreeEntrance(cache, _block_stack(model, cache, patches))
    cache.begin(Trajectory(3))
    for _ in range(2):
        got = entrance.enter(model, (), {**inputs, "return_dict": False}, inputs["hidden_states"], "cond")[0]
        cache.step_over()
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)
    assert cache.summary().skipped == (1,)
    patches.restore()


class Block(torch.nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.linear, self.in_place = torch.nn.Linear(8, 8), in_place

    def forward(self, x):
        if self.in_place:
            x += torch.tanh(self.linear(x))
            return x
        return x + torch.tanh(self.linear(x))


class Net(torch.nn.Module):
    def __init__(self, in_place=False, scales_input=False):
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.out, self.scales_input = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4), scales_input
        self.blocks = torch.nn.ModuleList(Block(in_place) for _ in range(3))

    def forward(self, x, t):
        if self.scales_input:
            x.mul_(0.5)
        h = self.inp(x) + t
        for block in self.blocks:
            h = block(h)
        return self.out(h)


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_blocks_that_write_into_their_input(in_place):
    net, x = Net(in_place), torch.randn(2, 5, 4)
    truth = net(x.clone(), 0.1)
    policy = Planned(Plan(5, (0, 2, 4)), "blocks")
    with stepcache.attach(net, policy, sample="x", num_steps=5, blocks=list(net.blocks)) as run:
        for _ in range(5):
            torch.testing.assert_close(net(x.clone(), 0.1), truth)
    assert run.summary().skipped == (1, 3)


@torch.no_grad()
@pytest.mark.parametrize("scales_input", [False, True])
def test_easycache_on_a_model_that_writes_into_its_input(scales_input):
    net, xs = Net(scales_input=scales_input), [torch.randn(1, 5, 4)]
    for _ in range(5):
        xs.append(xs[-1] + 0.01 * torch.randn(1, 5, 4))
    with stepcache.attach(net, EasyCache(1e9, 2), sample="x", num_steps=6) as run:
        ys = [net(x.clone(), 0.1) for x in xs]
    a = max(k for k in run.summary().computed if k < 4)
    torch.testing.assert_close(ys[4], xs[4] + (ys[a] - xs[a]))


# -------------------------------------------------------------------------------------------------- NaN and dtypes


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(("bad", "begin"), [(float("nan"), 0), (float("inf"), 0), (float("nan"), 5)])
def test_an_output_that_is_not_finite_passes_through_and_is_said(policy, bad, begin):
    pipe = tiny_pipe()
    calls = [0]

    def spoil(module, inputs, output):
        calls[0] += 1
        if calls[0] > 2 * begin:
            output[0].view(-1)[0] = bad
        return output

    pipe.transformer.register_forward_hook(spoil)
    with stepcache.accelerate(pipe, policy) as run:
        result = sample(pipe)
    assert not result.isfinite().all()
    said = [w for w in run.summary().warnings if "not finite at step" in w]
    assert len(said) == 1
    assert not any("never allowed" in w for w in run.summary().warnings)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_bf16_runs_stay_close_to_fp32_ones(policy):
    """The same decisions, and a result as near the fp32 one as an uncached bf16 run is."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        pipe = tiny_pipe()
        pipe.transformer.to(dtype)
        base = sample(pipe)
        with stepcache.accelerate(pipe, policy) as run:
            results[dtype] = (base.float(), sample(pipe).float(), run.summary().computed)
    (base, full, steps), (base16, half, steps16) = results.values()
    if not isinstance(policy, EasyCache):
        assert steps == steps16
        assert (half - full).norm() < 4 * (base16 - base).norm()


class Quantised(torch.nn.Linear):
    """A linear layer as GGUF and bitsandbytes keep it: weights that are whole numbers."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        scale = layer.weight.abs().max() / 127
        self.scale, self.bias_ = float(scale), layer.bias
        self.weight = torch.nn.Parameter((layer.weight / scale).round().to(torch.int8), requires_grad=False)
        self.bias = None

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias_.to(x.dtype))


def test_teacache_with_quantised_weights():
    pipe = tiny_pipe()
    policy = TeaCache(0.5, coefficients=(0.0, 0.0, 0.0, 1.0, 0.0))
    with stepcache.accelerate(pipe, policy) as run:
        sample(pipe)
    expected = run.summary().computed
    embedder = pipe.transformer.condition_embedder
    embedder.time_proj = Quantised(embedder.time_proj)
    embedder.time_embedder.linear_1 = Quantised(embedder.time_embedder.linear_1)
    with stepcache.accelerate(pipe, policy) as run:
        assert sample(pipe).isfinite().all()
    assert abs(len(run.summary().computed) - len(expected)) <= 1


# ------------------------------------------------------------------------------------------------------- what acts


@pytest.mark.parametrize(("guidance", "fits"), [(5.0, True), (9.0, False), (1.0, False)])
def test_a_plan_is_checked_against_the_guidance_that_acts(guidance, fits):
    pipe = tiny_pipe()
    plan = PlanFile(Plan(12, (0, 5, 11)), "hindsight", guidance=5.0)
    with stepcache.accelerate(pipe, plan):
        if fits:
            assert sample(pipe, guidance=guidance).isfinite().all()
        else:
            with pytest.raises(ValueError, match=f"guidance 5.0 .the run: {guidance}"):
                sample(pipe, guidance=guidance)


def test_attach_checks_plans_against_scheduler_and_guidance():
    net = Net()
    scheduler = tiny_scheduler(5.0)
    scheduler.set_timesteps(12)
    plan = PlanFile(Plan(12, (0, 5, 11)), "hindsight", shift=3.0, guidance=5.0, scheduler="UniPCMultistepScheduler")
    options = {"sample": "x", "num_steps": 12, "scheduler": scheduler}
    with pytest.raises(ValueError, match=r"shift 3.0 \(the run: 5.0\), guidance 5.0 \(the run: 9.0\)"):
        stepcache.attach(net, plan, guidance=9.0, **options)
    assert "step" not in vars(scheduler)
    with pytest.raises(ValueError, match="name it: attach"):
        stepcache.attach(net, Hindsight(5), sample="x", num_steps=12)
    with pytest.raises(ValueError, match="guidance is nan"):
        stepcache.attach(net, Hindsight(5), guidance=float("nan"), **options)


@torch.no_grad()
def test_attach_with_a_scheduler_runs_hindsight_and_restores_both():
    net, base = Net(), None
    for policy in (None, Off(), Hindsight(6), Uniform(6)):
        scheduler = tiny_euler()
        context = contextlib.nullcontext()
        if policy is not None:
            options = {"sample": "x", "num_steps": 12, "scheduler": scheduler, "guidance": 1.0}
            context = stepcache.attach(net, policy, **options)
        with context as run:
            scheduler.set_timesteps(12)
            x = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t / 1000), t, x, return_dict=False)[0]
        if policy is None:
            base = x
        elif isinstance(policy, Off):
            assert torch.equal(x, base)
        else:
            assert len(run.summary().computed) == 6
            assert run.summary().warnings == ()
        assert "step" not in vars(scheduler)
        assert "_compiled_call_impl" not in vars(net)


@torch.no_grad()
def test_attach_calibrates():
    net, recorder = Net(), Recorder()
    scheduler = tiny_euler()
    options = {"sample": "x", "num_steps": 12, "scheduler": scheduler, "guidance": 1.0}
    with stepcache.attach(net, recorder, **options):
        scheduler.set_timesteps(12)
        x = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t / 1000), t, x, return_dict=False)[0]
    calibration = recorder.finish(("a prompt", 0))
    assert (calibration.scheduler, calibration.shift, calibration.guidance) == (type(scheduler).__name__, 3.0, 1.0)
    assert max(r.mismatch for r in calibration.runs) < 1e-4
    plan = plan_hindsight(calibration, 5)
    with stepcache.attach(net, plan, **options) as run:
        scheduler.set_timesteps(12)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t / 1000), t, x, return_dict=False)[0]
    assert run.summary().computed == plan.plan.computed
    with (
        pytest.raises(ValueError, match=r"the run's latent is \[5, 4\] and the calibration's \[7, 4\]"),
        stepcache.attach(net, Recorder(size=(7, 4)), **options),
    ):
        scheduler.set_timesteps(12)
        x = torch.zeros(1, 5, 4)
        scheduler.step(net(x, 1.0), scheduler.timesteps[0], x)
