"""Preference training of an edit model on the embedded world.

A small FLUX.1 Kontext is trained from scratch to recolour drawings ("make it red"), on edits of which many are flawed.
Then it is trained on pairs of a good and a flawed edit of the same drawing, in 60 steps, once with the safeguard and
once without. The oracle scores its edits of drawings before and after.

    python benchmarks/studies/edit.py
    python benchmarks/studies/pictures.py edit_grid.png

It takes about ten minutes on one core. A second call takes the base from the first. The results are kept in `results`.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux import pipeline_flux_kontext
from pictures import write_tiles
from PIL import Image as PILImage
from tqdm.auto import tqdm
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
from trl_diffusion_sdpo.families import find_family
from trl_diffusion_sdpo.tools.demo.oracle import oracle_score
from trl_diffusion_sdpo.tools.demo.pipeline import load_base_pipeline
from trl_diffusion_sdpo.tools.demo.world import COLOURS, IMAGE_SIZE, Caption, captions, render

# The world's images are smaller than Kontext's, and 512 tokens of padding would take most of the time.
pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS = [(IMAGE_SIZE, IMAGE_SIZE)]
TOKENS = 8  # of a prompt
embed_prompts = FluxKontextPipeline._get_t5_prompt_embeds


def embed_short_prompts(self, prompt, **given):
    return embed_prompts(self, prompt, **{**given, "max_sequence_length": TOKENS})


FluxKontextPipeline._get_t5_prompt_embeds = embed_short_prompts
WORDS = ["make", "it", *COLOURS]
WIDTH = 64  # of the T5 encoder
SHAPE = 64  # width of an attention head; there are two
FLAWED = 0.5  # share of the base's training edits with a flaw
CALL = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "max_area": IMAGE_SIZE**2, "num_inference_steps": 12}
DRAWN = 6  # edits that are kept as images, for the picture
RUNS = {
    "DPO": {"safeguard": "none"},
    "output space, mu 0.6": {"safeguard": "output", "safeguard_mu": 0.6},
    "parameter space, mu 0.8": {"safeguard": "parameter", "safeguard_mu": 0.8},
}


# ---- The world of edits ---------------------------------------------------------------------------------------------


def edits(count: int, seed: int) -> list[tuple[Caption, str]]:
    """Return drawings, each with another colour that it is to have."""
    generator = np.random.default_rng(seed)
    every = captions()
    chosen = [every[index] for index in generator.integers(len(every), size=count)]
    return [(one, generator.choice([colour for colour in COLOURS if colour != one.colour])) for one in chosen]


def flawed(wanted: Caption, source: Caption, generator: np.random.Generator) -> np.ndarray:
    """Draw an edit that is blurred and moved, has the source's colour, or is blurred and has any colour."""
    offset = tuple(generator.normal(0, 3, 2).clip(-6, 6).tolist())
    kind = generator.integers(3)
    if kind == 0:
        return render(wanted, offset=offset, blur=float(generator.uniform(1, 2)))
    if kind == 1:
        return render(replace(wanted, colour=source.colour), offset=offset)
    return render(replace(wanted, colour=str(generator.choice(list(COLOURS)))), blur=float(generator.uniform(1, 2)))


def instruction(colour: str) -> str:
    return f"make it {colour}"


def pairs(count: int, seed: int) -> Dataset:
    """Return pairs of a good edit and a flawed one of the same drawing."""
    generator = np.random.default_rng([seed, 1])
    rows = []
    for source, colour in edits(count, seed):
        wanted = replace(source, colour=colour)
        images = {"source": render(source), "chosen": render(wanted), "rejected": flawed(wanted, source, generator)}
        rows.append({"prompt": instruction(colour), **{k: PILImage.fromarray(v) for k, v in images.items()}})
    kinds = {"prompt": Value("string"), **dict.fromkeys(("source", "chosen", "rejected"), Image())}
    return Dataset.from_list(rows, features=Features(kinds))


# ---- The base -------------------------------------------------------------------------------------------------------


