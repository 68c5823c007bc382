"""Every shell and Python block of the README runs, in order, in one folder; those that cannot here say why."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]*?) -->\n)?```(?P<kind>sh|python)\n(?P<code>.*?)```", re.DOTALL)
SKIPPED = ("pip install",)
"""Lines that are not run: what they install is what runs this."""


def blocks(path):
    """(kind, code, why it is not run) of a page's blocks."""
    return [(m["kind"], m["code"], m["why"]) for m in BLOCK.finditer(path.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a clone has, linked, so that nothing is written into this one; and our commands on the path."""
    place = tmp_path_factory.mktemp("clone")
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".venv", "outputs"):
            (place / entry.name).symlink_to(entry)
    commands = tmp_path_factory.mktemp("bin")
    (commands / "stepcache").write_text(f'#!/bin/sh\nexec {sys.executable} -m stepcache "$@"\n')
    (commands / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    return place, {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_the_readme_s_blocks_run_in_order(folder):
    place, environment = folder
    ran = 0
    for kind, code, why in blocks(ROOT / "README.md"):
        if why is not None:
            continue
        kept = [line for line in code.splitlines() if not line.startswith(SKIPPED)]
        command = ["sh", "-e", "-c"] if kind == "sh" else [sys.executable, "-c"]
        done = subprocess.run([*command, "\n".join(kept)], cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 4
    assert {"uncached.mkv", "cached.mkv", "calibration.json", "plan.json", "clip.mp4", "results"} <= set(
        os.listdir(place)
    )


def test_what_is_not_run_says_why():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for _, _, why in blocks(page):
            assert why is None or why.strip()


def commands(path):
    """Commands of a page's blocks without their comments, in order."""
    lines = [line.split("  #")[0].rstrip() for _, code, _ in blocks(path) for line in code.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_the_chinese_readme_s_commands_are_those_of_the_english_one():
    """It has fewer; Wan's place and the prompt are shortened there."""
    english, chinese = commands(ROOT / "README.md"), commands(ROOT / "README_CN.md")
    ours = [line for line in chinese if line.lstrip().startswith(("stepcache", "--policies", "pipe", "video", "with"))]
    assert len(ours) >= 9
    assert [line for line in ours if line not in english] == []
