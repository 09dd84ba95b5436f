"""Arguments of [`DiffusionSDPOTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..utils.secrets import masked
from .config.all_arguments import (
    AllArguments,
    read_words,
    settings_of,
    settled_loss_kwargs,
    settled_loss_type,
    settled_mapping,
    settled_resolution,
)
from .config.checks import check_settings
from .config.declaring import RESUME

# Settings of transformers that change the trajectory.
INHERITED = ("per_device_train_batch_size", "gradient_accumulation_steps", "mixed_precision", "seed", "data_seed")


@dataclass
class DiffusionSDPOConfig(AllArguments):
    r"""
    Configuration of [`DiffusionSDPOTrainer`].

    It has the settings of [`~transformers.TrainingArguments`], [`PipelineArguments`], [`MemoryArguments`],
    [`NoiseArguments`], [`LossArguments`], [`DataArguments`], [`WinnerArguments`], [`SampleArguments`] and
    [`RunArguments`]. If a setting is `None`, the trainer uses the default of the model's family and the loss, and logs
    its choice.

    [`~transformers.HfArgumentParser`] can turn this class into command line arguments.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: if unset, the default of the model's family for LoRA or full tuning.
    > - `weight_decay`: `0.01`, as in diffusers' scripts.
    > - `lr_scheduler_type`: `"constant_with_warmup"`, as published.
    > - `logging_steps`: `10`.
    > - `dataloader_num_workers`: if unset, the trainer chooses it by data and cores.
    > - `bf16`: `True` on an accelerator that supports it, unless `fp16` is set.
    > - `remove_unused_columns`: `False`, because the format of the data set selects its columns.
    > - `logging_nan_inf_filter`: `False`, because a loss that is not finite stops the run before the weights change.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + [
        "model_init_kwargs",
        "ref_model_init_kwargs",
        "loss_kwargs",
        "weighting_kwargs",
        "inversion_kwargs",
        "winner_budget_kwargs",
        "bucket_kwargs",
        "sample_kwargs",
    ]

    if TYPE_CHECKING:  # types after `__post_init__`
        output_dir: str
        model_init_kwargs: dict[str, Any] | None = None
        ref_model_init_kwargs: dict[str, Any] | None = None

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Initial learning rate. If unset, it is the default of the model's family for LoRA or full tuning."
        },
    )
    weight_decay: float = field(
        default=0.01, metadata={"help": "Weight decay. The default is that of diffusers' scripts."}
    )
    lr_scheduler_type: str = field(
        default="constant_with_warmup",
        metadata={"help": "Schedule of the learning rate. The default is constant after warm-up, as published."},
    )
    logging_steps: float = field(
        default=10,
        metadata={
            "help": "Optimizer steps between two logs, as an integer. A number below 1 is a share of all training "
            "steps."
        },
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Whether to use bf16 autocast. If unset, it is used if the accelerator supports it and `fp16` is "
            "not set."
        },
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Setting of transformers without effect. The format of the data set selects its columns."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Setting of transformers without effect. A loss that is not finite stops the run before the "
            "weights change."
        },
    )

    def __post_init__(self) -> None:
        read_words(self)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _accelerator_has_bf16()
        workers = self.dataloader_num_workers
        if workers is None:  # the trainer chooses later, from the data, but the checks of transformers need a number
            self.dataloader_num_workers = 0 if self.dataloader_prefetch_factor is None else 1
        super().__post_init__()
        if workers is None:
            self.dataloader_num_workers = None
        assert isinstance(self.accelerator_config, AcceleratorConfig), "`super().__post_init__` parses it."
        if self.accelerator_config.dispatch_batches is None:
            # accelerate cannot send the prompts and seeds of a batch between processes.
            self.accelerator_config.dispatch_batches = False
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # each forward pass uses every trainable weight
        if isinstance(self.sample_prompts, str):
            self.sample_prompts = [self.sample_prompts]
        if isinstance(self.sample_sources, str):
            self.sample_sources = [self.sample_sources]
        if isinstance(self.sample_scorers, str):
            self.sample_scorers = [self.sample_scorers]
        self.loss_type = settled_loss_type(self.loss_type)
        self.loss_kwargs: dict[str, float] = settled_loss_kwargs(self.loss_kwargs)
        self.weighting_kwargs: dict[str, Any] = settled_mapping("weighting_kwargs", self.weighting_kwargs)
        self.inversion_kwargs: dict[str, Any] = settled_mapping("inversion_kwargs", self.inversion_kwargs)
        self.winner_budget_kwargs: dict[str, Any] = settled_mapping("winner_budget_kwargs", self.winner_budget_kwargs)
        self.bucket_kwargs: dict[str, Any] = settled_mapping("bucket_kwargs", self.bucket_kwargs)
        self.sample_kwargs: dict[str, Any] = settled_mapping("sample_kwargs", self.sample_kwargs)
        self.resolution = settled_resolution(self.resolution)
        check_settings(self)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings without secrets. Saved files and trackers get this dictionary."""
        return masked(super().to_dict())

    def __str__(self) -> str:
        settings = "".join(f"{name}={value},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{settings})"

    __repr__ = __str__


def resume_settings() -> tuple[str, ...]:
    """Return the names of the settings that change the trajectory."""
    names = (name for name, setting in settings_of(DiffusionSDPOConfig).items() if RESUME in setting.facts)
    return (*names, *INHERITED)


def _accelerator_has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
