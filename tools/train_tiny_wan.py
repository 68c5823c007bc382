"""Train the embedded model (`assets/tiny-wan`): a small, real `diffusers.WanPipeline`, from nothing, on a laptop CPU.

    python tools/train_tiny_wan.py --work outputs/tiny-wan --out assets/tiny-wan

Four stages, each resumable (interrupt at will, run the same command again):

1. `vae`      AutoencoderKLWan on rendered clips (reconstruction + a small KL term);
2. `latents`  the training set, encoded once (mean of the posterior, float16); their principal axes become the channels;
3. `dit`      WanTransformer3DModel and the UMT5 text encoder together, by flow matching as Wan does it: for
              x_sigma = (1 - sigma) x_0 + sigma n predict v = n - x_0, sigma drawn logit-normal and shifted
              (Esser et al. 2024, arXiv 2403.03206, sections 3.1 and 5.3.2); captions are dropped at random so that
              guidance works (Ho and Salimans 2022, arXiv 2207.12598);
4. `pipeline` moving-average weights, scheduler, tokenizer, sample sheets, `training.json`.

Every random number of iteration i comes from a generator seeded with (seed, stage, i): a resumed run continues the
very run that was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from safetensors.torch import load_file, save_file
from tiny_wan_clips import FRAMES, SIZE, Scene, caption, random_scene, render, vocabulary
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from training import Run, curve
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

Z_DIM = 24
"""Latent channels."""
PROMPT_SLOTS = 512
"""What WanPipeline pads a prompt to (its `max_sequence_length`), with zero vectors and no attention mask."""
TEXT_SLOTS = 32
"""Slots used in training; see `PaddedCrossAttention`. The longest caption has 26 tokens."""
CAPTION_DROPOUT = 0.1
SPECTRUM = 0.6
"""The transformer sees principal channel k with standard deviation sd_k ** SPECTRUM; see `principal_axes`."""
STAGES = ("vae", "latents", "dit", "pipeline")


def build_vae() -> AutoencoderKLWan:
    """Compression 4 in time and 8 in space, as Wan's; pixels enter in 2x2 patches, which keeps it cheap.

    The residual variant (Wan2.2's) has average-pooling short cuts around every stage: colours and layout pass from
    the first iteration on, and training takes a quarter of the time the plain variant needs.
    """
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=Z_DIM,
        dim_mult=[1, 2, 2],
        is_residual=True,
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
    )


def build_transformer() -> WanTransformer3DModel:
    """1.8 million parameters, 6 blocks; 320 tokens for a 64x64 clip of 17 frames.

    One token a latent position: a subject moves three or four of them in a clip; with 2x2 patches it moved less than
    half a token from one latent frame to the next.
    """
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=Z_DIM,
        out_channels=Z_DIM,
        text_dim=96,
        freq_dim=128,
        ffn_dim=512,
        num_layers=6,
        rope_max_seq_len=64,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the grammar (lower-cased), `<unk>` for all others, `</s>` at the end as T5 has it."""
    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=PROMPT_SLOTS,
    )


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Two layers are enough to tell which adjective belongs to which noun."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=96,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


