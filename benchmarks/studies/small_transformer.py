"""A small text-to-image transformer of the embedded world, for studies of models that are no U-Nets.

It is a `StableDiffusion3Pipeline` of 2.3 million parameters, trained from scratch by flow matching on the same flawed
drawings as the demo's U-Net. It has the demo's VAE and text encoder, and no T5. `load_base` trains it on first use and
reads it from the folder afterwards.

    python benchmarks/studies/small_transformer.py

It takes about seven minutes on one core. The last lines printed are the oracle's scores of its images.
"""

import argparse
import contextlib
import json
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm
from transformers import CLIPTextModelWithProjection

from trl_diffusion_sdpo.families import find_family
from trl_diffusion_sdpo.models.generation import draw_images, quiet_copy
from trl_diffusion_sdpo.tools.demo.oracle import oracle_score
from trl_diffusion_sdpo.tools.demo.pipeline import LATENT_SHAPE, load_base_pipeline, score_latents, score_prompts
from trl_diffusion_sdpo.tools.demo.world import IMAGE_SIZE, captions, imperfect_render
from trl_diffusion_sdpo.utils.errors import UserError

__all__ = ["LATENT_SHAPE", "generate_images", "load_base"]

FOLDER = Path("bench_output/small_transformer")
# What the weights depend on. They are kept with the weights, and other settings do not take those weights.
TRAINING = {
    "seed": 0,
    "steps": 2500,
    "batch": 48,
    "learning_rate": 1.5e-3,
    "average_decay": 0.998,
    "prompt_dropout": 0.1,
    "images_per_prompt": 96,
    "layers": 4,
    "heads": 4,
    "head_width": 32,
}
CHUNK = 256  # images per forward pass
STEPS = 12  # of sampling, as for the demo's U-Net


def load_base(folder: Path = FOLDER, **changed: Any) -> StableDiffusion3Pipeline:
    """Return the base model in float32 on the CPU, without progress bars. Train it first if the folder is empty.

    Args:
        folder (`Path`): Where the weights are kept.
        changed: Settings of [`TRAINING`] to change, such as fewer `steps`.

    Raises:
        `UserError`: If the folder has weights of other settings.
    """
    settings = {**TRAINING, **changed}
    record = folder / "training.json"
    if not record.is_file():
        pipeline = new_pipeline(settings)
        train(pipeline, settings)
        pipeline.save_pretrained(folder)
        record.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    kept = json.loads(record.read_text(encoding="utf-8"))
    if kept != settings:
        raise UserError(
            f"The weights in {folder} must be of the settings {settings}, and they are of {kept}. Delete the folder."
        )
    no_t5: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
    return without_t5(StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **no_t5))


