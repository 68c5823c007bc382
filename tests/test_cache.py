"""StepCache on its own: steps and branches, resets, what is kept, weights, devices."""

import pytest
import torch

from stepcache import EasyCache, Fixed, LeMiCa, MagCache, Off, Plan, Ratios, StepCache, Trajectory


def latents(value, shape=(1, 4, 2, 4, 4)):
    return torch.full(shape, float(value))


def visit(cache, branch, x, output=None, holder=None):
    call = cache.enter(branch, x, holder=holder)
    if call.compute:
        y = x if output is None else output
        cache.keep(call, x, y)
    else:
        y = cache.predict(call, x)
    cache.leave(call, y)
    return call, y


def held(cache):
    return sum(len(b.features) for b in cache._branches) + (len(cache._decider.tensors()) if cache._decider else 0)


def test_a_step_ends_when_a_branch_comes_round_again():
    cache = StepCache(Off())
    cache.begin(Trajectory(4))
    steps = [visit(cache, b, latents(0))[0].step for b in ("c", "u", "c", "u", "c", "c", "u")]
    assert steps == [0, 0, 1, 1, 2, 3, 3]


def test_branches_by_identity_of_their_conditioning():
    cache = StepCache(Fixed(Plan(3, (0, 2))))
    cache.begin(Trajectory(3))
    cond, uncond = object(), object()
    values = []
    for step in range(3):
        for i, text in enumerate((cond, uncond)):
            _, y = visit(cache, id(text), latents(step), latents(10 * step + i), holder=text)
            values.append(y.mean().item())
    assert values == [0, 1, 0, 1, 20, 21]
    assert [b.name for b in cache.summary().branches] == ["cond", "uncond"]


def test_a_reuse_that_lacks_what_it_needs_computes_and_says_so():
    cache = StepCache(Fixed(Plan(4, (0, 3))))
    cache.begin(Trajectory(4))
    visit(cache, "cond", latents(0))
    visit(cache, "cond", latents(1))
    call, _ = visit(cache, "uncond", latents(1))  # guidance switched on late
    assert (call.compute, call.forced, call.step) == (True, True, 1)
    assert not visit(cache, "cond", latents(2))[0].compute
    assert not visit(cache, "uncond", latents(2))[0].compute
    assert cache.summary().forced == ((1, "uncond"),)
    assert any("nothing to reuse" in w for w in cache.summary().warnings)


def test_another_size_in_mid_run_is_not_mixed_with_the_old_one():
    cache = StepCache(Fixed(Plan(4, (0, 3))))
    cache.begin(Trajectory(4))
    visit(cache, "c", latents(1))
    call, y = visit(cache, "c", latents(2, (1, 4, 2, 6, 6)))
    assert call.forced
    assert y.shape[-1] == 6


def test_one_call_more_than_the_steps_is_a_new_trajectory():
    cache = StepCache(Fixed(Plan(3, (0, 2))))
    cache.begin(Trajectory(3))
    for _ in range(2):
        calls = [visit(cache, "c", latents(k), latents(k))[0] for k in range(3)]
        assert [c.step for c in calls] == [0, 1, 2]
        assert [c.compute for c in calls] == [True, False, True]
    assert cache.summary().computed == (0, 2)


@pytest.mark.parametrize("policy", [LeMiCa(14, "wan2.1-t2v-1.3B"), EasyCache(0.5, 3)])
def test_nothing_is_kept_when_the_trajectory_ends(policy):
    cache = StepCache(policy)
    cache.begin(Trajectory(50))
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


def test_a_branch_that_stopped_coming_is_freed_at_the_end_too():
    cache = StepCache(Fixed(Plan(6, (0, 5))))
    cache.begin(Trajectory(6))
    for b in ("cond", "uncond", "cond", "uncond"):
        visit(cache, b, latents(1))
    for _ in range(4):  # guidance switched off after step 1
        visit(cache, "cond", latents(1))
    assert held(cache) == 0


def test_weights_combine_the_last_outputs():
    plan = Plan(4, (0, 1), weights=((2, (2.0, -1.0)), (3, (3.0, -2.0))))
    cache = StepCache(Fixed(plan))
    cache.begin(Trajectory(4))
    values = [visit(cache, "c", latents(0), latents(v))[1].mean().item() for v in (5, 7, 0, 0)]
    assert values == [5, 7, 9, 11]  # first-order extrapolation


def test_a_plain_reuse_copies_nothing():
    cache = StepCache(Fixed(Plan(3, (0, 2))))
    cache.begin(Trajectory(3))
    output = latents(3)
    visit(cache, "c", latents(0), output)
    assert visit(cache, "c", latents(1))[1].data_ptr() == output.data_ptr()


