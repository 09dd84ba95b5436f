"""Suggestions for misspelt names in error messages."""

import difflib
import re
from collections.abc import Iterable

# Options of other trainers (diffusers' scripts, kohya, SimpleTuner, OneTrainer) -> ours.
OTHER_TOOLS = {
    "base_model": "model_name_or_path",
    "pretrained_model_name": "model_name_or_path",
    "pretrained_model_name_or_path": "model_name_or_path",
    "pretrained_model": "model_name_or_path",
    "train_data_dir": "dataset_name",
    "instance_data_dir": "dataset_name",
    "dataset_dir": "dataset_name",
    "output_name": "output_dir",
    "lr": "learning_rate",
    "unet_lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "lr_warmup_steps": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "max_train_steps": "max_steps",
    "epochs": "num_train_epochs",
    "max_train_epochs": "num_train_epochs",
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "network_dim": "lora_r",
    "network_alpha": "lora_alpha",
    "network_weights": "adapter_name_or_path",
    "optimizer": "optim",
    "optimizer_type": "optim",
    "use_8bit_adam": "optim",
    "mixed_precision": "bf16",
    "dpo_beta": "beta",
    "beta_dpo": "beta",
    "min_snr_gamma": "snr_gamma",
    **dict.fromkeys(("logit_mean", "logit_std", "mode_scale"), "weighting_kwargs"),
    "use_ema": "ema_decay",
    "flip_aug": "random_flip",
    "enable_bucket": "aspect_ratio_buckets",
    "cache_latents": "precompute_latents",
    "cache_latents_to_disk": "precompute_latents",
    "vae_batch_size": "vae_encode_batch_size",
    "checkpointing_steps": "save_steps",
    "save_every_n_steps": "save_steps",
    "checkpoints_total_limit": "save_total_limit",
    "validation_prompt": "sample_prompts",
    "validation_prompts": "sample_prompts",
    "validation_steps": "sample_steps",
    "sample_every_n_steps": "sample_steps",
    "max_data_loader_n_workers": "dataloader_num_workers",
    "log_with": "report_to",
}
# Other names of choices.
CHOICE_ALIASES = {"dpo": "sigmoid"}
# Choices of other trainers that have another name and another constant here.
_CHOICES_ELSEWHERE = {"exo_pair": ("dmpo", "TRL's `exo_pair` is `dmpo`, and its `label_smoothing` is `dmpo_alpha`.")}
_MORE = {
    "warmup_steps": " A value below 1 is a share of all steps.",
    "optim": " `adamw_8bit` is the optimizer in 8 bits.",
}
# Patterns of options that do not exist here, with the reason.
_ABSENT = (
    (
        "^(label_smoothing|dspo_threshold|dmpo_alpha|mapo_temperature|mapo_scale|simpo_gamma|dpop_lambda|linear_eta|smpo_.*)$",
        "Constants of single losses are keys of `loss_kwargs`.",
    ),
    ("text_encoder|(^|_)te[123]?_lr|textual_inversion", "Text encoders are not trained."),
    (
        "lycoris|loha|lokr|lora_type|lora_algo|peft_type|network_(module|args)",
        "The only adapters are LoRAs (`use_peft`), also as DoRA and rsLoRA: `load_lora_weights` reads no others.",
    ),
)


def other_tools_option(name: str, options: Iterable[str]) -> str:
    """Return a sentence for the end of an error message on another trainer's option, or an empty string.

    Args:
        name (`str`): The unknown name, without dashes before it.
        options (`Iterable[str]`): Names of this command's options.
    """
    word = name.lower().replace("-", "_")
    ours = OTHER_TOOLS.get(word)
    if ours is not None and ours in options:
        return f" Here it is `--{ours}`.{_MORE.get(ours, '')}"
    return next((f" {reason}" for pattern, reason in _ABSENT if re.search(pattern, word)), "")


def did_you_mean(word: str, names: Iterable[str], prefix: str = "") -> str:
    """Return a sentence with the nearest valid names, for the end of an error message.

    Args:
        word (`str`): The unknown name; dashes count as underscores.
        names (`Iterable[str]`): The valid names.
        prefix (`str`): Written before each name, such as `--`.

    Returns:
        `str`: Such as " Did you mean `beta`?", with up to two names, or an empty string if none is near.
    """
    names = list(names)
    ours, reason = _CHOICES_ELSEWHERE.get(word, ("", ""))
    if ours in names:
        return f" {reason}"
    near = difflib.get_close_matches(word.lower().replace("-", "_"), names, n=2, cutoff=0.7)
    return f" Did you mean {' or '.join(f'`{prefix}{name}`' for name in near)}?" if near else ""
