"""A stand-in for HunyuanVideo-1.5's interface: what a drop-in touches, nothing else. Own code, for tests."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

STEPS = 50


@dataclass
class InferState:
    enable_cache: bool = False
    cache_type: str = "deepcache"
    enable_torch_compile: bool = False


class Block(torch.nn.Module):
    """Two streams, keywords only, and an index that must stay its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.img, self.txt = torch.nn.Linear(width, width), torch.nn.Linear(width, width)
        self.executions = 0

    def forward(self, img, txt, vec, block_idx):
        self.executions += 1
        assert block_idx == self.index
        return img + torch.tanh(self.img(img) + vec + txt.mean(1, keepdim=True)), txt + torch.tanh(self.txt(txt))


class Transformer(torch.nn.Module):
    def __init__(self, seed: int = 0, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inp, self.out = torch.nn.Linear(5, width), torch.nn.Linear(width, 2)
        self.double_blocks = torch.nn.ModuleList(Block(width) for _ in range(4))
        for i, block in enumerate(self.double_blocks):
            block.index = i

    def forward(self, hidden_states, timestep, text, *, return_dict=False):
        img = self.inp(hidden_states.flatten(2).transpose(1, 2))
        txt, vec = text, (timestep / 1000).view(-1, 1, 1)
        for index, block in enumerate(self.double_blocks):
            img, txt = block(img=img, txt=txt, vec=vec, block_idx=index)
        return self.out(img).transpose(1, 2).reshape(img.shape[0], 2, *hidden_states.shape[2:]), None


class Scheduler:
    """Euler's, as upstream's own: it finds its place in the run at the first step."""

    def __init__(self) -> None:
        self.config = {"shift": 5.0}
        self.timesteps = None

    def set_timesteps(self, steps):
        self.sigmas, self.step_index = torch.linspace(1, 0, steps + 1), None
        self.timesteps = 1000 * self.sigmas[:-1]

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        if self.step_index is None:
            self.step_index = int((self.timesteps == timestep).nonzero()[0])
        move = self.sigmas[self.step_index + 1] - self.sigmas[self.step_index]
        self.step_index += 1
        return (sample.float() + move * model_output.float(),)


class HunyuanVideo_1_5_Pipeline:
    transformer_seed = 0

    def __init__(self) -> None:
        self.transformer = Transformer(self.transformer_seed).eval()
        self.scheduler = Scheduler()
        self.guidance_scale = 6.0
        self.log = []

    @classmethod
    def create_pipeline(cls, pretrained_model_name_or_path, create_sr_pipeline=False):
        pipe = cls()
        if create_sr_pipeline:
            pipe.sr_pipeline = SuperResolution()
        return pipe

    @staticmethod
    def get_transformer_version(resolution, task, cfg_distilled, step_distilled, sparse):
        return f"{resolution}_{task}"

    def apply_infer_optimization(
        self, infer_state=None, enable_offloading=False, enable_group_offloading=False, overlap_group_offloading=True
    ):
        self.cache_helper = None
        if infer_state is not None and infer_state.enable_cache:
            if infer_state.cache_type not in ("deepcache", "teacache", "taylorcache"):
                raise ValueError(f"Unknown cache type: {infer_state.cache_type}.")
            self.log.append(f"own {infer_state.cache_type}")
        self.log.append(f"offload {enable_offloading} group {enable_group_offloading}")

    @torch.no_grad()
    def __call__(self, num_inference_steps=None, seed=0):
        steps = num_inference_steps or STEPS
        self.scheduler.set_timesteps(steps)
        latents = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        cond = torch.zeros(1, 3, 3, 4, 4)
        text = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(9))
        helper = getattr(self, "cache_helper", None)
        if helper is not None:
            helper.clear_states()
        for i, t in enumerate(self.scheduler.timesteps):
            if helper is not None:
                helper.cur_timestep = i
            both = torch.cat([torch.cat([latents, cond], 1)] * 2)
            uncond, prompt = self.transformer(both, t.repeat(2), text, return_dict=False)[0].chunk(2)
            v = uncond + self.guidance_scale * (prompt - uncond)
            latents = self.scheduler.step(v, t, latents, return_dict=False)[0]
        result = SimpleNamespace(videos=latents)
        if hasattr(self, "sr_pipeline"):
            result.sr_videos = self.sr_pipeline(num_inference_steps=8, seed=seed).videos
        return result


class SuperResolution(HunyuanVideo_1_5_Pipeline):
    """A pipeline of the same class with a transformer of the same class, as upstream's."""

    transformer_seed = 1


def write_record(pipe, out, path):
    """What the test reads: how often each block ran, and the result."""
    rank = os.environ.get("RANK", "0")
    count = lambda p: [b.executions for b in p.transformer.double_blocks]  # noqa: E731
    record = {
        "executions": count(pipe),
        "video": out.videos.flatten().tolist(),
        "log": pipe.log,
        "left": [n for n in vars(pipe.transformer) if n == "_compiled_call_impl"],
    }
    if hasattr(pipe, "sr_pipeline"):
        record |= {"sr_executions": count(pipe.sr_pipeline), "sr_video": out.sr_videos.flatten().tolist()}
    Path(f"{path}.rank{rank}.json").write_text(json.dumps(record))
