"""`stepcache generate` and `stepcache demo` on a real, untrained pipeline in a folder; mistakes users make."""

import json

import numpy as np
import pytest
import torch

from stepcache import Plan, Ratios
from stepcache.commands.main import main
from stepcache.measure.video import open_clip


def generate(model, out, *flags):
    return main(["generate", "--model", model, "--prompt", "a red circle", "--output", str(out), *map(str, flags)])


def clip(path):
    return np.stack(list(open_clip(path)))


@pytest.mark.parametrize(
    ("flags", "computed"),
    [
        ((), 12),
        (("--policy", "none"), 12),
        (("--policy", "lemica", "--table", "wan2.1-t2v-1.3B", "--lemica_budget", 6, "--resample"), 6),
        (("--policy", "easycache", "--thresh", 1e9, "--ret_steps", 3), 4),
        (("--policy", "magcache", "--table", "wan2.1-t2v-1.3B", "--magcache_K", 1, "--magcache_thresh", 9), 7),
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
    Plan(12, (0, 4, 11)).save(plan)
    out = tmp_path / "clip.npy"
    assert generate(model, out, "--steps", 12, "--plan", plan) == 0
    assert json.loads(out.with_suffix(".json").read_text())["result"]["computed"] == [0, 4, 11]
    assert generate(model, out, "--steps", 9, "--plan", plan, "--resample") == 0
    assert any("resampling was asked for" in str(w.message) for w in recwarn)


def test_calibration_can_be_passed_back(model, tmp_path):
    ratios, out = tmp_path / "ratios.json", tmp_path / "clip.npy"
    base = tmp_path / "base.npy"
    assert generate(model, base, "--steps", 8) == 0
    assert (
        generate(
            model, out, "--steps", 8, "--policy", "magcache", "--magcache_calibration", "--magcache_ratios", ratios
        )
        == 0
    )
    assert np.array_equal(clip(out), clip(base))
    assert Ratios.load(ratios).num_steps == 8
    assert generate(model, out, "--steps", 8, "--policy", "magcache", "--magcache_ratios", ratios) == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--policy", "lemica"), "no published table for WanTransformer3DModel"),
        (("--policy", "lemica", "--table", "wan2.1-t2v-1.3B"), "12 steps; published are 14, 17, 20, 25 of 50"),
        (("--policy", "lemica", "--table", "nonsense"), "no published table for nonsense"),
        (("--policy", "easycache", "--thresh", "-1"), "thresh is -1"),
        (("--policy", "magcache"), "no published ratios"),
        (("--policy", "magcache", "--magcache_ratios", "none.json"), "does not exist"),
        (("--policy", "magcache", "--magcache_calibration"), "needs --magcache_ratios"),
        (("--plan", "none.json"), "plan file 'none.json' does not exist"),
        (("--plan", "none.json", "--policy", "lemica"), "exclude each other"),
        (("--steps", "0"), "--steps is 0"),
        (("--height", "30"), "multiple of 16"),
        (("--num_frames", "6"), "4n + 1"),
        (("--guidance", "-2"), "--guidance is -2"),
        (("--image", "cat.png"), "takes no --image"),
        (("--device", "cuda"), "device 'cuda' cannot be used here"),
    ],
)
def test_mistakes(model, tmp_path, capsys, flags, says):
    if torch.cuda.is_available() and "cuda" in flags:
        flags, says = ("--device", "mps"), "cannot be used"
    out = tmp_path / "clip.mp4"
    assert generate(model, out, "--steps", 12, *flags) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.strip().splitlines()[-1].startswith("stepcache generate: error:")
    assert list(tmp_path.iterdir()) == []


def test_plans_for_something_else(model, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    for made, says in (
        (Plan(50, (0, 49)), "50 steps (the run: 12)"),
        (Plan(12, (0, 11), model="wan2.1-t2v-14B"), "model wan2.1-t2v-14B (the run: WanTransformer3DModel"),
        (Plan(12, (0, 11), shift=3.0), "shift 3.0 (the run: 5.0)"),
        (Plan(12, (0, 11), guidance=7.0), "guidance 7.0 (the run: 3.0)"),
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


def test_bad_output_name(model, tmp_path, capsys):
    assert generate(model, tmp_path / "clip.gif") == 2
    assert ".mp4, .mkv or .npy" in capsys.readouterr().err


def test_guidance_off_and_one_step(model, tmp_path):
    out = tmp_path / "clip.npy"
    assert generate(model, out, "--steps", 12, "--guidance", 1, "--policy", "easycache", "--thresh", 9) == 0
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


def test_demo_writes_table_clips_and_sheet(model, tmp_path, capsys):
    assert (
        main(["demo", "--model", model, "--out", str(tmp_path), "--steps", "12", "--budget", "6", "--thresh", "0.5"])
        == 0
    )
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [r["method"] for r in rows] == ["uncached", "lemica", "easycache", "magcache", "hindsight"]
    assert rows[4]["computed"] == 6
    assert rows[0]["computed"] == 12
    assert rows[1]["computed"] == 6
    assert rows[0]["psnr"] is None
    assert all(r["computed"] + r["reused"] == 12 for r in rows)
    assert (tmp_path / "table.txt").read_text().strip() in out
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {f"{r['method']}.{e}" for r in rows for e in ("mp4", "mkv")} | {
        "sheet.png",
        "table.json",
        "table.txt",
    }


def test_help_and_unknown_commands(capsys):
    for command in ([], ["generate"], ["demo"], ["compare"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        main(["fly"])
    assert stop.value.code == 2
