"""landscapes: drawn pictures of skies, mountains and seas; a FluxPipeline distilled from a teacher under guidance."""

from __future__ import annotations

import random
from dataclasses import astuple, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from recipes.base import DrawnRecipe, Settings, frozen_t5, packed, phrase_tokenizer, square_tokens

EDGE = 64
FINE = 2 * EDGE  # drawn at, and averaged
SLOTS = 6
"""Text tokens: five phrases and an end."""
WIDTH = 128

SKIES = {  # colours at the top and at the horizon
    "blue sky": ((0.20, 0.45, 0.90), (0.75, 0.88, 1.00)),
    "grey sky": ((0.45, 0.47, 0.52), (0.75, 0.75, 0.76)),
    "night sky": ((0.02, 0.03, 0.12), (0.12, 0.14, 0.32)),
    "pink dawn": ((0.55, 0.45, 0.75), (1.00, 0.72, 0.70)),
    "orange sunset": ((0.45, 0.20, 0.40), (1.00, 0.60, 0.20)),
    "green aurora": ((0.02, 0.10, 0.15), (0.15, 0.55, 0.40)),
}
LIGHTS = [f"{what} {where}" for what in ("sun", "full moon", "crescent moon") for where in ("left", "middle", "right")]
LIGHTS.append("no light")
RIDGES = {  # colour, roughness, height
    "snowy mountains": ((0.88, 0.91, 0.96), 1.0, 0.32),
    "dark mountains": ((0.22, 0.20, 0.27), 1.0, 0.30),
    "red rocks": ((0.66, 0.30, 0.18), 0.7, 0.22),
    "green hills": ((0.28, 0.55, 0.25), 0.2, 0.16),
    "golden dunes": ((0.86, 0.70, 0.36), 0.25, 0.14),
    "city": ((0.20, 0.22, 0.28), -1.0, 0.30),
}
GROUNDS = {
    "calm sea": (0.12, 0.34, 0.55),
    "meadow": (0.40, 0.62, 0.22),
    "snow field": (0.90, 0.93, 0.97),
    "sand": (0.88, 0.76, 0.50),
    "road": (0.34, 0.40, 0.26),
}
THINGS = ["pine trees", "round trees", "a house", "a sail boat", "cacti", "nothing else"]


@dataclass(frozen=True)
class Scene:
    """One phrase each."""

    sky: str
    light: str
    ridge: str
    ground: str
    thing: str

    @property
    def caption(self) -> str:
        """The phrases, joined by commas."""
        return ", ".join(astuple(self))


