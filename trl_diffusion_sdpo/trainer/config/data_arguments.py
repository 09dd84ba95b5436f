"""Settings of the data, and of interrupting and restarting a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ...data.buckets import AspectRatioBuckets
from .declaring import RESUME, Keys, Range, documented

OnBadRow = Literal["drop", "raise"]
Losers = Literal["data", "permute"]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "fast"]


@documented
@dataclass
class DataArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] for the data.

    Parameters:
        dataset_format (`str`, *optional*):
            Name of the preference format, such as `"pickapic"`. It is detected from the columns if unset.
        dataset_num_proc (`int`, *optional*):
            Number of processes that read images for `verify_images="all"` and for image sizes, per training process. It
            is the number of cores if unset.
        dataloader_num_workers (`int`, *optional*):
            Number of worker processes that decode images, per training process. If unset, the trainer chooses and logs
            the number: none for data that decode in seconds, one for a stream, and else up to four, as cores, shared
            memory and the start method allow. Map-style data give the same batches with any number. Evaluation uses the
            same number. If the number is unset, evaluation uses at most one worker for a stream and none for a data set
            of another class.
        swap_labels (`bool`, *optional*, defaults to `False`):
            Whether to swap winner and loser of every pair, in training and evaluation data. Set it to train a negative
            model, a reference of [`~trl_diffusion_sdpo.preference_guidance`].
        losers (`str`, *optional*, defaults to `"data"`):
            Source of the losers. `"data"` takes them from the data set. `"permute"` replaces each loser by the winner
            of a pair of another prompt, drawn anew in every epoch and once for evaluation. Use `"permute"` for images
            with captions, which have no losers; it needs map-style data.
        pair_weights (`str`, *optional*):
            Weights of the pairs' losses in training, divided by their mean over the training data. It is the name of a
            numeric column, or a function of the scores: `"gap"` (their gap), `"gain"` (the gap of `2^score`),
            `"inverse_gap"` (larger for small gaps) or `"agreement"` (smaller if several scorers disagree). Evaluation
            uses no weights. It cannot be used with streams.
        calibrated_scores (`bool`, *optional*, defaults to `False`):
            Whether to replace each image's score by its expected share of wins among the images of its prompt, for the
            loss and the weights. It cannot be used with streams.
        on_bad_row (`str`, *optional*, defaults to `"drop"`):
            What to do with undecodable images, unreadable labels and prompts that are no text. `"drop"` skips, counts
            and reports them; `"raise"` stops at the first. Ties are skipped and counted with both.
        verify_images (`str`, *optional*, defaults to `"sample"`):
            Images of a map-style data set that are decoded before training. `"sample"` decodes the images of 128 pairs
            spread over the data. `"all"` decodes all images, shared among the processes and cached by `datasets`, and
            drops bad pairs. `"none"` decodes none. If a bad image is found later, during loading, the next good pair
            replaces its pair. `True` means `"all"`, and `False` means `"none"`.
        image_schemes (`list[str]`, *optional*):
            URL schemes that rows may use besides `file`, `hf`, `zip` and `tar`, such as `s3`. Add one only if you trust
            the data: this machine opens the URLs that rows name.
        resolution (`int` or `list[int]`, *optional*):
            Side of the square training images in pixels, or their height and width. Write `1024` or `768 1344` on the
            command line, and `1024` or `[768, 1344]` in YAML. If unset, it is the model's default.
        aspect_ratio_buckets (`bool`, *optional*, defaults to `False`):
            Whether each pair is trained at the size nearest to its images' aspect ratios, from a list of sizes of about
            the area of `resolution`. Every batch has one size. The header of every image is read before the first batch
            and cached by `datasets`. It cannot be used with streams.
        bucket_kwargs (`dict` or `str`, *optional*):
            Constants of the list of sizes of `aspect_ratio_buckets`, in YAML or as JSON. Sides are multiples of `step`
            pixels (default 64), and `max_aspect_ratio` (default 2) is the largest ratio of the longer to the shorter
            side.
        min_side (`int`, *optional*):
            Shortest side in pixels that an image may have. Pairs with a smaller image are skipped and counted; set it
            to avoid enlarging images much. It reads image headers as `aspect_ratio_buckets` does. No pair is skipped if
            unset.
        random_crop (`bool`, *optional*, defaults to `False`):
            Whether to crop images at random instead of at the center. Both images of a pair use one draw.
        random_flip (`bool`, *optional*, defaults to `True`):
            Whether to flip half of the pairs horizontally. Both images of a pair use one draw.
        image_interpolation (`str`, *optional*, defaults to `"bilinear"`):
            Interpolation for resizing: `"bilinear"`, `"bicubic"`, `"lanczos"` or `"fast"`. `"fast"` is bilinear, but
            decodes JPEG files of at least twice the training size at a half, a quarter or an eighth of their size. Use
            it if the workers that decode images cannot keep up; the images are about as sharp as with `"lanczos"`.
        proportion_empty_prompts (`float`, *optional*, defaults to `0.0`):
            Share of pairs that are trained with an empty prompt, in `[0, 1]`. The paper uses 0.2.
        precompute_latents (`bool`, *optional*, defaults to `False`):
            Whether to encode images and prompts once before training, into files that later runs reuse. VAE and text
            encoders are then not on the training device. If the model is a name or folder and everything is encoded
            already, they are not loaded at all. It needs map-style data.
        precompute_dir (`str`, *optional*):
            Folder of the files that `precompute_latents` and `precompute_ref_errors` write, shared by all processes and
            runs. If unset, it is `trl-diffusion-sdpo` in the user's cache folder (`$XDG_CACHE_HOME`, or `~/.cache`).
        precompute_epochs (`int`, *optional*, defaults to `1`):
            Number of epochs whose random draws are computed before training; later epochs repeat them. With
            `precompute_latents` the draws are the crops of `random_crop`. With `precompute_ref_errors` they are all
            draws of a pair (crop, flip, dropped prompt, noise and timestep). Each epoch costs its encoding or forward
            passes again.
    """

    dataset_format: str | None = None
    dataset_num_proc: Annotated[int | None, Range("[1, inf)", "Leave it unset.")] = None
    dataloader_num_workers: int | None = None
    swap_labels: Annotated[bool, RESUME] = False
    losers: Annotated[Losers, RESUME] = "data"
    pair_weights: Annotated[str | None, RESUME] = None
    calibrated_scores: Annotated[bool, RESUME] = False
    on_bad_row: OnBadRow = "drop"
    verify_images: str = "sample"
    image_schemes: list[str] | None = None
    resolution: Annotated[list[int] | None, RESUME] = None
    aspect_ratio_buckets: Annotated[bool, RESUME] = False
    bucket_kwargs: Annotated[
        dict[str, Any] | str | None, Keys(AspectRatioBuckets, ("step", "max_aspect_ratio")), RESUME
    ] = None
    min_side: Annotated[int | None, Range("[1, inf)", "Leave it unset."), RESUME] = None
    random_crop: Annotated[bool, RESUME] = False
    random_flip: Annotated[bool, RESUME] = True
    image_interpolation: Annotated[Interpolation, RESUME] = "bilinear"
    proportion_empty_prompts: Annotated[float, Range("[0, 1]", "Published: 0.2."), RESUME] = 0.0
    precompute_latents: bool = False
    precompute_dir: str | None = None
    precompute_epochs: Annotated[int, Range("[1, inf)"), RESUME] = 1


@documented
@dataclass
class RunArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] for interrupting and restarting a run.

    Parameters:
        checkpoint_on_interrupt (`bool`, *optional*, defaults to `True`):
            Whether the first Ctrl-C (SIGINT) or SIGTERM finishes the current step and writes a checkpoint before
            [`~DiffusionSDPOTrainer.train`] raises `KeyboardInterrupt`. If `False`, the trainer does not handle these
            signals.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether a new run may start in an `output_dir` that holds another run. The other run's files are then moved
            into the subfolder `previous-run-1` (or `-2` and so on if that exists). If `False`, such a start is refused.
            Resuming from a checkpoint in the folder is always allowed and moves only files written after that
            checkpoint.
    """

    checkpoint_on_interrupt: bool = True
    overwrite_output_dir: bool = False
