"""`stepcache generate` and `stepcache demo` on a real, untrained pipeline in a folder; mistakes users make."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from stepcache import Off, Plan, PlanFile, Ratios
from stepcache.commands.main import COMMANDS, main
from stepcache.measure.video import open_clip


def command(*arguments):
    """The exit code, also of what the parser refuses."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


def generate(model, out, *flags):
    return command("generate", "--model", model, "--prompt", "a red circle", "--output", out, *flags)


def clip(path):
    return np.stack(list(open_clip(path)))


@pytest.mark.parametrize(
    ("flags", "computed"),
    [
        ((), 12),
        (("--policy", "uncached"), 12),
        (("--policy", "hindsight:6"), 6),
        (("--policy", "lemica:6", "--table", "wan2.1-t2v-1.3B", "--resample"), 6),
        (("--policy", "lemica:6,table=wan2.1-t2v-1.3B,resample=1,boundary=blocks"), 6),
        (("--policy", "uniform,interval=3", "--boundary", "blocks", "--cache_device", "cpu"), 5),
        (("--policy", "easycache:1e9,ret_steps=3"), 4),
        (("--policy", "magcache:9,K=1,table=wan2.1-t2v-1.3B"), 7),
    ],
)
def test_generate_writes_clip_and_record(model, tmp_path, capsys, flags, computed):
    out = tmp_path / "sub" / "clip.npy"
    assert generate(model, out, "--steps", 12, *flags) == 0
    assert clip(out).shape == (5, 32, 32, 3)
    record = json.loads(out.with_suffix(".json").read_text())
    assert len(record["result"]["computed"]) == computed
    assert record["request"]["steps"] == 12
    assert record["request"]["guidance"] == 3.0
    assert record["request"]["prompt"] == "a red circle"
    assert {"stepcache", "torch", "diffusers"} <= set(record["versions"])
    assert "steps" in capsys.readouterr().out


def test_the_same_command_gives_the_same_frames_and_lossless_keeps_them(model, tmp_path):
    a, b = tmp_path / "a.mp4", tmp_path / "b.npy"
    assert generate(model, a, "--steps", 3, "--lossless") == 0
    assert generate(model, b, "--steps", 3) == 0
    assert np.array_equal(clip(tmp_path / "a.mkv"), clip(b))
    assert {p.name for p in tmp_path.iterdir()} == {"a.mp4", "a.mkv", "a.json", "b.npy", "b.json"}


def test_generate_follows_a_plan_file(model, tmp_path, recwarn):
    plan = tmp_path / "plan.json"
    PlanFile(Plan(12, (0, 4, 11))).save(plan)
    out = tmp_path / "clip.npy"
    assert generate(model, out, "--steps", 12, "--plan", plan) == 0
    assert json.loads(out.with_suffix(".json").read_text())["result"]["computed"] == [0, 4, 11]
    assert generate(model, out, "--steps", 9, "--plan", plan, "--resample") == 0
    assert any("resampling was asked for" in str(w.message) for w in recwarn)


def test_a_plan_file_may_have_any_name(model, tmp_path):
    plan = tmp_path / "a plan, made for 12 steps.json"
    PlanFile(Plan(12, (0, 4, 11))).save(plan)
    assert generate(model, tmp_path / "clip.npy", "--steps", 12, "--plan", plan) == 0


def test_ratios_are_calibrated_and_used(model, tmp_path):
    ratios, out = tmp_path / "ratios.json", tmp_path / "clip.npy"
    base = tmp_path / "base.npy"
    assert generate(model, base, "--steps", 8) == 0
    assert generate(model, out, "--steps", 8, "--policy", f"magcache-calibration:{ratios}") == 0
    assert np.array_equal(clip(out), clip(base))
    assert Ratios.load(ratios).num_steps == 8
    assert generate(model, out, "--steps", 8, "--policy", f"magcache:0.12,ratios={ratios}") == 0


