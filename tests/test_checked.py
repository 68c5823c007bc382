"""Self-checked extrapolation against the rule written out on a real pipeline; gains, bands, bases, bad settings."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from conftest import sample, tiny_pipe
from hypothesis import given
from hypothesis import strategies as st

import stepcache
from stepcache import Check, Checked, LeMiCa, Plan
from stepcache.cache import FollowPlan, StepCache
from stepcache.plan import EARLY, Trajectory, first_order, in_hindsight
from stepcache.selfcheck import Increment, SelfCheck

NODES = (0, 2, 5, 8, 11)


def gentle_pipe():
    """A pipeline whose random weights make outputs move smoothly enough with time that a part can be foretold."""
    pipe = tiny_pipe()
    with torch.no_grad():
        pipe.transformer.condition_embedder.time_embedder.linear_1.weight.mul_(0.4)
    return pipe


@pytest.fixture
def pipe():
    return gentle_pipe()


def bands_of(x, edges):
    """The definition, with plain loops over pixels: means over the part of the square that lies in the frame."""
    smooth = []
    for edge in edges:
        r, mean = edge // 2, torch.empty_like(x)
        for i in range(x.shape[-2]):
            for j in range(x.shape[-1]):
                part = x[..., max(0, i - r) : i + r + 1, max(0, j - r) : j + r + 1]
                mean[..., i, j] = part.mean((-2, -1))
        smooth.append(mean)
    if not smooth:
        return [x]
    return [smooth[0], *(b - a for a, b in itertools.pairwise(smooth)), x - smooth[-1]]


def believed_at(k, known, gains, check, branches):
    """What is predicted for step k, branch by branch (turned into the check's basis)."""
    k1, o1 = known[-1]
    predicted = list(o1)
    if gains is not None:
        k2, o2 = known[-2]
        c = (k - k1) / (k1 - k2)
        for b in range(branches):
            parts = bands_of(o1[b] - o2[b], check.bands)
            believed = sum(t.view(-1, 1, 1, 1, 1) * q for t, q in zip(gains[b], parts, strict=True))
            predicted[b] = o1[b] + c * believed
    return predicted


@torch.no_grad()
def written_out(pipe, check, batch=1, guidance=5.0, steps=12, computed=NODES, hindsight=()):
    """The denoising loop with the self-check as prototype and paper state it: (final latent, gains by step)."""
    shares = dict(hindsight)
    g = torch.Generator().manual_seed(0)
    texts = [torch.randn(batch, 8, 32, generator=g), torch.randn(batch, 8, 32, generator=g)]
    texts = texts[: 2 if guidance > 1 else 1]
    pipe.scheduler.set_timesteps(steps)
    x = torch.randn(batch, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    known, gains, history = [], None, []
    pair = check.basis == "guidance" and len(texts) == 2
    turn = (lambda v: [v[0] - v[1], v[1]]) if pair else (lambda v: v)
    back = (lambda v: [v[0] + v[1], v[1]]) if pair else (lambda v: v)
    for k, step in enumerate(pipe.scheduler.timesteps):
        if k in computed:
            outputs = [pipe.transformer(x, step.expand(batch), t, return_dict=False)[0] for t in texts]
            turned = turn(outputs)
            if k in shares:
                predicted = believed_at(k, known, gains, check, len(texts))
                outputs = back([o + shares[k] * (o - p) for o, p in zip(turned, predicted, strict=True)])
            if len(known) >= 2:
                (k1, o1), (k2, o2) = known[-1], known[-2]
                new = []
                for o, a, b in zip(turned, o1, o2, strict=True):
                    happened, predicted = o - a, (k - k1) / (k1 - k2) * (a - b)
                    pairs = zip(bands_of(happened, check.bands), bands_of(predicted, check.bands), strict=True)
                    over = (1, 2, 3, 4)
                    new.append([((h * p).sum(over) / (p * p).sum(over)).clamp(0, 1) for h, p in pairs])
                m = check.average
                gains = (
                    new
                    if gains is None
                    else [
                        [m * old + (1 - m) * n for old, n in zip(o, n_, strict=True)]
                        for o, n_ in zip(gains, new, strict=True)
                    ]
                )
            known.append((k, turned))
            history.append(gains)
        else:
            predicted = believed_at(k, known, gains, check, len(texts))
            outputs = back(predicted)
        v = outputs[0] if len(outputs) == 1 else outputs[1] + guidance * (outputs[0] - outputs[1])
        x = pipe.scheduler.step(v, step, x, return_dict=False)[0]
    return x, history


@pytest.mark.parametrize(
    ("check", "batch", "guidance"),
    [
        (Check(basis="branch"), 1, 5.0),
        (Check(basis="branch"), 2, 5.0),
        (Check(bands=(), average=0.0, basis="branch"), 1, 5.0),
        (Check(bands=(11, 3), average=0.8, basis="branch"), 2, 5.0),
        (Check(basis="guidance"), 1, 5.0),
        (Check(bands=(5, 3), basis="guidance"), 2, 5.0),
        (Check(basis="guidance"), 1, 1.0),
    ],
)
def test_it_is_the_rule_written_out(pipe, check, batch, guidance):
    expected, gains = written_out(gentle_pipe(), check, batch, guidance)
    moved = [g for row in gains if row for band in row for g in band]
    assert any(0.1 < float(g.min()) < 0.9 for g in moved), "the example must exercise the gains"
    plan = Plan(12, NODES).checked(check)
    with stepcache.accelerate(pipe, plan) as run:
        got = sample(pipe, batch=batch, guidance=guidance)
    assert run.summary().computed == NODES
    assert not run.summary().forced
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("basis", ["guidance", "branch"])
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_in_hindsight_it_is_the_rule_written_out(pipe, basis, guidance):
    check, shares = Check(basis=basis), ((2, 0.3), (5, 0.5), (8, 0.4), (11, 1.0))
    expected, _ = written_out(gentle_pipe(), check, 1, guidance, hindsight=shares)
    without, _ = written_out(gentle_pipe(), check, 1, guidance)
    plan = replace(Plan(12, NODES).checked(check), hindsight=shares)
    with stepcache.accelerate(pipe, plan) as run:
        got = sample(pipe, guidance=guidance)
    assert run.summary().computed == NODES
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (expected - without).abs().max() > 1e-2
    with stepcache.accelerate(pipe, replace(plan, hindsight=()), boundary="blocks") as run:
        at_blocks = sample(pipe, guidance=guidance)
    with stepcache.accelerate(pipe, plan, boundary="blocks"):
        assert torch.equal(sample(pipe, guidance=guidance), at_blocks)  # tokens are left as they are


def test_which_plans_look_back():
    """Dense ones with a multistep sampler whose timesteps are known; by half of what the gap's steps missed."""
    even = tuple(1000.0 - 20 * k for k in range(50))
    dense = (*range(0, 49, 3), 49)
    plan = Plan(50, dense, timesteps=even, scheduler="UniPCMultistepScheduler").checked()
    assert dict(plan.hindsight) == {k: pytest.approx(0.5) for k in dense[1:-1]}  # (1 + 2) / 3, halved
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.resampled(40).hindsight == ()
    assert plan.extrapolated().hindsight == ()
    assert replace(plan, scheduler="FlowMatchEulerDiscreteScheduler").checked().hindsight == ()
    assert replace(plan, timesteps=None).checked().hindsight == ()
    long = tuple(k for k in range(50) if not 20 < k < 25)  # one gap of five steps
    assert replace(plan, computed=long, weights=(), hindsight=()).checked().hindsight == ()
    for wrong in (((1, 0.5),), ((3, 1.5),), ((3, float("nan")),)):
        with pytest.raises(ValueError, match="a computed step and a share in"):
            replace(plan, hindsight=wrong)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=20), st.lists(st.floats(0.1, 50), min_size=60, max_size=60))
