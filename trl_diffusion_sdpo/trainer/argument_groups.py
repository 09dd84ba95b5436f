"""The settings, in groups that [`DiffusionSDPOConfig`] inherits.

A setting is declared once: its field holds the default, its annotation the choices as a `Literal`, the allowed numbers
as a [`Range`] and the lists of settings that it belongs to; its paragraph of the class's docstring is its help. (The
parser of transformers hands all metadata of a field to `argparse`: nothing but the help can be there.)
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from ..families.timestep_sampling import WeightingScheme
from ..losses import LOSSES, Anchor, Granularity, LossType, Safeguard

RESUME = "resume"  # it changes the trajectory: resuming compares it, and the model card shows it
EVALUATION = "evaluation"  # an evaluation of saved weights depends on it

VaeDtype = Literal["auto", "float32", "bfloat16", "float16"]
OnBadRow = Literal["drop", "raise"]
Interpolation = Literal["bilinear", "bicubic", "lanczos"]
TimestepWeighting = Literal["none", "one_minus_t_squared"]
Preconditioner = Literal["plain", "adamw"]


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have.

    Args:
        interval (`str`): Such as `"(0, 1]"`; `"[1, inf)"` has no upper end.
        advice (`str`): Ends the error message.
    """

    interval: str
    advice: str = ""

    def __contains__(self, value: object) -> bool:
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        if not isinstance(value, (int, float)):
            return False
        above = value > low if self.interval[0] == "(" else value >= low
        return above and (value < high if self.interval[-1] == ")" else value <= high)

    def __str__(self) -> str:
        low, _, high = self.interval[1:-1].partition(", ")
        if high != "inf":
            return f"in {self.interval}"
        return f"greater than {low}" if self.interval[0] == "(" else f"at least {low}"


Group = TypeVar("Group", bound=type)


def documented(group: Group) -> Group:
    """Make the paragraphs of a dataclass's docstring the help of its fields.

    Raises:
        `ValueError`: If a field has no paragraph.
    """
    text = inspect.getdoc(group) or ""
    paragraphs = dict(re.findall(r"^    (\w+) \(.*?\):\s+(.*?)(?=^    \w|\Z)", text, re.DOTALL | re.MULTILINE))
    for setting in fields(group):
        if setting.name not in group.__annotations__:
            continue
        if setting.name not in paragraphs:
            raise ValueError(f"Each setting needs a paragraph in the docstring of {group.__name__}: {setting.name}.")
        paragraph = " ".join(paragraphs[setting.name].split())
        setting.metadata = MappingProxyType({"help": paragraph.replace("%", "%%")})
    return group