LEMICA = ("--policy", "lemica:25")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        # methods and what they need
        (LEMICA, "no published table for WanTransformer3DModel"),
        ((*LEMICA, "--table", "wan2.1-t2v-1.3B"), "12 steps; published are 14, 17, 20, 25 of 50"),
        ((*LEMICA, "--table", "nonsense"), "no published table for nonsense"),
        (("--policy", "lemica"), "expected lemica:BUDGET"),
        (("--policy", "hindsight"), "expected hindsight:BUDGET"),
        (("--policy", "hindsight:13"), "a budget of 13 does not fit 12 steps"),
        (("--policy", "hindsight:1"), "budget is 1; expected 2 or more"),
        (("--policy", "uniform"), "takes a budget or an interval"),
        (("--policy", "easycache:-1"), "thresh is -1"),
        (("--policy", "easycache:nan"), "threshold is 'nan'; expected a number"),
        (("--policy", "magcache"), "no published ratios"),
        (("--policy", "magcache:0.1,ratios=none.json"), "does not exist"),
        (("--policy", "magcache-calibration"), "expected magcache-calibration:FILE"),
        (("--policy", "teapot:3"), "is no method known here"),
        (("--policy", "hindsigt:3"), "did you mean hindsight?"),
        (("--policy", "easycache:25"), "25 looks like a number of steps, and easycache takes a threshold"),
        # names of earlier versions
        (("--policy", "checked:6"), "checked is now called hindsight; write hindsight:6"),
        (("--policy", "Checked:6"), "Checked is now called hindsight; write hindsight:6"),
        (("--policy", "none"), "none is now called uncached"),
        (("--policy", "lemica:25,predict=checked"), "predict= is gone"),
        (("--lemica_budget", "25"), "--lemica_budget is no longer a flag: write --policy lemica:25"),
        (("--lemica_predict", "checked"), "or --policy hindsight:25"),
        (("--budget", "25"), "--budget is no longer a flag: write --policy hindsight:25"),
        ((*LEMICA, "--budget", "20"), "--budget is no longer a flag"),
        (("--magcache_calibration",), "write --policy magcache-calibration:FILE"),
        (("--use_ret_steps",), "write --policy teacache:0.2,ret_steps=1"),
        # what only a benchmark can run
        (("--policy", "steps:6"), "here say --steps 6"),
        (("--policy", "easycache:@6"), "which stepcache bench does"),
        (("--policy", "fbcache:0.1"), "another project's cache"),
        # plans
        (("--plan", "none.json"), "plan file 'none.json' does not exist"),
        (("--plan", "none.json", *LEMICA), "exclude each other"),
        # flags without effect
        (("--table", "wan2.1-t2v-1.3B"), "--table has no effect on uncached"),
        (("--policy", "easycache:0.05", "--table", "wan2.1-t2v-1.3B"), "--table has no effect on easycache:0.05"),
        (("--policy", "hindsight:6", "--boundary", "blocks"), "--boundary has no effect on hindsight:6"),
        (("--policy", "uniform:6", "--resample"), "--resample has no effect on uniform:6"),
        (("--policy", "uniform:6,boundary=output", "--boundary", "blocks"), "says boundary= already"),
        (("--cache_device", "cpu"), "--cache_device has no effect on uncached"),
        (("--parallel", "ring"), "--parallel has no effect here; it needs torchrun"),
        (("--rank_timeout", "5"), "--rank-timeout has no effect here; it needs torchrun"),
        (("--guidance", "1", "--negative_prompt", "blur"), "--negative-prompt has no effect at guidance 1"),
        # numbers
        (("--steps", "0"), "--steps is 0"),
        (("--steps", "many"), "invalid int value"),
        (("--height", "30"), "multiple of 16"),
        (("--num_frames", "6"), "4n + 1"),
        (("--guidance", "-2"), "--guidance is -2"),
        (("--guidance", "nan"), "--guidance is nan"),
        (("--guidance", "inf"), "--guidance is inf"),
        (("--seed", str(2**64)), "expected 64 bits"),
        (("--seed", str(-(2**63) - 1)), "expected 64 bits"),
        (("--fps", "nan"), "--fps is nan"),
        (("--fps", "inf"), "--fps is inf"),
        (("--fps", "0"), "--fps is 0"),
        # what is not there
        (("--image", "cat.png"), "which takes no picture"),
        (("--device", "tpu"), "--device tpu cannot be used here"),
        (("--device", "meta"), "--device meta cannot be used here"),
        (("--device", "cuda:99"), "--device cuda:99 cannot be used here"),
        (("--policy", "uniform:6", "--cache_device", "tpu"), "--cache_device tpu cannot be used here"),
    ],
)
def test_mistakes(model, tmp_path, capsys, flags, says):
    out = tmp_path / "clip.mp4"
    assert generate(model, out, "--steps", 12, *flags) == 2
    error = capsys.readouterr().err
    *progress, sentence = error.splitlines()  # bars, where only the loaded model could tell
    assert says in sentence
    assert sentence.startswith("stepcache generate: error:")
    assert all("Loading" in line for line in progress if line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt(model, tmp_path, capsys, prompt):
    assert command("generate", "--model", model, "--prompt", prompt, "--output", tmp_path / "a.mp4") == 2
    assert "--prompt is empty" in capsys.readouterr().err


def test_damaged_weights(model, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (weights,) = (folder / "text_encoder").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    assert generate(folder, tmp_path / "a.mp4", "--steps", 2) == 2
    assert "cannot be loaded on" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_what_the_flags_tell_is_said_before_the_model_is_loaded(model, tmp_path, capsys, monkeypatch):
    import diffusers

    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", loaded)
    out, plan = tmp_path / "clip.mp4", tmp_path / "plan.json"
    PlanFile(Plan(50, (0, 49))).save(plan)
    (tmp_path / "file").touch()
    (tmp_path / "broken.png").write_text("not a picture")
    for target, *flags in (
        (out, "--policy", "hindsight:60"),
        (out, "--policy", "lemica:24,table=wan2.1-t2v-1.3B"),
        (out, "--policy", "magcache:0.1,table=nonsense"),
        (out, "--steps", 12, "--plan", plan),
        (out, "--image", tmp_path / "broken.png"),
        (out, "--device", "cuda:99"),
        (tmp_path / "file" / "clip.mp4",),
        (tmp_path / ("x" * 300 + ".mp4"),),
    ):
        assert generate(model, target, *flags) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"plan.json", "file", "broken.png"}


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("a.mkv", ("--lossless",), "--lossless has no effect here; it needs an .mp4 --output"),
        ("a.npy", ("--lossless",), "--lossless has no effect here"),
        ("a.npy", ("--fps", "8"), "--fps has no effect here; it needs an .mp4 or .mkv --output"),
        ("a.gif", (), "makes clips: expected one of .mp4, .mkv, .npy"),
        ("a.mp4", ("--policy", "magcache-calibration:a.json"), "would be written twice"),
    ],
)
def test_flags_and_names_of_the_output(model, tmp_path, monkeypatch, capsys, name, flags, says):
    monkeypatch.chdir(tmp_path)
    assert generate(model, name, "--steps", 2, *flags) == 2
    assert says in capsys.readouterr().err


