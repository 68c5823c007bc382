"""Stand-in for the `wan` package: pipelines whose `model` is called as Wan2.1 calls it."""

import types

import torch
import torch.distributed as dist
from torch import nn

TASKS = ["t2v-1.3B", "t2v-14B", "i2v-14B", "t2i-14B", "flf2v-14B", "vace-1.3B", "vace-14B"]


class Block(nn.Module):
    def __init__(self, dim, vace=False):
        super().__init__()
        self.mix, self.vace, self.executions = nn.Linear(dim, dim), vace, 0

    def forward(self, x, e, context, hints=None):
        self.executions += 1
        y = x + 0.3 * torch.tanh(self.mix(x) + e + context.mean())
        return y if hints is None else y + 0.01 * hints.mean()


class Model(nn.Module):
    def __init__(self, channels, vace):
        super().__init__()
        torch.manual_seed(3)
        dim = 16
        self.patch_embedding = nn.Linear(channels, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(4))
        self.head = nn.Linear(dim, 4)
        if vace:
            self.vace_blocks = nn.ModuleList(Block(dim) for _ in range(2))
            self.forward_vace = types.MethodType(lambda m, x, e, c: _vace(m, x, e, c), self)
        self.vace = vace

    def executions(self):
        return [b.executions for b in [*self.blocks, *(self.vace_blocks if self.vace else [])]]

    def forward(self, x, t, context, seq_len, y=None):
        u = x[0] if y is None else torch.cat([x[0], y[0]])
        tokens = self.patch_embedding(u.flatten(1).T[None])
        e = torch.sin(t.float() / 200)
        extra = {"hints": self.forward_vace(tokens, e, context[0])} if self.vace else {}
        for block in self.blocks:
            tokens = block(tokens, e=e, context=context[0], **extra)
        return [self.head(tokens + 0.1 * e)[0].T.reshape(4, *x[0].shape[1:]).float()]


def _vace(model, x, e, context):
    for block in model.vace_blocks:
        x = block(x, e, context)
    return x


def _usp_forward(model, x, t, context, seq_len, y=None):
    """Sequence parallelism as upstream installs it: an instance forward; here every rank works on all tokens."""
    return type(model).forward(model, x, t, context, seq_len, y)


class FlowUniPCMultistepScheduler:
    """The name of upstream's sampler, and how it is called; the rule is Euler's."""

    def __init__(self):
        self.config = {"solver": "euler"}

    def set_timesteps(self, steps, shift):
        u = torch.linspace(1, 0, steps + 1)
        self.sigmas = shift * u / (1 + (shift - 1) * u)
        self.timesteps = (self.sigmas[:-1] * 1000).long()
        self.index = 0

    def step(self, model_output, timestep, sample, return_dict=True):
        change = self.sigmas[self.index + 1] - self.sigmas[self.index]
        self.index += 1
        return (sample + change * model_output,)


class _Pipeline:
    channels, vace = 4, False

    def __init__(self, use_usp=False, fail_at=-1):
        self.model = Model(self.channels, self.vace).eval().requires_grad_(False)
        if use_usp:
            self.model.forward = types.MethodType(_usp_forward, self.model)
        self.fail_at = fail_at

    def generate(self, prompt, shift=5.0, sampling_steps=50, guide_scale=5.0, seed=-1):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 3, 6, 6, generator=g)
        context, null = [torch.randn(5, 8, generator=g)], [torch.zeros(5, 8)]
        arg_c, arg_null = {"context": context, "seq_len": 108}, {"context": null, "seq_len": 108}
        if self.channels > 4:
            arg_c["y"] = arg_null["y"] = [torch.ones(4, 3, 6, 6)]
        sampler = FlowUniPCMultistepScheduler()
        sampler.set_timesteps(sampling_steps, shift=shift)
        for k, step in enumerate(sampler.timesteps):
            if k == self.fail_at:
                raise RuntimeError("stand-in failure")
            t = step[None]
            cond = self.model([x], t=t, **arg_c)[0]
            uncond = self.model([x], t=t, **arg_null)[0]
            x = sampler.step(uncond + guide_scale * (cond - uncond), step, x, return_dict=False)[0]
        if dist.is_initialized():
            dist.barrier()
        return x


class WanT2V(_Pipeline):
    pass


class WanI2V(_Pipeline):
    channels = 8


class WanFLF2V(_Pipeline):
    channels = 8


class WanVace(_Pipeline):
    vace = True
