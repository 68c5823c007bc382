"""Stand-in for Wan2.2's `wan` package; blocks, model and sampler are those of the stand-in for Wan2.1."""

import types

import torch
import torch.distributed as dist

from wan.parts import FlowUniPCMultistepScheduler, Model, _usp_forward

A14B = {"sample_steps": 40, "sample_shift": 12.0, "sample_guide_scale": (3.0, 4.0)}
CONFIGS = {
    "t2v-A14B": A14B,
    "i2v-A14B": {**A14B, "sample_shift": 5.0, "sample_guide_scale": (3.5, 3.5)},
    "ti2v-5B": {"sample_steps": 50, "sample_shift": 5.0, "sample_guide_scale": 5.0},
    "s2v-14B": {"sample_steps": 40, "sample_shift": 3.0, "sample_guide_scale": 4.5},
    "animate-14B": {"sample_steps": 20, "sample_shift": 5.0, "sample_guide_scale": 1},
}


class _Pipeline:
    """`clips` runs of the sampler; `transformers`: what they are called here."""

    transformers, clips, boundary, num_train_timesteps, switch = ("model",), 1, 0.875, 1000, None

    def __init__(self, use_sp=False):
        for k, name in enumerate(self.transformers):
            model = Model(4, False).eval().requires_grad_(False)
            for p in model.parameters():
                p += 0.3 * k
            if use_sp:
                model.forward = types.MethodType(_usp_forward, model)
            setattr(self, name, model)

    def generate(self, prompt, shift=5.0, sampling_steps=50, guide_scale=5.0, seed=-1):
        scales = guide_scale if isinstance(guide_scale, tuple) else (guide_scale, guide_scale)
        return torch.stack([self._clip(shift, sampling_steps, scales, seed + k) for k in range(self.clips)])

    def _clip(self, shift, steps, scales, seed):
        g = torch.Generator().manual_seed(seed)
        x = [torch.randn(4, 3, 6, 6, generator=g)]
        context, null = [torch.randn(5, 8, generator=g)], [torch.zeros(5, 8)]
        sampler = FlowUniPCMultistepScheduler()
        sampler.set_timesteps(steps, shift=shift)
        border = self.boundary * self.num_train_timesteps
        if len(self.transformers) == 2:
            self.switch = int((sampler.timesteps >= border).sum())
        for t in sampler.timesteps:
            high = bool(t >= border)
            model = getattr(self, self.transformers[-1] if high else self.transformers[0])
            scale = scales[1] if high else scales[0]
            guided = model(x, t=t[None], context=context, seq_len=108)
            if scale > 1 or self.transformers != ("noise_model",):
                uncond = model(x, t=t[None], context=null, seq_len=108)
                guided = [u + scale * (c - u) for c, u in zip(guided, uncond, strict=True)]
            x = [sampler.step(guided[0], t, x[0], return_dict=False)[0]]
        if dist.is_initialized():
            dist.barrier()
        return x[0]


class WanT2V(_Pipeline):
    transformers = ("low_noise_model", "high_noise_model")


class WanI2V(WanT2V):
    boundary = 0.9


class WanTI2V(_Pipeline):
    pass


class WanS2V(_Pipeline):
    transformers, clips = ("noise_model",), 2


class WanAnimate(WanS2V):
    pass
