"""The wheel and the sdist: what is in them, and the commands from an environment that has nothing else of ours."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build(folder, target, out):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return next(Path(out).glob("*.whl" if target == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel of this folder, wheel of the sdist of this folder)"""
    folder = tmp_path_factory.mktemp("dist")
    sdist = build(ROOT, "sdist", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return build(ROOT, "wheel", folder), build(next((folder / "unpacked").iterdir()), "wheel", folder / "again"), sdist


def test_the_wheel_is_whole_and_the_sdist_makes_the_same(built):
    wheel, again, sdist = built
    names, of_sdist = (set(zipfile.ZipFile(path).namelist()) for path in (wheel, again))
    assert names == of_sdist
    sources = {
        str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "stepcache").rglob("*") if path.is_file()
    }
    assert {name for name in sources if "__pycache__" not in name} <= names
    assert "stepcache/assets/tiny-wan/transformer/diffusion_pytorch_model.safetensors" in names
    assert not [name for name in names if name.startswith(("tests", "bench", "tools"))]
    assert wheel.stat().st_size < 16e6
    assert sdist.stat().st_size < 20e6


@pytest.mark.slow
def test_the_installed_wheel_works_from_an_empty_folder(built, tmp_path):
    """Its own environment; torch and what else it needs are lent from here, this package is not."""
    place, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), str(built[0])],
        check=True,
    )
    environment = {**os.environ, "PYTHONPATH": f"{place}:{sysconfig.get_paths()['purelib']}", "PYTHONSAFEPATH": "1"}

    def run(*words):
        return subprocess.run(
            [sys.executable, "-S", str(place / "bin" / "stepcache"), *words],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
        )

    where = subprocess.run(
        [sys.executable, "-S", "-c", "import stepcache; print(stepcache.__file__)"],
        env=environment,
        cwd=empty,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(place))
    assert run("--version").stdout.startswith("stepcache ")
    done = run("demo", "--steps", "6", "--prompt", "a red circle", "--policies", "uniform:3 hindsight:3")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "at 3 of 6 steps" in done.stdout
    assert (empty / "outputs" / "demo" / "sheet.png").is_file()
