"""patterns: clips of moving two-colour patterns; a CogVideoXPipeline: v-prediction, batched guidance, DDIM."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor

from recipes.base import DrawnRecipe, Settings, frozen_t5, phrase_tokenizer

EDGE, FRAMES = 48, 9
FINE = 2 * EDGE  # drawn at, and averaged
SLOTS = 5
"""Text tokens: four phrases and an end."""

COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "orange": (0.98, 0.60, 0.12),
    "yellow": (0.98, 0.92, 0.30),
    "green": (0.15, 0.65, 0.25),
    "cyan": (0.30, 0.85, 0.90),
    "blue": (0.15, 0.25, 0.85),
    "purple": (0.50, 0.15, 0.65),
    "white": (0.97, 0.97, 0.97),
    "black": (0.06, 0.06, 0.08),
}
PATTERNS = ["stripes", "checks", "rings", "spiral", "dots", "waves", "rays", "plaid"]
MOTIONS = ["drifting left", "drifting right", "drifting up", "drifting down", "turning left", "turning right"]
MOTIONS += ["growing", "shrinking", "swaying", "standing still"]


@dataclass(frozen=True)
class Scene:
    """One phrase each."""

    pattern: str
    colour: str
    ground: str
    motion: str

    @property
    def caption(self) -> str:
        """Such as `rings, red, on blue, growing`."""
        return ", ".join((self.pattern, self.colour, f"on {self.ground}", self.motion))


class Patterns(DrawnRecipe):
    """v-prediction on DDIM's noise levels; both branches of guidance in one call."""

    name = "patterns"
    data = "8,000 drawn clips of 9 frames at 48x48: two-colour patterns that drift, turn, grow or sway"
    doc = "a CogVideoX video model: v-prediction on DDIM's noise levels, both branches of guidance in one call"
    limits = "Trained briefly: colours follow the caption, patterns are blotches, and motion was not measured."
    settings = Settings(vae_steps=2000, steps=6000, batch=16)
    channels = 16
    count = 8000
    call: ClassVar = {
        "height": EDGE,
        "width": EDGE,
        "num_frames": FRAMES,
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
        "max_sequence_length": SLOTS,
    }

    def scene(self, rng: random.Random) -> Scene:
        return random_scene(rng)

    def drawn(self, scene: Scene, seed: int) -> np.ndarray:
        return drawn(scene, seed)

    def untrained(self) -> CogVideoXPipeline:
        phrases = [*PATTERNS, *COLOURS, *(f"on {colour}" for colour in COLOURS), *MOTIONS]
        tokenizer = phrase_tokenizer(phrases, SLOTS)
        t5 = frozen_t5(len(tokenizer))
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=self.channels,
            out_channels=self.channels,
            time_embed_dim=128,
            text_embed_dim=64,
            num_layers=6,
            sample_width=EDGE // 4,
            sample_height=EDGE // 4,
            sample_frames=FRAMES,
            max_text_seq_length=SLOTS,
            spatial_interpolation_scale=1.0,
        )
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(16, 24, 32),
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3,
            latent_channels=self.channels,
            layers_per_block=1,
            norm_num_groups=8,
            scaling_factor=1.0,
            sample_height=EDGE,
            sample_width=EDGE,
        )
        scheduler = CogVideoXDDIMScheduler(  # CogVideoX's own noise levels
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            set_alpha_to_one=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
            clip_sample=False,
        )
        self._clean = scheduler.alphas_cumprod.float()
        return CogVideoXPipeline(tokenizer, t5, vae, transformer, scheduler)

    def text(self, pipe: Any, captions: list[str]) -> dict[str, Tensor]:
        states, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=SLOTS)
        return {"states": states}

    def scale_latents(self, vae: Any, mean: Tensor, std: Tensor) -> None:
        self._scale = 1 / float(std.square().mean().sqrt())
        vae.register_to_config(scaling_factor=self._scale)

    def tokens(self, latents: Tensor) -> Tensor:
        return (latents * self._scale).permute(0, 2, 1, 3, 4)

    def loss(self, predict: Any, x0: Tensor, g: torch.Generator) -> Tensor:
        """v-prediction (Salimans and Ho 2022, arXiv 2202.00512): v = sqrt(a) n - sqrt(1 - a) x_0, a drawn evenly."""
        time = torch.randint(0, len(self._clean), (len(x0),), generator=g)
        a = self._clean[time].to(x0.device).view(-1, 1, 1, 1, 1)
        noise = torch.randn(x0.shape, generator=g).to(x0.device)
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        return (predict(x, time.to(x0.device)).float() - (a.sqrt() * noise - (1 - a).sqrt() * x0)).square().mean()

    def predict(self, transformer: Any, x: Tensor, time: Tensor, text: dict[str, Tensor], guidance: Tensor) -> Tensor:
        return transformer(hidden_states=x, encoder_hidden_states=text["states"], timestep=time, return_dict=False)[0]