@torch.no_grad()
def generate_images(
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    latents: torch.Tensor,
    steps: int = STEPS,
    *,
    guidance_scale: float = 1.0,
    context: Callable[[StableDiffusion3Pipeline], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> np.ndarray:
    """Generate one image per prompt from initial latents, with Euler's method. Arguments and result are those of the
    function of the same name for the demo's U-Net.

    Args:
        latents (`torch.Tensor` of shape `(N, 4, 8, 8)`): Initial latents, drawn from a standard normal distribution.
        guidance_scale (`float`): Scale of classifier-free guidance, by two predictions a step; 1 turns guidance off.

    Returns:
        `np.ndarray` of shape `(N, 32, 32, 3)`, uint8.
    """
    sampler = quiet_copy(pipeline)
    images: list[Any] = []
    with context(sampler):
        for start in range(0, len(prompts), CHUNK):
            images += draw_images(
                sampler,
                list(prompts[start : start + CHUNK]),
                latents=latents[start : start + CHUNK],
                height=IMAGE_SIZE,
                width=IMAGE_SIZE,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
            )
    return np.stack([np.asarray(image) for image in images])


def new_pipeline(settings: dict[str, Any]) -> StableDiffusion3Pipeline:
    """Return an untrained pipeline with the demo's VAE, and with its text encoder in both CLIP places."""
    world = load_base_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        text_encoder = CLIPTextModelWithProjection(world.text_encoder.config).eval()
        encoder_weights = {
            f"text_model.{name.removeprefix('text_model.')}": tensor
            for name, tensor in world.text_encoder.state_dict().items()
        }
        missing, unexpected = text_encoder.load_state_dict(encoder_weights, strict=False)
        assert not unexpected, unexpected
        assert missing == ["text_projection.weight"], missing  # stays random: it mixes the words, and loses none
        width = world.text_encoder.config.hidden_size
        transformer = SD3Transformer2DModel(
            sample_size=LATENT_SHAPE[1],
            patch_size=2,
            in_channels=LATENT_SHAPE[0],
            out_channels=LATENT_SHAPE[0],
            num_layers=settings["layers"],
            attention_head_dim=settings["head_width"],
            num_attention_heads=settings["heads"],
            caption_projection_dim=settings["heads"] * settings["head_width"],
            joint_attention_dim=2 * width,
            pooled_projection_dim=2 * world.text_encoder.config.projection_dim,
            pos_embed_max_size=LATENT_SHAPE[1] // 2,
            qk_norm="rms_norm",
        )
    # An output of zeros is where a diffusion transformer usually starts.
    torch.nn.init.zeros_(transformer.proj_out.weight)
    world.vae.register_to_config(shift_factor=0.0)
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=world.vae,
        text_encoder=text_encoder,
        tokenizer=world.tokenizer,
        text_encoder_2=text_encoder,
        tokenizer_2=world.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=transformer,
    )
    return without_t5(pipeline)


def without_t5(pipeline: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """Let a pipeline without T5 encode prompts by CLIP's tokens alone, and turn its progress bars off.

    In place of T5's tokens, the pipeline would append 256 zeros, 16 times as many as the image has tokens.
    """

    def no_tokens(self: StableDiffusion3Pipeline, prompt: Any = None, num_images_per_prompt: int = 1, **_: Any):
        rows = 1 if isinstance(prompt, str) else len(prompt)
        width = self.transformer.config.joint_attention_dim
        return torch.zeros(rows * num_images_per_prompt, 0, width, device=self.text_encoder.device)

    pipeline._get_t5_prompt_embeds = types.MethodType(no_tokens, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train(pipeline: StableDiffusion3Pipeline, settings: dict[str, Any]) -> None:
    """Train the transformer in place by flow matching, then replace its weights by their average."""
    family = find_family(pipeline)
    drawn = torch.Generator().manual_seed(settings["seed"])
    latents, rows_of = flawed_latents(pipeline, settings["images_per_prompt"], settings["seed"])
    texts = [caption.text for caption in captions()]
    with torch.no_grad():
        embeddings = family.encode_prompts([*texts, ""])  # the last row is that of a dropped prompt
    transformer = pipeline.transformer.train()
    steps, batch, rate = settings["steps"], settings["batch"], settings["learning_rate"]
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    average = EMAModel(transformer.parameters(), decay=settings["average_decay"])
    bar = tqdm(range(steps), desc="small transformer", unit="step", mininterval=10)
    for step in bar:
        rows = torch.randint(len(latents), (batch,), generator=drawn)
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=drawn)
        timesteps = 1000 * torch.sigmoid(torch.randn(batch, generator=drawn))
        dropped = torch.rand(batch, generator=drawn) < settings["prompt_dropout"]
        prompts = torch.where(dropped, len(texts), rows_of[rows])
        conditioning = {name: tensor[prompts] for name, tensor in embeddings.items()}
        noisy = family.noise_process.add_noise(clean, noise, timesteps)
        predicted = family.predict(transformer, noisy, timesteps, conditioning)
        loss = (predicted - family.noise_process.target(clean, noise, timesteps)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(transformer.parameters())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    average.copy_to(transformer.parameters())
    transformer.eval()


@torch.no_grad()
def flawed_latents(
    pipeline: StableDiffusion3Pipeline, per_prompt: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the latents of flawed drawings, `(N, 4, 8, 8)`, and the index of each drawing's caption, `(N,)`."""
    family = find_family(pipeline)
    generator = np.random.default_rng(seed)
    images = [imperfect_render(caption, generator) for caption in captions() for _ in range(per_prompt)]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1  # (N, 32, 32, 3) -> NCHW
    latents = torch.cat([family.encode_images(part) for part in pixels.split(CHUNK)])
    return latents, torch.arange(len(captions())).repeat_interleave(per_prompt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=TRAINING["steps"])
    options = parser.parse_args()
    pipeline = load_base(options.folder, steps=options.steps)
    prompts, latents = score_prompts(), score_latents()
    for scale in (1.0, 2.0, 3.0, 5.0):
        images = generate_images(pipeline, prompts, latents, guidance_scale=scale)
        print(f"guidance {scale:g}: {oracle_score(images, prompts).mean():.3f}", flush=True)


if __name__ == "__main__":
    main()
