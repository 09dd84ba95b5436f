"""A loss and a model family of your own, trained on the package's tiny model: nothing is downloaded.

    python examples/scripts/own_loss_and_family.py --max_steps 20

The loss is a squared hinge on the logit. The family trains `OwnPipeline`, whose UNet predicts noise: copy `OwnFamily`
and change it for your pipeline. A family in your own package is registered by its import path, such as
"my_package.my_family:OwnFamily".
"""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer, PairTerms, register_family, register_loss
from trl_diffusion_sdpo.families import DDPM_DEFAULTS, DDPMProcess, Family
from trl_diffusion_sdpo.tools.demo.pairs import off_policy_pairs
from trl_diffusion_sdpo.tools.demo.pipeline import load_base_pipeline


def squared_hinge(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """Return `relu(1 - u)^2` for the logit `u` of each pair, `(B,)`."""
    return torch.relu(1 - terms.logit(beta)).square()


class OwnPipeline(StableDiffusionPipeline):
    """A pipeline that the package has no family for."""


class OwnFamily(Family):
    """How to encode prompts for `OwnPipeline`, and what its denoiser takes."""

    name = "Own"
    pipeline_classes = ("OwnPipeline",)
    denoiser_name = "unet"
    frozen_components = ("vae", "text_encoder")
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    learning_rate_full = 1e-5
    learning_rate_lora = 1e-4
    defaults = DDPM_DEFAULTS
    noise_process_class = DDPMProcess

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        embeddings, _ = self.call_encode_prompt(prompts, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeddings}  # (N, tokens, width)

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        text = conditioning["prompt_embeds"].to(latents.dtype)
        return {"sample": latents, "timestep": timesteps, "encoder_hidden_states": text}


def main(words: list[str] | None = None) -> DiffusionSDPOTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--pairs_per_prompt", type=int, default=2, help="pairs of each of the 72 prompts")
    parser.add_argument("--output_dir", default="own-loss-and-family")
    options = parser.parse_args(words)

    register_loss("squared_hinge", squared_hinge, reads_logit_only=True, anchor="branch")
    register_family("OwnPipeline", f"{__name__}:OwnFamily")
    args = DiffusionSDPOConfig(
        options.output_dir,
        loss_type="squared_hinge",
        beta=200.0,
        max_steps=options.max_steps,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
    )
    pipeline = OwnPipeline(**load_base_pipeline().components, requires_safety_checker=False)
    pairs = off_policy_pairs(per_prompt=options.pairs_per_prompt)
    trainer = DiffusionSDPOTrainer(pipeline, None, args, pairs, peft_config=LoraConfig(r=4))
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
