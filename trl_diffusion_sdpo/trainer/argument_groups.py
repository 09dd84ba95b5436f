"""The settings of the pipeline, the data and the run, in groups that [`DiffusionSDPOConfig`] inherits.

A field holds the default and the help of a setting; its annotation holds the choices as a `Literal`, the allowed
numbers as a [`Range`], and the lists of settings that it belongs to. (The parser of transformers passes all metadata of
a field on to `argparse`, so these facts cannot be among it.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

RESUME = "resume"  # it changes the trajectory: resuming compares it, and the model card shows it
EVALUATION = "evaluation"  # an evaluation of saved weights depends on it

VaeDtype = Literal["auto", "float32", "bfloat16", "float16"]
OnBadRow = Literal["drop", "raise"]
Interpolation = Literal["bilinear", "bicubic", "lanczos"]


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
    sync_ref_model: Annotated[bool, RESUME] = field(
        default=False,
        metadata={"help": "Whether to move the reference towards the policy every `ref_model_sync_steps` steps."},
    )
    ref_model_mixup_alpha: Annotated[float, Range("(0, 1]"), RESUME] = field(
        default=0.6, metadata={"help": "Share of the policy in the new reference, in (0, 1]."}
    )
    ref_model_sync_steps: Annotated[int, Range("[1, inf)"), RESUME] = field(
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
    vae_dtype: Annotated[VaeDtype, RESUME, EVALUATION] = field(
        default="auto",
        metadata={
            "help": "Precision in which the VAE encodes images; `auto` is that of autocast unless it overflows there."
        },
    )
    vae_encode_batch_size: Annotated[
        int | None, Range("[1, inf)", "Leave it unset to encode the images of a micro-batch together.")
    ] = field(default=None, metadata={"help": "Images that the VAE encodes at once; all of a micro-batch if unset."})


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
    dataset_num_proc: Annotated[int | None, Range("[1, inf)", "Leave it unset.")] = field(
        default=None,
        metadata={"help": "Number of processes with `verify_images=all`; as many as there are cores if unset."},
    )
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "Number of processes that decode images; chosen by data and cores if unset."}
    )
    on_bad_row: OnBadRow = field(
        default="drop",
        metadata={
            "help": "`drop` leaves out bad rows, counted; `raise` stops at the first. Ties are always left out."
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
    resolution: Annotated[list[int] | None, RESUME, EVALUATION] = field(
        default=None,
        metadata={"help": "Side of square images, or height and width, in pixels; the model's own if unset."},
    )
    random_crop: Annotated[bool, RESUME] = field(
        default=False, metadata={"help": "Whether to crop at random; the centre otherwise."}
    )
    random_flip: Annotated[bool, RESUME] = field(
        default=True, metadata={"help": "Whether to flip half of the pairs horizontally."}
    )
    image_interpolation: Annotated[Interpolation, RESUME, EVALUATION] = field(
        default="bilinear", metadata={"help": "How images are resized."}
    )
    proportion_empty_prompts: Annotated[float, Range("[0, 1]", "Published: 0.2."), RESUME] = field(
        default=0.0, metadata={"help": "Share of pairs trained with an empty prompt, in [0, 1]; the paper has 0.2."}
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

    sample_prompts: list[str] | None = field(
        default=None,
        metadata={"help": "Prompts of images generated with fixed seeds before, during and after training."},
    )
    sample_steps: Annotated[int | None, Range("[1, inf)", "Leave it unset for none.")] = field(
        default=None,
        metadata={"help": "Optimizer steps between generations of sample images; before and after training if unset."},
    )
    sample_inference_steps: Annotated[int, Range("[1, inf)")] = field(
        default=30, metadata={"help": "Denoising steps of a sample image."}
    )
    sample_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of the sample images; the pipeline's default if unset."}
    )
