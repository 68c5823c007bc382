"""assets/tiny-wan -> what the ComfyUI test bed reads, and diffusers' own trajectories to compare with.

    python export_tiny_wan.py --model assets/tiny-wan --out DIR [--prompts N]

Needs torch, diffusers, transformers (not ComfyUI). Writes
  tiny_wan.safetensors        the transformer under Wan's original (ComfyUI's) key names
  tiny_wan.json               its settings, latent means and deviations
  conds.safetensors           prompt embeddings (float32, padded as WanPipeline pads them), "neg" and "pos0".. "posN"
  ref_<sampler>_<steps>.safetensors   diffusers' final latents for pos0, seed latents in "noise"
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from safetensors.torch import save_file

RENAMES = [  # diffusers -> Wan's own
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("attn2", "cross_attn"),
    ("attn1", "self_attn"),
    (".to_out.0.", ".o."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("norm2", "norm3"),  # the cross-attention norm, the only one of the three with weights
]


def rename(key: str) -> str:
    if key == "scale_shift_table":
        return "head.modulation"
    if key.startswith("proj_out"):
        return key.replace("proj_out", "head.head")
    for old, new in RENAMES:
        key = key.replace(old, new)
    return key.replace("scale_shift_table", "modulation")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=5.0)
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    pipe = WanPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    t = pipe.transformer
    state = {rename(k): v.contiguous() for k, v in t.state_dict().items()}
    save_file(state, str(out / "tiny_wan.safetensors"))
    c, v = t.config, pipe.vae.config
    settings = {
        "unet": {
            "dim": c.num_attention_heads * c.attention_head_dim,
            "out_dim": c.out_channels,
            "in_dim": c.in_channels,
            "num_heads": c.num_attention_heads,
            "ffn_dim": c.ffn_dim,
            "num_layers": c.num_layers,
            "patch_size": list(c.patch_size),
            "freq_dim": c.freq_dim,
            "text_dim": c.text_dim,
            "qk_norm": True,
            "cross_attn_norm": True,
            "eps": c.eps,
        },
        "shift": pipe.scheduler.config.flow_shift,
        "latents_mean": v.latents_mean,
        "latents_std": v.latents_std,
    }
    (out / "tiny_wan.json").write_text(json.dumps(settings, indent=1))

    prompts = [p for p in (Path(args.model) / "evaluation_prompts.txt").read_text().splitlines() if p.strip()]
    step = max(1, len(prompts) // args.prompts)
    prompts = prompts[::step][: args.prompts]
    conds = {"neg": pipe.encode_prompt("", do_classifier_free_guidance=False, device="cpu", max_sequence_length=512)[0]}
    for i, p in enumerate(prompts):
        conds[f"pos{i}"] = pipe.encode_prompt(
            p, do_classifier_free_guidance=False, device="cpu", max_sequence_length=512
        )[0]
    save_file({k: x.float().contiguous() for k, x in conds.items()}, str(out / "conds.safetensors"))
    (out / "prompts.json").write_text(json.dumps(prompts, indent=1))

    noise = torch.randn(1, c.in_channels, 5, 8, 8, generator=torch.Generator().manual_seed(7))
    save_file({"noise": noise}, str(out / "noise.safetensors"))
    schedulers = {
        "euler": FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift),
        "unipc": UniPCMultistepScheduler.from_config(pipe.scheduler.config),
    }
    for name, scheduler in schedulers.items():
        pipe.scheduler = scheduler
        for steps in (20, 50):
            seen = {}

            def watch(module, a, k, output, seen=seen):
                seen.setdefault("timesteps", []).append(float(k["timestep"].flatten()[0]))

            handle = t.register_forward_hook(watch, with_kwargs=True)
            latents = pipe(
                prompt=prompts[0],
                negative_prompt="",
                num_inference_steps=steps,
                guidance_scale=args.guidance,
                height=64,
                width=64,
                num_frames=17,
                latents=noise.clone(),
                output_type="latent",
            ).frames
            handle.remove()
            sigmas = pipe.scheduler.sigmas.float().clone()
            save_file(
                {"latents": latents.contiguous(), "sigmas": sigmas, "timesteps": torch.tensor(seen["timesteps"][::2])},
                str(out / f"ref_{name}_{steps}.safetensors"),
            )
            print(name, steps, tuple(latents.shape), float(latents.std()), sigmas[:3].tolist(), sigmas[-3:].tolist())
    with torch.no_grad():  # one call of the transformer by itself
        x = noise
        y = t(hidden_states=x, timestep=torch.tensor([500.0]), encoder_hidden_states=conds["pos0"], return_dict=False)[
            0
        ]
    save_file({"x": x, "y": y.contiguous()}, str(out / "one_call.safetensors"))


if __name__ == "__main__":
    main()
