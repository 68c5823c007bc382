"""The Wan drop-ins in a clone of Wan2.2: against a stand-in, and the real repository when given."""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import near
from test_wan21_dropins import ROOT, SCRIPTS, STANDIN, executions, run

from stepcache.commands.main import main

T2V, TI2V = ("--task", "t2v-A14B"), ("--task", "ti2v-5B", "--size", "1280*704")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("Wan2.2")
    shutil.copytree(STANDIN.with_name("standin_wan22"), folder, dirs_exist_ok=True)
    shutil.copy(STANDIN / "wan" / "__init__.py", folder / "wan" / "parts.py")
    for script in SCRIPTS.values():
        shutil.copy(ROOT / script, folder)
    (folder / "ckpt").mkdir()
    return folder


@pytest.fixture(scope="module")
def baseline(clone):
    return executions(clone, "generate.py", *T2V, name="base.mp4")


def refused(clone, method, *flags):
    done = run(clone, method, *flags, check=False)
    assert done.returncode == 2
    return done.stderr


@pytest.mark.parametrize("method", ["lemica", "magcache", "hindsight"])
def test_without_its_flag_a_script_is_the_original_process(clone, baseline, method):
    assert executions(clone, method, *T2V) == near(baseline, 1e-6)


@pytest.mark.parametrize("budget", [20, 14])
@pytest.mark.parametrize("method", ["hindsight", "lemica"])
def test_the_second_expert_begins_with_an_evaluation_and_the_budget_holds(clone, baseline, method, budget):
    flags = {"hindsight": ("--budget",), "lemica": ("--lemica_resample", "--boundary", "output", "--lemica_budget")}
    done = run(clone, method, *T2V, *flags[method], budget, "--save_file", "h.mp4")
    line = next(line for line in done.stdout.splitlines() if set(line) <= set("█·") and len(line) == 40)
    switch = baseline["switch"]
    assert 3 < switch < 37
    assert (line.count("█"), line[switch]) == (budget, "█")
    counts = executions(clone, method, *T2V, *flags[method], budget)["executions"]
    assert counts == {"high_noise_model": 2 * line[:switch].count("█"), "low_noise_model": 2 * line[switch:].count("█")}


def test_hindsight_is_closer_than_reuse(clone, baseline):
    ours = executions(clone, "hindsight", *T2V, "--budget", 14)["video"]
    reuse = executions(
        clone, "lemica", *T2V, "--lemica_budget", 14, "--lemica_resample", "--boundary", "output"
    )["video"]  # fmt: skip
    assert math.dist(ours, baseline["video"]) < math.dist(reuse, baseline["video"])


def test_every_step_computed_is_the_original(clone, baseline):
    assert executions(clone, "hindsight", *T2V, "--budget", 40) == near(baseline, 1e-6)


def test_lemica_says_that_nothing_is_published(clone):
    assert "published nothing for Wan2.2's t2v-A14B. Add --lemica_resample" in refused(
        clone, "lemica", *T2V, "--lemica_budget", 20
    )


def test_magcache_has_ratios_of_its_own(clone):
    done = run(clone, "magcache", *T2V, "--use_magcache", "--save_file", "m.mp4")
    assert "magcache (thresh 0.06, K 2), boundary blocks: computed" in done.stdout
    assert "note" not in done.stderr
    assert "-t2v" not in run(clone, "magcache", *TI2V, "--use_magcache", "--save_file", "m.mp4").stderr
    assert "no ratios for s2v-14B; measure them with --magcache_calibration" in refused(
        clone, "magcache", "--task", "s2v-14B", "--use_magcache"
    )


def test_magcache_calibrates_and_takes_the_file_back(clone, baseline):
    flags = (*T2V, "--magcache_calibration", "--magcache_ratios", "r.json")
    assert "ratios written to r.json" in run(clone, "magcache", *flags, "--save_file", "c.mp4").stdout
    done = run(clone, "magcache", *T2V, "--use_magcache", "--magcache_ratios", "r.json", "--save_file", "r.mp4")
    assert "computed" in done.stdout
    assert "with sequence parallelism" in refused(clone, "magcache", *flags, "--ulysses_size", 2)


