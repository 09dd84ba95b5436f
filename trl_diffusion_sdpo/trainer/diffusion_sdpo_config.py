"""Arguments of [`DiffusionSDPOTrainer`], and the checks that need nothing but the arguments."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from ..families.noise import WEIGHTINGS
from ..families.timestep_sampling import DENSITIES
from ..losses import ANCHORS, GRANULARITIES, LOSSES, SAFEGUARDS, check_loss_kwargs, check_safeguard, loss_spec
from ..losses.preference import LOSS_KWARG_RANGES
from ..masking import masked
from .argument_groups import DataArguments, PipelineArguments, RunArguments, WinnerArguments
from .config_checks import (
    check_data,
    check_inherited,
    check_length,
    check_noise,
    check_parameter_safeguard,
    check_pipeline_arguments,
    check_reference,
    check_winner_arguments,
    settled_resolution,
)
from .setting_words import read_words


@dataclass
class DiffusionSDPOConfig(PipelineArguments, DataArguments, WinnerArguments, RunArguments, TrainingArguments):
    r"""
    Configuration of [`DiffusionSDPOTrainer`]: everything of [`~transformers.TrainingArguments`], of
    [`PipelineArguments`], [`DataArguments`], [`WinnerArguments`] and [`RunArguments`], and what preference tuning of a
    diffusion model adds. Fields left `None` take the value published for the model's family and the loss; the trainer
    logs what it chose.

    Using [`~transformers.HfArgumentParser`] this class turns into command line arguments.

    Parameters:

        > Parameters that control the noise

        timestep_range (`list[int]`, *optional*):
            Two whole numbers, lowest timestep and the first above the highest, such as `0 1000`; all if unset.
        timesteps (`list[float]`, *optional*):
            The only timesteps to train at, each as often: those that a distilled model's few steps visit, such as
            `999 749 499 249`. A density over all if unset.
        weighting_scheme (`str`, *optional*):
            Density of the timesteps: `"none"` (uniform), `"logit_normal"` or `"mode"`, before the shift that the
            pipeline's scheduler states; the family's own if unset.
        logit_mean (`float`, *optional*, defaults to `0.0`): Mean of `"logit_normal"`; above 0 draws more noise.
        logit_std (`float`, *optional*, defaults to `1.0`): Standard deviation of `"logit_normal"`.
        mode_scale (`float`, *optional*, defaults to `1.29`): Scale of `"mode"`; 0 is uniform.
        timestep_weighting (`str`, *optional*, defaults to `"none"`):
            `"one_minus_t_squared"` weighs errors of a flow model by `(1 - t)^2`, `t` the share of noise.
        snr_gamma (`float`, *optional*):
            Gamma of [min-SNR](https://huggingface.co/papers/2303.09556), which weighs the errors by timestep; 5.0 is
            usual. No weighting if unset.
        noise_offset (`float`, *optional*, defaults to `0.0`):
            Scale of a noise that is constant over the image, per channel, added to the noise.
        input_perturbation (`float`, *optional*, defaults to `0.0`):
            Scale of extra noise that the model's input carries and its target does not; 0.1 is usual.
        guidance_scale (`float`, *optional*):
            Guidance that a distilled denoiser, such as FLUX.1-dev's, takes as an input; the family's own if unset.

        > Parameters that control the loss and the safeguard

        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"`, `"hinge"`, `"ipo"`, `"robust"`, `"dspo"`, `"dspo_sdxl"`, `"dmpo"`, `"sft"`, `"mapo"`,
            `"simpo"`, `"dpop"`, `"linear"` or `"smpo"`.
        beta (`float`, *optional*):
            Strength of the tie to the reference, in the half form: the logit is `-(beta / 2)` times the margin of the
            mean squared errors.
        safeguard (`str`, *optional*, defaults to `"output"`):
            Scales the loser's gradient so that the winner's error does not rise to first order. `"output"` measures
            at the model's output, from the residuals, which costs nothing; `"parameter"` from the true gradients, one
            backward pass per branch and one lambda per optimizer step; `"none"` is the plain loss.
        safeguard_mu (`float`, *optional*):
            Share of the winner's descent that must remain, in `[0, 1]`.
        safeguard_granularity (`str`, *optional*, defaults to `"batch"`):
            `"batch"`, one lambda a micro-batch and process, as published; `"pair"`, one a pair, which does not depend
            on how pairs are batched; `"weighted"`, one a micro-batch under the pairs' true weights; `"noise_bin"`, one a
            noise level of the micro-batch.
        safeguard_eps (`float`, *optional*, defaults to `0.0`):
            Added to the dot product; 1e-9 reproduces the authors' code.
        safeguard_anchor (`str`, *optional*):
            What the parameter-space safeguard protects: `"branch"`, the winners' errors as the loss weighs them, or
            `"error"`, their plain mean, at the price of one more backward pass of the winners. The loss's own if
            unset: `"error"` for `ipo`, `dspo`, `dspo_sdxl` and `dmpo`, whose winner branch can raise the winner's
            error, `"branch"` for the others.
        safeguard_low_memory (`bool`, *optional*, defaults to `False`):
            Whether the parameter-space safeguard holds one branch's activations at a time, at the price of one more
            forward pass of the losers. Not with dropout.
        safeguard_diagnostics_steps (`int`, *optional*):
            Optimizer steps between two measurements of the parameter-space safeguard: lambda of output space beside
            its own, and the change of the winners' error on the same batch, noise and timesteps, predicted from its
            gradient and realised by the optimizer. None if unset.
        label_smoothing (`float`, *optional*): Share of flipped labels that `robust` assumes, 0.1 if unset.
        dspo_threshold (`float`, *optional*): Mean squared shift from which `dspo_sdxl` weighs it, 0.1 if unset.
        dmpo_alpha (`float`, *optional*): Distance of `dmpo`'s target preference from 1, 0.01 if unset.
        mapo_temperature (`float`, *optional*): T of `mapo`, 1000 if unset.
        mapo_scale (`float`, *optional*): s of `mapo`, 0.5 if unset.
        simpo_gamma (`float`, *optional*): Target margin of `simpo`, 0.5 if unset.
        dpop_lambda (`float`, *optional*): Charge of `dpop` on a rise of the winner's error, 5 if unset.
        linear_eta (`float`, *optional*): Lowest weight of `linear`, 1e-3 if unset.
        smpo_coefficient (`float`, *optional*): Coefficient of `smpo`, 10 if unset.
        smpo_score_scale (`float`, *optional*): What `smpo` divides score differences by, 1 if unset.

        > Parameters that control sample images

        sample_prompts (`list[str]`, *optional*):
            Prompts drawn with fixed seeds before, during and after training, into `samples/` of the output folder and
            the gallery of the model card.
        sample_steps (`int`, *optional*):
            Optimizer steps between two such drawings; only the first and the last if unset.
        sample_inference_steps (`int`, *optional*, defaults to `30`):
            Denoising steps a drawing takes.
        sample_guidance_scale (`float`, *optional*):
            Guidance scale of the drawings; the pipeline's own if unset.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: chosen by the model's family for LoRA or full tuning if unset.
    > - `weight_decay`: `0.01`, as in diffusers' scripts.
    > - `lr_scheduler_type`: `"constant_with_warmup"`, as published.
    > - `logging_steps`: `10`.
    > - `dataloader_num_workers`: chosen by data and cores if unset.
    > - `bf16`: `True` on an accelerator that has it, unless `fp16` is set.
    > - `remove_unused_columns`: `False`; the columns are the data set format's business.
    > - `logging_nan_inf_filter`: `False`; a loss that is not finite stops the run before the weights change.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs", "ref_model_init_kwargs"]

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "The initial learning rate; the family's own for LoRA or full tuning if unset."},
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay, as in diffusers' scripts."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "The scheduler type to use, constant as published."}
    )
    logging_steps: float = field(
        default=10,
        metadata={
            "help": "Log every X updates steps. Should be an integer or a float in range `[0,1)`. If smaller than 1, "
            "will be interpreted as ratio of total training steps."
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Whether to use bf16 autocast. On where the accelerator has it, if unset and not fp16."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept for compatibility; the data set's format knows its columns."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Kept for compatibility; a loss that is not finite stops the run before a step is taken."},
    )

    # Parameters that control the noise
    timestep_range: list[int] | None = field(
        default=None, metadata={"help": "Lowest timestep and the first above the highest; all if unset."}
    )
    timesteps: list[float] | None = field(
        default=None,
        metadata={"help": "The only timesteps to train at, for models of few steps; a density over all if unset."},
    )
    weighting_scheme: str | None = field(
        default=None,
        metadata={
            "help": "Density of the timesteps: `none` (uniform), `logit_normal` or `mode`; the family's own if unset.",
            "choices": list(DENSITIES),
        },
    )
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of `logit_normal`; above 0 draws more noise."})
    logit_std: float = field(default=1.0, metadata={"help": "Standard deviation of `logit_normal`."})
    mode_scale: float = field(default=1.29, metadata={"help": "Scale of `mode`; 0 is uniform."})
    timestep_weighting: str = field(
        default="none",
        metadata={
            "help": "`one_minus_t_squared` weighs errors of a flow model by (1 - t)^2, t the share of noise.",
            "choices": list(WEIGHTINGS),
        },
    )
    snr_gamma: float | None = field(
        default=None, metadata={"help": "Gamma of min-SNR weighting; 5.0 is usual. No weighting if unset."}
    )
    noise_offset: float = field(default=0.0, metadata={"help": "Scale of the per-channel constant noise."})
    input_perturbation: float = field(
        default=0.0, metadata={"help": "Scale of extra noise that the input carries and the target does not."}
    )

    guidance_scale: float | None = field(
        default=None,
        metadata={"help": "Guidance that a distilled denoiser takes as an input; the family's own if unset."},
    )

    # Parameters that control the loss and the safeguard
    loss_type: str = field(
        default="sigmoid", metadata={"help": f"Type of loss: {', '.join(LOSSES)}.", "choices": list(LOSSES)}
    )
    beta: float | None = field(
        default=None, metadata={"help": "Strength of the tie to the reference; the published one if unset."}
    )
    safeguard: str = field(
        default="output",
        metadata={
            "help": "`output` keeps the winner's error from rising to first order, measured from the residuals; "
            "`parameter` measures from the true gradients, one backward pass per branch; `none` is the plain loss.",
            "choices": list(SAFEGUARDS),
        },
    )
    safeguard_mu: float | None = field(
        default=None, metadata={"help": "Share of the winner's descent that must remain, in [0, 1]."}
    )
    safeguard_granularity: str = field(
        default="batch",
        metadata={
            "help": "One lambda a micro-batch (`batch`, as published), a pair (`pair`), a micro-batch under true "
            "weights (`weighted`), or a noise level of the micro-batch (`noise_bin`).",
            "choices": list(GRANULARITIES),
        },
    )
    safeguard_eps: float = field(
        default=0.0, metadata={"help": "Added to the dot product; 1e-9 reproduces the authors' code."}
    )
    safeguard_anchor: str | None = field(
        default=None,
        metadata={
            "help": "What the parameter-space safeguard protects: the winners' errors as the loss weighs them "
            "(`branch`) or their plain mean (`error`); the loss's own if unset.",
            "choices": list(ANCHORS),
        },
    )
    safeguard_low_memory: bool = field(
        default=False,
        metadata={"help": "Hold one branch's activations at a time, for one more forward pass of the losers."},
    )
    safeguard_diagnostics_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps between two measurements of the parameter-space safeguard."},
    )
    label_smoothing: float | None = field(
        default=None, metadata={"help": "Share of flipped labels that `robust` assumes, in [0, 0.5)."}
    )
    dspo_threshold: float | None = field(
        default=None, metadata={"help": "Mean squared shift from which `dspo_sdxl` weighs it."}
    )
    dmpo_alpha: float | None = field(
        default=None, metadata={"help": "Distance of `dmpo`'s target preference from 1, in (0, 0.5)."}
    )
    mapo_temperature: float | None = field(default=None, metadata={"help": "T of `mapo`."})
    mapo_scale: float | None = field(default=None, metadata={"help": "s of `mapo`."})
    simpo_gamma: float | None = field(default=None, metadata={"help": "Target margin of `simpo`."})
    dpop_lambda: float | None = field(
        default=None, metadata={"help": "Charge of `dpop` on a rise of the winner's error."}
    )
    linear_eta: float | None = field(default=None, metadata={"help": "Lowest weight of `linear`, in [0, 0.5)."})
    smpo_coefficient: float | None = field(default=None, metadata={"help": "Coefficient of `smpo`."})
    smpo_score_scale: float | None = field(
        default=None, metadata={"help": "What `smpo` divides score differences by."}
    )

    # Parameters that control sample images
    sample_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts drawn with fixed seeds before, during and after training."}
    )
    sample_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps between two drawings; only first and last if unset."}
    )
    sample_inference_steps: int = field(default=30, metadata={"help": "Denoising steps a drawing takes."})
    sample_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of the drawings; the pipeline's own if unset."}
    )

    def __post_init__(self):
        read_words(self)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _accelerator_has_bf16()
        open_workers = self.dataloader_num_workers is None
        if open_workers:  # the trainer decides, when it knows the data; for the checks of transformers it is a number
            self.dataloader_num_workers = 0 if self.dataloader_prefetch_factor is None else 1
        super().__post_init__()
        if open_workers:
            self.dataloader_num_workers = None
        if self.accelerator_config.dispatch_batches is None:
            # Batches carry host values (prompts, seeds), which accelerate cannot send between processes.
            self.accelerator_config.dispatch_batches = False
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # weights that take no part do not train
        if isinstance(self.sample_prompts, str):
            self.sample_prompts = [self.sample_prompts]
        for name in (
            "beta",
            "safeguard_mu",
            "winner_budget",
            "ema_decay",
            *LOSS_KWARG_RANGES,
        ):  # YAML reads 2e3 as text
            if isinstance(getattr(self, name), str):
                setattr(self, name, float(getattr(self, name)))
        self.resolution = settled_resolution(self.resolution)
        check_inherited(self)
        check_length(self)
        self._check_loss()
        check_pipeline_arguments(self)
        check_data(self)
        check_noise(self)
        check_reference(self)
        check_winner_arguments(self)

    @property
    def loss_kwargs(self) -> dict[str, float]:
        """The loss's own settings that were given, by name."""
        values = {name: getattr(self, name) for name in LOSS_KWARG_RANGES}
        return {name: value for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """As [`~transformers.TrainingArguments.to_dict`], without secrets: this is what is saved and tracked."""
        return masked(super().to_dict())

    def __str__(self) -> str:
        settings = "".join(f"{name}={value},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{settings})"

    __repr__ = __str__

    def _check_loss(self) -> None:
        check_loss_kwargs(self.loss_type, self.beta, self.loss_kwargs)
        check_safeguard(
            self.safeguard,
            0.0 if self.safeguard_mu is None else self.safeguard_mu,
            self.safeguard_granularity,
            self.safeguard_eps,
        )
        spec = loss_spec(self.loss_type)
        if not spec.uses_beta and self.beta is not None:
            warnings.warn(f"`beta={self.beta}` has no effect: the loss {self.loss_type!r} has none.", stacklevel=3)
        if self.loss_type == "dspo" and self.beta is not None and self.beta > 1:
            warnings.warn(
                f"`beta={self.beta}` with the loss 'dspo' multiplies the distance to the reference; the published "
                "value is 0.001. The form with a beta in the thousands is 'dspo_sdxl'.",
                stacklevel=3,
            )
        unsafe = self.safeguard == "none" or not spec.uses_loser
        if unsafe and (self.safeguard_mu is not None or self.safeguard_eps or self.safeguard_granularity != "batch"):
            reason = "`safeguard='none'`" if spec.uses_loser else f"the loss {self.loss_type!r} has no loser"
            warnings.warn(f"The `safeguard_*` settings have no effect: {reason}.", stacklevel=3)
        check_parameter_safeguard(self, spec)


def _accelerator_has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
