"""Train a model on its own images, in rounds.

Each round generates images, scores them, pairs good with bad ones and trains a LoRA on the pairs, from which the next
round starts. At the end, the scorers of `--judges` compare the base and every round on test prompts. Repeat a call that
was interrupted: it resumes.

```bash
python examples/scripts/self_improve.py --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --prompts prompts.txt --test_prompts test.txt --scorers pickscore --judges hpsv2.1 --learning_rate 1e-4
```

Without `--model_name_or_path`, it trains the package's tiny model, on the CPU:

```bash
python examples/scripts/self_improve.py --output_dir self-improve
```
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig

from trl_diffusion_sdpo import (
    Candidate,
    DiffusionSDPOConfig,
    DiffusionSDPOTrainer,
    evaluate_models,
    load_pairs,
    load_scorer,
)
from trl_diffusion_sdpo.tools.demo.pipeline import base_pipeline_folder
from trl_diffusion_sdpo.tools.demo.world import IMAGE_SIZE, captions
from trl_diffusion_sdpo.tools.evaluation.images import ImageSettings
from trl_diffusion_sdpo.tools.evaluation.prompts import distinct_prompts, read_prompts
from trl_diffusion_sdpo.tools.pairing.generate import Pairing, generate_pairs

EMBEDDED_SCORER = "trl_diffusion_sdpo.tools.demo.oracle:oracle"


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", help="Hub id or folder of the base pipeline; the package's tiny model if unset")
    add("--prompts", help="file of prompts to train on; half of the tiny model's if unset")
    add(
        "--test_prompts",
        help="file of prompts to compare on; the other half of the tiny model's if unset",
    )
    add("--scorers", nargs="+", default=[EMBEDDED_SCORER], help="choose the pairs")
    add("--judges", nargs="+", help="compare the models; `--scorers` if unset")
    add("--rounds", type=int, default=2)
    add("--images", type=int, default=16, help="images of each prompt in each round")
    add("--margin", type=float, default=1.0, help="smallest difference of a pair's rewards, in standard deviations")
    add("--max_steps", type=int, default=100, help="optimizer steps per round")
    add("--learning_rate", type=float, default=1e-3)
    add("--beta", type=float, default=None, help="pull towards the model that the round starts from")
    add("--lora_rank", type=int, default=16)
    add(
        "--noise_source",
        default="shared",
        choices=["shared", "generated"],
        help="`generated`: train each image at the noise it came from",
    )
    add("--safeguard", default="parameter", choices=["none", "output", "parameter"])
    add("--safeguard_mu", type=float, default=0.8)
    add("--batch_size", type=int, default=16)
    add("--guidance_scale", type=float, default=3.0, help="classifier-free guidance of all images")
    add("--num_inference_steps", type=int, default=12)
    add("--resolution", type=int, default=IMAGE_SIZE)
    add("--seed", type=int, default=0)
    add("--output_dir", default="self-improve")
    return parser.parse_args(argv)


def image_settings(options, first_seed, images):
    return ImageSettings(
        seeds=tuple(range(first_seed, first_seed + images)),
        call_kwargs={
            "guidance_scale": options.guidance_scale,
            "num_inference_steps": options.num_inference_steps,
            "height": options.resolution,
            "width": options.resolution,
        },
        batch_size=64 if options.model_name_or_path is None else 4,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def train_round(options, model, folder, run, is_first):
    """Train a LoRA on a folder of pairs, from the last checkpoint if there is one. A finished `run` stays as it is."""
    if (run / "README.md").is_file():
        return
    args = DiffusionSDPOConfig(
        str(run),
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        beta=options.beta,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=options.batch_size,
        resolution=options.resolution,
        random_flip=False,
        noise_source=options.noise_source,
        safeguard=options.safeguard,
        safeguard_mu=None if options.safeguard == "none" else options.safeguard_mu,
        save_steps=50,
        save_total_limit=1,
        report_to="none",
        seed=options.seed,
    )
    # Later rounds train the same LoRA on. The reference is the model that the round started from.
    adapter = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_rank) if is_first else None
    trainer = DiffusionSDPOTrainer(model, None, args, load_pairs(folder), peft_config=adapter)
    trainer.train(resume_from_checkpoint=any(run.glob("checkpoint-*")) or None)
    trainer.save_model()


def main(argv=None):
    options = parse(argv)
    output = Path(options.output_dir)
    embedded = [caption.text for caption in captions()]
    prompts = distinct_prompts(embedded[::2])
    test_prompts = distinct_prompts(embedded[1::2])
    if options.prompts is not None:
        prompts = read_prompts(options.prompts)
    if options.test_prompts is not None:
        test_prompts = read_prompts(options.test_prompts)
    base = options.model_name_or_path or str(base_pipeline_folder())
    scorers = [load_scorer(name) for name in options.scorers]
    judges = [load_scorer(name) for name in options.judges] if options.judges else scorers
    models = [Candidate("base", base)]
    model = base
    for number in range(1, options.rounds + 1):
        pairs = output / f"pairs-{number}"
        run = output / f"round-{number}"
        settings = image_settings(options, 1000 * options.seed + options.images * number, options.images)
        count = generate_pairs(
            Candidate("model", model), prompts, scorers, pairs, settings, Pairing(margin=options.margin)
        )
        print(f"Round {number}: {count} pairs of {len(prompts.prompts)} prompts")
        train_round(options, model, pairs, run, is_first=number == 1)
        model = str(run)
        models.append(Candidate(f"round-{number}", model))
    evaluation = evaluate_models(
        models, test_prompts, judges, output / "evaluation", image_settings(options, 10**6, 4)
    )
    for name, by_model in evaluation.scores.items():
        print(f"{name}: " + ", ".join(f"{model} {scores.mean():.3f}" for model, scores in by_model.items()))
    for comparison in evaluation.comparisons:
        print(f"{comparison.model}: {comparison.verdict}")
    return evaluation


if __name__ == "__main__":
    main()
