"""StepCache on its own: steps and branches, resets, what is kept, weights, devices."""

import pytest
import torch

from stepcache import EasyCache, Hindsight, LeMiCa, MagCache, Off, Plan, PlanFile, Ratios, StepCache, Trajectory
from stepcache.core.follow_weights import as_policy


def latents(value, shape=(1, 4, 2, 4, 4)):
    return torch.full(shape, float(value))


def cache_of(plan, steps=None, rounds=True, **options):
    cache = StepCache(as_policy(plan), rounds=rounds, **options)
    cache.begin(Trajectory(steps or plan.num_steps))
    return cache


def visit(cache, branch, x, output=None):
    call = cache.enter(branch, x)
    if call.compute:
        y = x if output is None else output
        cache.keep(call, x, y)
    else:
        y = cache.predict(call, x)
    cache.leave(call, y)
    return call, y


def held(cache):
    return sum(len(b.kept) for b in cache._branches.values()) + len(cache.strategy.tensors())


def test_without_a_sampler_a_step_ends_when_a_branch_comes_round_again():
    cache = cache_of(Off(), 4)
    steps = [visit(cache, b, latents(0))[0].step for b in ("c", "u", "c", "u", "c", "c", "u")]
    assert steps == [0, 0, 1, 1, 2, 3, 3]


def test_with_a_sampler_a_step_ends_when_it_steps_and_nowhere_else():
    cache = cache_of(Plan(3, (0, 2)), rounds=False)
    values = []
    for step in range(3):
        for window in range(3):  # three calls of one branch: each has a memory of its own
            call, y = visit(cache, "cond", latents(step), latents(10 * step + window))
            assert (call.step, call.branch) == (step, "cond" if window == 0 else f"cond #{window + 1}")
            values.append(y.mean().item())
        cache.step_over()
    assert values == [0, 1, 2, 0, 1, 2, 20, 21, 22]
    assert [len(b.computed) + len(b.skipped) for b in cache.summary().branches] == [3, 3, 3]


def test_calls_after_the_last_step_are_computed_and_said():
    cache = cache_of(Plan(2, (0,)), rounds=False)
    for _ in range(4):
        call, _ = visit(cache, "cond", latents(1))
        cache.step_over()
    assert call.compute
    assert held(cache) == 0
    assert cache.summary().branches[0].skipped == (1,)
    assert any("2 calls came after the last of 2 steps" in w for w in cache.summary().warnings)


def test_a_skip_that_lacks_what_it_needs_computes_and_says_so():
    cache = cache_of(Plan(4, (0, 3)))
    visit(cache, "cond", latents(0))
    visit(cache, "cond", latents(1))
    call, _ = visit(cache, "uncond", latents(1))  # guidance switched on late
    assert (call.compute, call.step) == (True, 1)
    assert not visit(cache, "cond", latents(2))[0].compute
    assert not visit(cache, "uncond", latents(2))[0].compute
    assert cache.summary().forced == ((1, "uncond"),)
    assert any("nothing to predict" in w for w in cache.summary().warnings)


def test_another_size_in_mid_run_is_not_mixed_with_the_old_one():
    cache = cache_of(Plan(4, (0, 3)))
    visit(cache, "c", latents(1))
    call, y = visit(cache, "c", latents(2, (1, 4, 2, 6, 6)))
    assert call.compute
    assert y.shape[-1] == 6
    assert any("changed its shape at step 1" in w for w in cache.summary().warnings)


def test_one_call_more_than_the_steps_is_a_new_run():
    cache = cache_of(Plan(3, (0, 2)))
    for _ in range(2):
        calls = [visit(cache, "c", latents(k), latents(k))[0] for k in range(3)]
        assert [c.step for c in calls] == [0, 1, 2]
        assert [c.compute for c in calls] == [True, False, True]
    assert cache.summary().computed == (0, 2)


@pytest.mark.parametrize("policy", [LeMiCa(14, "wan2.1-t2v-1.3B"), EasyCache(0.5, 3)])
def test_nothing_is_kept_when_the_run_ends(policy):
    cache = cache_of(policy, 50)
    most = 0
    for step in range(50):
        for b in ("cond", "uncond"):
            visit(cache, b, torch.randn(1, 4, 2, 4, 4) * (1 - step / 60))
            most = max(most, held(cache))
        if step < 49:
            assert held(cache) > 0
    assert held(cache) == 0
    assert most <= 5  # the cached difference of the first branch is held twice, by name, not by memory
    assert cache.summary().cache_bytes <= 4 * 4 * 128  # two latents a branch, float32, 128 numbers each


def test_an_aborted_run_is_freed_too():
    cache = cache_of(EasyCache(1e9, 2), 50)
    for _ in range(5):
        visit(cache, "cond", torch.randn(1, 4, 2, 4, 4))
    assert held(cache) > 0
    cache.end()
    assert held(cache) == 0
    assert cache.summary().computed == (0, 1)


def test_a_branch_that_stopped_coming_is_freed_at_the_end_too():
    cache = cache_of(Plan(6, (0, 5)))
    for b in ("cond", "uncond", "cond", "uncond"):
        visit(cache, b, latents(1))
    for _ in range(4):  # guidance switched off after step 1
        visit(cache, "cond", latents(1))
    assert held(cache) == 0


