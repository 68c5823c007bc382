"""Every shell and Python block of README, docs and examples runs, in order; those that cannot here say why.

The blocks of a page run as a reader would run them: in one folder that looks like a clone, its Python in one session.
"""

import json
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
PAGES = sorted(page.relative_to(ROOT) for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))

SESSION = """
import json, subprocess, sys
names = {"__name__": "__main__"}
for kind, code in json.load(sys.stdin):
    print(f"--- {kind}\\n{code}", flush=True)
    if kind == "python":
        exec(compile(code, "block", "exec"), names)
    else:
        subprocess.run(["sh", "-e", "-c", code], check=True)
"""


def blocks(path):
    """(kind, code, why it is not run) of a page's blocks."""
    return [(m["kind"], m["code"], m["why"]) for m in BLOCK.finditer(path.read_text(encoding="utf-8"))]


def kept(code):
    return "\n".join(line for line in code.splitlines() if not line.startswith(SKIPPED))


@pytest.fixture
def clone(tmp_path):
    """What a clone has, linked, so that nothing is written into this one; and our commands on the path."""
    place, commands = tmp_path / "clone", tmp_path / "bin"
    place.mkdir()
    commands.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".venv", "outputs"):
            (place / entry.name).symlink_to(entry)
    (commands / "stepcache").write_text(f'#!/bin/sh\nexec {sys.executable} -m stepcache "$@"\n')
    (commands / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    return place, {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}


def run(place, environment, session):
    """Run (kind, code) in one session; the blocks and what was said, if one fails."""
    done = subprocess.run(
        [sys.executable, "-c", SESSION],
        input=json.dumps(session),
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_blocks_of_a_page_run_in_order(page, clone):
    session = [(kind, kept(code)) for kind, code, why in blocks(ROOT / page) if why is None]
    if session:
        run(*clone, session)
    if page.name == "README.md":
        made = {"uncached.mkv", "cached.mkv", "calibration.json", "plan.json", "clip.mp4", "results"}
        assert made <= set(os.listdir(clone[0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.[ps][yh]")))
def test_an_example_runs(name, clone):
    run(*clone, [("sh", f"{'python' if name.endswith('.py') else 'sh'} examples/{name}")])


@pytest.mark.slow
def test_the_notebook_runs(clone):
    cells = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 4
    run(*clone, [("python", text) for text in code])
    assert all(cell.get("outputs") for cell in cells if cell["cell_type"] == "code")  # as they are looked at on the web


def test_what_is_not_run_says_why():
    """And nothing hides in a block without a language that looks like a command."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert all(why is None or why.strip() for _, _, why in blocks(ROOT / page))
        plain = re.findall(r"^```\n(.*?)^```", re.sub(r"```\w+\n.*?```", "", text, flags=re.DOTALL), re.DOTALL | re.M)
        assert not [block for block in plain if re.match(r"(stepcache|python|pip|git|wget) ", block)], page


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_links_and_pictures_of_the_pages_are_there():
    for page in [*(ROOT / page for page in PAGES), ROOT / "README_CN.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


# ------------------------------------------------------------------------------------------------ README_CN.md


def outline(path):
    """What both languages must have alike: levels of headings, commands, and figures and links of tables."""
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    levels = [len(line.split()[0]) for line in prose.splitlines() if re.match(r"#+ ", line)]
    code = [re.sub(r"\s*#.*", "", line) for _, code, _ in blocks(path) for line in code.splitlines()]
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    figures = [re.findall(r"\d+(?:\.\d+)?|\]\([^)]*\)|`[^`]*`", row) for row in rows]
    return levels, [line for line in code if line.strip()], figures


def test_the_chinese_readme_is_in_step_with_the_english_one():
    for english, chinese in zip(outline(ROOT / "README.md"), outline(ROOT / "README_CN.md"), strict=True):
        assert english == chinese