class Landscapes(DrawnRecipe):
    """One call a step, guidance as an input; Euler with a shift that depends on the size."""

    name = "landscapes"
    data = "14,000 drawn landscapes at 64x64: sky, sun or moon, ridge, ground and an object, one phrase each"
    doc = "a guidance-distilled FLUX image model: one call per step, with the guidance scale as an input"
    limits = "Objects are placed freely, so they may overlap; unknown phrases are ignored."
    settings = Settings(vae_steps=2500, steps=5000, batch=24, shift=1.5, distil_steps=2000)
    channels = 12
    count = 14000
    call: ClassVar = {
        "height": EDGE,
        "width": EDGE,
        "num_inference_steps": 50,
        "guidance_scale": 3.5,
        "max_sequence_length": SLOTS,
    }

    def scene(self, rng: random.Random) -> Scene:
        return random_scene(rng)

    def drawn(self, scene: Scene, seed: int) -> np.ndarray:
        return drawn(scene, seed)

    def untrained(self) -> FluxPipeline:
        phrases = [*SKIES, *LIGHTS, *RIDGES, *GROUNDS, *THINGS]
        clip_tokens, t5_tokens = phrase_tokenizer(phrases, SLOTS), phrase_tokenizer(phrases, SLOTS)
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip_tokens),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=SLOTS,
                projection_dim=64,
                initializer_factor=10.0,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=1,
            )
        )
        t5 = frozen_t5(len(t5_tokens))
        transformer = FluxTransformer2DModel(
            in_channels=4 * self.channels,
            num_layers=2,
            num_single_layers=6,
            attention_head_dim=32,
            num_attention_heads=WIDTH // 32,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
        vae = AutoencoderKL(
            block_out_channels=(24, 32, 48),
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            layers_per_block=1,
            latent_channels=self.channels,
            norm_num_groups=8,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.0,
            shift_factor=0.0,
        )
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=256, base_shift=0.5, max_shift=1.15
        )
        return FluxPipeline(scheduler, vae, clip, clip_tokens, t5, t5_tokens, transformer)

    def text(self, pipe: Any, captions: list[str]) -> dict[str, Tensor]:
        states, pooled, _ = pipe.encode_prompt(captions, captions, max_sequence_length=SLOTS)
        return {"states": states, "pooled": pooled}

    def scale_latents(self, vae: Any, mean: Tensor, std: Tensor) -> None:
        vae.register_to_config(shift_factor=float(mean.mean()), scaling_factor=1 / float(std.square().mean().sqrt()))
        self._shift, self._scale = vae.config.shift_factor, vae.config.scaling_factor

    def tokens(self, latents: Tensor) -> Tensor:
        return packed((latents - self._shift) * self._scale)

    def predict(self, transformer: Any, x: Tensor, time: Tensor, text: dict[str, Tensor], guidance: Tensor) -> Tensor:
        edge = square_tokens(x)
        rows, columns = torch.meshgrid(torch.arange(edge), torch.arange(edge), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(x)
        return transformer(
            hidden_states=x,
            timestep=time,
            guidance=guidance,
            pooled_projections=text["pooled"],
            encoder_hidden_states=text["states"],
            txt_ids=torch.zeros(SLOTS, 3).to(x),
            img_ids=places,
            return_dict=False,
        )[0]


def random_scene(rng: random.Random) -> Scene:
    """A scene drawn evenly, phrase by phrase."""
    return Scene(*(rng.choice(list(kind)) for kind in (SKIES, LIGHTS, RIDGES, GROUNDS, THINGS)))


def drawn(scene: Scene, seed: int) -> np.ndarray:
    """The scene with what its words leave open drawn from the seed, uint8 (3, EDGE, EDGE)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:FINE, 0:FINE] / FINE
    horizon = rng.uniform(0.52, 0.64)
    picture = _sky(scene, y, horizon)
    _light(picture, scene, x, y, rng)
    _ridge(picture, scene, x, y, horizon, rng)
    _ground(picture, scene, x, y, horizon, rng)
    _things(picture, scene, x, y, horizon, rng)
    small = picture.reshape(EDGE, 2, EDGE, 2, 3).mean((1, 3)).clip(0, 1)
    return (small * 255).round().astype(np.uint8).transpose(2, 0, 1)


def _sky(scene: Scene, y: np.ndarray, horizon: float) -> np.ndarray:
    top, low = (np.array(c) for c in SKIES[scene.sky])
    share = (y / horizon).clip(0, 1)[..., None]
    return top * (1 - share) + low * share


def _light(picture: np.ndarray, scene: Scene, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> None:
    if scene.light == "no light":
        return
    what, where = scene.light.rsplit(" ", 1)
    cx = {"left": 0.22, "middle": 0.5, "right": 0.78}[where] + rng.uniform(-0.05, 0.05)
    cy, radius = rng.uniform(0.12, 0.28), rng.uniform(0.07, 0.10)
    away = np.hypot(x - cx, y - cy)
    colour = np.array((1.0, 0.85, 0.35) if what == "sun" else (0.95, 0.95, 0.88))
    glow = np.exp(-((away / (3 * radius)) ** 2))[..., None] * (0.5 if what == "sun" else 0.2)
    picture += glow * (colour - picture)
    disc = away < radius
    if what == "crescent moon":
        disc &= np.hypot(x - cx - 0.5 * radius, y - cy + 0.2 * radius) > 0.85 * radius
    picture[disc] = colour


def _ridge(
    picture: np.ndarray, scene: Scene, x: np.ndarray, y: np.ndarray, horizon: float, rng: np.random.Generator
) -> None:
    colour, rough, height = RIDGES[scene.ridge]
    along = x[0]
    if rough < 0:  # towers
        towers = rng.uniform(0.3, 1, 14).repeat(FINE // 14 + 1)[:FINE]
        line = horizon - height * towers
    else:
        line = sum(
            rng.normal() * np.sin(2 * np.pi * (f * along + rng.uniform())) / f ** (2 - rough) for f in range(1, 9)
        )
        line = horizon - height * (0.35 + 0.65 * (line - line.min()) / (np.ptp(line) + 1e-6))
    mask = (y > line) & (y < horizon)
    shade = 0.8 + 0.35 * ((y - line) / height).clip(0, 1)
    light = 0.45 if scene.sky in ("night sky", "green aurora") else 1.0
    picture[mask] = (np.array(colour) * shade[..., None] * light)[mask]
    if rough < 0:
        lit = mask & (np.sin(60 * np.pi * x) > 0.3) & (np.sin(50 * np.pi * y) > 0.3) & (rng.random(x.shape) < 0.9)
        picture[lit] = (0.95, 0.85, 0.45)


def _ground(
    picture: np.ndarray, scene: Scene, x: np.ndarray, y: np.ndarray, horizon: float, rng: np.random.Generator
) -> None:
    mask, depth = y >= horizon, ((y - horizon) / (1 - horizon)).clip(0, 1)
    light = 0.45 if scene.sky in ("night sky", "green aurora") else 1.0
    colour = np.array(GROUNDS[scene.ground]) * light * (0.8 + 0.3 * depth[..., None])
    if scene.ground == "calm sea":  # the sky, mirrored, and waves
        mirror = picture[(np.clip(2 * horizon - y, 0, horizon - 0.01) * FINE).astype(int), (x * FINE).astype(int)]
        waves = 0.06 * np.sin(2 * np.pi * (9 * depth**0.6 + 0.7 * np.sin(2 * np.pi * (x + rng.uniform())))) * depth
        colour = 0.55 * colour + 0.45 * mirror + waves[..., None]
    if scene.ground == "road":
        middle = 0.5 + rng.uniform(-0.15, 0.15) * (1 - depth)
        road, line = abs(x - middle) < 0.04 + 0.30 * depth, abs(x - middle) < 0.006 + 0.02 * depth
        colour[road] = np.array((0.32, 0.32, 0.34)) * light
        colour[line & (np.sin(30 * np.sqrt(depth)) > 0)] = np.array((0.95, 0.93, 0.80)) * light
    picture[mask] = colour[mask]


def _things(
    picture: np.ndarray, scene: Scene, x: np.ndarray, y: np.ndarray, horizon: float, rng: np.random.Generator
) -> None:
    if scene.thing == "nothing else":
        return
    light = 0.5 if scene.sky in ("night sky", "green aurora") else 1.0
    for _ in range(1 if scene.thing.startswith("a ") else int(rng.integers(2, 5))):
        foot, cx, size = rng.uniform(horizon + 0.06, 0.95), rng.uniform(0.08, 0.92), 1.0
        size = 0.10 + 0.45 * (foot - horizon)
        u, v = (x - cx) / size, (foot - y) / size  # v = 0 at the foot, 1 at the top
        for colour, mask in _shape(scene.thing, u, v):
            picture[mask] = np.array(colour) * light


def _shape(thing: str, u: np.ndarray, v: np.ndarray) -> list[tuple[tuple[float, float, float], np.ndarray]]:
    if thing == "pine trees":
        cone = (v > 0.2) & (v < 1.3) & (abs(u) < 0.35 * (1 - ((v - 0.2) % 0.4) * 1.2) * (1.5 - v))
        return [((0.35, 0.22, 0.12), (abs(u) < 0.06) & (v > 0) & (v < 0.3)), ((0.08, 0.32, 0.16), cone)]
    if thing == "round trees":
        trunk = (abs(u) < 0.07) & (v > 0) & (v < 0.6)
        return [((0.42, 0.28, 0.15), trunk), ((0.25, 0.58, 0.16), np.hypot(u, v - 0.85) < 0.38)]
    if thing == "a house":
        roof = (v >= 0.55) & (v < 1) & (abs(u) < 0.6 * (1 - v) / 0.45)
        parts = [((0.93, 0.88, 0.76), (abs(u) < 0.45) & (v > 0) & (v < 0.55)), ((0.75, 0.20, 0.15), roof)]
        window = (abs(abs(u) - 0.24) < 0.09) & (v > 0.22) & (v < 0.42)
        return [*parts, ((0.98, 0.85, 0.35), window), ((0.35, 0.20, 0.12), (abs(u) < 0.08) & (v > 0) & (v < 0.32))]
    if thing == "a sail boat":
        hull = (v > 0) & (v < 0.2) & (abs(u) < 0.3 + v)
        sail = (v > 0.25) & (v < 1.2) & (u > 0.03) & (u < 0.55 * (1.2 - v))
        second = (v > 0.25) & (v < 1.0) & (u < -0.03) & (u > -0.35 * (1.0 - v))
        return [((0.50, 0.26, 0.12), hull), ((0.97, 0.97, 0.95), sail), ((0.90, 0.35, 0.30), second)]
    arm = (abs(abs(u) - 0.28) < 0.06) & (v > 0.4) & (v < 0.8) | (abs(v - 0.42) < 0.06) & (abs(u) < 0.3)
    return [((0.15, 0.45, 0.20), ((abs(u) < 0.09) & (v > 0) & (v < 1)) | arm)]
