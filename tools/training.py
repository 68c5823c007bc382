"""What every training here needs: an optimiser with a moving average that resumes where it was interrupted."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm


class Run:
    """A stage's weights, optimiser, moving average and losses, saved together as safetensors (never pickle)."""

    def __init__(self, modules: dict[str, torch.nn.Module], folder: Path, lr: float, steps: int, ema: float) -> None:
        self.folder, self.steps, self.lr, self.ema_decay = folder, steps, lr, ema
        self.params = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
        self.optimiser = torch.optim.AdamW(self.params.values(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-2)
        self.average = {n: p.detach().clone() for n, p in self.params.items()}
        self.losses: list[float] = []
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.safetensors").exists():
            self._load()

    @property
    def done(self) -> int:
        return len(self.losses)

    def iterations(self, title: str) -> Iterator[int]:
        """The iterations still to do, with a progress bar, a checkpoint every two minutes and one at the end."""
        bar = tqdm(range(self.done, self.steps), initial=self.done, total=self.steps, desc=title, dynamic_ncols=True)
        saved = started = time.monotonic()
        before = self.seconds
        for i in bar:
            yield i
            self.seconds = before + time.monotonic() - started
            if i % 20 == 0:
                recent = self.losses[-100:]
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
            if time.monotonic() - saved > 120:
                self.save()
                saved = time.monotonic()
        self.save()

    def update(self, loss: torch.Tensor) -> None:
        """One optimiser step: linear warm-up, cosine decay, gradients clipped to norm 1."""
        i = self.done
        rate = self.lr * min(1.0, (i + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * i / self.steps)) + 1e-6
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        self.optimiser.step()
        decay = min(self.ema_decay, (i + 1) / (i + 10))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.params.values()], 1 - decay)
        self.losses.append(round(loss.item(), 6))

    def use_average(self) -> None:
        with torch.no_grad():
            for name, parameter in self.params.items():
                parameter.copy_(self.average[name])

    def save(self) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.params.items():
            tensors |= {f"p.{name}": parameter.detach(), f"e.{name}": self.average[name]}
            if state := self.optimiser.state.get(parameter):  # a parameter that nothing uses has none
                tensors |= {f"m.{name}": state["exp_avg"], f"v.{name}": state["exp_avg_sq"]}
        tensors = {n: t.contiguous().clone() for n, t in tensors.items()}
        about = {"losses": json.dumps(self.losses), "seconds": str(self.seconds)}
        temporary = self.folder / "state.tmp"
        save_file(tensors, temporary, metadata=about)
        os.replace(temporary, self.folder / "state.safetensors")

    def _load(self) -> None:

        path = self.folder / "state.safetensors"
        with safe_open(path, "pt") as file:
            about = file.metadata()
        self.losses, self.seconds = json.loads(about["losses"]), float(about["seconds"])
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.params.items():
                parameter.copy_(tensors[f"p.{name}"])
                self.average[name].copy_(tensors[f"e.{name}"])
                if f"m.{name}" in tensors:
                    self.optimiser.state[parameter] = {
                        "step": torch.tensor(float(self.done)),
                        "exp_avg": tensors[f"m.{name}"].clone(),
                        "exp_avg_sq": tensors[f"v.{name}"].clone(),
                    }


def curve(losses: list[float], points: int = 50) -> list[float]:
    """The losses as means over at most 50 equal stretches."""
    width = max(1, math.ceil(len(losses) / points))
    return [round(sum(part) / len(part), 5) for j in range(0, len(losses), width) if (part := losses[j : j + width])]