def test_hindsight_is_bounded(gaps, moves):
    computed = tuple(itertools.accumulate([0, *gaps]))
    steps = computed[-1] + 1
    times = tuple(itertools.accumulate(moves[:steps][::-1]))[::-1]
    rows = dict(in_hindsight(computed, times))
    assert set(rows) <= set(computed)
    assert all(0 <= share <= 1 for share in rows.values())


def test_it_differs_from_reuse_and_from_plain_extrapolation(pipe):
    plan = Plan(12, NODES)
    rows = tuple((k, w) for k, w in first_order(NODES, 12) if k not in NODES)
    results = []
    for candidate in (plan, replace(plan, weights=rows), plan.checked()):
        with stepcache.accelerate(pipe, candidate):
            results.append(sample(pipe))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(results[a], results[b], atol=1e-2)


def test_a_second_run_is_the_first(pipe):
    with stepcache.accelerate(pipe, Checked(5)):
        first, second = sample(pipe), sample(pipe)
    assert torch.equal(first, second)


def test_blocks_and_cpu_cache(pipe):
    with stepcache.accelerate(pipe, Plan(12, NODES).checked(), boundary="blocks") as run:
        blocks = sample(pipe)
    assert run.summary().computed == NODES
    with stepcache.accelerate(pipe, Plan(12, NODES), boundary="blocks"):
        reuse = sample(pipe)
    assert not torch.allclose(blocks, reuse, atol=1e-3)
    with stepcache.accelerate(pipe, Plan(12, NODES).checked()):
        here = sample(pipe)
    with stepcache.accelerate(pipe, Plan(12, NODES).checked(), cache_device="cpu"):
        assert torch.equal(sample(pipe), here)


