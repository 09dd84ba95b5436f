"""`DiffusionSDPOConfig`, the settings of `DiffusionSDPOTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ...utils._compat import dictionary_settings
from ...utils.secrets import masked
from .all_arguments import (
    AllArguments,
    settings_of,
    settled_loss_kwargs,
    settled_loss_type,
    settled_mapping,
    settled_number,
    settled_resolution,
)
from .checks import check_settings
from .declaring import RESUME

# Settings of transformers that change the trained weights. A resumed run must have the values of its checkpoint.
ALSO_COMPARED = ("per_device_train_batch_size", "gradient_accumulation_steps", "mixed_precision", "seed", "data_seed")


@dataclass
class DiffusionSDPOConfig(AllArguments):
    r"""
    Configuration of [`DiffusionSDPOTrainer`].

    It has the settings of [`~transformers.TrainingArguments`], [`PipelineArguments`], [`MemoryArguments`],
    [`NoiseArguments`], [`LossArguments`], [`DataArguments`], [`WinnerArguments`], [`SampleArguments`] and
    [`RunArguments`]. Leave settings such as `beta` and `learning_rate` out: the trainer sets them to the defaults of
    the model's family and the loss, and logs the values.

    [`~transformers.HfArgumentParser`] turns this class into command line arguments.

    Example:

    ```python
    from trl_diffusion_sdpo import DiffusionSDPOConfig

    args = DiffusionSDPOConfig(output_dir="sd15-sdpo", max_steps=2000, per_device_train_batch_size=4)
    args.safeguard  # None: the trainer sets "parameter" if the loss and the engine allow it
    args.beta  # None: the trainer sets the default of the model's family and the loss
    ```

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: if unset, the default of the model's family for LoRA or full tuning.
    > - `weight_decay`: `0.01`, as in diffusers' scripts.
    > - `lr_scheduler_type`: `"constant_with_warmup"`, as in the paper.
    > - `logging_steps`: `10`.
    > - `dataloader_num_workers`: if unset, the trainer chooses it from the size of the data and the number of cores.
    > - `bf16`: `True` if the accelerator supports bf16 and `fp16` is not set.
    """

    _VALID_DICT_FIELDS = dictionary_settings(
        "model_init_kwargs",
        "ref_model_init_kwargs",
        "loss_kwargs",
        "weighting_kwargs",
        "safeguard_kwargs",
        "inversion_kwargs",
        "winner_budget_kwargs",
        "bucket_kwargs",
        "sample_kwargs",
    )

    if TYPE_CHECKING:  # types after `__post_init__`
        output_dir: str
        model_init_kwargs: dict[str, Any] | None = None
        ref_model_init_kwargs: dict[str, Any] | None = None

    # Settings of `TrainingArguments` with other defaults here.
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Initial learning rate. If unset, the default of the model's family for LoRA or full tuning."
        },
    )
    weight_decay: float = field(
        default=0.01, metadata={"help": "Weight decay. The default is that of diffusers' scripts."}
    )
    lr_scheduler_type: str = field(
        default="constant_with_warmup",
        metadata={"help": "Schedule of the learning rate. The default, constant after the warm-up, is the paper's."},
    )
    logging_steps: float = field(
        default=10,
        metadata={"help": "Number of optimizer steps between two logs; below 1, a share of all steps."},
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Whether to train under bf16 autocast. If unset, on if the accelerator has it and `fp16` is off."
        },
    )

    def __post_init__(self) -> None:
        for name, setting in settings_of(type(self)).items():
            value = getattr(self, name)
            if setting.types == {float} and isinstance(value, str):
                setattr(self, name, settled_number(name, value))  # YAML reads `1e-4` as text
            if setting.types == {list[float]} and isinstance(value, (list, tuple)):
                setattr(self, name, [settled_number(name, item) for item in value])
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _accelerator_has_bf16()
        workers = self.dataloader_num_workers
        if workers is None:  # the trainer chooses later, from the data, but transformers checks it now
            self.dataloader_num_workers = 0 if self.dataloader_prefetch_factor is None else 1
        super().__post_init__()
        if workers is None:
            self.dataloader_num_workers = None
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # each forward pass uses every trainable weight
        self.remove_unused_columns = False  # the format of the data set selects its columns
        self.logging_nan_inf_filter = False  # the filter would make the CPU wait for the device
        for name in ("sample_prompts", "sample_sources", "sample_scorers"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        self.loss_type = settled_loss_type(self.loss_type)
        self.loss_kwargs: dict[str, float | str] = settled_loss_kwargs(self.loss_kwargs)
        self.weighting_kwargs: dict[str, Any] = settled_mapping("weighting_kwargs", self.weighting_kwargs)
        self.safeguard_kwargs: dict[str, Any] = settled_mapping("safeguard_kwargs", self.safeguard_kwargs)
        self.inversion_kwargs: dict[str, Any] = settled_mapping("inversion_kwargs", self.inversion_kwargs)
        self.winner_budget_kwargs: dict[str, Any] = settled_mapping("winner_budget_kwargs", self.winner_budget_kwargs)
        self.bucket_kwargs: dict[str, Any] = settled_mapping("bucket_kwargs", self.bucket_kwargs)
        self.sample_kwargs: dict[str, Any] = settled_mapping("sample_kwargs", self.sample_kwargs)
        self.resolution = settled_resolution(self.resolution)
        check_settings(self)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings, with secrets such as tokens masked: what trackers and the files of a run get."""
        return masked(super().to_dict())

    def __str__(self) -> str:
        settings = "".join(f"{name}={value},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{settings})"

    __repr__ = __str__


def resume_settings() -> tuple[str, ...]:
    """Return the names of the settings that change the trained weights. A checkpoint records them, and a run that
    resumes with other values says so."""
    names = (name for name, setting in settings_of(DiffusionSDPOConfig).items() if RESUME in setting.facts)
    return (*names, *ALSO_COMPARED)


def _accelerator_has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
