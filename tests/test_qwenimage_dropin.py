"""The built Qwen-Image drop-in as a copied file, on a tiny real QwenImagePipeline with all its parts."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from forkserver import run_script
from PIL import Image

from stepcache import Plan, PlanFile
from stepcache.methods.lemica_schedules import SCHEDULES

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (ROOT / "LeMiCa4QwenImage/inference_qwenimage.py", ROOT / "Hindsight4QwenImage/hindsight_generate.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder as QwenImagePipeline.from_pretrained wants it."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    words = ["<pad>", "<unk>", "a", "red", "blue", "cat", "Describe", "image"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "vocab_size": len(words),
    }
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, vision_start_token_id=0, vision_end_token_id=0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    for p in transformer.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, 0, 0.1)
    pipe = QwenImagePipeline(
        transformer=transformer,
        vae=AutoencoderKLQwenImage(
            base_dim=24,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"),
    )
    folder = tmp_path_factory.mktemp("qwen-tiny")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anywhere")
    for script in SCRIPTS:
        shutil.copy(script, folder)
    return folder


def run(place, model, *flags, script=SCRIPTS[0].name, check=True, real=False):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    arguments = [script, "--model", str(model), "--prompt", "a red cat", "--size", "32*32", *map(str, flags)]
    done = run_script(arguments, place, env, real=real)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def computed(text):
    marks = next(line for line in text.splitlines() if line and set(line) <= {"█", "·"})
    return tuple(i for i, m in enumerate(marks) if m == "█")


def test_hindsight_on_its_own_steps_and_on_a_plan(place, model):
    said = run(place, model, "--budget", 10, script="hindsight_generate.py", real=True).stdout
    assert "hindsight (budget 10), boundary output: computed 10 of 50 steps" in said
    assert "wrote output_hindsight10.png" in said
    assert "warning" not in said
    PlanFile(Plan(50, (0, 3, 9, 20, 35, 49)), "hindsight", guidance=4.0).save(place / "p.json")
    followed = run(place, model, "--plan", "p.json", script="hindsight_generate.py").stdout
    assert computed(followed) == (0, 3, 9, 20, 35, 49)
    for flags, sentence in (
        (("--plan", "p.json", "--budget", 10), "exclude each other"),
        (("--plan", "p.json", "--true_cfg_scale", 7), "guidance 4.0 (the run: 7.0)"),
        (("--budget", 1), "--budget is 1; expected 2 or more"),
        (("--true_cfg_scale", "nan"), "--true_cfg_scale is nan"),
        (("--seed", 2**64), "--seed is 18446744073709551616"),
        (("--device", "tpu"), "--device 'tpu' cannot be used here"),
        (("--resample",), "--resample has no effect without --plan"),
    ):
        refused = run(place, model, *flags, script="hindsight_generate.py", check=False)
        assert refused.returncode == 2
        assert sentence in refused.stderr
        assert "Traceback" not in refused.stderr


def test_all_steps_computed_is_the_uncached_picture(place, model):
    run(place, model, "--output", "plain.png")
    run(place, model, "--budget", 50, "--output", "all.png", script="hindsight_generate.py")
    plain, all_steps = (np.asarray(Image.open(place / f"{n}.png")).astype(int) for n in ("plain", "all"))
    assert np.abs(plain - all_steps).max() <= 1  # two processes: rounding may differ


@pytest.mark.parametrize(
    ("cache", "table"), [("medium", "qwen-image"), ("fast", "qwen-image-2512"), ("25", "qwen-image")]
)
def test_it_computes_exactly_the_published_steps_in_both_branches(place, model, cache, table):
    done = run(place, model, "--cache", cache, "--table", table, "--output", f"{cache}.png")
    budget = {"medium": 17, "fast": 10}.get(cache) or int(cache)
    assert computed(done.stdout) == SCHEDULES[table][1][budget]
    assert re.search(rf"cond: computed {budget}, skipped {50 - budget}", done.stdout)
    assert re.search(rf"uncond: computed {budget}, skipped {50 - budget}", done.stdout)
    assert (place / f"{cache}.png").is_file()


def test_without_cache_all_and_without_guidance_one_branch(place, model):
    plain = run(place, model).stdout
    assert "computed 50 of 50 steps" in plain
    assert "wrote output.png" in plain
    done = run(place, model, "--cache", "slow", "--table", "qwen-image", "--true_cfg_scale", "1")
    assert "wrote output_lemica25_blocks.png" in done.stdout
    assert "cond: computed 25" in done.stdout
    assert "uncond" not in done.stdout


def test_the_blocks_boundary_and_resampling(place, model):
    flags = ("--cache", "8", "--table", "qwen-image", "--steps", "20", "--resample", "--boundary", "blocks")
    done = run(place, model, *flags, real=True)
    assert "computed 8 of 20 steps" in done.stdout
    assert "resampled from" in done.stderr


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--cache", "quick", "--table", "qwen-image"), "expected slow, medium, fast or a number"),
        (("--cache", "medium"), "add --table qwen-image or qwen-image-2512"),
        (("--cache", "18", "--table", "qwen-image"), "10, 17, 25 of 50 steps"),
        (("--cache", "medium", "--table", "qwen-image", "--steps", "40"), "with 17 of 40 steps"),
        (("--size", "31*32"), "--size is '31*32'; expected W*H in multiples of 16"),
        (("--output", "picture.tiff2"), "expected a name ending in .png"),
        (("--steps", "0"), "--steps is 0"),
        (("--boundary", "output"), "--boundary has no effect without --cache"),
        (("--lemica_predict", "checked"), "hindsight_generate.py"),
    ],
)
def test_bad_input_gets_a_sentence_and_exit_code_2(place, model, flags, sentence):
    done = run(place, model, *flags, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_folder_and_help(place):
    done = run(place, "no/such/folder", check=False)
    assert done.returncode == 2
    assert "neither a folder nor a hub id" in done.stderr
    assert "--true_cfg_scale" in run(place, "x", "--help").stdout
