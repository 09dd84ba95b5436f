"""Import, one optimizer step of a LoRA on the demo's tiny pipeline, save, and load it back in plain diffusers: what
`make test-pythons` runs under every Python that it finds."""

import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig

import trl_diffusion_sdpo
from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import build_pairs  # noqa: E402
from tiny_pipelines import stable_diffusion  # noqa: E402


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base, output = f"{folder}/base", f"{folder}/run"
        stable_diffusion.build().save_pretrained(base)
        args = DiffusionSDPOConfig(
            **{"output_dir": output, "max_steps": 1, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none"},
            **{"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True},
        )
        trainer = DiffusionSDPOTrainer(base, None, args, build_pairs(4), peft_config=LoraConfig(r=2))
        trainer.train()
        trainer.save_model()
        loaded = type(trainer.pipeline).from_pretrained(base)
        loaded.load_lora_weights(output)
        saved, trained = lora_of(loaded.unet), lora_of(trainer.denoiser)
        assert len(saved) == len(trained) > 0
        assert all(torch.equal(tensor, trained[name]) for name, tensor in saved.items())
        assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name), "the step moved nothing"
    python = ".".join(map(str, sys.version_info[:3]))
    sys.stdout.write(f"Python {python}, torch {torch.__version__}: {trl_diffusion_sdpo.__version__} tunes a LoRA.\n")


def lora_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Factors by module and letter; the adapter's own name is left out."""
    return {
        ".".join(
            part for part in name.split(".") if part not in ("default", "default_0", "base_model", "model")
        ): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" in name
    }


if __name__ == "__main__":
    main()
