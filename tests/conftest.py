"""What the tests share. The builders of tiny pipelines are in `tiny`."""

from __future__ import annotations

import surroundings  # noqa: F401

# isort: split
import importlib
import os
import shutil
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings

for folder in ("tools", "bench"):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / folder))
# A loaded machine is slow, not wrong.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

BUILDERS = ("sample", "tiny_i2v_pipe", "tiny_pipe", "tiny_scheduler", "tiny_transformer", "tiny_vae")


def __getattr__(name):
    """A builder, when it is asked for: importing torch and diffusers takes the process long that directs others."""
    if name not in BUILDERS:
        raise AttributeError(name)
    return getattr(importlib.import_module("tiny"), name)


def near(value, rel=1e-3):
    """Equal to `value` in everything but floats, and to those nearly: for what two processes computed.

    Sums are taken in another order where threads, memory or processors differ. Among many numbers a small one may be
    off by as much as the largest.
    """
    if is_dataclass(value):
        return near(asdict(value), rel)
    if isinstance(value, dict):
        return {name: near(entry, rel) for name, entry in value.items()}
    if isinstance(value, np.ndarray) or (value and isinstance(value, list) and {*map(type, value)} == {float}):
        sizes = np.abs(value)
        return pytest.approx(value, rel=rel, abs=rel * sizes[np.isfinite(sizes)].max(initial=0), nan_ok=True)
    if isinstance(value, list | tuple):
        return type(value)(near(entry, rel) for entry in value)
    return pytest.approx(value, rel=rel, nan_ok=True) if isinstance(value, float) else value


# The files that take longest, longest first.
LONG = ("test_cluster", "test_drivers", "test_ranks", "test_bench", "test_planning", "test_embedded_model")


def pytest_collection_modifyitems(items):
    """Long files first, so that with several workers none of them is still at one when the others have finished."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture
def pipe():
    from tiny import tiny_pipe

    return tiny_pipe()


@pytest.fixture
def toolkit():
    """The builders, for tests that need several pipelines."""
    import tiny

    return SimpleNamespace(
        pipe=tiny.tiny_pipe, i2v=tiny.tiny_i2v_pipe, sample=tiny.sample, scheduler=tiny.tiny_scheduler
    )


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with a real, untrained Wan pipeline, tokenizer and text encoder included."""
    from tiny import untrained_model

    folder = tmp_path_factory.mktemp("model")
    untrained_model(folder)
    return str(folder)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; STEPCACHE_CHROMIUM names another one."""
    binary = os.environ.get("STEPCACHE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip(
            "no Chromium here: install Debian's chromium and chromium-driver, or name one in STEPCACHE_CHROMIUM"
        )
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install -e '.[dev]')")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    found.set_script_timeout(60)
    yield found
    found.quit()
