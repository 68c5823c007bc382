"""`stepcache calibrate`, `plan` and `show`, end to end on a real, untrained pipeline; mistakes users make."""

import json
from pathlib import Path

import pytest

from stepcache import PlanFile
from stepcache.commands.main import main
from stepcache.planning.calibration import Calibration
from stepcache.planning.costs import magcache_ratios

STEPS = 16
PROMPTS = "# two prompts\na red circle\na blue square\n"


@pytest.fixture(scope="module")
def calibrated(model, tmp_path_factory):
    """A folder with prompts and a calibration of two runs."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "prompts.txt").write_text(PROMPTS)
    assert calibrate(model, folder) == 0
    return folder


def command(*arguments):
    """The exit code, also of what the parser refuses."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


def calibrate(model, folder, *flags):
    flags = ("--prompts", folder / "prompts.txt", "--steps", STEPS, "--out", folder / "calibration.json", *flags)
    return command("calibrate", "--model", model, *flags)


def plan(folder, out, *flags):
    return command("plan", "--calibration", folder / "calibration.json", "--out", out, *flags)


def test_calibrate_plan_generate(model, calibrated, tmp_path, capsys):
    found = Calibration.load(calibrated / "calibration.json")
    assert [r.prompt for r in found.runs] == ["a red circle", "a blue square"]
    assert found.runs[0].anchors[0][0] == STEPS // 5
    assert not found.runs[1].anchors
    assert found.guidance == 3.0
    out = tmp_path / "plan.json"
    assert plan(calibrated, out, "--budget", 6) == 0
    assert "6 of 16 steps computed" in capsys.readouterr().out
    made = PlanFile.load(out)
    assert (made.budget, made.method, made.model, made.scheduler) == (
        6,
        "hindsight",
        found.model,
        "UniPCMultistepScheduler",
    )
    flags = ["generate", "--model", model, "--prompt", "a cyan ring", "--steps", str(STEPS), "--plan", str(out)]
    assert main([*flags, "--output", str(tmp_path / "clip.npy")]) == 0
    record = json.loads((tmp_path / "clip.json").read_text())
    assert record["result"]["computed"] == list(made.plan.computed)
    assert main([*flags, "--output", str(tmp_path / "c.npy"), "--guidance", "6"]) == 2
    assert "guidance 2.1 to 3.9 (the run: 6)" in capsys.readouterr().err
    assert main([*flags[:-4], "--steps", "12", "--plan", str(out), "--output", str(tmp_path / "c.npy")]) == 2
    assert "16 steps (the run: 12)" in capsys.readouterr().err


def test_it_goes_on_where_it_stopped(model, calibrated, tmp_path, capsys):
    folder = tmp_path
    (folder / "prompts.txt").write_text(PROMPTS + "a green star\n")
    text = (calibrated / "calibration.json").read_text()
    (folder / "calibration.json").write_text(text)
    assert calibrate(model, folder) == 0
    assert "has 2 run(s); 1 of 3 remain" in capsys.readouterr().out
    assert len(Calibration.load(folder / "calibration.json").runs) == 3
    assert calibrate(model, folder, "--guidance", 5) == 2
    assert "guidance 3.0 (requested: 5.0)" in capsys.readouterr().err
    out = folder / "merged.json"
    files = [str(calibrated / "calibration.json"), str(folder / "calibration.json")]
    assert main(["calibrate", "--merge", *files, "--out", str(out)]) == 0
    assert len(Calibration.load(out).runs) == 3


@pytest.mark.parametrize(
    ("flags", "budget"),
    [
        (("--target-speedup", 4), 4),
        (("--target-speedup", 2.5), 6),
        (("--target-psnr", 1), 3),
        (("--target-psnr", 1e6), 16),
    ],
)
def test_targets(calibrated, tmp_path, flags, budget):
    assert plan(calibrated, tmp_path / "p.json", *flags) == 0
    assert PlanFile.load(tmp_path / "p.json").budget == budget


def test_objectives(calibrated, tmp_path):
    out = tmp_path / "p.json"
    for objective in ("lexminimax", "sum", "power"):
        assert plan(calibrated, out, "--budget", 6, "--method", "lemica", "--objective", objective) == 0
        assert (PlanFile.load(out).method, PlanFile.load(out).budget) == ("lemica", 6)