def random_scene(rng: random.Random) -> Scene:
    """A scene drawn evenly; pattern and ground are of two colours."""
    colour, ground = rng.sample(list(COLOURS), 2)
    return Scene(rng.choice(PATTERNS), colour, ground, rng.choice(MOTIONS))


def drawn(scene: Scene, seed: int) -> np.ndarray:
    """The clip, with what its words leave open drawn from the seed, uint8 (3, FRAMES, EDGE, EDGE)."""
    rng = np.random.default_rng(seed)
    scale, tilt, shift = rng.uniform(0.8, 1.25), rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3, 2)
    speed, fade = rng.uniform(0.75, 1.25), rng.uniform(0.0, 0.35)
    y, x = np.mgrid[0:FINE, 0:FINE] / FINE - 0.5
    time = np.linspace(0, 1, FRAMES)[:, None, None]
    u, v = _moved(scene.motion, x[None] - shift[0], y[None] - shift[1], speed * time)
    u, v = (np.cos(tilt) * u - np.sin(tilt) * v, np.sin(tilt) * u + np.cos(tilt) * v)
    share = _pattern(scene.pattern, u / scale, v / scale)[..., None]
    light = 1 - fade * np.hypot(x + 0.25, y + 0.25)[None, ..., None]  # a light from the top left
    clip = (np.array(COLOURS[scene.ground]) * (1 - share) + np.array(COLOURS[scene.colour]) * share) * light
    small = clip.reshape(FRAMES, EDGE, 2, EDGE, 2, 3).mean((2, 4)).clip(0, 1)
    return (small * 255).round().astype(np.uint8).transpose(3, 0, 1, 2)


def _moved(motion: str, x: np.ndarray, y: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in the pattern a pixel looks at a time in [0, 1]."""
    if motion.startswith("drifting"):
        dx, dy = {"left": (1, 0), "right": (-1, 0), "up": (0, 1), "down": (0, -1)}[motion.split()[1]]
        return x + 0.4 * dx * time, y + 0.4 * dy * time
    if motion.startswith("turning"):
        angle = (0.9 if motion.endswith("left") else -0.9) * time
        return x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    if motion in ("growing", "shrinking"):
        zoom = np.exp((-0.7 if motion == "growing" else 0.7) * time)
        return x * zoom, y * zoom
    sway = 0.12 * np.sin(2 * np.pi * time) if motion == "swaying" else 0 * time
    return x + sway, y + 0 * sway


def _pattern(pattern: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """1 where the pattern is, 0 on its ground."""
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    wave = {
        "stripes": lambda: np.sin(2 * np.pi * 4 * u),
        "checks": lambda: np.sin(2 * np.pi * 2.5 * u) * np.sin(2 * np.pi * 2.5 * v),
        "rings": lambda: np.sin(2 * np.pi * 4 * radius),
        "spiral": lambda: np.sin(2 * np.pi * 3 * radius + 2 * angle),
        "dots": lambda: np.cos(2 * np.pi * 3 * u) + np.cos(2 * np.pi * 3 * v) - 0.6,
        "waves": lambda: np.sin(2 * np.pi * (3.5 * v + 0.25 * np.sin(2 * np.pi * 2 * u))),
        "rays": lambda: np.sin(6 * angle),
        "plaid": lambda: np.maximum(np.sin(2 * np.pi * 2.5 * u), np.sin(2 * np.pi * 2.5 * v)) - 0.55,
    }[pattern]()
    return (0.5 + 3.0 * wave).clip(0, 1)