def test_a_name_with_a_colon_is_a_file(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generate(model, "10:53.mp4", "--steps", 2) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"10:53.mp4", "10:53.json"}
    assert clip("10:53.mp4").shape == (5, 32, 32, 3)


@pytest.mark.parametrize("version", [1, 2, 4, None])
def test_plan_files_of_other_versions(model, tmp_path, capsys, version):
    plan = tmp_path / "plan.json"
    PlanFile(Plan(12, (0, 11))).save(plan)
    document = json.loads(plan.read_text())
    assert document["version"] != version
    plan.write_text(json.dumps({**document, "version": version}))
    assert generate(model, tmp_path / "clip.mp4", "--steps", 12, "--plan", plan) == 2
    error = capsys.readouterr().err
    assert f"version {version} is unknown" in error
    assert error.count("\n") == 1


def test_damaged_model_folders(model, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for files, says in (
        ({"model_index.json": "{"}, "is not JSON"),
        ({"model_index.json": '{"_class_name": "DiTPipeline"}'}, "is a DiTPipeline; expected a text-to-video"),
        ({"model_index.json": '{"_class_name": "NoPipeline"}'}, "which this version of diffusers does not have"),
        ({"model_index.json": '{"_class_name": "WanVideoToVideoPipeline"}'}, "expected a text-to-video"),
        ({"model_index.json": '{"_class_name": "FluxImg2ImgPipeline"}'}, "expected one that works from text alone"),
        ({"model_index.json": '{"_class_name": "WanPipeline"}', "generation_defaults.json": "{"}, "is not JSON"),
        ({"generation_defaults.json": '{"height": "tall"}'}, "height is 'tall'; expected numbers"),
        ({"generation_defaults.json": '{"colour": 3}'}, "colour is 3; expected numbers"),
    ):
        for name, text in files.items():
            (folder / name).write_text(text)
        assert generate(folder, tmp_path / "a.mp4") == 2
        assert says in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_plans_for_something_else(model, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    for made, says in (
        (PlanFile(Plan(50, (0, 49))), "50 steps (the run: 12)"),
        (PlanFile(Plan(12, (0, 11)), model="wan2.1-t2v-14B"), "model wan2.1-t2v-14B (the run: WanTransformer3DModel"),
        (PlanFile(Plan(12, (0, 11)), shift=3.0), "shift 3.0 (the run: 5.0)"),
        (PlanFile(Plan(12, (0, 11)), guidance=7.0), "guidance 7.0 (the run: 3.0)"),
    ):
        made.save(plan)
        assert generate(model, tmp_path / "clip.npy", "--steps", 12, "--plan", plan) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["./nowhere", "nowhere"])
def test_missing_and_empty_model_folders(folder, tmp_path, capsys):
    assert generate(folder, tmp_path / "a.mp4") == 2
    assert "does not exist" in capsys.readouterr().err
    assert generate(str(tmp_path), tmp_path / "a.mp4") == 2
    assert "model_index.json" in capsys.readouterr().err


def test_a_plan_for_another_guidance_names_the_flag(model, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    PlanFile(Plan(12, (0, 11)), guidance=5.0).save(plan)
    assert generate(model, tmp_path / "a.mp4", "--steps", 12, "--plan", plan, "--guidance", 3) == 2
    assert "guidance 5.0 (the run: 3.0). Run with --guidance 5.0, make one for this run" in capsys.readouterr().err


def test_guidance_off_and_one_step(model, tmp_path):
    out = tmp_path / "clip.npy"
    assert generate(model, out, "--steps", 12, "--guidance", 1, "--policy", "easycache:9") == 0
    assert list(json.loads(out.with_suffix(".json").read_text())["result"]["branches"]) == ["cond"]
    assert generate(model, out, "--steps", 1, "--policy", "easycache") == 0


def test_an_interruption_leaves_nothing_half_written(model, tmp_path, monkeypatch, capsys):
    import stepcache.commands.generate as module

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_clip", interrupted)
    assert generate(model, tmp_path / "a.mp4", "--steps", 2) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_a_command_is_imported(monkeypatch, capsys):
    """That takes seconds, and people change their minds in the first."""

    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("stepcache.commands.main.importlib.import_module", interrupted)
    assert command("demo") == 130
    assert capsys.readouterr().err == "stepcache demo: interrupted; no partial files were left.\n"


def test_demo_writes_table_clips_sheet_and_animation(model, tmp_path, capsys):
    assert command("demo", "--model", model, "--out", tmp_path, "--steps", 12, "--prompt", "a cat") == 0
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "table.json").read_text())
    names = [f"{name}:{b}" for b in (6, 3) for name in ("uniform", "lemica", "easycache", "magcache", "hindsight")]
    assert [r["method"] for r in rows] == names
    assert rows[1]["label"] == "lemica:6, published list"
    known = {r["method"]: r["computed"] for r in rows}
    for name, budget in (("uniform", 6), ("lemica", 6), ("hindsight", 6), ("uniform", 3), ("hindsight", 3)):
        assert known[f"{name}:{budget}"] == [budget]
    assert abs(known["magcache:6"][0] - 6) <= 1, "searched for the count"
    assert all(part in out for part in (tmp_path / "table.txt").read_text().strip().split("\n\n"))
    assert re.search(r"Closest to the uncached clips at 6 of 12 steps: by mean PSNR ", out)
    assert "Not measured: other models" in out
    clips = {f"{name.replace(':', '_')}.{e}" for name in ("uncached", *names) for e in ("mp4", "mkv")}
    assert {p.name for p in tmp_path.iterdir()} == clips | {"sheet.png", "demo.webp", "table.json", "table.txt"}
    with Image.open(tmp_path / "demo.webp") as picture:
        assert picture.n_frames > 1


