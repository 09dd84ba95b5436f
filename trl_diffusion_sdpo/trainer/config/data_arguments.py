"""Settings of the data, and of a run as such."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ...data.buckets import AspectRatioBuckets
from .declaring import EVALUATION, RESUME, Keys, Range, documented

OnBadRow = Literal["drop", "raise"]
Losers = Literal["data", "permute"]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "fast"]


@documented
@dataclass
class DataArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that controls the data.

    Parameters:
        dataset_format (`str`, *optional*):
            Name of the preference format, such as `"pickapic"`; detected by columns if unset.
        dataset_num_proc (`int`, *optional*):
            Processes with `verify_images="all"` and for reading the sizes of images, for each process that trains; as
            many as there are cores if unset.
        dataloader_num_workers (`int`, *optional*):
            Processes that decode images beside each process that trains. If unset: none for data that are decoded in
            seconds, one for a stream, else up to four, as cores, shared memory and the start method allow; the trainer
            logs what it chose. Map-style data give the same batches with any number. Loaders for evaluation follow it;
            where it was unset, with at most one worker for a stream, and none for a data set of another class.
        swap_labels (`bool`, *optional*, defaults to `False`):
            Whether the published loser of every pair is trained as its winner, and the published winner as its loser,
            in training and evaluation data: for a negative model, a reference of
            [`~trl_diffusion_sdpo.preference_guidance`].
        losers (`str`, *optional*, defaults to `"data"`):
            `"data"`, the losers of the data set; `"permute"`, in place of each the winner of a pair of another prompt,
            drawn anew in every epoch, in evaluation once. Also for images with captions, which have no losers.
            Map-style data only.
        pair_weights (`str`, *optional*):
            Factors of the pairs' losses in training, divided by their mean over the training data: a numeric column, or
            a function of the scores: `"gap"`, their gap; `"gain"`, the gap of `2^score`; `"inverse_gap"`, larger for
            small gaps; `"agreement"`, smaller where several scorers disagree. Evaluations have none. Not for streams.
        calibrated_scores (`bool`, *optional*, defaults to `False`):
            Whether each image's expected share of wins among the images of its prompt takes the place of its score,
            for the loss and the weights. Not for streams.
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
        aspect_ratio_buckets (`bool`, *optional*, defaults to `False`):
            Whether each pair is trained at the size nearest to its images' aspect ratios, of a list of sizes of about
            the area of `resolution`; every batch has one size. The header of every image is read before the first
            batch, and kept by `datasets`. Not for streams.
        bucket_kwargs (`dict` or `str`, *optional*):
            What the list of those sizes is made of, in YAML or as JSON: `step` (64; their sides are multiples of it, in
            pixels) and `max_aspect_ratio` (2; the longer side to the shorter one).
        min_side (`int`, *optional*):
            Pairs with an image whose shorter side has fewer pixels are left out and counted, so that no image is
            enlarged much. Unset, none is left out. Reads headers as `aspect_ratio_buckets` does.
        random_crop (`bool`, *optional*, defaults to `False`):
            Whether to crop at random; the centre otherwise. One draw a pair.
        random_flip (`bool`, *optional*, defaults to `True`):
            Whether to flip half of the pairs horizontally. One draw a pair.
        image_interpolation (`str`, *optional*, defaults to `"bilinear"`):
            `"bilinear"`, `"bicubic"`, `"lanczos"` or `"fast"`. `"fast"` is bilinear, but JPEG files of at least twice
            the training size are decoded at a half, a quarter or an eighth of their size. Use it when the processes
            that decode images cannot keep up; the images are about as sharp as with `"lanczos"`.
        proportion_empty_prompts (`float`, *optional*, defaults to `0.0`):
            Share of pairs trained with an empty prompt, in `[0, 1]`; the paper has 0.2.
        precompute_latents (`bool`, *optional*, defaults to `False`):
            Whether to encode images and prompts before training, once for all epochs, into files that later runs use
            as well. VAE and text encoders are then not on the training device, and of a model given by name or folder
            not even loaded once all is encoded. Map-style data only.
        precompute_dir (`str`, *optional*):
            Folder of what `precompute_latents` and `precompute_ref_errors` compute, shared by all processes and runs;
            `trl-diffusion-sdpo` in the user's folder of caches (`$XDG_CACHE_HOME`, or `~/.cache`) if unset.
        precompute_epochs (`int`, *optional*, defaults to `1`):
            Number of epochs whose random draws are computed before training; later epochs repeat them. With
            `precompute_latents` these are the crops of `random_crop`, with `precompute_ref_errors` all draws of a pair
            (crop, flip, dropped prompt, noise and timestep). Each epoch costs its encoding or forward passes again.
    """

    dataset_format: str | None = None
    dataset_num_proc: Annotated[int | None, Range("[1, inf)", "Leave it unset.")] = None
    dataloader_num_workers: int | None = None
    swap_labels: Annotated[bool, RESUME, EVALUATION] = False
    losers: Annotated[Losers, RESUME, EVALUATION] = "data"
    pair_weights: Annotated[str | None, RESUME] = None
    calibrated_scores: Annotated[bool, RESUME, EVALUATION] = False
    on_bad_row: OnBadRow = "drop"
    verify_images: str = "sample"
    image_schemes: list[str] | None = None
    resolution: Annotated[list[int] | None, RESUME, EVALUATION] = None
    aspect_ratio_buckets: Annotated[bool, RESUME, EVALUATION] = False
    bucket_kwargs: Annotated[
        dict[str, Any] | str | None, Keys(AspectRatioBuckets, ("step", "max_aspect_ratio")), RESUME, EVALUATION
    ] = None
    min_side: Annotated[int | None, Range("[1, inf)", "Leave it unset."), RESUME, EVALUATION] = None
    random_crop: Annotated[bool, RESUME] = False
    random_flip: Annotated[bool, RESUME] = True
    image_interpolation: Annotated[Interpolation, RESUME, EVALUATION] = "bilinear"
    proportion_empty_prompts: Annotated[float, Range("[0, 1]", "Published: 0.2."), RESUME] = 0.0
    precompute_latents: bool = False
    precompute_dir: str | None = None
    precompute_epochs: Annotated[int, Range("[1, inf)"), RESUME] = 1


@documented
@dataclass
class RunArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that concerns a run as such: how it is interrupted and from what it resumes.

    Parameters:
        checkpoint_on_interrupt (`bool`, *optional*, defaults to `True`):
            Whether the first Ctrl-C (SIGINT) or SIGTERM lets the current step end and writes a checkpoint before
            [`~DiffusionSDPOTrainer.train`] raises `KeyboardInterrupt`. If not, the signals do what they did before.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether a new start may take an `output_dir` that holds another run, whose files are then moved into the
            folder `previous-run-1` within (`-2` and so on where there is one). Refused if not. Resuming from a
            checkpoint in the folder is always allowed: it moves only what was written after that checkpoint.
    """

    checkpoint_on_interrupt: bool = True
    overwrite_output_dir: bool = False
