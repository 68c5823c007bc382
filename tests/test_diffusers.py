"""The diffusers host on real pipelines: exactness, restoring, resets, branches, both boundaries."""

import gc

import pytest
import torch
from conftest import sample, tiny_i2v_pipe, tiny_pipe, tiny_scheduler
from PIL import Image

import stepcache
from stepcache import EasyCache, LeMiCa, MagCache, MagCacheCalibration, Off, Plan

HALF = Plan(12, (0, 1, 2, 5, 8, 11))


def reference_reuse(pipe, plan, boundary, guidance=5.0, seed=1, size=32):
    """The denoising loop written out: last output (or last residual of the blocks) of each branch reused."""
    t = pipe.transformer
    g = torch.Generator().manual_seed(0)
    texts = [torch.randn(1, 8, 32, generator=g), torch.randn(1, 8, 32, generator=g)]
    pipe.scheduler.set_timesteps(plan.num_steps)
    x = torch.randn(1, 16, 2, size // 8, size // 8, generator=torch.Generator().manual_seed(seed))
    kept = {}

    def blocks(x, step, text):
        rope = t.rope(x)
        h = t.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()
        _temb, proj, states, _ = t.condition_embedder(step, text, None)
        proj = proj.unflatten(1, (6, -1))
        for block in t.blocks:
            h = block(h, states, proj, rope)
        return h

    for k, step in enumerate(pipe.scheduler.timesteps):
        outputs = []
        for b, text in enumerate(texts[: 2 if guidance > 1 else 1]):
            ts = step.expand(1)
            if boundary == "output":
                if k in plan.computed:
                    kept[b] = t(x, ts, text, return_dict=False)[0]
                outputs.append(kept[b])
            else:
                tokens = t.patch_embedding(x).flatten(2).transpose(1, 2)
                if k in plan.computed:
                    kept[b] = blocks(x, ts, text) - tokens
                h = tokens + kept[b]
                temb = t.condition_embedder(ts, text, None)[0]
                shift, scale = (t.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
                h = t.proj_out(t.norm_out(h) * (1 + scale) + shift)
                f, hh, w = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
                h = h.reshape(1, f, hh, w, 1, 2, 2, 16).permute(0, 7, 1, 4, 2, 5, 3, 6)
                outputs.append(h.flatten(6, 7).flatten(4, 5).flatten(2, 3))
        v = outputs[0] if guidance <= 1 else outputs[1] + guidance * (outputs[0] - outputs[1])
        x = pipe.scheduler.step(v, step, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@torch.no_grad()
def test_output_reuse_is_exactly_the_last_output(pipe, guidance):
    with stepcache.accelerate(pipe, HALF) as run:
        ours = sample(pipe, guidance=guidance)
    assert torch.equal(ours, reference_reuse(pipe, HALF, "output", guidance))
    assert run.summary().computed == HALF.computed
    assert [b.name for b in run.summary().branches] == (["cond", "uncond"] if guidance > 1 else ["cond"])


@torch.no_grad()
def test_block_reuse_is_the_last_residual_and_runs_embeddings_and_head(pipe):
    with stepcache.accelerate(pipe, HALF, boundary="blocks"):
        ours = sample(pipe)
    expected = reference_reuse(pipe, HALF, "blocks")
    assert (ours - expected).norm() / expected.norm() < 1e-5
    assert not torch.equal(ours, sample(pipe))


@pytest.mark.parametrize("boundary", ["output", "blocks"])
def test_restoring_puts_back_the_very_objects(pipe, boundary):
    t = pipe.transformer
    before = {id(m): dict(vars(m)) for m in t.modules()}
    order, keys = [n for n, _ in t.named_modules()], list(t.state_dict())
    with pytest.raises(ZeroDivisionError), stepcache.accelerate(pipe, HALF, boundary=boundary):
        sample(pipe)
        raise ZeroDivisionError
    for m in t.modules():
        assert "forward" not in vars(m)
        assert set(vars(m)) - set(before[id(m)]) <= {"_diffusers_hook"}  # diffusers' own, made by cache_context
    assert [n for n, _ in t.named_modules()] == order
    assert list(t.state_dict()) == keys
    assert "cache_context" not in vars(t)


def test_restoring_puts_back_an_instance_forward_that_was_there(pipe):
    calls = []
    original = pipe.transformer.forward

    def mine(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    pipe.transformer.forward = mine
    with stepcache.accelerate(pipe, HALF):
        sample(pipe)
    assert len(calls) == 12
    assert pipe.transformer.forward is mine


def test_a_hook_put_over_ours_survives_disable(pipe):
    base = sample(pipe)
    run = stepcache.enable(pipe, HALF)
    ours = pipe.transformer.forward
    pipe.transformer.forward = lambda *a, **k: ours(*a, **k)
    theirs = pipe.transformer.forward
    stepcache.disable(pipe)
    assert pipe.transformer.forward is theirs
    assert torch.equal(sample(pipe), base)
    assert run.summary().branches == ()


@pytest.mark.parametrize("policy", [HALF, EasyCache(0.3, 3), LeMiCa(25, "wan2.1-t2v-1.3B", resample=True)])
def test_after_an_abort_the_next_run_is_as_in_a_fresh_process(policy):
    steps = 30 if isinstance(policy, LeMiCa) else 12
    fresh = tiny_pipe()
    with stepcache.accelerate(fresh, policy):
        expected = sample(fresh, steps)
    pipe = tiny_pipe()

    def abort(pipe, step, t, inputs):
        if step == 6:
            raise KeyboardInterrupt
        return inputs

    with stepcache.accelerate(pipe, policy) as run:
        with pytest.raises(KeyboardInterrupt):
            sample(pipe, steps, callback_on_step_end=abort)
        first = sample(pipe, steps)
        second = sample(pipe, steps)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert run.summary().num_steps == steps


def test_other_size_batch_steps_and_guidance_between_runs(pipe):
    settings = [{}, {"size": 48}, {"batch": 2}, {"guidance": 1.0}, {"frames": 9}, {"steps": 9}, {}]
    expected = []
    for s in settings:
        fresh = tiny_pipe()
        with stepcache.accelerate(fresh, EasyCache(0.3, 3)):
            expected.append(sample(fresh, **s))
    with stepcache.accelerate(pipe, EasyCache(0.3, 3)):
        for s, e in zip(settings, expected, strict=True):
            assert torch.equal(sample(pipe, **s), e)


def test_dtype_change_between_runs(pipe):
    with stepcache.accelerate(pipe, HALF):
        sample(pipe)
        pipe.transformer.to(torch.bfloat16)
        low = sample(pipe)
    fresh = tiny_pipe()
    fresh.transformer.to(torch.bfloat16)
    with stepcache.accelerate(fresh, HALF):
        assert torch.equal(sample(fresh), low)


def test_guidance_switched_off_in_mid_run(pipe):
    def off(pipe, step, t, inputs):
        if step == 5:
            pipe._guidance_scale = 1.0
        return inputs

    with stepcache.accelerate(pipe, HALF) as run:
        sample(pipe, callback_on_step_end=off)
        cond, uncond = run.summary().branches
        assert cond.computed == HALF.computed
        assert uncond.computed + uncond.skipped == (0, 1, 2, 5, 3, 4)
        assert not any(b.kept for b in run.cache._branches.values())


def test_guidance_switched_on_in_mid_run(pipe):
    def on(pipe, step, t, inputs):
        pipe._guidance_scale = 5.0 if step >= 2 else 1.0
        return inputs

    with stepcache.accelerate(pipe, HALF) as run:
        sample(pipe, callback_on_step_end=on)
    cond, uncond = run.summary().branches
    assert cond.computed == HALF.computed
    # Guidance was off at steps 1 and 2, both computed: what uncond kept of step 0 is too old to be repeated.
    assert run.summary().forced == ((3, "uncond"),)
    assert uncond.computed == (0, 3, 5, 8, 11)


def test_callback_that_changes_latents_in_place(pipe):
    def nudge(pipe, step, t, inputs):
        inputs["latents"].mul_(1.01)
        return inputs

    def replace_by_a_copy(pipe, step, t, inputs):
        return {"latents": inputs["latents"] * 1.01}

    with stepcache.accelerate(pipe, EasyCache(0.2, 3)) as run:
        in_place = sample(pipe, callback_on_step_end=nudge)
        first = run.summary().computed
        copied = sample(pipe, callback_on_step_end=replace_by_a_copy)
    assert torch.equal(in_place, copied)
    assert run.summary().computed == first
    assert run.summary().skipped


def test_two_pipelines_of_one_class_do_not_share_state():
    a, b = tiny_pipe(0), tiny_pipe(5)
    alone = []
    for p in (a, b):
        with stepcache.accelerate(p, EasyCache(0.3, 3)):
            alone.append(sample(p))
    with stepcache.accelerate(a, EasyCache(0.3, 3)) as ra, stepcache.accelerate(b, EasyCache(0.3, 3)) as rb:
        together = [None, None]

        def run_b_inside(pipe, step, t, inputs):
            if step == 4:
                together[1] = sample(b)
            return inputs

        together[0] = sample(a, callback_on_step_end=run_b_inside)
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])
    assert ra.summary().num_steps == rb.summary().num_steps == 12
    plain = tiny_pipe(0)
    assert "forward" not in vars(plain.transformer)


def test_a_baseline_run_before_enabling_changes_nothing(pipe):
    sample(pipe)
    with stepcache.accelerate(pipe, HALF) as run:
        ours = sample(pipe)
    fresh = tiny_pipe()
    with stepcache.accelerate(fresh, HALF):
        assert torch.equal(sample(fresh), ours)
    assert [b.name for b in run.summary().branches] == ["cond", "uncond"]


def test_repeated_integer_timesteps_do_not_confuse_the_steps(pipe):
    pipe.scheduler = tiny_scheduler(16.0)
    pipe.scheduler.set_timesteps(100)
    assert len(set(pipe.scheduler.timesteps.tolist())) < 100
    plan = Plan(100, (*tuple(range(0, 99, 2)), 99))
    with stepcache.accelerate(pipe, plan) as run:
        sample(pipe, steps=100, size=16)
    assert run.summary().computed == plan.computed


@pytest.mark.parametrize("boundary", ["output", "blocks"])
def test_cache_size_and_nothing_left(pipe, boundary):
    latent = 16 * 2 * 4 * 4 * 4
    with stepcache.accelerate(pipe, LeMiCa(25, "wan2.1-t2v-1.3B"), boundary=boundary) as run:
        sample(pipe, steps=50)
        assert not any(b.kept for b in run.cache._branches.values())
        assert run.cache.strategy.tensors() == []
    tokens = 2 * 2 * 2 * 48 * 4
    assert run.summary().cache_bytes == 2 * (latent if boundary == "output" else tokens)
    with stepcache.accelerate(pipe, EasyCache(0.2, 3)) as run:
        sample(pipe)
        assert run.cache.strategy.tensors() == []
    assert run.summary().cache_bytes <= 4 * latent


def test_the_pipeline_can_be_collected(pipe):
    import weakref

    own = tiny_pipe()
    with stepcache.accelerate(own, HALF):
        sample(own)
    ref = weakref.ref(own)
    del own
    gc.collect()
    assert ref() is None


def test_image_to_video_uses_the_latents_own_channels():
    pipe = tiny_i2v_pipe()
    image = Image.new("RGB", (32, 32), (200, 30, 60))
    seen = []
    policy = EasyCache(0.2, 3)
    base = sample(pipe, image=image)
    for boundary in ("output", "blocks"):
        with stepcache.accelerate(pipe, Off(), boundary=boundary):
            assert torch.equal(sample(pipe, image=image), base)
    with stepcache.accelerate(pipe, policy) as run:
        begin = run.cache.begin

        def spy(trajectory):
            begin(trajectory)
            compute = run.cache.strategy.compute
            run.cache.strategy.compute = lambda step, x: (seen.append((step, x.shape[1])), compute(step, x))[1]

        run.cache.begin = spy
        sample(pipe, image=image)
    # before its first output nothing says which channels are the latent's own
    assert seen[0] == (0, 36)
    assert {channels for _step, channels in seen[1:]} == {16}
    assert len(run.summary().computed) + len(run.summary().skipped) == 12


def test_magcache_calibration_changes_nothing_and_measures_the_ratios(pipe):
    base = sample(pipe)
    norms = []
    transformer = pipe.transformer
    inputs = {}
    hooks = [
        transformer.blocks[0].register_forward_pre_hook(lambda m, a: inputs.update(x=a[0].clone())),
        transformer.blocks[-1].register_forward_hook(lambda m, a, y: norms.append((y - inputs["x"]).norm(dim=-1))),
    ]
    sample(pipe)
    for h in hooks:
        h.remove()
    policy = MagCacheCalibration()
    with stepcache.accelerate(pipe, policy):
        assert torch.equal(sample(pipe), base)
    ratios = policy.ratios()
    expected = [1.0] + [(norms[2 * k] / norms[2 * k - 2]).mean().item() for k in range(1, 12)]
    assert ratios.branches["cond"] == pytest.approx(expected, abs=2e-5)
    assert set(ratios.branches) == {"cond", "uncond"}
    with stepcache.accelerate(pipe, MagCache(0.3, 3, 0.2, ratios=ratios)) as run:
        sample(pipe)
    assert run.summary().computed == MagCache(0.3, 3, 0.2, ratios=ratios).plan().computed


def test_calibration_without_a_complete_run():
    with pytest.raises(ValueError, match="no complete run"):
        MagCacheCalibration().ratios()


def test_return_dict_results_keep_their_type(pipe):
    t = pipe.transformer
    with stepcache.accelerate(pipe, Plan(3, (0, 2))):
        pipe.scheduler.set_timesteps(3)
        args = (torch.randn(1, 16, 2, 4, 4), torch.tensor([900.0]), torch.randn(1, 8, 32))
        first, second = t(*args), t(*args)
    assert type(first) is type(second)
    assert torch.equal(first.sample, second.sample)


def test_refusals(pipe):
    with pytest.raises(TypeError, match="policy"):
        stepcache.enable(pipe, 25)
    with pytest.raises(ValueError, match=r"not a diffusers pipeline; for other code use stepcache\.attach"):
        stepcache.enable(object(), HALF)
    with stepcache.accelerate(pipe, HALF):
        with pytest.raises(ValueError, match="enabled on this pipeline already"):
            stepcache.enable(pipe, HALF)
        with pytest.raises(ValueError, match=r"the plan is of 12 steps and the run has 20"):
            sample(pipe, steps=20)
    stepcache.disable(pipe)
    stepcache.disable(pipe)
    with (
        stepcache.accelerate(pipe, LeMiCa(25)),
        pytest.raises(ValueError, match="no published table for WanTransformer3D"),
    ):
        sample(pipe)


def test_diffusers_own_cache_is_refused(pipe):
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="diffusers' own cache"):
        stepcache.enable(pipe, HALF)


def test_one_step(pipe):
    base = sample(pipe, steps=1)
    with stepcache.accelerate(pipe, EasyCache()) as run:
        assert torch.equal(sample(pipe, steps=1), base)
    assert run.summary().computed == (0,)
    assert run.summary().warnings


def test_a_transformer_shared_by_two_pipelines_carries_one_cache(pipe):
    other = tiny_pipe()
    other.transformer = pipe.transformer
    with stepcache.accelerate(pipe, HALF), pytest.raises(ValueError, match="same transformer"):
        stepcache.enable(other, HALF)
    with stepcache.accelerate(other, HALF):
        sample(other)


def test_prompts_of_named_branches_are_not_kept(pipe):
    run = stepcache.enable(pipe, HALF)
    sample(pipe)
    assert [b.name for b in run.summary().branches] == ["cond", "uncond"]
    assert not any(isinstance(v, torch.Tensor) for b in run.cache._branches.values() for v in vars(b).values())
    stepcache.disable(pipe)


def test_a_transformer_put_aside_while_enabled_is_free_after_disable(pipe):
    first = pipe.transformer
    stepcache.enable(pipe, HALF)
    pipe.transformer = tiny_pipe(4).transformer
    stepcache.disable(pipe)
    pipe.transformer = first
    with stepcache.accelerate(pipe, HALF):
        sample(pipe)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("hindsight:6", stepcache.Hindsight(6)),
        ("hindsight:0.5", stepcache.Hindsight(0.5)),
        ("uniform:0.25", stepcache.Uniform(0.25)),
        ("easycache:0.3,ret_steps=3", EasyCache(0.3, 3)),
        ("lemica:6,table=wan2.1-t2v-1.3B,resample=1", LeMiCa(6, "wan2.1-t2v-1.3B", resample=True)),
    ],
)
def test_a_policy_may_be_given_by_its_name(pipe, name, policy):
    with stepcache.accelerate(pipe, policy) as run:
        expected = sample(pipe)
    with stepcache.accelerate(pipe, name) as named:
        assert torch.equal(sample(pipe), expected)
    assert named.summary().computed == run.summary().computed
    if "0.5" in name:
        assert len(run.summary().computed) == 6


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hindsigth:25", "'hindsigth:25' is no method known here; did you mean hindsight"),
        ("hindsight", "expected hindsight:BUDGET"),
        ("hindsight:1.5", "expected 2 or more, or a share above 0 and up to 1.0"),
        ("hindsight:half", "budget is 'half'; expected a number of steps, or a share of them such as 0.5"),
        ("easycache:@25", "asks for a search, which stepcache bench does"),
        ("steps:25", "num_inference_steps=25"),
        ("plan:none.json", "does not exist"),
    ],
)
def test_names_that_are_none(pipe, name, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        stepcache.enable(pipe, name)
    stepcache.enable(pipe, "uniform:4")
    stepcache.disable(pipe)


@pytest.mark.parametrize("budget", [0.0, 1.5, -2, 2.5, float("nan"), float("inf"), 1])
def test_budgets_that_are_none(budget):
    for policy in (stepcache.Hindsight, stepcache.Uniform):
        with pytest.raises(ValueError, match="expected 2 or more"):
            policy(budget)


@pytest.mark.parametrize(
    ("share", "steps", "expected"), [(0.5, 50, 25), (0.5, 9, 4), (0.01, 50, 2), (1.0, 8, 8), (0.5, 1, 1)]
)
def test_shares(share, steps, expected):
    from stepcache.core.plan import computed_steps

    assert computed_steps(share, steps) == expected
