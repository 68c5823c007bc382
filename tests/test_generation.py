"""What is known of a pipeline before it is loaded, and commands on pipelines that are not Wan's."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
from PIL import Image

from stepcache.commands.generate import read_image
from stepcache.commands.main import main
from stepcache.measure.generation import Request, check_request
from stepcache.measure.pipelines import inputs_of, model_defaults, pipeline_kind, weights_bytes

ZOO = Path(__file__).resolve().parents[1] / "assets" / "zoo"


@pytest.mark.parametrize(
    ("kind", "scale", "mixes", "video", "needs_image"),
    [
        ("WanPipeline", "guidance_scale", True, True, False),
        ("WanImageToVideoPipeline", "guidance_scale", True, True, True),
        ("LTXImageToVideoPipeline", "guidance_scale", True, True, True),  # its signature has a default for it
        ("QwenImagePipeline", "true_cfg_scale", True, False, False),
        ("QwenImageEditPlusPipeline", "true_cfg_scale", True, False, True),
        ("FluxPipeline", "guidance_scale", False, False, False),  # distilled
        ("FluxImg2ImgPipeline", "guidance_scale", False, False, True),
        ("Flux2Pipeline", "guidance_scale", False, False, False),
        ("HunyuanVideoPipeline", "guidance_scale", False, True, False),
        ("HunyuanVideo15Pipeline", None, False, True, False),  # a guider
        ("CogVideoXPipeline", "guidance_scale", True, True, False),
        ("ZImagePipeline", "guidance_scale", True, False, False),
    ],
)
def test_what_a_pipeline_takes(kind, scale, mixes, video, needs_image):
    inputs = inputs_of(getattr(diffusers, kind))
    assert (inputs.scale, inputs.mixes, inputs.video, inputs.needs_image) == (scale, mixes, video, needs_image)


def test_defaults_are_the_folder_s_then_the_pipeline_s(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "HunyuanVideoPipeline"}')
    known = {"steps": 50, "height": 720, "width": 1280, "num_frames": 129, "guidance": 6.0, "max_sequence_length": 256}
    assert model_defaults(str(tmp_path)) == known
    (tmp_path / "generation_defaults.json").write_text('{"steps": 20, "fps": 24}')
    assert model_defaults(str(tmp_path)) == {**known, "steps": 20, "fps": 24}


@pytest.mark.parametrize(
    ("kind", "request_", "says"),
    [
        (
            "FluxPipeline",
            Request("a", num_frames=5),
            "--num-frames has no effect on FluxPipeline, which makes",
        ),
        ("FluxPipeline", Request("a", negative_prompt="b"), "--negative-prompt has no effect on FluxPipeline"),
        ("HunyuanVideo15Pipeline", Request("a", negative_prompt="b"), None),
        ("Flux2Pipeline", Request("a", negative_prompt="b"), "--negative-prompt has no effect on Flux2Pipeline"),
        ("HunyuanVideo15Pipeline", Request("a", guidance=3.0), "--guidance has no effect on HunyuanVideo15Pipeline"),
        ("LTXPipeline", Request("a", num_frames=8), None),
        ("WanPipeline", Request("a", num_frames=8), r"expected 4n \+ 1"),
    ],
)
def test_requests_are_checked_against_the_pipeline(kind, request_, says):
    inputs = inputs_of(getattr(diffusers, kind))
    if says is None:
        check_request(request_, inputs)
        return
    with pytest.raises(ValueError, match=says):
        check_request(request_, inputs)


def test_a_hub_id_that_cannot_be_had_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is no folder here"):
        pipeline_kind("nobody/nothing")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "suffix"), [("emoji", ".png"), ("landscapes", ".png"), ("patterns", ".mkv")])
def test_every_command_takes_other_pipelines(name, suffix, tmp_path, capsys):
    """Qwen-Image and FLUX, which make pictures, and CogVideoX: generate, calibrate, plan with trials, bench."""
    model, steps = str(ZOO / name), ["--steps", "15"]
    prompts = json.loads((ZOO / name / "prompts.json").read_text())["development"][:1]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    found = [tmp_path / f"{name}-{i}{suffix}" for i in (0, 1)]
    generate = ["generate", "--model", model, "--prompt", prompts[0], *steps]
    assert main([*generate, "--output", str(found[0])]) == 0
    assert main([*generate, "--output", str(found[1]), "--policy", "hindsight:9"]) == 0
    assert main(["compare", *map(str, found), "--no-lpips"]) == 0
    calibration, plan = str(tmp_path / "calibration.json"), str(tmp_path / "plan.json")
    asked = ["--model", model, "--prompts", str(tmp_path / "prompts.txt"), *steps]
    assert main(["calibrate", *asked, "--out", calibration]) == 0
    assert json.loads(Path(calibration).read_text())["runs"][0]["anchors"]  # what PSNR forecasts come to
    planned = ["plan", "--calibration", calibration, "--budget", "8", "--out", plan]
    assert main([*planned, "--refine", "1", "--model", model]) == 0
    capsys.readouterr()
    policies = f"hindsight:9 plan:{plan}"
    assert main(["bench", *asked, "--out", str(tmp_path / "results"), "--policies", policies]) == 0
    table = capsys.readouterr().out
    assert "hindsight:9" in table
    assert "failed" not in table
    assert main(["report", str(tmp_path / "results")]) == 0


def test_a_picture_to_begin_with_keeps_its_shape(tmp_path, capsys):
    """A circle stays one: the picture is cropped, not squeezed, and turned as its camera says."""
    y, x = np.mgrid[:60, :120]
    circle = ((y - 30) ** 2 + (x - 60) ** 2 < 20**2).astype(np.uint8) * 255
    Image.fromarray(circle).save(tmp_path / "wide.png")
    read = np.asarray(read_image(str(tmp_path / "wide.png"), Request("", height=64, width=64)))[..., 0] > 127
    rows, columns = np.flatnonzero(read.any(1)), np.flatnonzero(read.any(0))
    assert len(rows) == len(columns) == pytest.approx(40 * 64 / 60, abs=2)
    assert "is 120 x 60; its middle is cropped to 64 x 64" in capsys.readouterr().err
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    Image.fromarray(circle).save(tmp_path / "phone.jpg", exif=exif)
    assert read_image(str(tmp_path / "phone.jpg"), Request("")).size == (60, 120)


def test_bytes_of_weights_are_of_what_is_loaded(tmp_path):
    """Variants beside them do not count, pointers that git-lfs left are said."""
    model = tmp_path / "emoji"
    shutil.copytree(ZOO / "emoji", model)
    whole = weights_bytes(str(model), "float32")
    parts = sum(path.stat().st_size for path in model.glob("*/*.safetensors"))
    assert whole == 2 * weights_bytes(str(model), "bfloat16")
    assert parts / 2 < whole <= 2 * parts  # stored in half precision
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert weights_bytes(str(model), "float32") == whole
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        weights_bytes(str(model), "float32")
    assert weights_bytes("owner/name", "float32") is None