@documented
@dataclass
class PipelineArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that controls the model and the reference.

    Parameters:
        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments for `DiffusionPipeline.from_pretrained`, used when `model` is a string.
        ref_model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments for the `from_pretrained` of the reference's denoiser, used when `ref_model` is a string;
            nothing else of its pipeline is loaded. Of `model_init_kwargs`, `dtype`, `variant` and what is about access
            to the Hub hold for it too unless given here; the policy's `revision` never does.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the model and the reference. With dropout, policy and reference differ from
            the first step.
        sync_ref_model (`bool`, *optional*, defaults to `False`):
            Whether to move the reference towards the policy every `ref_model_sync_steps` optimizer steps, as
            [TR-DPO](https://huggingface.co/papers/2404.09656) does. Works with adapters as well.
        ref_model_mixup_alpha (`float`, *optional*, defaults to `0.6`):
            Share of the policy in the new reference, `ref = alpha * policy + (1 - alpha) * ref`, in `(0, 1]`.
        ref_model_sync_steps (`int`, *optional*, defaults to `512`):
            Optimizer steps between two such moves.
        ref_model_half_precision (`bool`, *optional*, defaults to `True`):
            Under bf16 or fp16 autocast, whether a full reference holds its linear and convolution weights in that
            precision. Autocast rounds exactly those anyway, so the arithmetic is identical and the copy is half as
            large. Not used with `sync_ref_model`.
        save_full_pipeline (`bool`, *optional*, defaults to `False`):
            Whether [`~DiffusionSDPOTrainer.save_model`] writes the whole pipeline beside the tuned weights (not in
            intermediate checkpoints).
        vae_dtype (`str`, *optional*, defaults to `"auto"`):
            Precision in which the VAE encodes images: `"float32"`, `"bfloat16"` or `"float16"`. `"auto"` is that of
            autocast, but float32 under fp16 where the VAE's configuration says that it overflows there
            (`force_upcast`); without autocast, as the VAE was loaded.
        vae_encode_batch_size (`int`, *optional*):
            Images that the VAE encodes at once; all of a micro-batch, two a pair, if unset. A smaller number needs
            less memory and gives the same latents, to rounding.
    """

    model_init_kwargs: dict[str, Any] | str | None = None
    ref_model_init_kwargs: dict[str, Any] | str | None = None
    disable_dropout: bool = True
    sync_ref_model: Annotated[bool, RESUME] = False
    ref_model_mixup_alpha: Annotated[float, Range("(0, 1]"), RESUME] = 0.6
    ref_model_sync_steps: Annotated[int, Range("[1, inf)"), RESUME] = 512
    ref_model_half_precision: bool = True
    save_full_pipeline: bool = False
    vae_dtype: Annotated[VaeDtype, RESUME, EVALUATION] = "auto"
    vae_encode_batch_size: Annotated[
        int | None, Range("[1, inf)", "Leave it unset to encode the images of a micro-batch together.")
    ] = None


@documented
@dataclass
class DataArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that controls the data.

    Parameters:
        dataset_format (`str`, *optional*):
            Name of the preference format, such as `"pickapic"`; detected by columns if unset.
        dataset_num_proc (`int`, *optional*):
            Processes with `verify_images="all"`, for each process that trains; as many as there are cores if unset.
        dataloader_num_workers (`int`, *optional*):
            Processes that decode images beside each process that trains. If unset: none for data that are decoded in
            seconds, one for a stream, else up to four, as cores, shared memory and the start method allow; the trainer
            logs what it chose. Map-style data give the same batches with any number. Loaders for evaluation follow it;
            where it was unset, with at most one worker for a stream, and none for a data set of another class.
        on_bad_row (`str`, *optional*, defaults to `"drop"`):
            `"drop"` leaves out undecodable images, unreadable labels and prompts that are no text, counted and
            reported; `"raise"` stops at the first. Ties are left out and counted either way.
        verify_images (`str`, *optional*, defaults to `"sample"`):
            Which images of a map-style data set are decoded before training: `"sample"`, those of 128 pairs spread
            over it; `"all"`, shared among the processes (cached by `datasets`), which leaves bad pairs out; `"none"`.
            Other bad images are found when they are loaded; the next good pair is used instead. `True` is all, `False`
            none.
        image_schemes (`list[str]`, *optional*):
            Schemes of URLs that rows may name besides `file`, `hf`, `zip` and `tar`, such as `s3`: what a row names is
            opened on this machine.
        resolution (`int` or `list[int]`, *optional*):
            Side of the square training images, or their height and width, in pixels; the model's own if unset. On the
            command line `1024` or `768 1344`, in YAML `1024` or `[768, 1344]`.
        random_crop (`bool`, *optional*, defaults to `False`):
            Whether to crop at random; the centre otherwise. One draw a pair.
        random_flip (`bool`, *optional*, defaults to `True`):
            Whether to flip half of the pairs horizontally. One draw a pair.
        image_interpolation (`str`, *optional*, defaults to `"bilinear"`):
            `"bilinear"`, `"bicubic"` or `"lanczos"`.
        proportion_empty_prompts (`float`, *optional*, defaults to `0.0`):
            Share of pairs trained with an empty prompt, in `[0, 1]`; the paper has 0.2.
    """

    dataset_format: str | None = None
    dataset_num_proc: Annotated[int | None, Range("[1, inf)", "Leave it unset.")] = None
    dataloader_num_workers: int | None = None
    on_bad_row: OnBadRow = "drop"
    verify_images: str = "sample"
    image_schemes: list[str] | None = None
    resolution: Annotated[list[int] | None, RESUME, EVALUATION] = None
    random_crop: Annotated[bool, RESUME] = False
    random_flip: Annotated[bool, RESUME] = True
    image_interpolation: Annotated[Interpolation, RESUME, EVALUATION] = "bilinear"
    proportion_empty_prompts: Annotated[float, Range("[0, 1]", "Published: 0.2."), RESUME] = 0.0


@documented
@dataclass
class RunArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that concerns a run as such: how it is interrupted and from what it resumes.

    Parameters:
        checkpoint_on_interrupt (`bool`, *optional*, defaults to `True`):
            Whether the first Ctrl-C (SIGINT) or SIGTERM lets the current step end and writes a checkpoint before
            [`~DiffusionSDPOTrainer.train`] raises `KeyboardInterrupt`. If not, the signals do what they did before.
        trust_checkpoint (`bool`, *optional*, defaults to `False`):
            Whether to resume from a checkpoint with pickled files that could run code: files that hold more than
            tensors, numbers and settings are refused otherwise. Set it for your own checkpoints only.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether a new start may take an `output_dir` that holds another run, whose files are then moved into the
            folder `previous-run-1` within (`-2` and so on where there is one). Refused if not. Resuming from a
            checkpoint in the folder is always allowed: it moves only what was written after that checkpoint.
    """

    checkpoint_on_interrupt: bool = True
    trust_checkpoint: bool = False
    overwrite_output_dir: bool = False


@documented
@dataclass
class SampleArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that controls sample images.

    Parameters:
        sample_prompts (`list[str]`, *optional*):
            Prompts of images that are generated with fixed seeds before, during and after training, into `samples/` of
            the output folder and the gallery of the model card.
        sample_steps (`int`, *optional*):
            Optimizer steps between two generations of them; before and after training only, if unset.
        sample_inference_steps (`int`, *optional*, defaults to `30`):
            Denoising steps of a generated image.
        sample_guidance_scale (`float`, *optional*):
            Guidance scale of the generated images; the pipeline's default if unset.
    """

    sample_prompts: list[str] | None = None
    sample_steps: Annotated[int | None, Range("[1, inf)", "Leave it unset for none.")] = None
    sample_inference_steps: Annotated[int, Range("[1, inf)")] = 30
    sample_guidance_scale: float | None = None


@documented
@dataclass
class NoiseArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that controls the noise.

    Parameters:
        timestep_range (`list[int]`, *optional*):
            Two whole numbers, lowest timestep and the first above the highest, such as `0 1000`; all if unset.
        timesteps (`list[float]`, *optional*):
            The only timesteps to train at, each as often: those that a distilled model's few steps visit, such as
            `999 749 499 249`. A density over all if unset.
        weighting_scheme (`str`, *optional*):
            Density of the timesteps: `"none"` (uniform), `"logit_normal"` or `"mode"`, before the shift that the
            pipeline's scheduler states; the family's own if unset.
        logit_mean (`float`, *optional*, defaults to `0.0`): Mean of `"logit_normal"`; above 0 samples more noise.
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
    """

    timestep_range: Annotated[list[int] | None, RESUME, EVALUATION] = None
    timesteps: Annotated[list[float] | None, RESUME, EVALUATION] = None
    weighting_scheme: Annotated[WeightingScheme | None, RESUME, EVALUATION] = None
    logit_mean: Annotated[float, RESUME, EVALUATION] = 0.0
    logit_std: Annotated[float, RESUME, EVALUATION] = 1.0
    mode_scale: Annotated[float, RESUME, EVALUATION] = 1.29
    timestep_weighting: Annotated[TimestepWeighting, RESUME, EVALUATION] = "none"
    snr_gamma: Annotated[float | None, Range("(0, inf)", "Leave it unset for none."), RESUME, EVALUATION] = None
    noise_offset: Annotated[float, Range("[0, inf)", "Use 0 for none."), RESUME, EVALUATION] = 0.0
    input_perturbation: Annotated[float, Range("[0, inf)", "Use 0 for none."), RESUME, EVALUATION] = 0.0

    guidance_scale: Annotated[float | None, RESUME, EVALUATION] = None


@documented
@dataclass
class LossArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that controls the loss and the safeguard.

    Parameters:
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
            on how pairs are batched; `"weighted"`, one a micro-batch under the pairs' true weights; `"noise_bin"`, one
            a noise bin of the micro-batch.
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
    """

    loss_type: Annotated[LossType, RESUME] = "sigmoid"
    beta: Annotated[float | None, RESUME] = None
    safeguard: Annotated[Safeguard, RESUME] = "output"
    safeguard_mu: Annotated[float | None, RESUME] = None
    safeguard_granularity: Annotated[Granularity, RESUME] = "batch"
    safeguard_eps: Annotated[float, RESUME] = 0.0
    safeguard_anchor: Annotated[Anchor | None, RESUME] = None
    safeguard_low_memory: bool = False
    safeguard_diagnostics_steps: Annotated[int | None, Range("[1, inf)", "Leave it unset for none.")] = None
    label_smoothing: Annotated[float | None, RESUME] = None
    dspo_threshold: Annotated[float | None, RESUME] = None
    dmpo_alpha: Annotated[float | None, RESUME] = None
    mapo_temperature: Annotated[float | None, RESUME] = None
    mapo_scale: Annotated[float | None, RESUME] = None
    simpo_gamma: Annotated[float | None, RESUME] = None
    dpop_lambda: Annotated[float | None, RESUME] = None
    linear_eta: Annotated[float | None, RESUME] = None
    smpo_coefficient: Annotated[float | None, RESUME] = None
    smpo_score_scale: Annotated[float | None, RESUME] = None

    @property
    def loss_kwargs(self) -> dict[str, float]:
        """The settings of the loss besides `beta` that were given, by name."""
        values = {name: getattr(self, name) for spec in LOSSES.values() for name in spec.loss_kwargs}
        return {name: value for name, value in values.items() if value is not None}


@documented
@dataclass
class WinnerArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that watches and steers what training does to the preferred images. A noise
    level is the share of noise in a noisy latent, from 0 (clean) to 1: sigma of flow matching, and under DDPM the sigma
    with the same ratio of signal to noise. It means the same for every model.

    Parameters:
        num_noise_bins (`int`, *optional*, defaults to `8`):
            Equal parts of the noise levels from 0 to 1: evaluation reports the change of errors in each,
            `safeguard_granularity="noise_bin"` has a lambda for each, `winner_budget` steers each.
        loser_noise_range (`list[float]`, *optional*):
            Two noise levels, lowest and highest, within which losers train, such as `0.6 1`; outside, a pair trains its
            winner only. All levels if unset.
        winner_budget (`float`, *optional*):
            Target for the winners' error in every noise bin: its largest rise, as a share of the error before training;
            0.05 is five per cent. Measured on a probe; the losers' gradients are scaled down in noise bins above it,
            back up below it, and down in all bins while one is above it although its losers are scaled to 0. With
            `ema_decay`, the averaged weights are measured and held to it; the last weights may lie above. Not measured
            if unset.
        winner_budget_pairs (`int`, *optional*, defaults to `32`):
            Pairs of the probe: spread over the evaluation data (of several sets, the first), or the first of a stream;
            over the training data where there are none.
        winner_budget_steps (`int`, *optional*, defaults to `10`):
            Optimizer steps between two measurements of the probe.
        ema_decay (`float`, *optional*):
            Keeps an average of the trained weights, `average = decay * average + (1 - decay) * weights` after every
            step, in `(0, 1)`; early steps use `(1 + step) / (10 + step)` where that is smaller. It is evaluated, saved
            and pushed beside the weights, in the folder `ema`. None if unset.
        safeguard_preconditioner (`str`, *optional*, defaults to `"plain"`):
            With `safeguard="parameter"`: `"adamw"` bounds lambda also by what AdamW makes of the gradient, with its
            momentum, preconditioner, weight decay and clipping. Experimental.
    """

    num_noise_bins: Annotated[int, Range("[1, inf)"), RESUME, EVALUATION] = 8
    loser_noise_range: Annotated[list[float] | None, RESUME] = None
    winner_budget: Annotated[float | None, Range("(0, inf)", "0.01 is one per cent."), RESUME] = None
    winner_budget_pairs: Annotated[int, Range("[1, inf)"), RESUME] = 32
    winner_budget_steps: Annotated[int, Range("[1, inf)"), RESUME] = 10
    ema_decay: Annotated[float | None, Range("(0, 1)", "Usual: 0.98 to 0.9999."), RESUME] = None
    safeguard_preconditioner: Annotated[Preconditioner, RESUME] = "plain"