def test_magcache_plans(calibrated, tmp_path, capsys):
    out, ratios = tmp_path / "p.json", tmp_path / "ratios.json"
    loose = ("--magcache_K", 6, "--retention_ratio", 0.1)
    assert plan(calibrated, out, "--budget", 6, "--method", "magcache", *loose) == 0
    made = PlanFile.load(out)
    assert (made.method, made.budget, made.boundary) == ("magcache", 6, "output")
    assert dict(made.figures)["magcache_thresh"] > 0
    magcache_ratios(Calibration.load(calibrated / "calibration.json")).save(ratios)
    flags = ["plan", "--calibration", str(ratios), "--out", str(out)]
    assert main([*flags, "--method", "magcache", "--target-speedup", "2.6", *map(str, loose)]) == 0
    assert (PlanFile.load(out).plan.computed, PlanFile.load(out).boundary) == (made.plan.computed, "blocks")
    capsys.readouterr()
    assert main([*flags, "--budget", "6"]) == 2
    assert "holds MagCache's ratios only" in capsys.readouterr().err
    assert plan(calibrated, out, "--budget", 3, "--method", "magcache") == 2
    assert "with K = 2 and retention 0.2 no threshold" in capsys.readouterr().err


@pytest.mark.slow
def test_edges_are_measured_and_kept(model, calibrated, tmp_path, capsys):
    out = tmp_path / "p.json"
    flags = ("--budget", 8, "--method", "lemica", "--longest", 3, "--model", model, "--replay-runs", 1)
    assert plan(calibrated, out, *flags, "--edges", "replay") == 0
    assert "rank correlation" in capsys.readouterr().out
    edges = tmp_path / "p.edges.json"
    assert len(json.loads(edges.read_text())["runs"]) == 1
    first = PlanFile.load(out)
    assert plan(calibrated, out, "--budget", 8, "--method", "lemica", "--edges", edges) == 0
    assert PlanFile.load(out).plan.computed == first.plan.computed
    other = ("--budget", 8, "--method", "lemica", "--edges", "replay", "--model", model)
    assert plan(calibrated, tmp_path / "q.json", *other, "--height", 64) == 2
    assert "the run's latent is [24, 2, 8, 4]" in capsys.readouterr().err