def test_the_demo_s_verdict_is_what_was_measured():
    from stepcache.commands.demo import Result, Shown, table, verdicts

    def result(name, count, *values):
        frames, summary = np.zeros((1, 2, 2, 3), np.uint8), None
        return Result(Shown(name, name, Off()), frames, summary, (count,) * len(values), values, (0.9,) * len(values))

    ours, theirs = result("hindsight:25", 25, 40.0, 30.0), result("uniform:25", 25, 39.0, 33.0)
    assert verdicts([ours, theirs, result("lemica:14", 14, 50.0)], 50) == [
        "Closest to the uncached clips at 25 of 50 steps: by mean PSNR uniform (36.0), by the worst prompt uniform "
        "(33.0), by SSIM hindsight (0.9000)."
    ]
    assert "by mean PSNR hindsight (35.0)" in verdicts([ours, result("uniform:25", 25, 30.0)], 50)[0]
    assert "35.0   30.0" in table([ours, theirs], 50)


def test_demo_of_other_methods(model, tmp_path, capsys):
    policies = ("--policies", "uniform:3 uniform:4", "--prompt", "a cat")
    assert command("demo", "--model", model, "--out", tmp_path, "--steps", 6, *policies) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [r["method"] for r in rows] == ["uniform:3", "uniform:4"]
    assert (tmp_path / "uniform_3.mp4").exists()
    for flags, says in (
        (("--policies", ""), "--policies is empty"),
        (("--policies", "uncached"), "names no method besides the uncached run"),
        (("--policies", "uniform:3 uniform:3"), "more than once"),
        (("--policies", "uniform:9"), "does not fit 6 steps"),
        (("--policies", "easycache:@9"), "a run has 6 steps"),
        (("--policies", f"magcache-calibration:{tmp_path}/r.json"), "for stepcache generate"),
        (("--budget", "3"), "--budget is no longer a flag"),
        (("--prompt", ""), "--prompt is empty"),
        (("--out", tmp_path / "table.txt"), "is a file, not a folder"),
    ):
        capsys.readouterr()
        assert command("demo", "--model", model, "--out", tmp_path, "--steps", 6, *flags) == 2
        assert says in capsys.readouterr().err


def test_help_and_unknown_commands(capsys):
    for name in ((), *((name,) for name in COMMANDS)):
        with pytest.raises(SystemExit) as stop:
            main([*name, "--help"])
        assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        main(["fly"])
    assert stop.value.code == 2
