"""Self-checked extrapolation against the rule written out on a real pipeline; gains, bands, bases, bad settings."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from conftest import sample, tiny_pipe
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from stepcache.hindsight.selfcheck import Increment, SelfCheck

import stepcache
from stepcache import Check, Hindsight, LeMiCa, Plan
from stepcache.core.cache import StepCache
from stepcache.core.follow_plan import FollowPlan
from stepcache.core.plan import HindsightSettings, first_order
from stepcache.core.trajectory import Trajectory
from stepcache.hindsight.corrector import WIDE, Ledger
from stepcache.hindsight.response import response

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
def written_out(pipe, check, batch=1, guidance=5.0, steps=12, computed=NODES):
    """The denoising loop with the self-check as prototype and paper state it: (final latent, gains by step)."""
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
    plan = replace(Plan(12, NODES).checked(check), hindsight=None)
    with stepcache.accelerate(pipe, plan) as run:
        got = sample(pipe, batch=batch, guidance=guidance)
    assert run.summary().computed == NODES
    assert not run.summary().forced
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def looked_back(pipe, rule, batch=1, guidance=5.0, steps=12, computed=NODES):
    """The same loop with hindsight from its definition: at every step the latent is summed up anew from all outputs
    as they are known by then, instead of handing a sampler what it lacks."""
    g = torch.Generator().manual_seed(0)
    texts = [torch.randn(batch, 8, 32, generator=g), torch.randn(batch, 8, 32, generator=g)]
    pipe.scheduler.set_timesteps(steps)
    answers, sigmas = response(pipe.scheduler), pipe.scheduler.sigmas
    start = torch.randn(batch, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    branches = [(guidance, texts[0]), (1 - guidance, texts[1])] if guidance > 1 else [(1.0, texts[0])]
    raw, known, best, gains = {}, {}, [], None  # outputs by branch; guided and moved to the new latent; all, best guess
    factor, floor = torch.ones(batch, 1, 1, 1, 1), 0.0
    dots = lambda a, b: (a * b).sum((1, 2, 3, 4), keepdim=True)  # noqa: E731
    mixed = lambda outputs: sum(w * o for (w, _), o in zip(branches, outputs, strict=True))  # noqa: E731

    def predicted(k, before):
        """Without and with what the moved latents add."""
        c = (k - before[0]) / (before[0] - before[1]) if len(before) > 1 and gains is not None else 0.0
        outputs = raw[before[0]]
        if c:
            pairs = zip(outputs, raw[before[1]], gains, strict=True)
            outputs = [a + q.clamp_min(floor) * c * (a - b) for a, b, q in pairs]
        shift = [known[n] - mixed(raw[n]) for n in before[:2]]
        return mixed(outputs), shift[0] + (c * (shift[0] - shift[1]) if c else 0.0)

    def latent(k):
        return start * answers[k, 0] + sum(answers[k, 1 + s] * v for s, v in enumerate(best))

    for k, t in enumerate(pipe.scheduler.timesteps):
        x, before = latent(k).float(), [n for n in computed if n < k][::-1]
        ahead = next((n for n in computed if n > k), steps)
        if k in computed:
            raw[k] = [pipe.transformer(x, t.expand(batch), e, return_dict=False)[0] for _, e in branches]
            guided = mixed(raw[k])
            if gains is not None and guidance > 1:
                without, given = predicted(k, before)
                if float(given.abs().max()):
                    found = factor * dots(guided - without, given) / dots(given, given)
                    factor = (factor + found.clamp(0.3, 2.0)) / 2
            if len(before) > 1:
                pairs = list(zip(raw[k], raw[before[0]], raw[before[1]], strict=True))
                new = [(dots(o - a, a - b) / dots(a - b, a - b)) for o, a, b in pairs]
                c = (k - before[0]) / (before[0] - before[1])
                new = [(q / c).clamp(0, 1) for q in new]
                gains = new if gains is None else [(a + b) / 2 for a, b in zip(gains, new, strict=True)]
            added = torch.zeros_like(guided)
            gap = range(before[0] + 1, k) if before else ()
            if gap:
                gone = {s: (s - before[0]) / (k - before[0]) for s in gap}
                share = 1.0 if guidance > 1 else min(1.0, (3 / (k - before[0])) ** 2)
                clean = 1 - float(sigmas[k])
                rate = (guidance - 1) * min(clean / rule.knee, 1) / max(clean, 1e-3) * rule.feedback[0]
                for _ in range(200):  # the output moves the latent that moves the output: until it stands still
                    there = {s: torch.lerp(known[before[0]], guided + added, gone[s]) for s in gap}
                    moved = sum(answers[k, 1 + s] * share * (there[s] - best[s]) for s in gap).float()
                    added = 0.5 * added + 0.5 * rate * factor * moved
                for s in gap:
                    best[s] = best[s] + share * (there[s] - best[s])
            known[k] = guided + added
            best.append(known[k])
            floor = rule.floor * min(1.0, WIDE * steps / (ahead - k)) if guidance > 1 else 0.0
        else:
            best.append(sum(predicted(k, before)))
    return latent(steps).float()


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_in_hindsight_it_is_the_rule_written_out(guidance, batch, sampler):
    rule = HindsightSettings(feedback=(0.3,), bands=(), knee=0.3, floor=0.4)
    pipe = gentle_pipe()
    if sampler == "euler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = looked_back(pipe, rule, batch, guidance)
    plan = Plan(12, NODES).checked(Check(bands=(), basis="branch"))
    with stepcache.accelerate(pipe, replace(plan, hindsight=rule)) as run:
        got = sample(pipe, batch=batch, guidance=guidance)
    assert run.summary().computed == NODES
    assert not run.summary().warnings
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
    with stepcache.accelerate(pipe, replace(plan, hindsight=None)):
        assert (sample(pipe, batch=batch, guidance=guidance) - expected).abs().max() > 2e-2


def test_hindsight_needs_the_output_boundary_a_linear_sampler_and_branches_that_stay(pipe):
    plan = Plan(12, NODES).checked()
    results = []
    for candidate in (plan, replace(plan, hindsight=None)):
        with stepcache.accelerate(pipe, candidate, boundary="blocks") as run:
            results.append(sample(pipe))
    assert torch.equal(*results)  # tokens are left as they are

    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with stepcache.accelerate(pipe, plan) as run:
        sample(pipe)
    assert any(
        "not put right in hindsight: FlowMatchEulerDiscreteScheduler is not linear" in w for w in run.summary().warnings
    )
    with stepcache.attach(gentle_pipe().transformer, plan, sample="hidden_states", num_steps=12) as attached:
        attached.cache.enter("all", torch.zeros(1, 16, 2, 4, 4))
        assert any("does not know the sampler" in w for w in attached.summary().warnings)


def test_two_branches_in_one_call_are_seen(pipe):
    """A module that is called once with both halves gets what two calls of one half each get."""
    plan, scheduler = Plan(12, NODES).checked(Check(basis="branch", bands=())), pipe.scheduler
    texts = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for together in (True, False):
        scheduler.set_timesteps(12)
        x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
        names = {"sample": "hidden_states", "timestep": "timestep", "condition": "encoder_hidden_states"}
        if together:
            del names["condition"]
        run = stepcache.attach(pipe.transformer, plan, num_steps=12, scheduler=scheduler, **names)
        with run, torch.no_grad():
            for t in scheduler.timesteps:
                if together:
                    out = pipe.transformer(torch.cat([x, x]), t.expand(2), texts, return_dict=False)[0]
                    cond, uncond = out.chunk(2)
                else:
                    cond, uncond = (pipe.transformer(x, t.expand(1), e[None], return_dict=False)[0] for e in texts)
                x = scheduler.step(uncond + 5 * (cond - uncond), t, x, return_dict=False)[0]
        assert not run.summary().warnings
        results.append(x)
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)


@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 5), min_size=2, max_size=8),
    st.sampled_from(["UniPC", "Euler", "DPM"]),
    st.sampled_from([0.0, 4.0]),
)
@settings(max_examples=40)
def test_the_sampler_arrives_where_the_best_outputs_lead(seed, gaps, sampler, strength):
    """Whatever was handed on before: the latent after a step is that of the outputs as they are known by then."""
    computed = tuple(itertools.accumulate([0, *gaps]))
    steps = computed[-1] + 1
    scheduler = {
        "UniPC": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "Euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "DPM": DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    }[sampler]
    scheduler.set_timesteps(steps)
    answers = response(scheduler)
    ledger = Ledger(answers, HindsightSettings(), strength)
    g = torch.Generator().manual_seed(seed)
    handed, best, node = [], [], 0
    for k in range(steps):
        value = torch.randn(1, 2, 1, 6, 6, generator=g, dtype=torch.float64)
        if k in computed:
            due = ledger.computed(k, value)
            truth = ledger._nodes[0].output  # with what the moved latent adds
            for s in range(node + 1, k):
                along = (s - node) / (k - node)
                share = 1.0 if strength else min(1.0, (3 / (k - node)) ** 2)
                best[s] = best[s] + share * (torch.lerp(best[node], truth, along) - best[s])
            node = k
            best.append(truth)
        else:
            due = ledger.reused(k, value, (1.0,))
            best.append(ledger._gap[-1][1])
        handed.append(value if due is None else value + due)
        arrives, wanted = (sum(answers[k + 1, 1 + s] * v for s, v in enumerate(vs)) for vs in (handed, best))
        torch.testing.assert_close(arrives, wanted, rtol=1e-4, atol=1e-4)


def test_a_sampler_that_answers_late_is_refused():
    late = torch.tril(torch.ones(5, 5, dtype=torch.float64), -1)
    with pytest.raises(ValueError, match="nothing can be put right"):
        Ledger(late, HindsightSettings())


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
    with stepcache.accelerate(pipe, Hindsight(5)):
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
    cache = StepCache(Hindsight(3))
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
    published, checked = LeMiCa(20).plan("wan2.1-t2v-1.3B"), LeMiCa(20, predict="hindsight").plan("wan2.1-t2v-1.3B")
    assert checked.computed == published.computed
    assert checked.check == Check()
    assert dict(checked.weights)[checked.reused[-1]][0] > 1
    assert Hindsight(20, "published").plan(50, "wan2.1-t2v-1.3B").computed == published.computed
    assert "hindsight" in str(LeMiCa(20, predict="hindsight"))


def test_plans_with_a_check_round_trip_and_resample():
    plan = replace(Plan(12, NODES).checked(Check((11, 5), 0.25, "guidance")), guidance_range=(3.5, 6.5))
    plan = replace(plan, scheduler="UniPC", errors=((1, 0.5),), figures=(("psnr", 30.0),))
    assert Plan.from_json(plan.to_json()) == plan
    longer = plan.resampled(24)
    assert longer.check == plan.check
    assert longer.weights == first_order(longer.computed, 24)
    assert longer.hindsight == plan.hindsight
    assert plan.extrapolated().hindsight is None
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
        (lambda: HindsightSettings(feedback=(0.5,)), "2 numbers of 0 or more"),
        (lambda: HindsightSettings(feedback=(-1.0, 0.5)), "2 numbers of 0 or more"),
        (lambda: HindsightSettings(knee=0.0), "the knee above 0"),
        (lambda: HindsightSettings(floor=1.5), "shares of 1"),
        (lambda: Hindsight(1), "expected 2 or more"),
        (lambda: Hindsight(5, "best"), "expected uniform or published"),
        (lambda: Hindsight(30).plan(20), "use at most 20"),
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
    for bad in ({"bands": [4]}, {"bands": 5}, {"gain": 2}, [], 3):
        for name in ("check", "hindsight"):
            with pytest.raises(ValueError, match=r"plan|bands"):
                Plan.from_json(json.dumps({**document, name: bad}))


def test_follow_plan_keeps_two_outputs():
    assert FollowPlan(Plan(12, NODES).checked()).history == 2
