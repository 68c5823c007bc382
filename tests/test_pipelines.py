"""Every pipeline of tools/tiny_pipelines.py and tiny_modular.py, run as the table in docs/pipelines.md is made."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import ClassifierFreeGuidance

import stepcache
from stepcache import Plan, PlanFile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import tiny_pipelines
from pipeline_table import ALL, NOT_RUN, examine
from tiny_modular import MODULAR
from tiny_newer import NEWER
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
    "MiniMaxH3ModularPipeline",
    "Flux3ModularPipeline",
    "WanAnimate2ModularPipeline",
    "AnimaModularPipeline",
    "WanModularPipeline",
    "QwenImageModularPipeline",
    "FluxModularPipeline",
    "LTX2ModularPipeline",
    "HunyuanVideo15ModularPipeline",
    "ZImageModularPipeline",
}


UNCORRECTED = {  # what the summary says where hindsight does not correct
    "AllegroPipeline": "is not linear in the model's outputs",
    "CogVideoXPipeline": "is not stepped by output, timestep and sample alone",
    "CosmosTextToWorldPipeline": "computed [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11] instead of",
    "HunyuanDiTPipeline": "is not linear in the model's outputs",
    "SanaSprintPipeline": "has no step for each of its timesteps",
}


def test_all_that_are_named_are_there():
    names = [t.name for t in ALL]
    assert not NAMED - set(names)
    assert len(names) == len(set(names))
    assert not set(NOT_RUN) & set(names)


def test_no_family_of_modular_pipelines_is_left_out():
    from diffusers.modular_pipelines.modular_pipeline import MODULAR_PIPELINE_MAPPING

    families = {name.split("ModularPipeline")[0] for name in [*NOT_RUN, *(t.name for t in MODULAR)]}
    variants = ("plus", "layered", "turbo", "distilled", "pyramid")  # tools/tiny_modular.py says that they are not here
    known = {made().split("ModularPipeline")[0] for key, made in MODULAR_PIPELINE_MAPPING.items() if key}
    assert {k for k in known - families if not any(v in k.lower() for v in variants)} == set()


@pytest.mark.parametrize("tiny", ALL, ids=lambda t: t.name)
def test_pipeline(tiny):
    row = examine(tiny)
    if row.output.startswith("not in this diffusers"):
        pytest.skip(row.output)
    assert row.output == "yes"
    assert row.blocks in ("yes", "not known")
    assert row.easycache == "yes" or row.easycache.startswith("no: ")
    assert 0 < row.computed < row.steps
    assert row.hindsight == "yes" or tiny.name in UNCORRECTED
    assert UNCORRECTED.get(tiny.name, "") in row.hindsight


SCALES = {
    "WanPipeline": "guidance_scale",
    "QwenImagePipeline": "true_cfg_scale",
    "QwenImageEditPipeline": "true_cfg_scale",
    "HunyuanVideoPipeline": "true_cfg_scale",
    "FluxPipeline (true guidance)": "true_cfg_scale",
    "CogVideoXPipeline": "guidance_scale",
    "DiTPipeline": "guidance_scale",
    "HunyuanVideo15Pipeline": "guider",
}


@pytest.mark.parametrize("name", SCALES)
def test_plans_are_checked_against_the_guidance_that_acts(name, monkeypatch):
    """A distilled scale (an input of the model) is not it; `true_cfg_scale` and a guider's are."""
    tiny = next(t for t in PIPELINES if t.name == name)
    pipe, key, original = tiny.build(), SCALES[name], tiny_pipelines.sample
    plan = PlanFile(Plan(12, (0, 4, 8, 11)), guidance=4.0)
    for scale in (4.0, 9.0):
        if key == "guider":
            pipe.guider = ClassifierFreeGuidance(scale)
        given = {} if key == "guider" else {key: scale}
        called = lambda p, s, seed, given=given, **kwargs: original(p, s, seed, **{**kwargs, **given})  # noqa: E731
        monkeypatch.setattr(tiny_pipelines, "sample", called)
        with stepcache.accelerate(pipe, plan):
            if scale == 4.0:
                tiny.call(pipe, 12, 0)
            else:
                with pytest.raises(ValueError, match=r"guidance 4.0 \(the run: 9.0\)"):
                    tiny.call(pipe, 12, 0)


def test_a_distilled_scale_mixes_nothing():
    tiny = next(t for t in PIPELINES if t.name == "FluxPipeline")
    pipe = tiny.build()
    with stepcache.accelerate(pipe, stepcache.Off()) as run:
        tiny.call(pipe, 4, 0)
    assert run.cache.run.guidance == 1.0


@pytest.mark.parametrize(
    "name", ["MiniMaxH3ModularPipeline", "LTX2ModularPipeline", "Cosmos3OmniModularPipeline (sound)"]
)
def test_every_sampler_of_a_step_has_its_corrector(name):
    """Sound has a scheduler of its own (MiniMax-H3) or a copy (LTX-2)."""
    tiny = next(t for t in MODULAR if t.name == name)
    pipe = tiny.build()
    truth, errors = tiny.call(pipe, 12, 0), []
    for policy in ("hindsight:6", "uniform:6"):
        with stepcache.accelerate(pipe, policy) as run:
            errors.append(float((tiny.call(pipe, 12, 0) - truth).norm() / truth.norm()))
        if policy == "hindsight:6":
            assert len(run.summary().strategy._correctors) == 2
    assert errors[0] < errors[1]


def test_guidance_that_remembers_outputs_gets_no_made_up_ones():
    """AceStep's pipeline keeps a running mean of what guidance moved; with ones at skipped steps the error was 0.36."""
    tiny = next(t for t in NEWER if t.name == "AceStepPipeline")
    pipe = tiny.build()
    truth, errors = tiny.call(pipe, 12, 0), []
    for policy in ("hindsight:6", "uniform:6"):
        with stepcache.accelerate(pipe, policy) as run:
            errors.append(float((tiny.call(pipe, 12, 0) - truth).norm() / truth.norm()))
        assert not run.cache.strategy.tensors()
    assert errors[0] < errors[1]


def test_the_latent_s_tokens_may_come_last():
    """What EasyCache measures is the latent, not the text's padding before it."""
    tiny = next(t for t in NEWER if t.name == "Ideogram4Pipeline")
    pipe, seen = tiny.build(), []

    class Watched(stepcache.EasyCache):
        def begin(self, run):
            strategy = super().begin(run)
            compute = strategy.compute
            strategy.compute = lambda step, x: (seen.append(x.shape), compute(step, x))[1]
            return strategy

    with stepcache.accelerate(pipe, Watched(0.1, 2)):
        tiny.call(pipe, 6, 0)
    assert len(set(seen[1:])) == 1
    assert seen[1][1] < seen[0][1]


def test_released_models_are_known_in_modular_pipelines_too():
    from diffusers import WanTransformer3DModel

    from stepcache.hosts.diffusers import model_name

    pipe = next(t for t in MODULAR if t.name == "WanModularPipeline").build()
    assert model_name(pipe).startswith("WanTransformer3DModel-")
    with torch.device("meta"):
        large = WanTransformer3DModel(num_layers=40, num_attention_heads=40, in_channels=16)
    pipe.update_components(transformer=large)
    assert model_name(pipe) == "wan2.1-t2v-14B"


def test_a_pipeline_without_a_scheduler_is_refused():
    pipe = next(t for t in MODULAR if t.name == "WanModularPipeline").build()
    pipe.update_components(scheduler=None)
    with pytest.raises(ValueError, match="has no scheduler"):
        stepcache.enable(pipe, "hindsight:6")
