"""What users combine a cache with: compilation, offloading, LoRA, batches, callbacks, two experts."""

import gc

import pytest
import torch
from conftest import sample, tiny_pipe, tiny_scheduler, tiny_transformer, tiny_vae

import stepcache
from stepcache import EasyCache, LeMiCa, MagCache, Off, Plan, Ratios, TaylorSeer, TeaCache, Uniform

HALF = Plan(12, (0, 1, 2, 5, 8, 11))
LINEAR = TaylorSeer(3, 1).plan(12)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_frames() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("how", ["torch.compile", "module.compile"])
def test_a_plan_skips_outside_the_compiled_graph(how):
    """After the first two steps nothing is compiled anew, whatever is skipped."""
    expected, pipe = None, tiny_pipe()
    with stepcache.accelerate(pipe, HALF):
        expected = sample(pipe)
    if how == "torch.compile":
        pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")
    else:
        pipe.transformer.compile(backend="aot_eager")
    counts = []

    def note(pipe, step, t, inputs):
        counts.append(compiled_frames())
        return inputs

    with stepcache.accelerate(pipe, HALF) as run:
        compiled = sample(pipe, callback_on_step_end=note)
    assert counts[1] > 0
    assert counts[1:] == [counts[1]] * 11
    assert torch.allclose(compiled, expected, atol=1e-4)
    assert run.summary().computed == HALF.computed
    before = counts[-1]
    counts.clear()
    with stepcache.accelerate(pipe, LINEAR):
        sample(pipe, callback_on_step_end=note)
    assert set(counts) == {before}


def test_compiled_blocks_at_the_blocks_boundary(pipe):
    with stepcache.accelerate(pipe, HALF, boundary="blocks"):
        expected = sample(pipe)
    for block in pipe.transformer.blocks:
        block.compile(backend="aot_eager")
    with stepcache.accelerate(pipe, HALF, boundary="blocks") as run:
        assert torch.allclose(sample(pipe), expected, atol=1e-4)
    assert run.summary().computed == HALF.computed


def test_a_wholly_compiled_transformer_has_no_blocks_to_enter(pipe):
    pipe.transformer.compile(backend="aot_eager")
    with pytest.raises(ValueError, match="compile the blocks instead"):
        stepcache.enable(pipe, HALF, boundary="blocks")


def test_compiling_after_enabling_is_an_error_and_not_a_silent_loss(pipe):
    with stepcache.accelerate(pipe, HALF):
        pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")
        with pytest.raises(ValueError, match="compiled or replaced after the cache was enabled"):
            sample(pipe)


def test_module_compile_after_enabling_is_noticed(pipe):
    with stepcache.accelerate(pipe, HALF) as run:
        pipe.transformer.compile(backend="aot_eager")
        with pytest.raises(ValueError, match="compiled or replaced after the cache was enabled"):
            sample(pipe)
    assert run.summary().branches == ()


def test_model_offload_over_two_runs(pipe):
    """accelerate takes its hooks out and puts them in again after every run; skipped calls must not load weights."""
    accelerate = pytest.importorskip("accelerate")
    with stepcache.accelerate(pipe, HALF):
        expected = sample(pipe)
    hook = accelerate.hooks.CpuOffload(execution_device=torch.device("cpu"))
    loads = []
    pre = hook.pre_forward
    hook.pre_forward = lambda module, *a, **k: (loads.append(1), pre(module, *a, **k))[1]
    accelerate.hooks.add_hook_to_module(pipe.transformer, hook)
    with stepcache.accelerate(pipe, HALF) as run:
        assert torch.equal(sample(pipe), expected)
        assert len(loads) == 2 * len(HALF.computed)
        accelerate.hooks.remove_hook_from_module(pipe.transformer)
        accelerate.hooks.add_hook_to_module(pipe.transformer, hook)
        assert torch.equal(sample(pipe), expected)
    assert len(loads) == 4 * len(HALF.computed)
    assert run.summary().computed == HALF.computed


def test_lora_loaded_and_scaled(pipe):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    plain = sample(pipe)
    pipe.transformer.add_adapter(config)
    results = {}
    for scale in (1.0, 0.3):
        base = sample(pipe, attention_kwargs={"scale": scale})
        with stepcache.accelerate(pipe, Off()):
            assert torch.equal(sample(pipe, attention_kwargs={"scale": scale}), base)
        with stepcache.accelerate(pipe, HALF) as run:
            results[scale] = sample(pipe, attention_kwargs={"scale": scale})
        assert run.summary().computed == HALF.computed
        assert not torch.equal(base, plain)
    assert not torch.equal(results[1.0], results[0.3])


