"""Suggestions for error messages about misspelt names, and about options of other trainers."""

import difflib
from collections.abc import Iterable

# Our options -> their names in other trainers (diffusers' scripts, kohya, SimpleTuner, OneTrainer).
_NAMES_ELSEWHERE = {
    "model_name_or_path": "base_model pretrained_model pretrained_model_name pretrained_model_name_or_path",
    "dataset_name": "train_data_dir instance_data_dir dataset_dir",
    "output_dir": "output_name",
    "learning_rate": "lr unet_lr",
    "lr_scheduler_type": "lr_scheduler",
    "warmup_steps": "lr_warmup_steps warmup_ratio",
    "per_device_train_batch_size": "batch_size train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "max_steps": "max_train_steps",
    "num_train_epochs": "epochs max_train_epochs",
    "lora_r": "rank lora_rank network_dim",
    "lora_alpha": "network_alpha",
    "adapter_name_or_path": "network_weights",
    "optim": "optimizer optimizer_type use_8bit_adam",
    "bf16": "mixed_precision",
    "beta": "dpo_beta beta_dpo",
    "weighting_kwargs": "logit_mean logit_std mode_scale",
    "ema_decay": "use_ema",
    "random_flip": "flip_aug",
    "aspect_ratio_buckets": "enable_bucket",
    "precompute_latents": "cache_latents cache_latents_to_disk",
    "vae_encode_batch_size": "vae_batch_size",
    "save_steps": "checkpointing_steps save_every_n_steps",
    "save_total_limit": "checkpoints_total_limit",
    "sample_prompts": "validation_prompt validation_prompts",
    "sample_steps": "validation_steps sample_every_n_steps",
    "dataloader_num_workers": "max_data_loader_n_workers",
    "report_to": "log_with",
}
OTHER_TOOLS = {name: ours for ours, names in _NAMES_ELSEWHERE.items() for name in names.split()}
# Other names of a setting's value -> the value.
CHOICE_ALIASES = {"dpo": "sigmoid"}


def other_tools_option(name: str, options: Iterable[str]) -> str:
    """Return a sentence that says what another trainer's option is called here, for the end of an error message, or an
    empty string if the option is not known.

    Args:
        name (`str`): Name of the option, without leading dashes.
        options (`Iterable[str]`): Names of this command's options.
    """
    ours = OTHER_TOOLS.get(name.lower().replace("-", "_"))
    return f" The name of this option here is `--{ours}`." if ours is not None and ours in options else ""


def did_you_mean(word: str, names: Iterable[str], prefix: str = "") -> str:
    """Return a sentence that suggests the names most similar to an unknown one, for the end of an error message.

    Args:
        word (`str`): The unknown name. Dashes count as underscores.
        names (`Iterable[str]`): Valid names.
        prefix (`str`): Text before each suggested name, such as `--`.

    Returns:
        `str`: A question such as " Did you mean `beta`?" with one or two names, or an empty string.
    """
    names = list(names)
    near = difflib.get_close_matches(word.lower().replace("-", "_"), names, n=2, cutoff=0.7)
    return f" Did you mean {' or '.join(f'`{prefix}{name}`' for name in near)}?" if near else ""
