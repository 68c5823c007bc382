"""Hindsight against its rule written out on a real pipeline; what it holds, costs, survives and refuses."""

import copy
import itertools

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import sample
from torch.utils._python_dispatch import TorchDispatchMode

import stepcache
from stepcache import Hindsight, Plan, PlanFile, Uniform
from stepcache.bench.tiny import gentle_pipe
from stepcache.core.plan import even
from stepcache.core.trajectory import Trajectory
from stepcache.hindsight.corrector import MEMORY, Corrector
from stepcache.hindsight.method import FollowHindsight
from stepcache.hindsight.response import remembered, response
from stepcache.hindsight.schedule import places_of, spaced

NODES = (0, 2, 5, 8, 11)
SAMPLERS = {
    "unipc": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dpm": lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
}


@pytest.fixture
def pipe():
    return gentle_pipe()


@torch.no_grad()
def written_out(pipe, batch=1, guidance=5.0, steps=12, computed=NODES):
    """The denoising loop with the rule of `hindsight.corrector`'s head, step by step."""
    g = torch.Generator().manual_seed(0)
    texts = [torch.randn(batch, 8, 32, generator=g), torch.randn(batch, 8, 32, generator=g)]
    pipe.scheduler.set_timesteps(steps)
    final = response(pipe.scheduler)[-1, 1:].tolist()
    x = torch.randn(batch, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    known, share, last_missed = [], None, None

    def forecast(k):
        (k1, o1), *older = known[::-1]
        if not older:
            return o1
        k2, o2 = older[0]
        return o1 + min((k - k1) / (k1 - k2), 1) * (o1 - o2)

    for k, t in enumerate(pipe.scheduler.timesteps):
        if k not in computed:
            x = pipe.scheduler.step(forecast(k), t, x, return_dict=False)[0]
            continue
        outputs = [pipe.transformer(x, t.expand(batch), e, return_dict=False)[0] for e in texts]
        v = outputs[1] + guidance * (outputs[0] - outputs[1]) if guidance > 1 else outputs[0]
        gap = list(range(known[-1][0] + 1, k)) if known else []
        if not gap:
            known.append((k, v))
            x = pipe.scheduler.step(v, t, x, return_dict=False)[0]
            continue
        missed = v - forecast(k)
        if last_missed is None:
            share = torch.full((batch,), MEMORY)
        for i in range(batch if last_missed is not None else 0):
            squares = float(missed[i].square().sum()) + float(last_missed[i].square().sum())
            agreed = min(1.0, float((missed[i] + last_missed[i]).norm()) / squares**0.5)
            share[i] = MEMORY * share[i] + (1 - MEMORY) * agreed
        best, (start, before) = forecast(k) + share.view(-1, 1, 1, 1, 1) * missed, known[-1]
        made_good = 0
        for s in gap:
            interpolated = before + (s - start) / (k - start) * (best - before)
            made_good = made_good + final[s] / final[k] * (interpolated - forecast(s))
        known.append((k, best))
        last_missed = missed
        x = pipe.scheduler.step(best + made_good, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("batch", "guidance"), [(1, 5.0), (2, 5.0), (1, 1.0), (2, 9.0)])
def test_it_is_the_rule_written_out(pipe, sampler, batch, guidance):
    pipe.scheduler = SAMPLERS[sampler]()
    reference = gentle_pipe()
    reference.scheduler = SAMPLERS[sampler]()
    expected = written_out(reference, batch, guidance)
    with stepcache.accelerate(pipe, PlanFile(Plan(12, NODES), "hindsight")) as run:
        got = sample(pipe, batch=batch, guidance=guidance)
    assert run.summary().computed == NODES
    assert run.summary().warnings == ()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def answers_of(sampler, steps):
    scheduler = SAMPLERS[sampler]()
    scheduler.set_timesteps(steps)
    return response(scheduler)


@settings(max_examples=40)
@given(st.sampled_from(sorted(SAMPLERS)), st.integers(4, 20), st.randoms(use_true_random=False))
def test_a_gap_is_made_good_in_the_final_latent(sampler, steps, random):
    """What the sampler got moves the final latent as outputs interpolated between what is kept would have."""
    computed = [0]
    while computed[-1] < steps - 1:
        computed.append(min(computed[-1] + random.randint(1, 4), steps - 1))
    answers = answers_of(sampler, steps)
    corrector = Corrector(answers)
    outputs = torch.randn(steps, 1, 2, 4, 4, generator=torch.Generator().manual_seed(steps))
    given_, kept = [], {}
    for k in range(steps):
        if k in computed:
            given_.append(corrector.computed(k, outputs[k]))
            kept[k] = corrector.tensors[0].clone()
        else:
            given_.append(corrector.skipped(k, outputs.device))
    best = []
    for k in range(steps):
        last, ahead = max(c for c in computed if c <= k), min(c for c in computed if c >= k)
        best.append(torch.lerp(kept[last], kept[ahead], (k - last) / max(ahead - last, 1)))
    final = answers[-1, 1:].float()
    torch.testing.assert_close(
        torch.einsum("s,s...->...", final, torch.stack(given_)),
        torch.einsum("s,s...->...", final, torch.stack(best)),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def fed(outputs, computed):
    """A corrector after the outputs of a run, and the shares it believed."""
    corrector, shares = Corrector(answers_of("unipc", len(outputs))), []
    for k, output in enumerate(outputs):
        if k not in computed:
            corrector.skipped(k, output.device)
        else:
            corrector.computed(k, output)
            shares.append(corrector._share if corrector._share is None else corrector._share.clone())
    return [share for share in shares if share is not None]


def test_what_lags_is_believed_more_and_what_swings_less():
    """Sample 0: outputs on a parabola, whose forecasts always miss to one side. Sample 1: misses that turn round."""
    steps, computed = 41, range(0, 41, 2)
    one = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    outputs = [one * torch.tensor([k**2 / 100, (-1.5) ** (k // 2)]).view(2, 1, 1, 1) for k in range(steps)]
    shares = fed(outputs, computed)
    assert shares[0].tolist() == pytest.approx([MEMORY, MEMORY])
    lags, swings = zip(*(share.tolist() for share in shares), strict=True)
    assert list(lags) == sorted(lags)
    assert lags[-1] > 0.9
    assert list(swings) == sorted(swings, reverse=True)
    assert swings[-1] < 0.55


@given(st.integers(0, 2**31))
def test_a_share_is_a_share(seed):
    g = torch.Generator().manual_seed(seed)
    for share in fed(list(torch.randn(20, 3, 2, 4, 4, generator=g)), (0, 3, 4, 7, 12, 19)):
        assert ((share > 0) & (share <= 1)).all()


def test_misses_of_nothing_are_no_error():
    """Outputs that do not move: forecasts miss nothing, and nothing is divided by nothing."""
    corrector = Corrector(answers_of("euler", 9))
    for k in range(9):
        output = torch.ones(1, 4, 4)
        got = corrector.computed(k, output) if k % 2 == 0 else corrector.skipped(k, output.device)
        torch.testing.assert_close(got, output)


def test_no_forecast_reaches_farther_than_its_line_was_measured_over():
    corrector = Corrector(None)
    for k in (0, 1):
        corrector.computed(k, torch.full((1, 2, 2), float(k)))
    got = [corrector.skipped(k, torch.device("cpu"))[0, 0, 0].item() for k in (2, 3, 4)]
    assert got == [2.0, 2.0, 2.0]


AGAIN = {
    "heun": [1.0, 0.9, 0.9, 0.7, 0.7, 0.4, 0.4, 0.2],
    "heunpp2": [1.0, 0.9, 0.7, 0.9, 0.7, 0.4, 0.7, 0.4, 0.2, 0.1],
}


def test_places_are_numbers_but_where_levels_come_again():
    assert places_of([1 - k / 50 for k in range(50)]) == list(range(50))
    assert places_of(AGAIN["heun"]) == [0, 1, 1, 2, 2, 3, 3, 4]
    assert places_of(AGAIN["heunpp2"]) == [0, 1, 2, 1, 2, 3, 2, 3, 4, 5]


@given(st.sampled_from(sorted(AGAIN)), st.data())
def test_outputs_on_a_line_in_noise_levels_are_forecast_as_they_are(sampler, data):
    """Whatever is computed, outputs that are linear in the place are forecast exactly as far as the line reaches."""
    places = places_of(AGAIN[sampler])
    last = len(places) - 1
    answers = torch.eye(last + 2, dtype=torch.float64).cumsum(0)  # every output moves the latent by one
    corrector, known, skipped = Corrector(answers, places=places), [], False
    for k, place in enumerate(places):
        truth = torch.full((1, 2, 2), 3 + 2 * place)
        within = len(known) == 2 and abs(place - known[0]) <= abs(known[0] - known[1])
        if k in (0, 1, last) or data.draw(st.booleans()):
            assert torch.isfinite(corrector.computed(k, truth)).all()
            if skipped and not within:
                return  # a forecast that fell short is believed in part
            known, skipped = [place, *(p for p in known if p != place)][:2], False
        else:
            skipped = True
            assert not within or torch.allclose(corrector.skipped(k, truth.device), truth)
            if not within:
                return


def grows(z, share, fine=64, gaps=60, reuse=False, pay=True):
    """Whether dx/dt = -z x, t in gaps, sampled in `fine` steps a gap, grows under the rule with a share of its own."""
    x, nodes = 1.0, []
    for k in range(gaps):
        v = -z * x
        if reuse or len(nodes) < 2:
            nodes = [v, *nodes]
        else:
            forecast = 2 * nodes[0] - nodes[1]
            missed = share * (v - forecast)
            nodes = [forecast + missed, *nodes]
            x += pay * missed * sum(s / fine for s in range(fine)) / fine
        for s in range(fine):
            x += (nodes[0] + (s / fine * (nodes[0] - nodes[1]) if k and not reuse else 0.0)) / fine
        if abs(x) > 1e3:
            return True
    return abs(x) > 1


@pytest.mark.parametrize(("share", "limit"), [(1.0, 0.5), (0.8, 1.0), (0.7, 1.35), (0.6, 1.83), (0.5, 2.5)])
def test_damping_is_what_makes_it_stable(share, limit):
    """The limits that the corrector's head names, and those of reuse and of extrapolation."""
    assert not grows(0.9 * limit, share)
    assert grows(1.15 * limit, share)
    assert not grows(1.9, 0, reuse=True)
    assert grows(2.1, 0, reuse=True)
    assert not grows(0.9, 1.0, pay=False)
    assert grows(1.1, 1.0, pay=False)


@given(st.integers(2, 200), st.data())
def test_the_schedule_has_its_budget_and_gaps_that_do_not_waver(steps, data):
    shift = data.draw(st.floats(0.5, 16.0))
    levels = [shift * s / (1 + (shift - 1) * s) for s in (1 - k / steps for k in range(steps))]
    budget = data.draw(st.integers(2, steps))
    plan = spaced(steps, budget, levels)
    assert (plan.budget, plan.computed[0], plan.computed[-1]) == (budget, 0, steps - 1)
    gaps = [b - a for a, b in itertools.pairwise(plan.computed)]
    widest = gaps.index(max(gaps))
    assert gaps[: widest + 1] == sorted(gaps[: widest + 1])
    falling = gaps[len(gaps) - 1 - gaps[::-1].index(max(gaps)) :]
    assert falling == sorted(falling, reverse=True)


def test_one_schedule_for_all_samplers_in_noise_levels():
    """Steps of Euler and of UniPC at other shifts and step counts: the same levels, as near as their steps allow."""
    found = {}
    for steps, shift in ((50, 3.0), (50, 5.0), (200, 1.0)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        levels = [t / 1000 for t in scheduler.timesteps.tolist()]
        found[steps, shift] = [levels[k] for k in spaced(steps, 14, levels).computed[:-2]]
    for a, b in itertools.combinations(found.values(), 2):
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 0.06


def test_where_noise_levels_are_not_known_steps_are_even():
    expected = even(50, 14)
    assert spaced(50, 14) == expected
    assert spaced(50, 14, [0.5] * 50) == expected
    assert spaced(50, 14, [0.5, 0.7] * 25) == expected
    whole = [0.99] * 3 + [1 - k / 50 for k in range(3, 50)]
    assert spaced(50, 14, whole).budget == 14, "whole timesteps repeat at strong shifts"
    with pytest.raises(ValueError, match="at most 50"):
        spaced(50, 51, whole)


def test_all_steps_computed_is_the_uncached_run(pipe):
    base = sample(pipe)
    with stepcache.accelerate(pipe, Hindsight(12)):
        assert torch.equal(sample(pipe), base)


def test_it_is_closer_than_reuse(pipe):
    """On a model whose outputs move smoothly; a sign or an index gone wrong loses at once."""
    base, errors = sample(pipe, 24), []
    for policy in (Uniform(12), PlanFile(even(24, 12), "hindsight")):
        with stepcache.accelerate(pipe, policy):
            errors.append(float((sample(pipe, 24) - base).norm()))
    assert errors[1] < 0.95 * errors[0]


class Operations(TorchDispatchMode):
    """Counts operations that read or write a whole latent."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in (*args, result) if isinstance(t, torch.Tensor)]
        self.count += any(n >= self.numel for n in sizes) and "view" not in str(func) and "detach" not in str(func)
        return result


def follow(plan, sampler="unipc", shape=(1, 16, 3, 20, 20), dtype=torch.float32):
    """The strategy with a real sampler: yields (step, strategy, operations) after every step."""
    scheduler = SAMPLERS[sampler]()
    scheduler.set_timesteps(plan.num_steps)
    run = Trajectory(plan.num_steps, sampler=scheduler)
    strategy = FollowHindsight(plan, run)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for k in range(plan.num_steps):
        output = x * (1 + k / 10)
        with Operations(x.numel()) as operations:
            strategy.guided(k, output, k in plan.computed, scheduler)
        yield k, strategy, operations.count


def test_what_a_step_costs_and_holds():
    plan = Hindsight(20).plan(50)
    for k, strategy, count in follow(plan):
        assert count <= (20 if k in plan.computed else 10)
        assert len(strategy.tensors()) <= 3
        assert all(t.dtype == torch.float32 for t in strategy.tensors())
    assert strategy.tensors() == [], "nothing is held while the VAE decodes"


def test_an_aborted_run_holds_nothing(pipe):
    with pytest.raises(ZeroDivisionError), stepcache.accelerate(pipe, Hindsight(6)) as run:
        sample(pipe, callback_on_step_end=lambda pipe, step, t, kwargs: 1 / 0 if step == 5 else kwargs)
    assert run.cache.strategy.tensors() == []


def test_after_an_abort_the_next_run_is_as_in_a_fresh_process(pipe):
    with stepcache.accelerate(pipe, Hindsight(6)):
        expected = sample(pipe)
        with pytest.raises(ZeroDivisionError):
            sample(pipe, callback_on_step_end=lambda pipe, step, t, kwargs: 1 / 0 if step == 5 else kwargs)
        assert torch.equal(sample(pipe), expected)
        assert sample(pipe, size=48).shape[-1] == 6
        assert torch.equal(sample(pipe), expected)


def test_cache_device_moves_what_is_held(pipe):
    with stepcache.accelerate(pipe, Hindsight(6)):
        expected = sample(pipe)
    with stepcache.accelerate(pipe, Hindsight(6), cache_device="cpu"):
        assert torch.equal(sample(pipe), expected)


def test_bf16_loses_no_more_than_rounding():
    plan = Hindsight(20).plan(50)
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        corrector = Corrector(answers_of("unipc", 50))
        x = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        got = []
        for k in range(50):
            output = (x * (1 + k / 40)).to(dtype)
            got.append(corrector.computed(k, output) if k in plan.computed else corrector.skipped(k, x.device))
        runs[dtype] = torch.stack(got)
    error = (runs[torch.bfloat16] - runs[torch.float32]).norm() / runs[torch.float32].norm()
    assert error < 3 * 2**-8


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: DDPMScheduler(), "not linear in the model's outputs"),
        (lambda: EulerAncestralDiscreteScheduler(), "not linear in the model's outputs"),
    ],
)
def test_samplers_that_add_noise_are_forecast_and_not_corrected(make, reason):
    scheduler = make()
    scheduler.set_timesteps(12)
    strategy = FollowHindsight(Plan(12, NODES), Trajectory(12, sampler=scheduler))
    outputs = torch.randn(12, 1, 4, 4)
    torch.manual_seed(5)
    before, state = torch.get_rng_state(), copy.deepcopy({k: v for k, v in vars(scheduler).items() if k != "sigmas"})
    got = [strategy.guided(k, outputs[k], k in NODES, scheduler) for k in range(12)]
    assert torch.equal(torch.get_rng_state(), before), "probing draws no random numbers of others"
    assert str(state) == str({k: v for k, v in vars(scheduler).items() if k != "sigmas"})
    assert reason in strategy.warnings()[0]
    assert torch.equal(got[0], outputs[0])
    first = outputs[0] + (outputs[2] - outputs[0]) * MEMORY
    torch.testing.assert_close(got[3], first + (first - outputs[0]) / 2)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ({"sampler": None}, "does not know the sampler"),
        ({"steps": 11}, "does not walk all of the sampler's steps"),
    ],
)
def test_what_is_not_known_is_said_and_not_corrected(run, says):
    scheduler = SAMPLERS["euler"]()
    scheduler.set_timesteps(run.pop("steps", 12))
    strategy = FollowHindsight(Plan(12, NODES), Trajectory(12, **{"sampler": scheduler, **run}))
    x = torch.randn(1, 4, 4)
    assert torch.equal(strategy.guided(0, x, True, run.get("sampler", scheduler)), x)
    assert says in strategy.warnings()[0]


class OnGPU(torch.Tensor):
    """Refuses to be mixed with tensors of the CPU, as one on a GPU does; `.cpu()` is the only way back."""

    def __deepcopy__(self, memo):
        return self.as_subclass(torch.Tensor).clone().as_subclass(OnGPU)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        plain = [a for a in args if type(a) is torch.Tensor and a.ndim]
        if plain and func.__name__ not in ("__get__", "__deepcopy__", "__repr__"):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_a_scheduler_on_another_device_is_probed_on_the_cpu(sampler):
    scheduler = SAMPLERS[sampler]()
    scheduler.set_timesteps(12)
    expected = response(scheduler)
    scheduler.sigmas, scheduler.timesteps = scheduler.sigmas.as_subclass(OnGPU), scheduler.timesteps.as_subclass(OnGPU)
    assert torch.equal(response(scheduler), expected)
    assert type(scheduler.sigmas) is OnGPU


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_reads_nothing_from_the_device(sampler):
    """On the meta device, which has nothing to be read; on CUDA, `no-waiting` of the self-test sees all waiting."""
    scheduler = SAMPLERS[sampler]()
    scheduler.set_timesteps(12)
    strategy = FollowHindsight(Plan(12, NODES), Trajectory(12, sampler=scheduler))
    x = torch.randn(1, 4, 2, 8, 8, device="meta")
    for k in range(12):
        assert strategy.guided(k, x, k in NODES, scheduler).is_meta
    assert strategy.warnings() == ()


def test_a_latent_that_changes_its_shape_starts_anew():
    corrector = Corrector(answers_of("euler", 12))
    for k, size in enumerate((4, 4, 6, 6)):
        output = torch.full((1, 4, size, size), float(k))
        assert torch.equal(corrector.computed(k, output), output)
    assert corrector.skipped(4, output.device).shape == output.shape


def test_another_transformer_takes_over():
    corrector = Corrector(answers_of("euler", 12))
    corrector.computed(0, torch.zeros(1, 4, 4, 4))
    corrector.skipped(1, torch.device("cpu"))
    corrector.restart()
    output = torch.ones(1, 4, 4, 4)
    assert torch.equal(corrector.computed(2, output), output), "never corrected across the change"
    assert torch.equal(corrector.skipped(3, output.device), output), "nor extrapolated"


def test_a_second_sampler_in_one_step_has_a_corrector_of_its_own():
    sound, pictures = SAMPLERS["euler"](), SAMPLERS["euler"]()
    for scheduler in (sound, pictures):
        scheduler.set_timesteps(12)
    alone = FollowHindsight(Plan(12, NODES), Trajectory(12, sampler=pictures))
    both = FollowHindsight(Plan(12, NODES), Trajectory(12, sampler=pictures))
    outputs = torch.randn(12, 1, 4, 4)
    for k in range(12):
        expected = alone.guided(k, outputs[k], k in NODES, pictures)
        assert torch.equal(both.guided(k, outputs[k], k in NODES, pictures), expected)
        assert torch.equal(both.guided(k, outputs[k], k in NODES, sound), expected)
    assert both.warnings() == ()


def test_a_sampler_that_steps_twice_for_one_evaluation_is_left_alone():
    scheduler = SAMPLERS["euler"]()
    scheduler.set_timesteps(12)
    strategy = FollowHindsight(Plan(12, NODES), Trajectory(12, sampler=scheduler))
    x = torch.randn(1, 4, 4)
    strategy.guided(0, x, True, scheduler)
    assert torch.equal(strategy.guided(0, x, True, scheduler), x)
    assert strategy.compute(1, x), "from here on all is computed"
    assert "several steps for one evaluation" in strategy.warnings()[0]


def test_answers_are_remembered_by_noise_levels_too():
    """UniPC's timesteps are whole numbers: two walks may share them and differ in their sigmas."""
    scheduler = SAMPLERS["unipc"]()
    scheduler.set_timesteps(12)
    before = remembered(scheduler)
    scheduler.sigmas = scheduler.sigmas**1.001
    assert torch.equal(remembered(scheduler), response(scheduler))
    assert not torch.equal(remembered(scheduler), before)


@pytest.mark.parametrize("twice", [True, False])
def test_what_no_forecast_goes_with_is_refused_at_a_skipped_step(twice):
    first, other = SAMPLERS["euler"](), SAMPLERS["euler"]()
    for scheduler in (first, other):
        scheduler.set_timesteps(12)
    strategy = FollowHindsight(Plan(12, NODES), Trajectory(12, sampler=first))
    x = torch.randn(1, 4, 4)
    strategy.guided(0, x, True, first)
    strategy.guided(1, x, False, first)
    with pytest.raises(ValueError, match=r"at a skipped step: .*use uniform"):
        strategy.guided(1, x, False, first if twice else other)


def test_a_sampler_that_joins_late_has_the_rest_computed():
    first, other = SAMPLERS["euler"](), SAMPLERS["euler"]()
    for scheduler in (first, other):
        scheduler.set_timesteps(12)
    strategy = FollowHindsight(Plan(12, NODES), Trajectory(12, sampler=first))
    x = torch.randn(1, 4, 4)
    for k in range(3):
        strategy.guided(k, x, k in NODES, first)
    assert torch.equal(strategy.guided(2, x, True, other), x)
    assert strategy.compute(3, x)
    assert "joins in mid-run" in strategy.warnings()[0]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Hindsight(1), "2 or more"),
        (lambda: Hindsight(13).plan(12), "use at most 12"),
        (lambda: stepcache.Checked, "now called Hindsight"),
    ],
)
def test_bad_settings(make, says):
    with pytest.raises((ValueError, AttributeError), match=says):
        make()


def test_it_says_where_its_schedule_comes_from():
    assert str(Hindsight(20)) == "hindsight (budget 20)"
    assert str(PlanFile(Plan(12, NODES), "hindsight")) == "hindsight, planned (budget 5)"


@pytest.mark.parametrize(
    ("budget", "steps", "computed"),
    [(0.5, 8, 6), (0.5, 4, 3), (0.5, 10, 8), (0.9, 10, 9), (0.5, 11, 6), (4, 8, 4), (1.0, 4, 4)],
)
def test_of_few_steps_a_share_is_what_is_reliable(pipe, budget, steps, computed):
    with stepcache.accelerate(pipe, Hindsight(budget)) as run:
        sample(pipe, steps=steps)
    told = run.summary()
    assert len(told.computed) == computed
    assert any("not reliable" in note for note in told.notes) == (
        computed > max(2, round(budget * steps)) and budget <= 1
    )
    recommends = f"only {steps} steps, which differ much: compute {steps - steps // 4} or more"
    assert any(recommends in w for w in told.warnings) == (budget == 4)