@pytest.mark.parametrize("policy", [HALF, LINEAR, EasyCache(0.3, 3)])
def test_a_batch_is_its_samples(policy):
    """A plan treats every sample of a batch as if it were alone."""
    pipe = tiny_pipe()
    with stepcache.accelerate(pipe, policy) as run:
        both = sample(pipe, batch=2)
    assert both.shape[0] == 2
    assert run.summary().skipped
    if isinstance(policy, Plan):
        g = torch.Generator().manual_seed(0)
        cond, uncond = torch.randn(2, 8, 32, generator=g), torch.randn(2, 8, 32, generator=g)
        noise = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
        for i in range(2):
            with stepcache.accelerate(pipe, policy):
                alone = pipe(
                    prompt_embeds=cond[i : i + 1],
                    negative_prompt_embeds=uncond[i : i + 1],
                    latents=noise[i : i + 1],
                    height=32,
                    width=32,
                    num_frames=5,
                    num_inference_steps=12,
                    output_type="latent",
                ).frames
            assert torch.allclose(alone[0], both[i], atol=1e-4)


def test_a_callback_that_changes_latents_changes_what_is_computed_from_them(pipe):
    def halve(pipe, step, t, inputs):
        return {"latents": inputs["latents"] * 0.5} if step == 4 else inputs

    with stepcache.accelerate(pipe, HALF) as run:
        plain = sample(pipe)
        changed = sample(pipe, callback_on_step_end=halve)
        assert torch.equal(sample(pipe), plain)
    assert not torch.equal(changed, plain)
    assert run.summary().computed == HALF.computed


def test_guidance_switched_off_half_way(pipe):
    def off(pipe, step, t, inputs):
        if step == 5:
            pipe._guidance_scale = 1.0
        return inputs

    with stepcache.accelerate(pipe, HALF) as run:
        sample(pipe, callback_on_step_end=off)
        branches = {b.name: b for b in run.summary().branches}
        assert branches["cond"].computed == HALF.computed
        assert branches["uncond"].computed == (0, 1, 2, 5)
        assert branches["uncond"].skipped == (3, 4)
        assert all(not b.kept for b in run.cache._branches.values())


def test_two_pipelines_interleaved_step_by_step():
    first, second = tiny_pipe(0), tiny_pipe(7)
    with stepcache.accelerate(first, HALF):
        expected = sample(first)
    with stepcache.accelerate(second, LINEAR):
        inner = sample(second)
    results = []

    def interrupt(pipe, step, t, inputs):
        if step == 4:
            results.append(sample(second))
        return inputs

    with stepcache.accelerate(first, HALF), stepcache.accelerate(second, LINEAR):
        assert torch.equal(sample(first, callback_on_step_end=interrupt), expected)
    assert torch.equal(results[0], inner)


def two_experts():
    from diffusers import WanPipeline

    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=tiny_transformer(0),
        transformer_2=tiny_transformer(5),
        vae=tiny_vae(),
        scheduler=tiny_scheduler(),
        boundary_ratio=0.8,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def handover_of(pipe, steps=12):
    pipe.scheduler.set_timesteps(steps)
    return int((pipe.scheduler.timesteps >= 800).sum())


@pytest.mark.parametrize("boundary", ["output", "blocks"])
def test_two_experts_compute_every_step_exactly(boundary):
    pipe = two_experts()
    base = sample(pipe)
    with stepcache.accelerate(pipe, Off(), boundary=boundary):
        assert torch.equal(sample(pipe), base)


@pytest.mark.parametrize("policy", [HALF, LINEAR, EasyCache(0.3, 3)], ids=["plan", "taylor", "easycache"])
def test_the_second_expert_starts_with_an_evaluation_of_its_own(policy):
    pipe = two_experts()
    switch = handover_of(pipe)
    assert 3 < switch < 9
    calls = {"transformer": 0, "transformer_2": 0}
    for name in calls:
        getattr(pipe, name).proj_out.register_forward_hook(lambda *_, n=name: calls.__setitem__(n, calls[n] + 1))
    with stepcache.accelerate(pipe, policy) as run:
        sample(pipe)
    summary = run.summary()
    assert switch in summary.computed
    assert any(k < switch for k in summary.skipped)
    assert any(k > switch for k in summary.skipped)
    assert calls["transformer"] == 2 * sum(k < switch for k in summary.computed)
    assert calls["transformer_2"] == 2 * sum(k >= switch for k in summary.computed)
    assert [b.name for b in summary.branches] == ["cond", "uncond"]