def test_weights_combine_the_last_outputs():
    cache = cache_of(Plan(4, (0, 1), weights=((2, (2.0, -1.0)), (3, (3.0, -2.0)))))
    values = [visit(cache, "c", latents(0), latents(v))[1].mean().item() for v in (5, 7, 0, 0)]
    assert values == [5, 7, 9, 11]  # first-order extrapolation


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_outputs_may_be_written_into_by_whoever_receives_them(mode):
    cache, seen = cache_of(Plan(4, (0, 3))), []
    with mode():
        for _ in range(3):
            _, y = visit(cache, "c", latents(0), latents(2))
            seen.append(y.mean().item())
            y.mul_(2)
    assert seen == [2, 2, 2]


def test_half_precision_differences_are_taken_in_float32():
    cache = cache_of(EasyCache(1e9, 2), 5)
    x, y = torch.randn(1, 8).bfloat16(), torch.randn(1, 8).bfloat16()
    visit(cache, "c", x, y)
    visit(cache, "c", x * 0.5, y)
    call, z = visit(cache, "c", x * 0.25)
    assert not call.compute
    assert z.dtype == torch.bfloat16
    expected = ((x * 0.25).float() + (y.float() - (x * 0.5).float())).bfloat16()
    assert torch.equal(z, expected)


def test_cache_device_moves_features():
    cache = cache_of(Plan(3, (0, 2)), cache_device="meta")
    visit(cache, "c", latents(0))
    assert cache._branches["c"].kept[0][1].device.type == "meta"
    cache = cache_of(Plan(3, (0, 2)), cache_device="cpu")
    visit(cache, "c", latents(0), latents(4))
    assert visit(cache, "c", latents(1))[1].mean() == 4


def test_few_steps_are_warned_about():
    cache = cache_of(Plan(4, (0, 3)))
    for k in range(4):
        visit(cache, "c", latents(k))
    assert any("only 4 steps" in w for w in cache.summary().warnings)
    assert "·" in str(cache.summary())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("policy", [Plan(12, (0, 4, 8, 11)), EasyCache(1e9, 2)])
def test_what_is_not_finite_passes_through_with_one_warning(bad, policy):
    cache = cache_of(policy, 12)
    for k in range(12):
        _, y = visit(cache, "c", latents(k), latents(bad if k >= 4 else k))
    assert not y.isfinite().any()
    said = [w for w in cache.summary().warnings if "not finite" in w]
    assert len(said) == 1
    assert not any("never allowed" in w for w in cache.summary().warnings)


def test_wrong_boundary():
    with pytest.raises(ValueError, match="boundary is 'middle'"):
        StepCache(Off(), boundary="middle")
    with pytest.raises(ValueError, match="boundary blocks has no effect"):
        StepCache(Hindsight(5), boundary="blocks").begin(Trajectory(12))


def test_a_call_before_any_run_is_computed():
    call = StepCache(Off()).enter("c", latents(0))
    assert call.compute


def test_a_branch_that_missed_a_computed_step_is_computed_and_not_repeated_from_before():
    cache = cache_of(Plan(8, (0, 1, 4, 7)))
    for step in range(8):
        visit(cache, "cond", latents(step), latents(step))
        if step in (0, 1, 5, 6):  # absent at step 4, which was computed
            call, y = visit(cache, "uncond", latents(step), latents(100 + step))
            assert call.compute == (step != 6)
            assert y.mean() == (105 if step >= 5 else 100 + step)
    assert cache.summary().forced == ((5, "uncond"),)


def test_another_size_in_mid_run_with_two_weights():
    cache = cache_of(Plan(6, (0, 1, 5), weights=tuple((k, (2.0, -1.0)) for k in (2, 3, 4))))
    for k in range(6):
        shape = (1, 4, 2, 4, 4) if k < 3 else (1, 4, 2, 6, 6)
        assert visit(cache, "c", latents(k, shape))[1].shape == shape
    assert [s for s, _ in cache.summary().forced] == [3, 4]


def test_what_computes_everything_keeps_nothing():
    cache = cache_of(Off(), 3, boundary="blocks")
    for k in range(3):
        visit(cache, "c", latents(k))
        assert held(cache) == 0
    assert cache.summary().cache_bytes == 0
    assert cache.summary().warnings == ()


def test_a_plan_for_the_other_boundary():
    cache = StepCache(PlanFile(Plan(3, (0, 2)), boundary="blocks"), boundary="output")
    with pytest.raises(ValueError, match=r"boundary blocks \(the run: output\)"):
        cache.begin(Trajectory(3))


def test_the_summary_tells_what_was_resampled():
    cache = cache_of(LeMiCa(25, "wan2.1-t2v-1.3B", resample=True), 30)
    visit(cache, "c", latents(0))
    assert "resampled from 25 of 50 to 25 of 30" in str(cache.summary())
    assert cache.summary().plan.num_steps == 30


def test_ratios_of_another_model_are_refused():
    ratios = Ratios(3, {"cond": (1.0, 1.0, 1.0)}, model="a")
    with pytest.raises(ValueError, match="calibrated on a and the run is b"):
        StepCache(MagCache(ratios=ratios)).begin(Trajectory(3, "b"))
    StepCache(MagCache(ratios=ratios, model="b")).begin(Trajectory(3, "b"))


def test_a_branch_that_was_freed_and_comes_back_at_a_skipped_last_step_is_computed():
    cache = cache_of(Plan(6, (0, 3)))
    for step in range(6):
        visit(cache, "cond", latents(step))
        if step in (0, 1, 2, 3, 5):
            call, _ = visit(cache, "uncond", latents(step))
    assert call.compute
    assert held(cache) == 0
