"""CLIP score: does a clip show what its prompt says? A metric without a reference (Hessel et al., arXiv 2104.08718).

100 max(cos(image, text), 0), the mean over a few frames, of CLIP ViT-B/32 as published. Nothing is fetched: it is used
where transformers' cache on this machine has it.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

CLIP = "openai/clip-vit-base-patch32"
FRAMES = 8
"""Frames of a clip that are looked at, evenly spread."""


class ClipScore:
    """The score of frames and a prompt.

    Args:
        model, processor: transformers' `CLIPModel` and `CLIPProcessor`.
        source: what the report calls them.
    """

    def __init__(self, model: Any, processor: Any, source: str = CLIP) -> None:
        self.model, self.processor, self.source = model.eval(), processor, source

    @torch.no_grad()
    def __call__(self, frames: np.ndarray, prompt: str) -> float:
        """Mean score of frames [T, H, W, 3] uint8, 0 to 100."""
        chosen = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)
        given = self.processor(
            text=[prompt], images=list(frames[chosen]), return_tensors="pt", padding=True, truncation=True
        )
        found = self.model(**given.to(self.model.device))
        images, text = (torch.nn.functional.normalize(x, dim=-1) for x in (found.image_embeds, found.text_embeds))
        return float(100 * (images @ text.T).clamp(min=0).mean())


def find_clip_score(name: str | os.PathLike[str] = CLIP) -> tuple[ClipScore | None, str]:
    """The score, if its weights are on this machine, and what they are; else None and why."""
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        return None, f"no CLIP score: transformers is not installed ({error})"
    try:
        model = CLIPModel.from_pretrained(name, local_files_only=True)
        processor = CLIPProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return None, f"no CLIP score: {name} is not in transformers' cache on this machine"
    return ClipScore(model, processor, os.fspath(name)), os.fspath(name)