@pytest.mark.parametrize("switch", [4, 5, 6, 9])
@pytest.mark.parametrize("late", [False, True])
def test_extrapolation_stays_exact_on_a_line_after_a_handover_or_a_late_branch(switch, late):
    """Weights are for the planned steps; evaluations that come between must not take their place."""
    from stepcache import StepCache, Trajectory

    cache, plan = StepCache(TaylorSeer(3, 1)), TaylorSeer(3, 1).plan(24)
    cache.begin(Trajectory(24))
    reused = []
    for k in range(24):
        for key in ("cond", "uncond") if late and k >= switch else ("cond",):
            x = torch.zeros(1)
            call = cache.enter(key, x, owner=0 if late or k < switch else 1)
            if call.compute:
                cache.keep(call, x, torch.tensor([float(k)]))
            else:
                reused.append((key, k))
                if len([c for c in plan.computed if c < k]) > 1:  # before that there is nothing but repetition
                    assert cache.predict(call, x).item() == pytest.approx(k)
                else:
                    cache.predict(call, x)
            cache.leave(call, x)
        cache.step_over()
    last = "uncond" if late else "cond"
    assert sum(key == last and k > switch + 6 for key, k in reused) >= 5


def test_nothing_of_the_first_expert_is_reused_by_the_second():
    pipe = two_experts()
    switch = handover_of(pipe)
    early = Plan(12, tuple(range(switch + 1)))
    late = Plan(12, tuple(range(switch)))
    with stepcache.accelerate(pipe, early):
        a = sample(pipe)
    with stepcache.accelerate(pipe, late) as run:
        assert torch.equal(sample(pipe), a)
    assert run.summary().computed == early.computed