@pytest.mark.parametrize(
    ("flags", "steps", "runs", "calls"),
    [
        (("--task", "i2v-A14B"), 40, 1, 2),
        (TI2V, 50, 1, 2),
        ((*TI2V, "--image", "a.png"), 50, 1, 2),
        (("--task", "s2v-14B"), 40, 2, 2),
        (("--task", "animate-14B"), 20, 2, 1),
    ],
)
def test_all_tasks_are_accelerated(clone, flags, steps, runs, calls):
    half = steps // 2
    done = run(clone, "hindsight", *flags, "--budget", half, "--save_file", "t.mp4")
    assert done.stdout.count(f"computed {half} of {steps} steps") == runs
    done = executions(clone, "hindsight", *flags, "--budget", half)
    assert sum(done["executions"].values()) == runs * calls * half
    done = run(clone, "easycache", *flags, "--thresh", 1e9, "--ret_steps", 4, "--save_file", "t.mp4")
    computed = 7 if "A14B" in flags[1] else 5  # the second expert's rate of change is measured anew
    assert done.stdout.count(f"computed {computed} of {steps} steps") == runs


def test_calibrate_plan_and_where_a_plan_fits(clone, capsys):
    run(clone, "hindsight", *T2V, "--calibration", "c.json", "--prompt", "two cats", "--save_file", "c.mp4")
    plan = ["plan", "--calibration", str(clone / "c.json"), "--budget", "12", "--out", str(clone / "p.json")]
    assert main(plan) == 0
    capsys.readouterr()
    followed = run(clone, "hindsight", *T2V, "--plan", "p.json", "--save_file", "p.mp4").stdout
    assert "computed 12 of 40 steps" in followed
    assert "(the run: 9)" in refused(clone, "hindsight", *T2V, "--plan", "p.json", "--sample_guide_scale", 9)
    assert "model wan2.2-t2v-A14B (the run: wan2.2-i2v-A14B)" in refused(
        clone, "hindsight", "--task", "i2v-A14B", "--plan", "p.json"
    )


def test_bad_input(clone, tmp_path):
    assert "a second transformer begins" in refused(clone, "hindsight", *T2V, "--budget", 2)
    assert "does not know the task x2v-7B. It knows those of wan2.1: t2v-1.3B" in refused(
        clone, "easycache", "--task", "x2v-7B"
    )
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "__init__.py").touch()
    (tmp_path / "generate.py").write_text("def main(): pass\n")
    shutil.copy(ROOT / SCRIPTS["hindsight"], tmp_path)
    assert "generate.py beside this script has no _parse_args; it is not Wan2.1's or Wan2.2's, or too old" in refused(
        tmp_path, "hindsight", "--budget", 20
    )


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--budget", 14)])
def test_two_ranks_decide_alike(clone, flags):
    one = executions(clone, "hindsight", *T2V, *flags)
    assert executions(clone, "hindsight", *T2V, "--ulysses_size", 2, *flags, ranks=2) == near(one, 1e-5)


REAL = {
    "lemica": (("--lemica_budget", "20", "--lemica_resample"), 20),
    "hindsight": (("--budget", "14"), 14),
    "easycache": (("--thresh", "1e9", "--ret_steps", "4"), None),
    "magcache": (("--use_magcache",), None),
}


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("WAN22_ROOT"), reason="WAN22_ROOT does not name a clone of Wan-Video/Wan2.2")
@pytest.mark.parametrize("task", ["t2v-A14B", "ti2v-5B"])
@pytest.mark.parametrize("method", SCRIPTS)
def test_the_real_repository_generates(tmp_path_factory, method, task):
    """WAN22_RUNNER (default: this Python) runs a script of the clone; WAN22_CKPT holds Wan2.2-T2V-A14B and -TI2V-5B."""
    if not os.environ.get("WAN22_CKPT"):
        pytest.skip("WAN22_CKPT is not set: nothing was generated with the real Wan2.2 code")
    root = tmp_path_factory.mktemp("upstream") / "Wan2.2"
    shutil.copytree(os.environ["WAN22_ROOT"], root, ignore=shutil.ignore_patterns(".git", "*.pth", "*.safetensors"))
    shutil.copy(ROOT / SCRIPTS[method], root)
    ckpt = f"{os.environ['WAN22_CKPT']}/Wan2.2-{'T2V-A14B' if task == 't2v-A14B' else 'TI2V-5B'}"
    size = "832*480" if task == "t2v-A14B" else "1280*704"
    flags, wanted = REAL[method]
    command = [*shlex.split(os.environ.get("WAN22_RUNNER", sys.executable)), SCRIPTS[method].split("/")[1]]
    command += ["--task", task, "--size", size, "--ckpt_dir", ckpt, "--prompt", "a cat", "--sample_steps", "40"]
    command += ["--frame_num", "13", "--save_file", str(root / "out.mp4"), *flags]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"WAN22_ROOT": str(root), "WAN_ROOT": str(root)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    count = int(re.search(r"computed (\d+) of 40 steps", done.stdout)[1])
    assert count < 40
    assert wanted in (None, count)
    assert (root / "out.mp4").stat().st_size > 0
