"""Every pipeline of tools/tiny_pipelines.py, run as the table in docs/pipelines.md is made."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from pipeline_table import examine
from tiny_pipelines import PIPELINES

NAMED = {  # what the papers and repositories name
    "WanPipeline",
    "WanPipeline (two experts)",
    "WanImageToVideoPipeline",
    "WanVACEPipeline",
    "HunyuanVideoPipeline",
    "HunyuanVideo15Pipeline",
    "QwenImagePipeline",
    "QwenImageEditPipeline",
    "Flux2Pipeline",
    "Flux2KleinPipeline",
    "FluxKontextPipeline",
    "CogVideoXPipeline",
    "LattePipeline",
    "LTXPipeline",
    "MochiPipeline",
    "ZImagePipeline",
    "StableDiffusion3Pipeline",
    "ErnieImagePipeline",
}


def test_all_that_are_named_are_there():
    assert not NAMED - {t.name for t in PIPELINES}
    assert len(PIPELINES) >= 20


@pytest.mark.parametrize("tiny", PIPELINES, ids=lambda t: t.name)
def test_pipeline(tiny):
    row = examine(tiny)
    if row.output.startswith("not in this diffusers"):
        pytest.skip(row.output)
    assert row.output == "yes"
    assert row.blocks in ("yes", "not known")
    assert row.easycache == "yes" or row.easycache.startswith("no: ")
    assert 0 < row.computed < row.steps
