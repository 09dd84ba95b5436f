"""Train a LoRA of the demo's pipeline for one step, save it, and load it in plain diffusers. run_pythons.py runs this
under every Python it finds."""

import sys
import tempfile
from pathlib import Path

import datasets
import torch
from peft import LoraConfig
from PIL import Image

import trl_diffusion_sdpo
from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_pipelines import stable_diffusion  # noqa: E402


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base, output = f"{folder}/base", f"{folder}/run"
        stable_diffusion.build().save_pretrained(base)
        args = DiffusionSDPOConfig(
            **{"output_dir": output, "max_steps": 1, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none"},
            **{"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True},
        )
        trainer = DiffusionSDPOTrainer(base, None, args, pairs(), peft_config=LoraConfig(r=2))
        trainer.train()
        trainer.save_model()
        plain = type(trainer.pipeline).from_pretrained(base)
        before = predict(plain.unet)
        plain.load_lora_weights(output)
        after = predict(plain.unet)
        torch.testing.assert_close(after, predict(trainer.denoiser), rtol=1e-4, atol=1e-5)
        assert (after - before).abs().max() > 1e-4, "the step changed nothing"
    python = ".".join(map(str, sys.version_info[:3]))
    sys.stdout.write(f"Python {python}, torch {torch.__version__}: {trl_diffusion_sdpo.__version__} tunes a LoRA.\n")


def pairs() -> datasets.Dataset:
    """Four preference pairs of plain colours."""
    images = [Image.new("RGB", (16, 16), (40 * number, 200, 90)) for number in range(8)]
    rows = zip(images[:4], images[4:], strict=True)
    return datasets.Dataset.from_list(
        [{"prompt": f"number {number}", "chosen": one, "rejected": other} for number, (one, other) in enumerate(rows)]
    )


def predict(unet: torch.nn.Module) -> torch.Tensor:
    """Its prediction for fixed noise and text, (2, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(0)
    noisy, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        return unet.eval()(noisy, torch.tensor([10, 700]), text[..., : unet.config.cross_attention_dim]).sample


if __name__ == "__main__":
    main()