def new_pipeline(seed: int) -> FluxKontextPipeline:
    """Return an untrained pipeline with the VAE and CLIP encoder of the embedded world."""
    torch.manual_seed(seed)
    world = load_base_pipeline()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -1.0) for word in WORDS)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=8)
    config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=16, d_ff=2 * WIDTH, num_layers=1, num_heads=4)
    t5 = T5EncoderModel(config)
    torch.nn.init.normal_(t5.get_input_embeddings().weight)  # small ones would hardly differ
    transformer = FluxTransformer2DModel(
        in_channels=4 * world.vae.config.latent_channels,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=SHAPE,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=world.text_encoder.config.hidden_size,
        axes_dims_rope=(16, 24, 24),
    )
    world.vae.register_to_config(shift_factor=0.0)
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=world.vae,
        text_encoder=world.text_encoder,
        tokenizer=world.tokenizer,
        text_encoder_2=t5.eval(),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def train_base(pipeline: FluxKontextPipeline, steps: int, batch: int, seed: int) -> None:
    """Train the transformer by flow matching on edits, of which a share is flawed."""
    family = find_family(pipeline)
    generator, drawn = np.random.default_rng([seed, 2]), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(pipeline.transformer.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    with torch.no_grad():
        prompts = {colour: family.encode_prompts([instruction(colour)]) for colour in COLOURS}
    sources = {one: encoded(family, [render(one)]) for one in captions()}
    bar = tqdm(range(steps), desc="base", unit="step")
    for step in bar:
        wanted = edits(batch, seed=1_000_000 * (seed + 1) + step)
        targets = []
        for source, colour in wanted:
            good = replace(source, colour=colour)
            is_flawed = generator.random() < FLAWED
            targets.append(flawed(good, source, generator) if is_flawed else render(good))
        clean = encoded(family, targets)
        conditioning = {
            name: torch.cat([prompts[colour][name] for _, colour in wanted]) for name in prompts[wanted[0][1]]
        }
        conditioning["source_0"] = torch.cat([sources[source] for source, _ in wanted])
        levels = torch.sigmoid(torch.randn(batch, generator=drawn))
        noise = torch.randn(clean.shape, generator=drawn)
        shares = levels.view(-1, 1, 1, 1)
        predicted = family.predict(
            pipeline.transformer, (1 - shares) * clean + shares * noise, 1000 * levels, conditioning
        )
        loss = (predicted - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def encoded(family, images: list[np.ndarray]) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return family.encode_images(pixels)


# ---- Training and measuring -----------------------------------------------------------------------------------------


@torch.no_grad()
def edited(pipeline: FluxKontextPipeline, wanted: list[tuple[Caption, str]], seed: int) -> np.ndarray:
    """Return the model's edits, `(N, 32, 32, 3)`, from noise that depends on the seed alone."""
    pipeline.set_progress_bar_config(disable=True)
    images = [PILImage.fromarray(render(source)) for source, _ in wanted]
    prompts = [instruction(colour) for _, colour in wanted]
    generators = [torch.Generator().manual_seed(1000 * seed + index) for index in range(len(wanted))]
    made = pipeline(image=images, prompt=prompts, generator=generators, guidance_scale=1.0, **CALL).images
    return np.stack([np.asarray(image) for image in made])


def score(images: np.ndarray, wanted: list[tuple[Caption, str]]) -> np.ndarray:
    return oracle_score(images, [replace(source, colour=colour).text for source, colour in wanted])


def tune(base: Path, run: dict, steps: int, output: Path) -> tuple[FluxKontextPipeline, float]:
    """Train on pairs, and return the tuned pipeline and the relative change of the error on held-out winners."""
    pipeline = FluxKontextPipeline.from_pretrained(base)
    args = DiffusionSDPOConfig(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=16,
        learning_rate=2e-4,
        beta=100.0,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        resolution=IMAGE_SIZE,
        random_flip=False,
        eval_strategy="steps",
        eval_steps=steps,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_num_workers=0,
        **run,
    )
    trainer = DiffusionSDPOTrainer(pipeline, None, args, pairs(400, 1), pairs(60, 2))
    trainer.train()
    changes = [entry.get("eval_errors/winner_change_relative") for entry in trainer.state.log_history]
    return trainer.pipeline, [change for change in changes if change is not None][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench_output/edit"), help="folder of the base")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--base_steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32, help="of the base's training")
    parser.add_argument("--steps", type=int, default=60, help="on pairs")
    parser.add_argument("--edits", type=int, default=120, help="edits that the oracle scores")
    options = parser.parse_args()
    base = options.output / "base"
    if not (base / "model_index.json").is_file():
        pipeline = new_pipeline(seed=0)
        train_base(pipeline, options.base_steps, options.batch, seed=0)
        pipeline.save_pretrained(base)
    wanted = edits(options.edits, seed=3)
    columns = {"source": np.stack([render(source) for source, _ in wanted])}
    columns["base"] = edited(FluxKontextPipeline.from_pretrained(base), wanted, seed=0)
    before = score(columns["base"], wanted)
    results = {"base": {"score": float(before.mean())}}
    for name, run in RUNS.items():
        pipeline, change = tune(base, run, options.steps, options.output / "run")
        columns[name] = edited(pipeline, wanted, seed=0)
        after = score(columns[name], wanted)
        error = float((after - before).std(ddof=1) / len(after) ** 0.5)
        gain = float((after - before).mean())
        results[name] = {"score": float(after.mean()), "gain": gain, "standard_error": error, "winners": change}
        print(name, results[name], flush=True)
    columns["wanted"] = np.stack([render(replace(source, colour=colour)) for source, colour in wanted])
    options.results.mkdir(parents=True, exist_ok=True)
    write_tiles(options.results / "edit_images.png", np.stack([images[:DRAWN] for images in columns.values()], axis=1))
    (options.results / "edit.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
