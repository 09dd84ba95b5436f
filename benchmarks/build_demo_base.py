"""Train the demo's base model from scratch: `python benchmarks/build_demo_base.py`.

The script first trains the autoencoder on the demo's flawed images, then the denoiser and the text encoder on latents
with captions. It saves the finished autoencoder in `--work_dir`, so a second call does not train it again.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trl_diffusion_sdpo.tools.demo.pipeline import LATENT_SHAPE
from trl_diffusion_sdpo.tools.demo.world import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPES, captions, imperfect_render

logger = logging.getLogger(__name__)

IMAGES_PER_PROMPT = 96
VAE_BATCH, VAE_LR, KL_WEIGHT = 32, 2e-3, 1e-7
UNET_BATCH, UNET_LR, EMA_DECAY, PROMPT_DROPOUT = 64, 2e-3, 0.998, 0.1

TEXT_LENGTH = 8  # start token, five words, end token, one unused
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def main(arguments: list[str] | None = None) -> None:
    """Build both stages and save the pipeline in `--output`, rounded to bfloat16 and stored in float32.

    Rounded weights compress to half the size, and float32 files load in one dtype whatever the caller asks for.
    """
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    images, prompts = render_training_data(args.seed)
    pipeline = build_pipeline(args.seed)

    vae_folder = args.work_dir / "vae"
    if (vae_folder / "diffusion_pytorch_model.safetensors").is_file():
        logger.info("The autoencoder in %s is finished: stage skipped.", vae_folder)
        finished = AutoencoderKL.from_pretrained(vae_folder)
        pipeline.vae.load_state_dict(finished.state_dict())
        pipeline.vae.register_to_config(scaling_factor=finished.config.scaling_factor)
    else:
        train_vae(pipeline.vae, images, steps=args.vae_steps, seed=args.seed)
        pipeline.vae.save_pretrained(vae_folder)

    train_unet(pipeline, images, prompts, steps=args.unet_steps, seed=args.seed)
    pipeline.to(torch.bfloat16).to(torch.float32).save_pretrained(args.output)
    logger.info("The base model is in %s.", args.output)


def build_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """Build the untrained pipeline in float32 on the CPU: 1.8 million parameters, 32 x 32 images, 4 x 8 x 8 latents.

    The global random state does not change.
    """
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae, unet, text_encoder = _build_vae(), _build_unet(), _build_text_encoder(tokenizer)
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer with one token for every word of the demo's captions. Other text is split into bytes.

    The merges are built word by word. Each word is split with the merges so far, and its first two pieces are merged
    until one is left. A later merge has a lower rank, so it cannot split an earlier word.
    """
    words = ["a", "on", *COLOURS, *SHAPES, *BACKGROUNDS]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _split(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    characters = _byte_characters()
    tokens = [*characters, *(one + _WORD_END for one in characters), *(a + b for a, b in merges), _START, _END]
    vocab = {token: index for index, token in enumerate(tokens)}
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    return CLIPTokenizer(vocab=vocab, merges=merges, **special, model_max_length=TEXT_LENGTH)


def _build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_SHAPE[0],
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def _build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SHAPE[1],
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def _build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def _split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Encode one word by byte-pair encoding: apply the merges in order of rank, each from left to right."""
    pieces = [*word[:-1], word[-1] + _WORD_END]
    for pair in merges:
        merged: list[str] = []
        for piece in pieces:
            if merged and (merged[-1], piece) == pair:
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged
    return pieces


def _byte_characters() -> list[str]:
    """Return the character of each of the 256 bytes in byte-level BPE. Printable bytes are their own characters."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = range(256, 256 + 256 - len(printable))
    return [chr(code) for code in [*printable, *others]]


def render_training_data(seed: int) -> tuple[torch.Tensor, list[str]]:
    """Render the flawed images that both stages train on: `(N, 3, 32, 32)` in `[-1, 1]`, and their N captions."""
    generator = np.random.default_rng(seed)
    shown = [caption for caption in captions() for _ in range(IMAGES_PER_PROMPT)]
    rendered = np.stack([imperfect_render(caption, generator) for caption in tqdm(shown, desc="rendering")])
    images = torch.from_numpy(rendered).permute(0, 3, 1, 2).float() / 127.5 - 1  # (N, H, W, C) -> (N, C, H, W)
    return images, [caption.text for caption in shown]


def train_vae(vae: AutoencoderKL, images: torch.Tensor, *, steps: int, seed: int) -> None:
    """Train the autoencoder in place on MSE + L1 / 2 + 1e-7 KL, then set its scaling factor."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LR)
    schedule = OneCycleLR(optimizer, max_lr=VAE_LR, total_steps=steps)
    vae.train()
    for _ in tqdm(range(steps), desc="autoencoder"):
        batch = images[torch.randint(len(images), (VAE_BATCH,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        loss = F.mse_loss(decoded, batch) + 0.5 * F.l1_loss(decoded, batch) + KL_WEIGHT * posterior.kl().mean()
        _step(loss, vae.parameters(), optimizer, schedule)
    vae.eval()
    scale = 1 / encode(vae, images).std()
    vae.register_to_config(scaling_factor=round(float(scale), 4))


def train_unet(
    pipeline: StableDiffusionPipeline, images: torch.Tensor, prompts: list[str], *, steps: int, seed: int
) -> None:
    """Train denoiser and text encoder in place to predict the noise, then replace their weights by an average."""
    generator = torch.Generator().manual_seed(seed)
    latents = encode(pipeline.vae, images) * pipeline.vae.config.scaling_factor
    tokens, empty = _tokenize(pipeline, prompts), _tokenize(pipeline, [""])
    noising = DDPMScheduler.from_config(pipeline.scheduler.config)
    modules = torch.nn.ModuleList([pipeline.unet, pipeline.text_encoder]).train()
    average = EMAModel(modules.parameters(), decay=EMA_DECAY)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=UNET_LR)
    schedule = OneCycleLR(optimizer, max_lr=UNET_LR, total_steps=steps)
    for _ in tqdm(range(steps), desc="denoiser"):
        rows = torch.randint(len(latents), (UNET_BATCH,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        timesteps = torch.randint(noising.config.num_train_timesteps, (UNET_BATCH,), generator=generator)
        dropped = torch.rand(UNET_BATCH, generator=generator) < PROMPT_DROPOUT
        ids = torch.where(dropped[:, None], empty, tokens[rows])
        noisy = noising.add_noise(latents[rows], noise, timesteps)
        states = pipeline.text_encoder(ids).last_hidden_state
        loss = F.mse_loss(pipeline.unet(noisy, timesteps, states).sample, noise)
        _step(loss, modules.parameters(), optimizer, schedule)
        average.step(modules.parameters())
    average.copy_to(modules.parameters())
    modules.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Return the means of the unscaled latents: `(N, 3, 32, 32)` -> `(N, 4, 8, 8)`."""
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(256)])


def _tokenize(pipeline: StableDiffusionPipeline, prompts: list[str]) -> torch.Tensor:
    return pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def _step(loss: torch.Tensor, parameters, optimizer: torch.optim.Optimizer, schedule: OneCycleLR) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("trl_diffusion_sdpo/tools/demo/base"), help="folder of the result"
    )
    work_dir = "folder of the trained autoencoder; delete it to train it again"
    parser.add_argument("--work_dir", type=Path, default=Path("build/demo_base"), help=work_dir)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_steps", type=int, default=2000)
    parser.add_argument("--unet_steps", type=int, default=2500)
    return parser


if __name__ == "__main__":
    main()
