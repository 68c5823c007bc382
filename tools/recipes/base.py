"""What a model of the zoo is made of, and the two trainings that every one of them goes through."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from training import Run
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

DROPPED = 0.1
"""Share of captions left out in training, so that guidance works (Ho and Salimans 2022, arXiv 2207.12598)."""


@dataclass(frozen=True)
class Settings:
    """How long and how fast a model is trained.

    Args:
        vae_steps: iterations of the VAE.
        steps: iterations of the transformer.
        batch: examples an iteration (the VAE: half of them).
        lr: peak learning rate of the transformer.
        shift: of the noise levels seen in training (Esser et al. 2024, arXiv 2403.03206, section 5.3.2).
        distil_steps: iterations of the distillation of guidance; 0: none.
    """

    vae_steps: int = 1500
    steps: int = 5000
    batch: int = 24
    lr: float = 1.5e-3
    shift: float = 2.0
    distil_steps: int = 0


class Recipe(ABC):
    """One model of the zoo: its data, its untrained pipeline, and what its transformer is asked for."""

    name: str
    data: str
    """What it was trained on."""
    doc: str
    """What kind of model it stands for."""
    limits: str
    """What it cannot do."""
    settings: Settings
    call: ClassVar[dict[str, Any]]
    """Arguments of a pipeline call: size, steps, guidance. Written to call.json."""
    channels: int
    """Channels of the latent."""

    @abstractmethod
    def examples(self) -> tuple[Tensor, list[str]]:
        """The training set: uint8 (N, 3, height, width) or (N, 3, frames, height, width), and a caption each."""

    @abstractmethod
    def held_out(self, count: int) -> list[str]:
        """Captions for evaluation; where the data allow it, of combinations that no example shows."""

    @abstractmethod
    def untrained(self) -> Any:
        """The diffusers pipeline with random weights; the text encoder stays as it is."""

    @abstractmethod
    def text(self, pipe: Any, captions: list[str]) -> dict[str, Tensor]:
        """What the transformer is told of the captions, one row each; the first of them may be the empty one."""

    @abstractmethod
    def scale_latents(self, vae: Any, mean: Tensor, std: Tensor) -> None:
        """Tell the VAE its latents' mean and spread a channel, so that the transformer sees about unit variance."""

    @abstractmethod
    def tokens(self, latents: Tensor) -> Tensor:
        """The VAE's latents, scaled, as the transformer takes them."""

    @abstractmethod
    def predict(self, transformer: Any, x: Tensor, time: Tensor, text: dict[str, Tensor], guidance: Tensor) -> Tensor:
        """The transformer's output at noisy tokens x, as the pipeline calls it."""

    empty = ""
    """The caption that stands for none."""

    def loss(self, predict: Any, x0: Tensor, g: torch.Generator) -> Tensor:
        """Mean square error at random noise levels; `predict(x, time)` is the transformer with its texts.

        Here of rectified flow, whose target is n - x_0.
        """
        x, sigma, noise = self.noised(x0, g)
        return (predict(x, sigma).float() - (noise - x0)).square().mean()

    def noised(self, x0: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """X = (1 - sigma) x_0 + sigma n, sigma in (0, 1), logit-normal and shifted, one a sample, and n."""
        u = torch.sigmoid(torch.randn(len(x0), generator=g))
        sigma = (self.settings.shift * u / (1 + (self.settings.shift - 1) * u)).to(x0.device)
        s = sigma.view(-1, *[1] * (x0.ndim - 1))
        noise = torch.randn(x0.shape, generator=g).to(x0.device)
        return (1 - s) * x0 + s * noise, sigma, noise

    @cached_property
    def training_set(self) -> tuple[Tensor, list[str]]:
        """`examples`, made once."""
        return self.examples()


class Drawn(Protocol):
    """A scene in words, of which pictures are drawn; one phrase each, joined by commas."""

    @property
    def caption(self) -> str:
        """The words."""


class DrawnRecipe(Recipe):
    """A model of drawn scenes. A tenth of all captions is kept for evaluation."""

    count: int
    """Examples of the training set."""

    @abstractmethod
    def scene(self, rng: random.Random) -> Drawn:
        """A scene drawn evenly, phrase by phrase."""

    @abstractmethod
    def drawn(self, scene: Any, seed: int) -> np.ndarray:
        """Its picture or clip, with what its words leave open drawn from the seed: uint8 as `examples`."""

    def examples(self) -> tuple[Tensor, list[str]]:
        rng = random.Random(self.name)
        scenes: list[Drawn] = []
        while len(scenes) < self.count:
            if not kept(scene := self.scene(rng)):
                scenes.append(scene)
        pictures = np.stack([self.drawn(scene, j) for j, scene in enumerate(scenes)])
        return torch.from_numpy(pictures), [scene.caption for scene in scenes]

    def held_out(self, count: int) -> list[str]:
        rng = random.Random("evaluation")
        found: list[str] = []
        while len(found) < count:
            if kept(scene := self.scene(rng)) and scene.caption not in found:
                found.append(scene.caption)
        return found


def kept(scene: Drawn) -> bool:
    """Whether a scene is kept for evaluation."""
    return random.Random(scene.caption).random() < 0.1


def frozen_t5(vocabulary: int) -> T5EncoderModel:
    """A small text encoder with random weights."""
    return T5EncoderModel(
        T5Config(vocab_size=vocabulary, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
    )


def train_vae(recipe: Recipe, vae: Any, work: Path, device: str, seed: int) -> Run:
    """Reconstruction (L1 and L2) and a small KL term, on crops of half the size; whole pictures towards the end."""
    pictures, settings = recipe.training_set[0], recipe.settings
    run = Run({"vae": vae}, work / "vae", lr=3e-3, steps=settings.vae_steps, ema=0.995)
    for i in run.iterations("vae"):
        g = generator(seed, "vae", i)
        pick = torch.randint(0, len(pictures), (settings.batch // 2,), generator=g)
        x = as_pixels(pictures[pick])
        edge = x.shape[-1] if i > 0.9 * settings.vae_steps else x.shape[-1] // 2
        top, left = (int(v) for v in torch.randint(0, x.shape[-1] - edge + 1, (2,), generator=g))
        x = x[..., top : top + edge, left : left + edge].to(device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=g).to(device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - x
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        run.update(error.abs().mean() + 2 * error.square().mean() + 1e-4 * kl)
    run.use_average()
    return run


@torch.no_grad()
def encoded(recipe: Recipe, vae: Any, device: str) -> Tensor:
    """The training set as the transformer takes it, float16; the VAE learns its latents' scale on the way."""
    pictures = recipe.training_set[0]
    parts = [vae.encode(as_pixels(part).to(device)).latent_dist.mean.cpu() for part in pictures.split(32)]
    latents = torch.cat(parts)
    axes = [d for d in range(latents.ndim) if d != 1]
    recipe.scale_latents(vae, latents.mean(axes), latents.std(axes))
    return torch.cat([recipe.tokens(part) for part in latents.split(256)]).half()


def train_transformer(recipe: Recipe, pipe: Any, latents: Tensor, work: Path, device: str, seed: int) -> Run:
    """The transformer, with captions dropped at random."""
    transformer, settings = pipe.transformer, recipe.settings
    texts = caption_table(recipe, pipe)
    run = Run({"transformer": transformer}, work / "transformer", settings.lr, settings.steps, ema=0.999)
    for i in run.iterations("transformer"):
        g = generator(seed, "transformer", i)
        pick = torch.randint(0, len(latents), (settings.batch,), generator=g)
        dropped = torch.rand(len(pick), generator=g) < DROPPED
        rows = torch.where(dropped, 0, pick + 1)
        text = {name: table[rows].to(device) for name, table in texts.items()}
        guidance = torch.ones(len(pick), device=device)
        with torch.autocast(device, dtype=torch.bfloat16):
            run.update(
                recipe.loss(
                    lambda x, time, text=text, guidance=guidance: recipe.predict(transformer, x, time, text, guidance),
                    latents[pick].float().to(device),
                    g,
                )
            )
    run.use_average()
    return run


def distil_guidance(
    recipe: Recipe, teacher: Any, pipe: Any, latents: Tensor, work: Path, device: str, seed: int
) -> Run:
    """A student that gives in one call what its teacher gives under guidance (Meng et al. 2023, arXiv 2210.03142).

    Its target at guidance w, drawn from 1 to 6, is u + w (c - u), with the teacher's outputs c and u with and without
    the caption.
    """
    student, settings = pipe.transformer, recipe.settings
    texts = caption_table(recipe, pipe)
    run = Run({"transformer": student}, work / "student", settings.lr / 2, settings.distil_steps, ema=0.998)
    for i in run.iterations("student"):
        g = generator(seed, "student", i)
        pick = torch.randint(0, len(latents), (settings.batch,), generator=g)
        w = (1 + 5 * torch.rand(len(pick), generator=g)).to(device)
        told, untold = ({n: t[r].to(device) for n, t in texts.items()} for r in (pick + 1, 0 * pick))
        x, sigma, _ = recipe.noised(latents[pick].float().to(device), g)
        with torch.autocast(device, dtype=torch.bfloat16):
            with torch.no_grad():
                c, u = (recipe.predict(teacher, x, sigma, t, torch.ones_like(w)).float() for t in (told, untold))
            got = recipe.predict(student, x, sigma, told, w).float()
        run.update((got - (u + w.view(-1, *[1] * (x.ndim - 1)) * (c - u))).square().mean())
    run.use_average()
    return run


@torch.no_grad()
def caption_table(recipe: Recipe, pipe: Any) -> dict[str, Tensor]:
    """What the transformer is told of every example; row 0: of none."""
    return recipe.text(pipe, [recipe.empty, *recipe.training_set[1]])


def as_pixels(pictures: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def generator(seed: int, stage: str, i: int) -> torch.Generator:
    """The random numbers of iteration i of a stage: a resumed training goes on as if it had not stopped."""
    return torch.Generator().manual_seed((seed * 101 + sum(stage.encode())) * 1_000_003 + i)


def phrase_tokenizer(phrases: list[str], length: int, end: str = "</s>") -> PreTrainedTokenizerFast:
    """One token a phrase between commas: with a frozen random encoder, what belongs together must be one token."""
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<pad>", end, "<unk>", *phrases])}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(", ", "removed")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token=end, unk_token="<unk>", model_max_length=length
    )


def packed(latents: Tensor) -> Tensor:
    """(N, C, H, W) to tokens of 2x2 positions (N, H W / 4, 4 C), as FluxPipeline and QwenImagePipeline pack them."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def square_tokens(tokens: Tensor) -> int:
    """Edge of a square picture in tokens."""
    return math.isqrt(tokens.shape[1])