@given(st.integers(0, 10**6), st.sampled_from([(), (5,), (11, 5)]), st.sampled_from(["branch", "guidance"]))
def test_the_prediction_stays_between_reuse_and_extrapolation(seed, bands, basis):
    g = torch.Generator().manual_seed(seed)
    cond, uncond, p, q = (torch.randn(2, 3, 1, 6, 6, generator=g) for _ in range(4))
    check = SelfCheck(Check(bands, 0.5, basis))
    check.learn({"cond": Increment(cond, p), "uncond": Increment(uncond, q)})
    for rows in check._gains.values():
        assert all(float(gain.min()) >= 0 and float(gain.max()) <= 1 for gain in rows)
    exact = SelfCheck(Check(bands, 0.5, basis))
    exact.learn({"cond": Increment(p, p), "uncond": Increment(q, q)})
    torch.testing.assert_close(exact.damp("cond", {"cond": p, "uncond": q}), p)
    opposed = SelfCheck(Check(bands, 0.5, basis))
    opposed.learn({"cond": Increment(-p, p), "uncond": Increment(-q, q)})
    assert float(opposed.damp("cond", {"cond": p, "uncond": q}).abs().max()) < 1e-6


def test_a_gain_that_is_no_number_means_reuse():
    check = SelfCheck(Check(basis="branch"))
    zero, nan = torch.zeros(1, 2, 1, 4, 4), torch.full((1, 2, 1, 4, 4), float("nan"))
    ones = torch.ones(1, 2, 1, 4, 4)
    check.learn({"a": Increment(ones, zero), "b": Increment(nan, ones)})
    assert float(check.damp("a", {"a": ones}).abs().max()) == 0
    assert float(check.damp("b", {"b": ones}).abs().max()) == 0
    assert SelfCheck(Check()).damp("a", {"a": ones}) is None


def test_tokens_have_bands_where_the_grid_is_known():
    g = torch.Generator().manual_seed(0)
    image, change = torch.randn(2, 3, 6, 4, generator=g), torch.randn(2, 3, 6, 4, generator=g)
    tokens = lambda x: x.flatten(2).transpose(1, 2)  # noqa: E731
    plain, packed = SelfCheck(Check()), SelfCheck(Check(), grid=(6, 4))
    plain.learn({"a": Increment(image, change)})
    packed.learn({"a": Increment(tokens(image), tokens(change))})
    expected = tokens(plain.damp("a", {"a": change}))
    torch.testing.assert_close(packed.damp("a", {"a": tokens(change)}), expected)
    unknown = SelfCheck(Check())
    unknown.learn({"a": Increment(tokens(image), tokens(change))})
    assert len(unknown._gains["a"]) == 1


