"""Calibrations against the tensors themselves, written out; the file; and what must not pass for a calibration."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_pipelines
import torch
from conftest import sample, tiny_pipe
from diffusers import (
    CogVideoXDDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import stepcache
from stepcache import Hindsight, Plan, PlanFile
from stepcache.hindsight.response import response
from stepcache.methods.taylorseer import taylor_weights
from stepcache.planning.calibrate import calibrate, describe
from stepcache.planning.calibration import Calibration, Recorder, gram_matrix
from stepcache.planning.costs import (
    final_error,
    gram_edges,
    magcache_ratios,
    plan_error,
    plan_hindsight,
    plan_lemica,
    step_errors,
)
from stepcache.planning.forecasts import forecasts, knee, psnr_of
from stepcache.planning.replay import MeasuredEdges, measured_edges, rank_agreement, replays

STEPS = 10
SCHEDULERS = {
    "unipc": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "unipc order 3": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=3
    ),
    "dpm++": lambda: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def recorded(pipe, guidance=5.0, seeds=(1, 2), batch=1):
    """A calibration, and the tensors that it is about: outputs (branches, S, ...) and latents (S + 1, ...) a run."""
    runs = []

    def watched(prompt, seed):
        outputs, latents, real = {}, [], pipe.transformer.forward

        def forward(hidden_states, *args, **kwargs):
            out = real(hidden_states, *args, **kwargs)
            outputs.setdefault(float(kwargs["encoder_hidden_states"].sum()), []).append(out[0].clone())
            if len(latents) < len(next(iter(outputs.values()))):
                latents.append(hidden_states.clone())
            return out

        pipe.transformer.forward = forward
        final = sample(pipe, steps=STEPS, guidance=guidance, seed=seed)
        del pipe.transformer.forward
        runs.append((torch.stack([torch.stack(rows) for rows in outputs.values()]), torch.stack([*latents, final])))
        return final

    return calibrate(pipe, [(f"prompt {s}", s) for s in seeds], watched), runs


@pytest.fixture(scope="module")
def calibrated():
    return recorded(tiny_pipe())


def test_gram_matrices_are_the_inner_products(calibrated):
    calibration, runs = calibrated
    assert calibration.branches == ("cond", "uncond")
    for run, (outputs, latents) in zip(calibration.runs, runs, strict=True):
        guided = outputs[1] + 5.0 * (outputs[0] - outputs[1])
        rows = torch.cat([guided, latents[:1]]).flatten(1).double()
        np.testing.assert_allclose(run.gram, (rows @ rows.T).numpy(), rtol=1e-5)
        for name, branch in zip(calibration.branches, outputs, strict=True):
            for k in range(1, STEPS):
                norms = [branch[k + d].norm(dim=1) for d in (0, -1)]
                assert run.magnitude[name][k, 0] == pytest.approx(float((norms[0] / norms[1]).mean()), rel=1e-5)
                rate = (branch[k] - branch[k - 1]).abs().mean() / (latents[k] - latents[k - 1]).abs().mean()
                assert run.rates[name][k] == pytest.approx(float(rate), rel=1e-5)
        assert run.mismatch < 1e-5


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_response_rebuilds_every_latent(name):
    pipe = tiny_pipe()
    pipe.scheduler = SCHEDULERS[name]()
    calibration, runs = recorded(pipe, guidance=3.0, seeds=(1,))
    outputs, latents = runs[0]
    guided = outputs[1] + 3.0 * (outputs[0] - outputs[1])
    for k in range(STEPS + 1):
        row = torch.tensor(calibration.response[k])
        rebuilt = row[0] * latents[0].double() + torch.einsum("s,s...->...", row[1:], guided.double())
        torch.testing.assert_close(rebuilt, latents[k].double(), rtol=1e-4, atol=1e-4)
    norm = float(latents[-1].double().norm())
    assert calibration.final_norms[0] == pytest.approx(norm, rel=1e-5)


def test_every_sample_of_a_batch_is_a_run():
    pipe, recorder = tiny_pipe(), Recorder()
    cond, uncond = torch.randn(2, 2, 8, 32, generator=torch.Generator().manual_seed(0))
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS, "output_type": "latent"}

    def run(which):
        seeds = [torch.Generator().manual_seed(seed) for seed in which]
        pipe(prompt_embeds=cond[which], negative_prompt_embeds=uncond[which], generator=seeds, **size)
        return recorder.finish(*(("a", seed) for seed in which))

    with stepcache.accelerate(pipe, recorder):
        both, alone = run([0, 1]), [run([0]), run([1])]
        with pytest.raises(ValueError, match=r"for 2 prompt\(s\)"):
            recorder.finish(("a", 1), ("b", 2))
    for one, two in zip(both.runs, (found.runs[0] for found in alone), strict=True):
        np.testing.assert_allclose(one.gram, two.gram, rtol=1e-3, atol=1e-2)
        for name in both.branches:
            np.testing.assert_allclose(one.magnitude[name], two.magnitude[name], rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(one.rates[name], two.rates[name], rtol=1e-3)


@pytest.mark.parametrize("name", ["qwen_image", "cogvideo"])
def test_guidance_of_any_kind_is_calibrated(name):
    """Norm-rescaled (Qwen-Image) and batched in one call (CogVideoX): only what the sampler is given counts."""
    pipe = getattr(tiny_pipelines, name)()
    call = {"qwen_image": tiny_pipelines.call_qwen_image, "cogvideo": tiny_pipelines.call_video}[name]
    if name == "cogvideo":
        pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)
    found = calibrate(pipe, [("a", 1)], lambda prompt, seed: call(pipe, STEPS, seed))
    assert found.runs[0].mismatch < 1e-4
    norm = float(call(pipe, STEPS, 1).double().norm())
    assert found.final_norms[0] == pytest.approx(norm, rel=1e-4)
    with stepcache.accelerate(pipe, plan_hindsight(found, 5)) as run:
        call(pipe, STEPS, 1)
    assert len(run.summary().computed) == 5


def test_guidance_off_is_one_branch():
    calibration, _ = recorded(tiny_pipe(), guidance=1.0, seeds=(1,))
    assert calibration.branches == ("cond",)
    assert plan_hindsight(calibration, 5).budget == 5


def test_streamed_to_a_file_and_in_half_precision(tmp_path, calibrated):
    calibration, _ = calibrated
    pipe = tiny_pipe()
    run = lambda prompt, seed: sample(pipe, steps=STEPS, seed=seed)  # noqa: E731
    same = calibrate(pipe, [("prompt 1", 1)], run, folder=str(tmp_path))
    np.testing.assert_array_equal(same.runs[0].gram, calibration.runs[0].gram)
    assert not list(tmp_path.iterdir())
    half = calibrate(pipe, [("prompt 1", 1)], run, dtype=torch.float16)
    np.testing.assert_allclose(half.runs[0].gram, calibration.runs[0].gram, rtol=5e-3, atol=5e-1)


def test_a_plan_s_open_loop_error_is_what_the_tensors_say(calibrated):
    calibration, runs = calibrated
    schedule = Plan(STEPS, (0, 2, 5, 9))
    weights = dict(taylor_weights(schedule.computed, STEPS, 1))
    plan, extrapolated = PlanFile(schedule, "hindsight"), PlanFile(replace(schedule, weights=tuple(weights.items())))
    for r, (outputs, latents) in enumerate(runs):
        guided = (outputs[1] + 5.0 * (outputs[0] - outputs[1])).double()
        error = torch.zeros_like(guided[0])
        for s in schedule.skipped:
            row = weights.get(s, (1.0,))
            sources = [k for k in schedule.computed if k < s][::-1]
            predicted = sum(w * guided[k] for w, k in zip(row, sources, strict=False))
            missed = predicted - guided[s]
            assert step_errors(calibration, plan)[s, r] == pytest.approx(
                float(missed.norm() / guided[s].norm()), rel=1e-6
            )
            error += calibration.influence[s] * missed
        expected = float(error.norm() / latents[-1].double().norm())
        assert plan_error(calibration, extrapolated)[r] == pytest.approx(expected, rel=1e-4)
        error = torch.zeros_like(guided[0])  # and once the gaps are interpolated between their ends
        for s, (a, b) in {1: (0, 2), 3: (2, 5), 4: (2, 5), 6: (5, 9), 7: (5, 9), 8: (5, 9)}.items():
            error += calibration.influence[s] * (torch.lerp(guided[a], guided[b], (s - a) / (b - a)) - guided[s])
        expected = float(error.norm() / latents[-1].double().norm())
        assert plan_error(calibration, plan)[r] == pytest.approx(expected, rel=1e-4)
    assert plan_error(calibration, PlanFile(Plan(STEPS, tuple(range(STEPS))))).max() == 0


def test_planned_schedules(calibrated):
    calibration, _ = calibrated
    plan = plan_hindsight(calibration, 5)
    assert (plan.budget, plan.method, plan.boundary) == (5, "hindsight", "output")
    assert plan.guidance_range == pytest.approx((3.5, 6.5))
    assert plan.plan.weights == ()
    assert plan.plan == Hindsight(5).plan(STEPS, calibration.levels), "the one that a run without a plan follows"
    with pytest.raises(ValueError, match="a budget of 11 does not fit 10 steps"):
        plan_hindsight(calibration, 11)


def test_noise_levels_are_the_scheduler_s(calibrated):
    scheduler = tiny_pipe().scheduler
    scheduler.set_timesteps(STEPS)
    assert calibrated[0].levels == pytest.approx(scheduler.sigmas[:STEPS].tolist(), abs=1e-3)


def test_lemica_s_graph_in_closed_form_and_by_replays(calibrated):
    """The closed form leaves out that later outputs answer; an edge to the last step has none but one."""
    calibration, _ = calibrated
    pipe = tiny_pipe()
    run = lambda prompt, seed: sample(pipe, steps=STEPS, seed=seed)  # noqa: E731
    edges = measured_edges(pipe, [("prompt 1", 1)], run, longest=3)
    assert len(edges.mean()) == len(replays(STEPS, 3)) == 15
    truth = run("", 1)
    for i, j in ((0, 2), (3, 6), (6, 9)):  # the same edge as an ordinary plan
        with stepcache.accelerate(pipe, Plan(STEPS, tuple(k for k in range(STEPS) if not i < k < j))):
            change = (run("", 1) - truth).abs().mean()
        assert edges.mean()[i, j] == pytest.approx(float(change), rel=1e-4)
    closed = gram_edges(calibration, 3)
    assert rank_agreement(closed, edges.mean()) > 0.5
    plan = plan_lemica(calibration, 6, edges.mean())
    assert plan.budget == 6


def test_replays_at_the_blocks(tmp_path):
    pipe = tiny_pipe()
    run = lambda prompt, seed: sample(pipe, steps=6, seed=seed)  # noqa: E731
    saved = []
    edges = measured_edges(pipe, [("a", 1)], run, longest=3, boundary="blocks", save=saved.append)
    truth = run("", 1)
    with stepcache.accelerate(pipe, Plan(6, (0, 1, 4, 5)), boundary="blocks"):
        change = (run("", 1) - truth).abs().mean()
    assert edges.mean()[1, 4] == pytest.approx(float(change), rel=1e-4)
    edges.save(tmp_path / "edges.json")
    assert MeasuredEdges.load(tmp_path / "edges.json") == edges == saved[-1]
    again = measured_edges(pipe, [("a", 1)], run, longest=3, boundary="blocks", known=edges)
    assert again == edges
    with pytest.raises(ValueError, match="expected 2 or more"):
        measured_edges(pipe, [("a", 1)], run, longest=1)


def test_a_replay_in_half_precision_measures_the_skip_and_no_rounding():
    """What is recalled has the dtype that the model returned, so an edge is the error of the run that skips."""
    pipe = tiny_pipe()
    pipe.transformer.to(torch.bfloat16)
    truth = sample(pipe, steps=6)
    edges = measured_edges(pipe, [("a", 1)], lambda p, s: sample(pipe, steps=6, seed=s), longest=2)
    with stepcache.accelerate(pipe, Plan(6, (0, 1, 3, 4, 5))):
        change = (sample(pipe, steps=6) - truth).abs().mean()
    assert edges.mean()[1, 3] == pytest.approx(float(change), rel=1e-3)


def test_a_replay_evaluates_only_what_it_must():
    pipe = tiny_pipe()
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    measured_edges(pipe, [("a", 1)], lambda p, s: sample(pipe, steps=6, seed=s), longest=2)
    evaluated = sum(6 - j for _, j in replays(6, 2))
    assert len(calls) == 2 * (6 + evaluated)


def test_the_file_round_trips(tmp_path, calibrated):
    calibration, _ = calibrated
    path = tmp_path / "calibration.json"
    calibration.save(path)
    found = Calibration.load(path)
    np.testing.assert_array_equal(found.grams, calibration.grams)
    np.testing.assert_array_equal(found.response, calibration.response)
    assert found.key() == calibration.key()
    assert [r.prompt for r in found.runs] == [r.prompt for r in calibration.runs]
    assert path.stat().st_size / len(found.runs) < 2**20
    assert describe(found) == describe(calibration)
    ratios = magcache_ratios(found)
    assert ratios.num_steps == STEPS
    assert set(ratios.branches) == {"cond", "uncond"}


def test_merging(calibrated):
    calibration, _ = calibrated
    one, two = (replace(calibration, runs=(run,)) for run in calibration.runs)
    merged = one.merged(two)
    assert merged.runs == calibration.runs
    assert merged.merged(two).runs == merged.runs, "a run is taken once"
    with pytest.raises(ValueError, match=r"guidance 5.0 and 4.0"):
        one.merged(replace(two, guidance=4.0))


def test_going_on_where_it_stopped(calibrated):
    calibration, _ = calibrated
    pipe, ran = tiny_pipe(), []

    def run(prompt, seed):
        ran.append(seed)
        return sample(pipe, steps=STEPS, seed=seed)

    first = replace(calibration, runs=calibration.runs[:1])
    whole = calibrate(pipe, [("prompt 1", 1), ("prompt 2", 2)], run, known=first)
    assert ran == [2]
    np.testing.assert_allclose(whole.grams, calibration.grams)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(num_steps=10**9),
        lambda d: d.update(num_steps="10"),
        lambda d: d.update(response="AAAA"),
        lambda d: d.update(branches=[]),
        lambda d: d.update(branches=["a", "b", "c"]),
        lambda d: d["runs"][0].update(gram=d["runs"][0]["gram"][:-4]),
        lambda d: d["runs"][0].update(gram="!" * len(d["runs"][0]["gram"])),
        lambda d: d["runs"][0].update(rates={"cond": [1.0]}),
        lambda d: d["runs"][0].pop("prompt"),
        lambda d: d.update(timesteps=[1.0]),
        lambda d: d.update(levels=[1.0]),
        lambda d: d.update(size="abc"),
        lambda d: d.update(surprise=1),
    ],
)
def test_damaged_and_hostile_files(tmp_path, calibrated, damage):
    calibration, _ = calibrated
    path = tmp_path / "bad.json"
    calibration.save(path)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"bad.json"):
        Calibration.load(path)


def test_truncated_and_foreign_files(tmp_path, calibrated):
    calibration, _ = calibrated
    path = tmp_path / "bad.json"
    calibration.save(path)
    path.write_text(path.read_text()[:1000])
    with pytest.raises(ValueError, match="not JSON"):
        Calibration.load(path)
    path.write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(ValueError, match="not text"):
        Calibration.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"bad.json"):
        Calibration.load(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Calibration.load(tmp_path / "none.json")


def test_a_sampler_that_adds_noise_is_refused():
    scheduler = EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match="not linear in the model's outputs"):
        response(scheduler)
    pipe = tiny_pipe()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    with pytest.raises(ValueError, match="not linear"):
        calibrate(pipe, [("a", 1)], lambda p, s: sample(pipe, steps=STEPS, seed=s))


def test_the_scheduler_itself_is_left_alone():
    scheduler = SCHEDULERS["unipc"]()
    scheduler.set_timesteps(STEPS)
    before = scheduler.step_index
    response(scheduler)
    assert scheduler.step_index == before
    assert all(m is None for m in scheduler.model_outputs)


def test_latents_that_are_not_the_sampler_s_are_refused():
    """Whatever else moves the latents, such as a callback, shows in them."""
    pipe = tiny_pipe()

    def push(pipe, step, t, kwargs):
        return {"latents": kwargs["latents"] * (1.5 if step == 4 else 1.0)}

    with pytest.raises(ValueError, match="something changes the latent between steps"):
        calibrate(pipe, [("a", 1)], lambda p, s: sample(pipe, steps=STEPS, seed=s, callback_on_step_end=push))


def test_a_run_that_was_interrupted_teaches_nothing():
    pipe, recorder = tiny_pipe(), Recorder()

    def stop(pipe, step, t, kwargs):
        raise KeyboardInterrupt

    with stepcache.accelerate(pipe, recorder):
        with pytest.raises(KeyboardInterrupt):
            sample(pipe, steps=STEPS, callback_on_step_end=stop)
        with pytest.raises(ValueError, match="did not come to its end"):
            recorder.finish(("a", 1))


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="expected float32, float16 or bfloat16"):
        Recorder(dtype=torch.float64)
    with pytest.raises(ValueError, match="no runs were asked for"):
        calibrate(tiny_pipe(), [], lambda p, s: None)


def test_gram_matrix_in_chunks():
    rows = [torch.randn(1000) for _ in range(7)]
    stack = torch.stack(rows).double()
    np.testing.assert_allclose(gram_matrix(rows, chunk=64), (stack @ stack.T).numpy())


def test_the_curve_falls_and_has_a_knee(calibrated):
    calibration, _ = calibrated
    curve = forecasts(calibration)
    assert [f.budget for f in curve] == sorted(f.budget for f in curve)
    assert curve[-1].error == 0
    assert curve[0].error > curve[-3].error
    assert knee(curve) in curve
    assert psnr_of(calibration, 0.1) is None
    one = replace(calibration, runs=(replace(calibration.runs[0], anchors=((3, 0.2, 30.0),)),))
    error = float(plan_error(one, PlanFile(Hindsight(3).plan(STEPS), "hindsight"))[0])
    assert psnr_of(one, error) == pytest.approx(30.0)
    assert psnr_of(one, error / 10) == pytest.approx(50.0)


def test_final_error_moves_the_final_latent(calibrated):
    """The simulated final latent is the recorded one plus the plan's error: no error, no difference."""
    calibration, _ = calibrated
    pipe, recorder = tiny_pipe(), Recorder()
    with stepcache.accelerate(pipe, recorder):
        final = sample(pipe, steps=STEPS, seed=1)
    torch.testing.assert_close(recorder.combined(calibration.state_vector(STEPS)), final, rtol=1e-4, atol=1e-4)
    vector = final_error(calibration, PlanFile(Plan(STEPS, (0, 4, 9))))
    moved = recorder.combined(calibration.state_vector(STEPS) + vector)
    norm = float((moved - final).norm() / final.norm())
    assert norm == pytest.approx(plan_error(calibration, PlanFile(Plan(STEPS, (0, 4, 9))))[0], rel=1e-3)
