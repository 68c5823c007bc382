"""The embedded model loads with stock diffusers, is small enough, and its card says what was measured."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

import stepcache
from stepcache import LeMiCa
from stepcache.planning.calibration import Calibration
from stepcache.planning.costs import plan_hindsight

MODEL = Path(__file__).resolve().parent.parent / "assets" / "tiny-wan"


@pytest.fixture(scope="module")
def pipe():
    pipe = WanPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(pipe, steps=50, seed=0):
    return pipe(
        "a big blue ring turning over a black plain background",
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=steps,
        guidance_scale=7.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).frames[0]


def test_components_and_size(pipe):
    names = {n: type(c).__name__ for n, c in pipe.components.items() if c is not None}
    assert names["transformer"] == "WanTransformer3DModel"
    assert names["vae"] == "AutoencoderKLWan"
    assert names["text_encoder"] == "UMT5EncoderModel"
    assert names["scheduler"] == "UniPCMultistepScheduler"
    assert sum(p.stat().st_size for p in MODEL.rglob("*") if p.is_file()) <= 32 * 2**20
    assert not [p for p in MODEL.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_the_asked_colour_is_there_and_guidance_matters(pipe):
    video = clip(pipe, steps=20)
    assert video.shape == (17, 3, 64, 64)
    red, _, blue = video.mean(dim=(0, 2, 3))
    assert blue > 2 * red


@pytest.mark.slow
def test_half_the_steps_give_nearly_the_same_clip(pipe):
    base = clip(pipe)
    assert torch.equal(clip(pipe), base)
    with stepcache.accelerate(pipe, LeMiCa(25, "wan2.1-t2v-1.3B")) as run:
        cached = clip(pipe)
    assert len(run.summary().computed) == 25
    assert (cached - base).square().mean() < (clip(pipe, seed=1) - base).square().mean() / 20


def test_the_card_states_the_measurement():
    measured = json.loads((MODEL / "evaluation.json").read_text())
    card = (MODEL / "README.md").read_text()
    assert measured["prompts"] == 64
    assert f"{100 * measured['colour']:.0f} %" in card
    assert f"{100 * measured['direction']:.0f} %" in card
    assert f"{measured['psnr_25_against_50_mean']:.1f} dB mean" in card
    assert measured["colour"] >= 0.9
    assert measured["psnr_25_against_50_mean"] < 30
    assert measured["direction"] >= 0.8
    assert measured["direction_of_real_clips"] == 1


def test_the_shipped_calibration_is_of_this_model():
    calibration = Calibration.load(MODEL / "calibration.json")
    plan = plan_hindsight(calibration, 20)
    assert (plan.model, plan.plan.num_steps, plan.method) == (calibration.model, 50, "hindsight")
    assert len(calibration.runs) == 8
    assert 0 < dict(plan.figures)["open_loop_error_mean"] < 0.2