def test_one_sample_without_batch_dimension_has_one_gain():
    cache = StepCache(Checked(3))
    check = SelfCheck(Check(), batched=False)
    check.learn({"a": Increment(torch.randn(16, 2, 4, 4), torch.randn(16, 2, 4, 4))})
    assert check._gains["a"][0].numel() == 1
    assert cache.batched


def test_guidance_switched_off_half_way_goes_on(pipe):
    """The unconditional branch disappears: its gains go, the other branch starts anew; nothing fails."""

    def off(pipe, step, t, kwargs):
        if step == 5:
            pipe._guidance_scale = 1.0
        return {}

    plan = Plan(12, (0, 1, 3, 5, 7, 9, 11)).checked(Check(basis="guidance"))
    with stepcache.accelerate(pipe, plan) as run:
        sample(pipe, callback_on_step_end=off)
    assert {b.name: len(b.computed) for b in run.summary().branches}["cond"] == 7


def test_lemica_predicts_on_its_own_schedule():
    published, checked = LeMiCa(20).plan("wan2.1-t2v-1.3B"), LeMiCa(20, predict="checked").plan("wan2.1-t2v-1.3B")
    assert checked.computed == published.computed
    assert checked.check == Check()
    assert dict(checked.weights)[checked.reused[-1]][0] > 1
    assert Checked(20, "published").plan(50, "wan2.1-t2v-1.3B").computed == published.computed
    assert "checked" in str(LeMiCa(20, predict="checked"))


def test_the_first_quarter_repeats():
    plan = Plan(40, (0, 3, 6, 9, 12, 16, 20, 39)).checked()
    named = dict(plan.weights)
    assert all(step not in named for step in (4, 5, 7, 8, 10, 11))  # begun before step 10
    assert named[13] == (4 / 3, -1 / 3)
    assert {6, 9, 12} <= set(named)  # the check learns at all of them
    assert 4 in dict(plan.extrapolated().weights)


def test_plans_with_a_check_round_trip_and_resample():
    plan = replace(Plan(12, NODES).checked(Check((11, 5), 0.25, "guidance")), guidance_range=(3.5, 6.5))
    plan = replace(plan, scheduler="UniPC", errors=((1, 0.5),), figures=(("psnr", 30.0),))
    assert Plan.from_json(plan.to_json()) == plan
    longer = plan.resampled(24)
    assert longer.check == plan.check
    assert longer.weights == first_order(longer.computed, 24, EARLY)
    with pytest.raises(ValueError, match=r"guidance 3.5 to 6.5 \(the run: 7\)"):
        plan.fitted_to(Trajectory(12, guidance=7.0))
    with pytest.raises(ValueError, match="scheduler UniPC"):
        plan.fitted_to(Trajectory(12, guidance=5.0, scheduler="Euler"))
    assert plan.fitted_to(Trajectory(12, guidance=5.0, scheduler="UniPC")) is plan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Check(bands=(4,)), "odd edges"),
        (lambda: Check(bands=(3, 5)), "odd edges"),
        (lambda: Check(average=1.0), "below 1"),
        (lambda: Check(basis="sum"), "expected one of branch, guidance"),
        (lambda: Checked(1), "expected 2 or more"),
        (lambda: Checked(5, "best"), "expected uniform or published"),
        (lambda: Checked(30).plan(20), "use at most 20"),
        (lambda: LeMiCa(25, predict="guess"), "expected reuse or checked"),
        (lambda: Plan(5, (0, 2, 4), weights=((2, (1.0,)),)), "not a reused step"),
        (lambda: Plan(5, (0, 2, 4), weights=((1, (float("inf"),)),)), "finite"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_damaged_check_is_refused():
    document = json.loads(Plan(12, NODES).checked().to_json())
    for bad in ({"bands": [4]}, {"bands": 5}, {"gain": 2}, []):
        with pytest.raises(ValueError, match=r"plan|bands"):
            Plan.from_json(json.dumps({**document, "check": bad}))


def test_follow_plan_keeps_two_outputs():
    assert FollowPlan(Plan(12, NODES).checked()).history == 2
