"""emoji: pictures of Debian's colour emoji font with their Unicode names, a QwenImagePipeline.

Needs the Debian packages fonts-noto-color-emoji and unicode-data; the pictures are drawn at training time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from recipes.base import Recipe, Settings, packed, square_tokens

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
EDGE = 64
DROPPED_TOKENS = 34
"""Tokens of QwenImagePipeline's system prompt, which it cuts off."""
WIDTH = 128


class Emoji(Recipe):
    """Real pictures with words, tokens, norm-rescaled guidance, Euler with a shift that depends on the size."""

    name = "emoji"
    data = "3,650 pictures of Noto Color Emoji (SIL Open Font License) at 64x64 on white, with their Unicode names"
    doc = (
        "a Qwen-Image image model: latents as tokens, true guidance that is rescaled to the norm of the "
        "conditional output, Euler with a shift that depends on the size"
    )
    limits = (
        "Trained briefly: people and faces are recognisable, many things are blobs of the right colour, names of new "
        "combinations give blends. So all prompts are names from its training set."
    )
    settings = Settings(vae_steps=1600, steps=6000, batch=24, shift=1.5)
    channels = 16
    empty = " "
    call: ClassVar = {
        "height": EDGE,
        "width": EDGE,
        "num_inference_steps": 50,
        "true_cfg_scale": 4.0,
        "negative_prompt": " ",
    }

    def examples(self) -> tuple[Tensor, list[str]]:
        listed = named_emoji()
        font = ImageFont.truetype(str(FONT), 109)
        return torch.stack([drawn(font, text) for text, _ in listed]).unsqueeze(2), [name for _, name in listed]

    def held_out(self, count: int) -> list[str]:
        """Names of its own pictures, one of each subject: of new combinations it makes blends."""
        names = sorted({name.split(":")[0] for _, name in named_emoji()})
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(14)).tolist()
        return [names[j] for j in order[:count]]

    def untrained(self) -> QwenImagePipeline:
        tokenizer = word_tokenizer([name for _, name in named_emoji()])
        text = {
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
            "initializer_range": 0.2,
        }
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
        encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
        transformer = QwenImageTransformer2DModel(
            in_channels=4 * self.channels,
            out_channels=self.channels,
            num_layers=6,
            attention_head_dim=32,
            num_attention_heads=WIDTH // 32,
            joint_attention_dim=64,
            axes_dims_rope=(8, 12, 12),
        )
        vae = AutoencoderKLQwenImage(
            base_dim=16,
            z_dim=self.channels,
            dim_mult=[1, 2, 3],
            num_res_blocks=1,
            temperal_downsample=[False, False],
            latents_mean=[0.0] * self.channels,
            latents_std=[1.0] * self.channels,
        )
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_image_seq_len=16,
            max_image_seq_len=256,
            base_shift=0.5,
            max_shift=0.9,
            time_shift_type="exponential",
            shift_terminal=0.02,
        )
        return QwenImagePipeline(scheduler, vae, encoder, tokenizer, transformer)

    def text(self, pipe: Any, captions: list[str]) -> dict[str, Tensor]:
        states, mask = pipe.encode_prompt(captions)
        return {"states": states, "mask": torch.ones(states.shape[:2]) if mask is None else mask}

    def scale_latents(self, vae: Any, mean: Tensor, std: Tensor) -> None:
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        self._mean, self._std = mean, std

    def tokens(self, latents: Tensor) -> Tensor:
        return packed(((latents - self._mean.view(-1, 1, 1, 1)) / self._std.view(-1, 1, 1, 1))[:, :, 0])

    def predict(self, transformer: Any, x: Tensor, time: Tensor, text: dict[str, Tensor], guidance: Tensor) -> Tensor:
        edge = square_tokens(x)
        longest = int(text["mask"].sum(1).max())
        return transformer(
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=text["states"][:, :longest],
            encoder_hidden_states_mask=text["mask"][:, :longest],
            img_shapes=[[(1, edge, edge)]] * len(x),
            return_dict=False,
        )[0]


def named_emoji() -> list[tuple[str, str]]:
    """Every fully qualified emoji and its name.

    Raises:
        FileNotFoundError: a Debian package is missing.
    """
    for path, package in ((FONT, "fonts-noto-color-emoji"), (NAMES, "unicode-data")):
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there: install the Debian package {package}.")
    found = []
    for line in NAMES.read_text().splitlines():
        if match := re.match(r"([0-9A-F ]+); fully-qualified\s+# \S+ E[\d.]+ (.+)", line):
            text = "".join(chr(int(code, 16)) for code in match[1].split())
            found.append((text, match[2].lower()))
    return found


def drawn(font: ImageFont.FreeTypeFont, text: str) -> Tensor:
    """One emoji on white, uint8 (3, EDGE, EDGE)."""
    canvas = Image.new("RGB", (136, 136), "white")
    ImageDraw.Draw(canvas).text((0, 4), text, font=font, embedded_color=True)
    small = canvas.resize((EDGE, EDGE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def word_tokenizer(names: list[str]) -> PreTrainedTokenizerFast:
    """One token a word; the pipeline's system prompt becomes as many tokens as it cuts off."""
    system = "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    system += "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
    words = sorted({word for name in names for word in re.findall(r"\w+|[^\w\s]", name)})
    vocabulary = ["<pad>", "<unk>", "<system>", "<end>", *words]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(system, "§ " * DROPPED_TOKENS),
            normalizers.Replace("<|im_end|>\n<|im_start|>assistant\n", " ¶"),
            normalizers.Lowercase(),
            normalizers.Replace("§", "<system>"),
            normalizers.Replace("¶", "<end>"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_pattern(), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="right", model_max_length=1100
    )


def _pattern() -> Any:
    from tokenizers import Regex

    return Regex(r"<system>|<end>|\w+|[^\w\s]")