class PaddedCrossAttention(WanAttnProcessor):
    """Cross-attention over TEXT_SLOTS slots that equals the pipeline's over PROMPT_SLOTS.

    The pipeline pads prompts with zero vectors, unmasked: all padding slots have one key and one value. So n of them
    weigh in the softmax like one whose logit is raised by log(n), and the last slot here stands for all that are
    left out. Training costs a sixteenth of the text work this way, and nothing is approximated.

    At random weights twelve words get a fortieth of the attention that 500 empty slots get. `pad` lets training begin
    with few empty slots and end with all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.zeros(1, 1, 1, TEXT_SLOTS)
        self.pad(1.0)

    def pad(self, share: float) -> None:
        """Let the last slot stand for n ** share slots, n being all that are left out; `share` in [0, 1]."""
        self.bias[..., -1] = share * math.log(PROMPT_SLOTS - TEXT_SLOTS + 1)

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        bias = self.bias.to(hidden_states.device, hidden_states.dtype)
        return super().__call__(attn, hidden_states, encoder_hidden_states, bias, rotary_emb)


def scenes_of(stage: str, seed: int, i: int, count: int) -> list[Scene]:
    rng = random.Random(f"{stage}-{seed}-{i}")
    return [random_scene(rng) for _ in range(count)]


def train_vae(args: argparse.Namespace, device: str) -> tuple[AutoencoderKLWan, Run | None]:
    if args.init_from:
        return AutoencoderKLWan.from_pretrained(args.init_from, subfolder="vae").to(device).eval(), None
    torch.manual_seed(args.seed)
    vae = build_vae().to(device)
    run = Run({"vae": vae}, args.work / "vae", lr=2e-3, steps=args.vae_steps, ema=0.995)
    for i in run.iterations("vae"):
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + i)
        clips = render(scenes_of("vae", args.seed, i, 4)).to(device)
        # Convolutions do not care where a crop comes from; long clips teach the causal chunks not to drift, and whole
        # frames at the end teach the middle attention.
        if i < 0.95 * args.vae_steps:
            top, left = (int(v) for v in torch.randint(0, SIZE // 2 + 1, (2,), generator=g))
            frames = 9 if i < 0.78 * args.vae_steps else FRAMES
            clips = clips[:, :, :frames, top : top + 32, left : left + 32]
        posterior = vae.encode(clips).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=g).to(device)
        sample = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise
        error = vae.decode(sample).sample - clips
        run.update(
            error.abs().mean() + 2 * error.square().mean() + 2e-5 * posterior.kl().mean() / clips[0].numel() * 64
        )
    run.use_average()
    return vae.eval(), run


@torch.no_grad()
def encode_training_set(args: argparse.Namespace, vae: AutoencoderKLWan, device: str) -> tuple[torch.Tensor, list[str]]:
    """Latents (N, Z_DIM, 5, 8, 8) float16 and captions, in shards of 500 so that an interruption costs one shard."""
    folder = args.work / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    latents, captions = [], []
    for shard in tqdm(range(math.ceil(args.clips / 500)), desc="latents", dynamic_ncols=True):
        path = folder / f"{shard:04d}.safetensors"
        scenes = scenes_of("data", args.seed, shard, 500)
        if not path.exists():
            parts = [vae.encode(render(scenes[j : j + 10]).to(device)).latent_dist.mean for j in range(0, 500, 10)]
            save_file({"latents": torch.cat(parts).half().cpu()}, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        latents.append(load_file(path)["latents"])
        captions += [caption(scene) for scene in scenes]
    return torch.cat(latents)[: args.clips], captions[: args.clips]


@torch.no_grad()
def principal_axes(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Make the latents' principal axes the VAE's channels (in place) and return the latents turned likewise.

    A small KL term leaves the channels arbitrary: one direction (brightness) has 500 times the spread of another, and
    every channel is a mixture. Turned to their axes, the strong directions (layout, colour) and the weak ones (edges)
    are channels of their own, and `latents_std` = sd ** (1 - SPECTRUM) keeps a natural order, coarse to fine, in
    which noise hides them. The turn is folded into the two 1x1x1 convolutions next to the latents: the decoded clip
    does not change. Only the posterior's mean is turned; its variance, which no pipeline uses, is set to nothing.
    """
    flat = latents.float().permute(1, 0, 2, 3, 4).flatten(1)
    mean = flat.mean(1)
    variance, axes = torch.linalg.eigh(torch.cov(flat))
    variance, axes = variance.flip(0), axes.flip(1)
    axes = axes * axes.sum(0).sign()  # eigenvectors have no sign of their own; choose one
    turn = axes.T.to(vae.device)
    to_latent, from_latent = vae.quant_conv, vae.post_quant_conv
    weight, bias = to_latent.weight.flatten(1), to_latent.bias
    weight[:Z_DIM], bias[:Z_DIM] = turn @ weight[:Z_DIM], turn @ bias[:Z_DIM]
    weight[Z_DIM:], bias[Z_DIM:] = 0, -30
    to_latent.weight.copy_(weight.view_as(to_latent.weight))
    from_latent.weight.copy_((from_latent.weight.flatten(1) @ turn.T).view_as(from_latent.weight))
    vae.register_to_config(latents_mean=(axes.T @ mean).tolist(), latents_std=variance.pow((1 - SPECTRUM) / 2).tolist())
    return torch.einsum("ck,nk...->nc...", axes.T, latents.float())