def test_magcache_gives_each_expert_its_own_start():
    pipe = two_experts()
    switch = handover_of(pipe)
    ratios = Ratios(12, {"cond": (1.0,) * 12, "uncond": (1.0,) * 12})
    with stepcache.accelerate(pipe, MagCache(0.1, 12, 0.4, ratios=ratios)) as run:
        sample(pipe)
    kept = run.summary().computed
    windows = [*range(int(2 * switch * 0.4 + 1) // 2), *range(switch, int(switch + (12 - switch) * 0.4) + 1), 11]
    assert set(windows) <= set(kept)
    assert len(kept) < 12


def test_teacache_on_wan_follows_the_rule_written_out(pipe):
    """The authors' loop, on the embeddings of the very calls the pipeline makes."""
    for ret in (False, True):
        embeddings = []

        def see(module, args, out, ret=ret, embeddings=embeddings):
            embeddings.append(out[1 if ret else 0].detach().float())

        hook = pipe.transformer.condition_embedder.register_forward_hook(see)
        sample(pipe, steps=20, guidance=1.0)
        hook.remove()
        assert len(embeddings) == 20
        policy = TeaCache(0.15, ret, model="wan2.1-t2v-1.3B")
        from stepcache.methods.teacache_coefficients import COEFFICIENTS

        c = COEFFICIENTS["wan2.1-t2v-1.3B"]["ret_steps" if ret else "no_ret_steps"]
        computed, total = [], 0.0
        for s in range(20):
            if s < (5 if ret else 1) or s >= 19:
                should, total = True, 0.0
            else:
                d = float((embeddings[s] - embeddings[s - 1]).abs().mean() / embeddings[s - 1].abs().mean())
                total += sum(a * d ** (4 - i) for i, a in enumerate(c))
                should = not total < 0.15
                total = 0.0 if should else total
            if should:
                computed.append(s)
        with stepcache.accelerate(pipe, policy) as run:
            sample(pipe, steps=20)
        assert list(run.summary().computed) == computed
        assert run.summary().plan.computed == tuple(computed)


def test_teacache_needs_coefficients_and_an_embedding(pipe):
    with stepcache.accelerate(pipe, TeaCache()), pytest.raises(ValueError, match="no published coefficients for WanT"):
        sample(pipe)
    with pytest.raises(ValueError, match="known here for Wan in diffusers only"):
        TeaCache(model="wan2.1-t2v-14B").begin(stepcache.Trajectory(50))


def test_a_stochastic_sampler_is_remarked_upon(pipe):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    with stepcache.accelerate(pipe, HALF) as run:
        sample(pipe)
    assert any("adds fresh noise at every step" in w for w in run.summary().warnings)


def test_distilled_models_are_remarked_upon(pipe):
    pipe.transformer.register_to_config(use_meanflow=True)
    with stepcache.accelerate(pipe, HALF) as run:
        sample(pipe)
    assert any("distilled to few steps" in w for w in run.summary().warnings)


def test_teacache_where_the_time_embedder_stays_in_float32(pipe):
    with stepcache.accelerate(pipe, TeaCache(0.15, True, model="wan2.1-t2v-1.3B")) as run:
        sample(pipe, steps=20)
    expected = run.summary().computed
    half = tiny_pipe()
    half.transformer.to(torch.bfloat16)
    half.transformer.condition_embedder.time_embedder.to(torch.float32)
    assert half.transformer.condition_embedder.time_proj.weight.dtype == torch.bfloat16
    with stepcache.accelerate(half, TeaCache(0.15, True, model="wan2.1-t2v-1.3B")) as run:
        sample(half, steps=20)
    assert abs(len(run.summary().computed) - len(expected)) <= 2


def test_a_pipeline_that_went_away_leaves_nothing_on_its_transformer():
    first = tiny_pipe()
    transformer = first.transformer
    stepcache.enable(first, HALF)
    del first
    gc.collect()
    assert "_compiled_call_impl" not in vars(transformer)
    second = tiny_pipe()
    second.transformer = transformer
    with stepcache.accelerate(second, HALF) as run:
        sample(second)
    assert run.summary().computed == HALF.computed


def test_step_counts_of_a_pipeline_that_shares_the_transformer(pipe):
    """The other pipeline is not cached, whatever it shares; what this one does next is its own."""
    from diffusers import WanPipeline

    other = WanPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    with stepcache.accelerate(pipe, Uniform(interval=3)) as run:
        first = sample(pipe, steps=20)
        uncached = sample(other, steps=12)
        assert run.summary().num_steps == 20
        assert torch.equal(sample(pipe, steps=20), first)
        assert run.summary().computed == (0, 3, 6, 9, 12, 15, 18, 19)
    assert torch.equal(sample(other, steps=12), uncached)


def test_the_recorded_plan_is_of_the_boundary_that_ran(pipe):
    with stepcache.accelerate(pipe, Uniform(interval=3), boundary="blocks") as run:
        sample(pipe)
    assert (run.summary().boundary, run.summary().plan.budget) == ("blocks", 5)


def test_a_plan_without_reuse_is_remarked_upon(pipe):
    with stepcache.accelerate(pipe, Uniform(interval=1)) as run:
        sample(pipe)
    assert any("no step was skipped" in w for w in run.summary().warnings)
    with stepcache.accelerate(pipe, Off()) as run:
        sample(pipe)
    assert not run.summary().warnings


def test_an_enabled_scheduler_can_be_copied_and_pickled(pipe):
    import copy
    import pickle

    with stepcache.accelerate(pipe, HALF):
        sample(pipe)
        assert pickle.loads(pickle.dumps(pipe.scheduler)).step.__self__ is not pipe.scheduler
        twin = copy.deepcopy(pipe.scheduler)  # pipelines with sound step it with a copy: the sampler's door comes along
        assert vars(twin)["step"] is not vars(pipe.scheduler)["step"]
    twin.set_timesteps(4)
    assert twin.step(torch.zeros(1, 2), twin.timesteps[0], torch.zeros(1, 2), return_dict=False)[0].shape == (1, 2)
    assert "step" not in vars(pipe.scheduler)


def test_two_pipelines_with_one_scheduler_disabled_in_the_order_of_enabling():
    first, second = tiny_pipe(0), tiny_pipe(7)
    second.scheduler = first.scheduler
    stepcache.enable(first, HALF)
    stepcache.enable(second, HALF)
    stepcache.disable(first)
    with_second = sample(second)
    stepcache.disable(second)
    assert "step" not in vars(first.scheduler)
    with stepcache.accelerate(second, HALF):
        assert torch.equal(sample(second), with_second)


def test_few_steps_are_remarked_upon(pipe):
    with stepcache.accelerate(pipe, Uniform(budget=2)) as run:
        sample(pipe, steps=4)
    assert any("only 4 steps" in w for w in run.summary().warnings)


def test_pipelines_without_a_transformer_say_what_was_looked_for():
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=UNet2DConditionModel(
            block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
        ),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with pytest.raises(
        ValueError, match=r"has no transformer: looked for a component of that name, found scheduler, u"
    ):
        stepcache.enable(pipe, HALF)


def test_a_shared_structure_is_nobody_for_certain():
    from stepcache.hosts.diffusers import model_name

    class Config:
        num_layers, num_attention_heads, attention_head_dim, in_channels = 60, 24, 128, 64

    transformer = type(
        "QwenImageTransformer2DModel", (torch.nn.Module,), {"config": Config, "forward": lambda s, x: x}
    )()
    pipe = type("QwenImagePipeline", (), {"components": {"transformer": transformer}})()
    assert model_name(pipe) == "qwen-image or qwen-image-2512"
    with pytest.raises(ValueError, match="no published table for qwen-image or qwen-image-2512; name one"):
        LeMiCa(25).begin(stepcache.Trajectory(50, model_name(pipe)))
    edit = type("QwenImageEditPipeline", (), {"components": {"transformer": transformer}})()
    assert model_name(edit) == "qwen-image-edit"