def test_half_precision_differences_are_taken_in_float32():
    cache = StepCache(EasyCache(1e9, 2))
    cache.begin(Trajectory(5))
    x, y = torch.randn(1, 8).bfloat16(), torch.randn(1, 8).bfloat16()
    visit(cache, "c", x, y)
    visit(cache, "c", x * 0.5, y)
    call, z = visit(cache, "c", x * 0.25)
    assert not call.compute
    assert z.dtype == torch.bfloat16
    expected = ((x * 0.25).float() + (y.float() - (x * 0.5).float())).bfloat16()
    assert torch.equal(z, expected)


def test_cache_device_moves_features():
    cache = StepCache(Fixed(Plan(3, (0, 2))), cache_device="meta")
    cache.begin(Trajectory(3))
    visit(cache, "c", latents(0))
    assert cache._branches[0].features[0].device.type == "meta"
    cache = StepCache(Fixed(Plan(3, (0, 2))), cache_device="cpu")
    cache.begin(Trajectory(3))
    visit(cache, "c", latents(0), latents(4))
    assert visit(cache, "c", latents(1))[1].mean() == 4


def test_few_steps_are_warned_about():
    cache = StepCache(Fixed(Plan(4, (0, 3))))
    cache.begin(Trajectory(4))
    for k in range(4):
        visit(cache, "c", latents(k))
    assert any("only 4 steps" in w for w in cache.summary().warnings)
    assert "·" in str(cache.summary())


def test_wrong_boundary_and_no_begin():
    with pytest.raises(ValueError, match="boundary is 'middle'"):
        StepCache(Off(), boundary="middle")
    with pytest.raises(RuntimeError, match="begin"):
        StepCache(Off()).enter("c", latents(0))


def test_a_branch_that_missed_a_computed_step_is_computed_and_not_repeated_from_before():
    cache = StepCache(Fixed(Plan(8, (0, 1, 4, 7))))
    cache.begin(Trajectory(8))
    for step in range(8):
        visit(cache, "cond", latents(step), latents(step))
        if step in (0, 1, 5, 6):  # absent at step 4, which was computed
            call, y = visit(cache, "uncond", latents(step), latents(100 + step))
            assert call.forced == (step == 5)
            assert y.mean() == (105 if step >= 5 else 100 + step)
    assert cache.summary().forced == ((5, "uncond"),)


def test_another_size_in_mid_run_with_two_weights():
    plan = Plan(6, (0, 1, 5), weights=tuple((k, (2.0, -1.0)) for k in (2, 3, 4)))
    cache = StepCache(Fixed(plan))
    cache.begin(Trajectory(6))
    for k in range(6):
        shape = (1, 4, 2, 4, 4) if k < 3 else (1, 4, 2, 6, 6)
        assert visit(cache, "c", latents(k, shape))[1].shape == shape
    assert [s for s, _ in cache.summary().forced] == [3, 4]


def test_what_computes_everything_keeps_nothing():
    cache = StepCache(Off(), boundary="blocks")
    cache.begin(Trajectory(3))
    for k in range(3):
        visit(cache, "c", latents(k))
        assert held(cache) == 0
    assert cache.summary().cache_bytes == 0
    assert cache.summary().warnings == ()


def test_a_plan_for_the_other_boundary_and_a_bad_device():
    cache = StepCache(Fixed(Plan(3, (0, 2), boundary="blocks")), boundary="output")
    with pytest.raises(ValueError, match=r"boundary blocks \(the run: output\)"):
        cache.begin(Trajectory(3))
    with pytest.raises(ValueError, match="cache_device is 'nonsense'"):
        StepCache(Off(), cache_device="nonsense")


def test_the_summary_tells_what_was_resampled():
    cache = StepCache(LeMiCa(25, "wan2.1-t2v-1.3B", resample=True))
    cache.begin(Trajectory(30))
    visit(cache, "c", latents(0))
    assert "resampled from 25 of 50 to 25 of 30" in str(cache.summary())
    assert cache.summary().plan.num_steps == 30


def test_ratios_of_another_model_are_refused():
    ratios = Ratios(3, {"cond": (1.0, 1.0, 1.0)}, model="a")
    with pytest.raises(ValueError, match="calibrated on a and the run is b"):
        StepCache(MagCache(ratios=ratios)).begin(Trajectory(3, "b"))
    StepCache(MagCache(ratios=ratios, model="b")).begin(Trajectory(3, "b"))


def test_a_branch_that_was_freed_and_comes_back_at_a_reused_last_step_is_computed():
    cache = StepCache(Fixed(Plan(6, (0, 3))))
    cache.begin(Trajectory(6))
    for step in range(6):
        visit(cache, "cond", latents(step))
        if step in (0, 1, 2, 3, 5):
            call, _ = visit(cache, "uncond", latents(step))
    assert call.forced
    assert held(cache) == 0