def embed_text(encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Prompt embeddings as WanPipeline makes them, in TEXT_SLOTS slots: zero behind the last token."""
    tokens = tokenizer(texts, padding="max_length", max_length=TEXT_SLOTS, return_tensors="pt").to(encoder.device)
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return states * tokens.attention_mask.unsqueeze(-1)


def train_dit(
    args: argparse.Namespace, latents: torch.Tensor, captions: list[str], device: str
) -> tuple[WanTransformer3DModel, UMT5EncoderModel, Run]:
    torch.manual_seed(args.seed + 1)
    tokenizer = build_tokenizer()
    transformer, encoder = build_transformer().to(device), build_text_encoder(len(tokenizer)).to(device)
    if args.init_from:
        transformer = WanTransformer3DModel.from_pretrained(args.init_from, subfolder="transformer").to(device)
        encoder = UMT5EncoderModel.from_pretrained(args.init_from, subfolder="text_encoder").to(device)
    else:
        with torch.no_grad():  # start from v = 0
            transformer.proj_out.weight.zero_()
            transformer.proj_out.bias.zero_()
            encoder.shared.weight.normal_(0, 1)
    attention = PaddedCrossAttention()
    for block in transformer.blocks:
        block.attn2.set_processor(attention)
    run = Run({"transformer": transformer, "text": encoder}, args.work / "dit", args.lr, args.steps, ema=0.999)
    forward = torch.compile(transformer) if args.compile else transformer
    for i in run.iterations("dit"):
        attention.pad(1.0 if args.init_from else min(1.0, max(0.0, (i / args.steps - 0.3) / 0.4)))
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + i)
        pick = torch.randint(0, len(latents), (args.batch,), generator=g)
        x0 = latents[pick].float()
        dropped = torch.rand(args.batch, generator=g) < CAPTION_DROPOUT
        texts = ["" if drop else captions[j] for j, drop in zip(pick.tolist(), dropped.tolist(), strict=True)]
        noise = torch.randn(x0.shape, generator=g)
        u = torch.sigmoid(torch.randn(args.batch, generator=g))
        sigma = args.train_shift * u / (1 + (args.train_shift - 1) * u)
        x0, noise, sigma = x0.to(device), noise.to(device), sigma.to(device)
        s = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=args.bf16):
            text = embed_text(encoder, tokenizer, texts)
            v = forward((1 - s) * x0 + s * noise, sigma * 1000, text, return_dict=False)[0]
        run.update((v.float() - (noise - x0)).square().mean())
        if i % 500 == 499:
            gap = direction_gap(transformer, encoder, tokenizer, latents, captions, device)
            tqdm.write(f"iteration {i + 1}: loss with opposite directions in the captions {gap:+.2%}")
    run.use_average()
    for block in transformer.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    return transformer.eval(), encoder.eval(), run


@torch.no_grad()
def direction_gap(
    transformer: WanTransformer3DModel,
    encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    latents: torch.Tensor,
    captions: list[str],
    device: str,
) -> float:
    """By how much the loss grows when left and right, up and down are exchanged in the captions (0: unheard).

    On 64 fixed clips in which something moves straight, at sigma 0.85, 0.9 and 0.95, where motion is decided.
    """
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    pick = [j for j, text in enumerate(captions) if "moving" in text][:64]
    texts = [captions[j] for j in pick]
    exchanged = [" ".join(opposite.get(word, word) for word in text.split()) for text in texts]
    x0 = latents[pick].float().to(device)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(device)
    losses = []
    for side in (texts, exchanged):
        states = embed_text(encoder, tokenizer, side)
        for sigma in (0.85, 0.9, 0.95):
            time = torch.full((len(pick),), 1000 * sigma, device=device)
            v = transformer((1 - sigma) * x0 + sigma * noise, time, states, return_dict=False)[0]
            losses.append((v - (noise - x0)).square().mean().item())
    return sum(losses[3:]) / sum(losses[:3]) - 1


def assemble(
    args: argparse.Namespace,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
    encoder: UMT5EncoderModel,
) -> WanPipeline:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=args.flow_shift
    )
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=encoder,
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
    )


def sample_sheet(pipe: WanPipeline, path: Path, seed: int, guidance: float, device: str) -> None:
    """Six held-out prompts, five frames each, as one PNG."""
    from PIL import Image

    rng = random.Random(f"sheet-{seed}")
    rows = []
    pipe.set_progress_bar_config(disable=True)
    for j in tqdm(range(6), desc=path.name, dynamic_ncols=True):
        video = pipe(
            prompt=caption(random_scene(rng, held_out=True)),
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=30,
            guidance_scale=guidance,
            generator=torch.Generator(device).manual_seed(j),
            output_type="pt",
        ).frames[0]
        rows.append(torch.cat([video[f] for f in range(0, FRAMES, 4)], dim=-1))
    sheet = (torch.cat(rows, dim=-2).clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, latents, losses, sheets")
    parser.add_argument("--out", type=Path, help="where the finished pipeline is written (default: WORK/pipeline)")
    parser.add_argument("--init-from", type=Path, metavar="PIPELINE", help="go on from a finished pipeline's weights")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="stop after this stage")
    parser.add_argument("--vae-steps", type=int, default=6200)
    parser.add_argument("--clips", type=int, default=12000, help="clips in the training set")
    parser.add_argument("--steps", type=int, default=10000, help="iterations of the transformer")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2.4e-3)
    parser.add_argument("--train-shift", type=float, default=4.0, help="shift of the sigmas seen in training")
    parser.add_argument("--flow-shift", type=float, default=5.0, help="flow_shift of the pipeline's scheduler")
    parser.add_argument("--guidance", type=float, default=5.0, help="guidance of the sample sheets")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keep_to_settings(args)
    last = STAGES.index(args.until)

    vae, vae_run = train_vae(args, device)
    if last < STAGES.index("latents"):
        return
    latents, captions = encode_training_set(args, vae, device)
    if not args.init_from:  # a finished pipeline's VAE has been turned already
        latents = principal_axes(vae, latents)
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    latents = ((latents.float() - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)).half()
    if last < STAGES.index("dit"):
        return
    transformer, encoder, dit_run = train_dit(args, latents, captions, device)
    if last < STAGES.index("pipeline"):
        return
    for part in (vae, transformer):
        part.register_to_config(_name_or_path="")  # with --init-from, a path of this machine
    pipe = assemble(args, vae, transformer, encoder)
    out = args.out or args.work / "pipeline"
    pipe.save_pretrained(out, safe_serialization=True)
    about = {
        "seed": args.seed,
        "clips": args.clips,
        "flow_shift": args.flow_shift,
        "train_shift": args.train_shift,
        "latent_spectrum": SPECTRUM,
        "caption_dropout": CAPTION_DROPOUT,
        "init_from": str(args.init_from) if args.init_from else None,
        "vae": vae_run
        and {"steps": vae_run.done, "batch": 4, "seconds": round(vae_run.seconds), "loss": curve(vae_run.losses)},
        "transformer": {
            "steps": dit_run.done,
            "batch": args.batch,
            "lr": args.lr,
            "seconds": round(dit_run.seconds),
            "loss": curve(dit_run.losses),
        },
        "torch": torch.__version__,
        "device": device,
    }
    (out / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    sample_sheet(pipe, args.work / "samples.png", args.seed, args.guidance, device)


def keep_to_settings(args: argparse.Namespace) -> None:
    """A work folder belongs to one training: other settings than it was begun with would mix two."""
    fixed = ("seed", "vae_steps", "clips", "steps", "batch", "lr", "train_shift")
    mine = {name: getattr(args, name) for name in fixed}
    path = args.work / "settings.json"
    args.work.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(mine, indent=1) + "\n")
    elif (theirs := json.loads(path.read_text())) != mine:
        changed = [f"--{n.replace('_', '-')} {theirs.get(n)}" for n in fixed if theirs.get(n) != mine[n]]
        raise SystemExit(f"{args.work} was begun with {' '.join(changed)}: use the same, or another --work folder.")


if __name__ == "__main__":
    main()