@pytest.mark.slow
def test_refining_resumes(model, calibrated, tmp_path, capsys):
    out = tmp_path / "p.json"
    flags = ("--budget", 6, "--model", model, "--refine")
    assert plan(calibrated, out, *flags, 2) == 0
    assert "2 schedules tried" in capsys.readouterr().out
    assert plan(calibrated, out, *flags, 3) == 0
    assert len(json.loads((tmp_path / "p.trials.json").read_text())["trials"]) == 3
    assert dict(PlanFile.load(out).figures)["measured_runs"] == 2


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_show(calibrated, tmp_path, capsys, suffix):
    out = tmp_path / "p.json"
    plan(calibrated, out, "--budget", 6)
    capsys.readouterr()
    picture = tmp_path / f"a.{suffix}"
    assert main(["show", str(out), "--out", str(picture)]) == 0
    text = capsys.readouterr().out
    assert text.count("0:+") >= 1
    assert picture.stat().st_size > 5000
    assert main(["show", str(calibrated / "calibration.json"), "--out", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "<- knee" in text
    assert " dB " in text
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--budget", 1), "expected 2 to 16"),
        (("--budget", 17), "expected 2 to 16"),
        (("--budget", 2, "--method", "lemica", "--longest", 4), "smallest budget is 5"),
        (("--target-speedup", 100), "expected 1 to 8"),
        (("--budget", 6, "--refine", 2), "--refine needs --model"),
        (("--budget", 6, "--refine", 0), "--refine is 0"),
        (("--budget", 6, "--refine", 2, "--model", "nowhere"), "does not exist"),
        (("--budget", 6, "--method", "lemica", "--longest", 0), "--longest is 0"),
        (("--budget", 6, "--longest", 4), "--longest has no effect here"),
        (("--target-psnr", "nan"), "--target-psnr is nan"),
        (("--target-speedup", "nan"), "--target-speedup is nan"),
        (("--budget", 6, "--method", "lemica", "--edges", "replay"), "--edges replay needs --model"),
        # flags without effect
        (
            ("--budget", 6, "--method", "lemica", "--refine", 2),
            "it needs --method hindsight",
        ),
        (("--budget", 6, "--method", "lemica", "--magcache_K", 2), "--magcache-K has no effect here"),
        (("--budget", 6, "--magcache_K", 3), "--magcache-K has no effect here; it needs --method magcache"),
        (("--budget", 6, "--retention_ratio", 0.2), "--retention-ratio has no effect here"),
        (("--budget", 6, "--objective", "sum"), "--objective has no effect here; it needs --method lemica"),
        (("--budget", 6, "--edges", "gram"), "--edges has no effect here; it needs --method lemica"),
        (
            ("--budget", 6, "--method", "lemica", "--gamma", 2.0),
            "it needs --objective power",
        ),
        (("--budget", 6, "--method", "lemica", "--replay-runs", 1), "it needs --edges replay"),
        (("--budget", 6, "--method", "lemica", "--boundary", "blocks"), "it needs --edges replay"),
        (("--budget", 6, "--model", "somewhere"), "it needs --refine or --edges replay"),
        (("--budget", 6, "--height", 32), "it needs --refine or --edges replay"),
        (("--budget", 6, "--method", "magcache", "--longest", 4), "--longest has no effect here"),
        # of earlier versions
        (("--budget", 6, "--method", "checked"), "checked is now called hindsight"),
        (("--budget", 6, "--mode", "static"), "--mode is no longer a flag"),
        (("--budget", 6, "--bands", "11,5"), "--bands is no longer a flag"),
        (("--budget", 6, "--basis", "branch"), "--basis is no longer a flag"),
        (("--budget", 6, "--method", "lemica", "--objective", "power", "--gamma", 0.1), "gamma"),
        (("--budget", 6, "--method", "lemica", "--objective", "power", "--gamma", "nan"), "gamma"),
        (("--budget", 6, "--method", "lemica", "--edges", "nowhere.json"), "does not exist"),
    ],
)
def test_bad_plans(calibrated, tmp_path, capsys, flags, message):
    assert plan(calibrated, tmp_path / "p.json", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("prompts", "flags", "message"),
    [
        ("", (), "is empty"),
        ("a\na\n", (), "more than once"),
        (None, (), "does not exist"),
        ("a\n", ("--seeds", "x"), "whole numbers"),
        ("a\n", ("--seeds", "1,1"), "each seed once"),
        ("a\n", ("--seeds", 2**64), "expected 64 bits"),
        ("a\n", ("--steps", "0"), "at least 1"),
        ("a\n", ("--steps", "1"), "2 to 1000 steps"),
        ("a\n", ("--steps", "1001"), "2 to 1000 steps"),
        ("a\n", ("--guidance", "nan"), "--guidance is nan"),
        ("a\n", ("--device", "tpu"), "--device tpu cannot be used here"),
        ("a\n", ("--workers", 2), "--workers has no effect here; it needs --ray"),
        ("a\n", ("--merge", "x.json"), "has no effect here; it needs runs (no --merge)"),
        ("a\n", ("--height", "30"), "multiple of 16"),
        ("a\n", ("--store", "/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_bad_calibrations(model, tmp_path, capsys, prompts, flags, message):
    if prompts is not None:
        (tmp_path / "prompts.txt").write_text(prompts)
    assert calibrate(model, tmp_path, *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "calibration.json").exists()


def test_what_is_missing(calibrated, tmp_path, capsys):
    assert main(["calibrate", "--out", str(tmp_path / "c.json")]) == 2
    assert "--model and --prompts, or --merge" in capsys.readouterr().err
    assert main(["show", str(tmp_path / "none.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["show", str(calibrated / "calibration.json"), "--out", str(tmp_path / "a.gif")]) == 2
    assert ".png or .svg" in capsys.readouterr().err
    Path(tmp_path / "junk.json").write_text("{}")
    assert main(["show", str(tmp_path / "junk.json")]) == 2
    assert "not a stepcache.plan file" in capsys.readouterr().err


def test_another_calibration_is_told_before_its_runs(model, calibrated, tmp_path, capsys, monkeypatch):
    """Steps and guidance before the model is loaded, the model before the first run, the size at its first step."""
    from stepcache.commands import calibrate as module

    def ran(*args, **kwargs):
        raise AssertionError("a run was made")

    monkeypatch.setattr(module, "sample_latent", ran)
    (tmp_path / "prompts.txt").write_text(PROMPTS + "a green star\n")
    (tmp_path / "calibration.json").write_text((calibrated / "calibration.json").read_text())
    before = (tmp_path / "calibration.json").read_text()
    for flags, says in (
        (("--guidance", 4), "guidance 3.0 (requested: 4.0)"),
        (("--steps", 20), "num_steps 16 (requested: 20)"),
    ):
        assert calibrate(model, tmp_path, *flags) == 2
        assert says in capsys.readouterr().err
    monkeypatch.undo()
    for flags, size in ((("--height", 64), [24, 2, 8, 4]), (("--num_frames", 9), [24, 3, 4, 4])):
        assert calibrate(model, tmp_path, *flags) == 2
        assert f"the run's latent is {size} and the calibration's [24, 2, 4, 4]" in capsys.readouterr().err
    assert (tmp_path / "calibration.json").read_text() == before
