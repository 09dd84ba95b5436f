"""The settings of the pipeline, the data, the winners and the run, in groups that [`DiffusionSDPOConfig`] inherits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VAE_DTYPES = ("auto", "float32", "bfloat16", "float16")
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")
ON_BAD_ROW = ("drop", "raise")
METRICS = ("plain", "adamw")


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

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `DiffusionPipeline.from_pretrained`, as JSON."}
    )
    ref_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for the `from_pretrained` of a named reference's denoiser, as JSON."},
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Whether to disable dropout in the model and reference model."}
    )
    sync_ref_model: bool = field(
        default=False,
        metadata={"help": "Whether to move the reference towards the policy every `ref_model_sync_steps` steps."},
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "Share of the policy in the new reference, in (0, 1]."}
    )
    ref_model_sync_steps: int = field(
        default=512, metadata={"help": "Optimizer steps between two moves of the reference."}
    )
    ref_model_half_precision: bool = field(
        default=True,
        metadata={
            "help": "Under autocast, hold a full reference's linear and convolution weights in that precision; the "
            "arithmetic is identical."
        },
    )
    save_full_pipeline: bool = field(
        default=False, metadata={"help": "Whether `save_model` writes the whole pipeline beside the tuned weights."}
    )
    vae_dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision in which the VAE encodes images; `auto` is that of autocast unless it overflows there.",
            "choices": list(VAE_DTYPES),
        },
    )
    vae_encode_batch_size: int | None = field(
        default=None, metadata={"help": "Images that the VAE encodes at once; all of a micro-batch if unset."}
    )


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
            Other bad images are found when they are drawn. The next good pair stands in for a bad one. `True` is all,
            `False` none.
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

    dataset_format: str | None = field(
        default=None, metadata={"help": "Name of the preference format; detected by columns if unset."}
    )
    dataset_num_proc: int | None = field(
        default=None,
        metadata={"help": "Number of processes with `verify_images=all`; as many as there are cores if unset."},
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={"help": "Number of processes that decode images; chosen by data and cores if unset."},
    )
    on_bad_row: str = field(
        default="drop",
        metadata={
            "help": "`drop` leaves out bad rows, counted; `raise` stops at the first. Ties are always left out.",
            "choices": list(ON_BAD_ROW),
        },
    )
    verify_images: str = field(
        default="sample",
        metadata={
            "help": "Which images of a map-style data set to decode before training: those of a `sample` of pairs, "
            "`all` or `none`."
        },
    )
    image_schemes: list[str] | None = field(
        default=None,
        metadata={"help": "Schemes of URLs that rows may name besides `file`, `hf`, `zip` and `tar`, such as `s3`."},
    )
    resolution: list[int] | None = field(
        default=None,
        metadata={"help": "Side of square images, or height and width, in pixels; the model's own if unset."},
    )
    random_crop: bool = field(default=False, metadata={"help": "Whether to crop at random; the centre otherwise."})
    random_flip: bool = field(default=True, metadata={"help": "Whether to flip half of the pairs horizontally."})
    image_interpolation: str = field(
        default="bilinear",
        metadata={"help": "How images are resized.", "choices": list(INTERPOLATIONS)},
    )
    proportion_empty_prompts: float = field(
        default=0.0, metadata={"help": "Share of pairs trained with an empty prompt, in [0, 1]; the paper has 0.2."}
    )


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
            Target for the winners' error at every noise level: its largest rise, as a share of the error before
            training; 0.05 is five per cent. Measured on a probe; the losers' gradients are scaled down at noise levels
            above it, back up below, and at all levels while one is above it with its own losers shut off. With
            `ema_decay` it is the averaged weights that are measured and held to it, and the last ones lie above. Not
            watched if unset.
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

    num_noise_bins: int = field(
        default=8,
        metadata={"help": "Equal parts of the noise levels from 0 to 1, for reports, noise_bins and budget."},
    )
    loser_noise_range: list[float] | None = field(
        default=None,
        metadata={"help": "Lowest and highest noise level, in [0, 1], at which losers train; all if unset."},
    )
    winner_budget: float | None = field(
        default=None,
        metadata={
            "help": "Largest rise of the winners' error, as a share of that before training; unwatched if unset."
        },
    )
    winner_budget_pairs: int = field(default=32, metadata={"help": "Pairs on which `winner_budget` is measured."})
    winner_budget_steps: int = field(
        default=10, metadata={"help": "Optimizer steps between two measurements of `winner_budget`."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of an average of the trained weights, in (0, 1); none if unset."}
    )
    safeguard_preconditioner: str = field(
        default="plain",
        metadata={
            "help": "`adamw` bounds the parameter-space lambda also by what AdamW makes of the gradient. Experimental.",
            "choices": list(METRICS),
        },
    )


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
            folder `previous-run-1` within (`-2` and so on where there is one). Refused if not. A run that goes on from
            a checkpoint in the folder needs no leave: it moves there only what was written after that checkpoint.
    """

    checkpoint_on_interrupt: bool = field(
        default=True,
        metadata={"help": "Whether the first Ctrl-C or SIGTERM leaves a checkpoint after the current step."},
    )
    trust_checkpoint: bool = field(
        default=False,
        metadata={"help": "Whether to resume from pickled files that could run code; for your own checkpoints only."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Whether a new start may take a folder that holds another run; that is moved into `previous-run-1`."
        },
    )
