"""The embedded model's generator, trainer and measure: split, grammar, exact padding trick, exact resuming."""

import argparse
import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import eval_tiny_wan as evaluation  # noqa: E402
import tiny_wan_clips as clips  # noqa: E402
import train_tiny_wan as training  # noqa: E402


def test_every_caption_is_in_the_vocabulary_and_fits():
    tokenizer = training.build_tokenizer()
    rng = random.Random(0)
    for _ in range(2000):
        ids = tokenizer(clips.caption(clips.random_scene(rng))).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) < training.TEXT_SLOTS
    assert tokenizer("a purple elephant").input_ids.count(tokenizer.unk_token_id) == 2


def test_the_split_is_disjoint_and_about_one_in_sixteen():
    rng = random.Random(1)

    def words(scene):
        s = scene.subjects[0]
        return (s.colour, s.shape, s.motion, scene.ground, scene.texture)

    seen = {words(clips.random_scene(rng)) for _ in range(3000)}
    held = {words(clips.random_scene(rng, held_out=True)) for _ in range(300)}
    assert not seen & held
    combinations = [clips.random_scene(rng, held_out=bool(i % 2)) for i in range(10)]
    assert [c.held_out for c in combinations] == [False, True] * 5


def test_rendering_is_deterministic_and_in_range():
    scene = clips.random_scene(random.Random(3))
    a, b = clips.render([scene]), clips.render([scene])
    assert a.shape == (1, 3, clips.FRAMES, clips.SIZE, clips.SIZE)
    assert torch.equal(a, b)
    assert a.min() >= -1
    assert a.max() <= 1


def test_the_measure_accepts_all_real_clips_and_no_wrong_ones():
    scenes = evaluation.held_out_scenes(24, seed=5)
    real = [((c.permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy() for c in clips.render(scenes)]
    verdicts = evaluation.judge(real, scenes)
    assert all(v["colour"] and v["direction"] for v in verdicts)
    backwards = evaluation.judge([c[::-1] for c in real], scenes)
    assert not any(v["direction"] for v in backwards)
    still = evaluation.judge([c[:1].repeat(len(c), 0) for c in real], scenes)
    assert not any(v["direction"] for v in still)
    grey = evaluation.judge([c.mean(-1, keepdims=True).astype(c.dtype).repeat(3, -1) for c in real], scenes)
    assert not any(v["colour"] for v in grey)
    swapped = evaluation.judge([c[..., [1, 2, 0]] for c in real], scenes)
    assert not any(v["colour"] for v, s in zip(swapped, scenes, strict=True) if len(s.subjects) == 1)


@torch.no_grad()
def test_short_padding_with_a_raised_logit_equals_the_pipelines_long_padding():
    torch.manual_seed(0)
    tokenizer, transformer = training.build_tokenizer(), training.build_transformer().eval()
    encoder = training.build_text_encoder(len(tokenizer)).eval()
    text = training.embed_text(encoder, tokenizer, ["a red circle turning over a grey plain background", ""])
    long = torch.zeros(2, training.PROMPT_SLOTS, text.shape[-1])
    long[:, : training.TEXT_SLOTS] = text
    x, t = torch.randn(2, training.Z_DIM, 5, 8, 8), torch.tensor([300.0, 800.0])
    expected = transformer(x, t, long, return_dict=False)[0]
    for block in transformer.blocks:
        block.attn2.set_processor(training.PaddedCrossAttention())
    ours = transformer(x, t, text, return_dict=False)[0]
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_principal_axes_change_the_channels_and_not_the_clip():
    torch.manual_seed(0)
    vae = training.build_vae().eval()
    clips = training.render(training.scenes_of("data", 0, 0, 3))
    before = vae.encode(clips).latent_dist.mean
    picture = vae.decode(before[:1]).sample
    turned = training.principal_axes(vae, before)
    after = vae.encode(clips).latent_dist.mean
    assert torch.allclose(after, turned, atol=1e-4 * float(turned.abs().max()))
    assert torch.allclose(vae.decode(after[:1]).sample, picture, atol=1e-4)
    spread = torch.cov(turned.permute(1, 0, 2, 3, 4).flatten(1))
    assert (spread - spread.diag().diag()).abs().max() < 1e-3 * spread.max()
    sd = spread.diag().clamp(min=0).sqrt()
    assert torch.all(sd[:-1] >= sd[1:] - 1e-6)
    std = torch.tensor(vae.config.latents_std)
    assert torch.allclose((sd / std)[:8], (sd**training.SPECTRUM)[:8], rtol=1e-2)


def test_places_are_said_of_what_stays_and_shown_there():
    rng = random.Random(0)
    for _ in range(300):
        for s in training.random_scene(rng).subjects:
            assert bool(s.place) != s.motion.startswith("moving")
            if s.place == "on the left":
                assert s.x < 0.4
            if s.place == "at the bottom":
                assert s.y > 0.6


@pytest.mark.slow
def test_an_interrupted_training_resumes_where_it_was(tmp_path, monkeypatch):
    """Four iterations in one go, and two with a checkpoint between: the same losses."""
    torch.manual_seed(0)
    latents, captions = torch.randn(8, training.Z_DIM, 5, 8, 8).half(), ["a red circle turning"] * 8

    def parse(folder):
        settings = {"seed": 3, "batch": 2, "lr": 1e-3, "steps": 4, "bf16": False, "init_from": None}
        return argparse.Namespace(work=folder, train_shift=2.0, compile=False, **settings)

    _, _, whole = training.train_dit(parse(tmp_path / "whole"), latents, captions, "cpu")

    class Interrupt(Exception):
        pass

    update = training.Run.update

    def interrupted(self, loss):
        update(self, loss)
        if self.done == 2:
            self.save()
            raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "update", interrupted)
        with pytest.raises(Interrupt):
            training.train_dit(parse(tmp_path / "parts"), latents, captions, "cpu")
    _, _, parts = training.train_dit(parse(tmp_path / "parts"), latents, captions, "cpu")
    assert parts.losses == whole.losses
    assert len(parts.losses) == 4
