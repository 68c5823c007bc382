"""The models of the zoo as a benchmark sees them: loaded, sampled in batches, compared with their own uncached runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from stepcache.bench.meter import Meter
from stepcache.bench.peers import Entered
from stepcache.core.plan import Plan
from stepcache.core.strategy import Policy
from stepcache.hosts.diffusers import accelerate
from stepcache.measure.metrics import psnr
from stepcache.planning.calibration import Calibration, Recorder

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"tiny-wan": ROOT / "assets" / "tiny-wan"} | {
    name: ROOT / "assets" / "zoo" / name for name in ("emoji", "landscapes", "patterns")
}
FIRST_SEED = {"development": 7000, "calibration": 5000, "evaluation": 9000}
"""Seeds of the three kinds of prompts; the n-th prompt of a kind has the n-th seed from here."""
SAMPLERS = {
    "euler": lambda config: diffusers.FlowMatchEulerDiscreteScheduler(shift=config.flow_shift),
    "dpm++": lambda config: diffusers.DPMSolverMultistepScheduler.from_config(config),
}


@dataclass(frozen=True)
class Setting:
    """How a model is run: steps, guidance scale and sampler (`None`: the model's own), and the precision of outputs."""

    steps: int = 50
    guidance: float | None = None
    sampler: str | None = None
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Such as "50 steps, guidance 7"."""
        parts = [f"{self.steps} steps"]
        parts += [f"guidance {self.guidance:g}"] if self.guidance is not None else []
        parts += [self.sampler] if self.sampler else []
        parts += [self.dtype] if self.dtype != "float32" else []
        return ", ".join(parts)


@dataclass
class Subject:
    """A model of the zoo.

    Raises:
        FileNotFoundError: its weights are missing; the sentence says how they are made.
    """

    name: str
    pipe: Any = field(init=False)

    def __post_init__(self) -> None:
        folder = FOLDERS[self.name]
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no model; `python tools/train_zoo.py {self.name} --work outputs/{self.name}` makes it."
            )
        self.pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder))
        self.pipe.set_progress_bar_config(disable=True)
        self._sampler = self.pipe.scheduler

    @cached_property
    def call(self) -> dict[str, Any]:
        """Arguments of a pipeline call."""
        return dict(json.loads((FOLDERS[self.name] / "call.json").read_text()))

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        """Prompts by what they are for: development, calibration, evaluation."""
        return dict(json.loads((FOLDERS[self.name] / "prompts.json").read_text()))

    @torch.no_grad()
    def sample(self, texts: list[str], seeds: list[int], setting: Setting) -> np.ndarray:
        """All clips in one batch: float32 (N, frames, height, width, 3) in [0, 1]; of images one frame."""
        scale = "true_cfg_scale" if "true_cfg_scale" in self.call else "guidance_scale"
        call = {**self.call, "num_inference_steps": setting.steps}
        if setting.guidance is not None:
            call[scale] = setting.guidance
        if "negative_prompt" in call:
            call["negative_prompt"] = [call["negative_prompt"]] * len(texts)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        found = self.pipe(prompt=texts, generator=generators, output_type="np", **call)
        clips = np.asarray(found.frames if hasattr(found, "frames") else found.images, np.float32).clip(0, 1)
        return clips if clips.ndim == 5 else clips[:, None]

    @contextmanager
    def as_set(self, setting: Setting) -> Iterator[None]:
        """The pipeline with the setting's sampler and precision."""
        own, make = self._sampler, SAMPLERS.get(setting.sampler or "")
        self.pipe.scheduler = make(own.config) if make else own
        parts = [m for m in self.pipe.components.values() if isinstance(m, torch.nn.Module)]
        weights = [(t, t.data) for m in parts for t in (*m.parameters(), *m.buffers())]
        if setting.dtype != "float32":
            self.pipe.to(getattr(torch, setting.dtype))
        try:
            yield
        finally:
            self.pipe.scheduler = own
            for tensor, data in weights:  # converted back they would be rounded
                tensor.data = data


@dataclass(frozen=True)
class Peer:
    """Another project's cache, entered through its own API."""

    enter: Entered


Method = Policy | Plan | Peer


@dataclass
class Series:
    """Prompts of one kind under one setting, and the uncached clips of them."""

    subject: Subject
    setting: Setting
    kind: str
    count: int

    def __post_init__(self) -> None:
        known = self.subject.prompts[self.kind]
        if self.count > len(known):
            raise ValueError(f"{self.subject.name} has {len(known)} {self.kind} prompts; {self.count} were asked for.")
        self.texts, first = known[: self.count], FIRST_SEED[self.kind]
        self.seeds = [first + i for i in range(self.count)]

    @cached_property
    def truth(self) -> np.ndarray:
        """The uncached clips."""
        with self.subject.as_set(self.setting):
            return self.subject.sample(self.texts, self.seeds, self.setting)

    def clips(self, method: Method, alone: bool = False) -> tuple[np.ndarray, list[int]]:
        """The clips under a method, in one batch or one by one, and how many steps each computed."""
        size = 1 if alone else self.count
        clips, counts = [], []
        with self.subject.as_set(self.setting), self._entered(method) as computed:
            for i in range(0, self.count, size):
                clips.append(self.subject.sample(self.texts[i : i + size], self.seeds[i : i + size], self.setting))
                counts += [computed()] * len(clips[-1])
        return np.concatenate(clips), counts

    @contextmanager
    def _entered(self, method: Method) -> Iterator[Callable[[], int]]:
        """A method on the pipeline; what is yielded says how many steps the run before computed."""
        pipe = self.subject.pipe
        if not isinstance(method, Peer):
            with accelerate(pipe, method) as run:
                yield lambda: len(run.summary().computed)
            return
        meter, calls = Meter(pipe), [0]
        hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

        def computed() -> int:  # all blocks of a computed step run, and the first of the others
            calls_a_step, ran = calls[0] // self.setting.steps, meter.executed[0] - calls[0]
            calls[0] = meter.executed[0] = 0
            return round(ran / (len(meter.blocks) - 1) / calls_a_step)

        try:
            with meter.watching(), method.enter(pipe, self.setting.steps):
                yield computed
        finally:
            hook.remove()

    def score(self, method: Method, alone: bool = False) -> list[dict[str, float]]:
        """Computed steps and PSNR (mean over frames, dB) of every prompt."""
        clips, counts = self.clips(method, alone)
        return self.compared(clips, counts)

    def compared(self, clips: np.ndarray, counts: list[int]) -> list[dict[str, float]]:
        """A row a prompt."""
        pairs = zip(self.truth, clips, counts, strict=True)
        return [{"computed": n, "psnr": round(float(psnr(a, b).mean()), 4)} for a, b, n in pairs]

    def on_grid(self, computed: tuple[int, ...] | int) -> list[dict[str, float]]:
        """The sampler alone: on the noise levels of these steps of the run, or on so many of its own.

        Nothing for samplers whose steps are a fixed number of timesteps apart (DDIM): they have no such grid.
        """
        if isinstance(computed, int):
            setting = Setting(computed, self.setting.guidance, self.setting.sampler, self.setting.dtype)
            with self.subject.as_set(setting):
                clips = self.subject.sample(self.texts, self.seeds, setting)
            return self.compared(clips, [computed] * self.count)
        pipe, setting = self.subject.pipe, self.setting
        if not hasattr(pipe.scheduler, "sigmas"):
            return []
        with self.subject.as_set(setting):
            before = pipe.scheduler
            pipe.scheduler = _on_grid(before, computed, setting.steps)
            try:
                clips = self.subject.sample(self.texts, self.seeds, Setting(len(computed), setting.guidance))
            finally:
                pipe.scheduler = before
        return self.compared(clips, [len(computed)] * self.count)

    def calibration(self) -> Calibration:
        """What the uncached runs of these prompts teach."""
        recorder = Recorder()
        with self.subject.as_set(self.setting), accelerate(self.subject.pipe, recorder):
            self.truth_from(self.subject.sample(self.texts, self.seeds, self.setting))
        return recorder.finish(*zip(self.texts, self.seeds, strict=True))

    def truth_from(self, clips: np.ndarray) -> None:
        """Clips of an uncached run that was made for another reason."""
        self.__dict__.setdefault("truth", clips)


def _on_grid(scheduler: Any, computed: tuple[int, ...], steps: int) -> Any:
    """A sampler on the noise levels of the computed steps, instead of as many levels of its own."""
    sampler = copy.deepcopy(scheduler)
    original = sampler.set_timesteps

    def set_timesteps(
        num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None
    ) -> None:
        if sigmas is None:
            original(steps, device=device)
        else:  # as the pipelines of FLUX and Qwen-Image space them
            original(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu, device=device)
        sampler.sigmas = sampler.sigmas[[*computed, steps]]
        sampler.timesteps = sampler.timesteps[list(computed)]
        sampler.num_inference_steps = len(computed)

    sampler.set_timesteps = set_timesteps
    return sampler
