"""Settings of the data, and of the output folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .declaring import RESUME, Range, documented

VerifyImages = Literal["sample", "all", "none"]
Losers = Literal["data", "permute"]


@documented
@dataclass
class DataArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] for the data.

    Parameters:
        dataset_format (`str`, *optional*):
            Name of the data set's format, such as `"pickapic"`. If unset, it is detected from the column names.
        dataset_num_proc (`int`, *optional*):
            Number of processes that read images before training, to verify them (`verify_images="all"`) and to find
            their sizes. If unset, one per CPU core.
        dataloader_num_workers (`int`, *optional*):
            Number of DataLoader workers that decode images, for each training process. Batches of map-style data do not
            depend on it. If unset, the trainer chooses: none for fewer than 512 pairs, at most one for a stream, at
            most four otherwise.
        score_threshold (`float`, *optional*):
            Score from which on an image is liked, for images that each have a `score`. Set it if your scores have a
            scale, such as 4 of 5 stars, and for streams. If unset, the median of the training data, also for held-out
            images.
        swap_labels (`bool`, *optional*, defaults to `False`):
            Whether to swap winner and loser of every pair, in training and evaluation data. The result prefers the
            worse images, and can be the `reference` of [`~trl_diffusion_sdpo.preference_guidance`].
        losers (`str`, *optional*, defaults to `"data"`):
            Source of the losers. `"data"` uses those in the data set. `"permute"` replaces each by the winner of a
            random pair with another prompt, drawn again in every epoch; use it for images with captions, which have no
            losers. It needs map-style data.
        pair_weights (`str`, *optional*):
            Source of the weights of training pairs, by which their losses are multiplied: a numeric column, or a
            function of the winner's and loser's scores. The functions are `"gap"` (difference of the scores), `"gain"`
            (difference of `2^score`), `"inverse_gap"` (larger if the scores are closer), `"rarity"` (larger if few
            images have such scores) and `"agreement"` (smaller if several scorers disagree). Weights are divided by
            their mean over the training data. Evaluation uses none. Not possible with streams.
        calibrated_scores (`bool`, *optional*, defaults to `False`):
            Whether to replace each image's score by its expected share of wins against the other images of its prompt,
            before the loss and `pair_weights` read it. Scores from `pairs score` become log-odds first. Not possible
            with streams.
        verify_images (`str`, *optional*, defaults to `"sample"`):
            Images of a map-style data set that are decoded before training, to find damaged ones. `"sample"` decodes
            128 pairs, evenly spaced in the data. `"all"` decodes every image and drops pairs with a damaged one.
            `"none"` decodes none. A damaged image that turns up during training costs its pair: the next good pair
            takes its place.
        image_schemes (`list[str]`, *optional*):
            URL schemes, such as `s3`, that image URLs in the data may have in addition to `file`, `hf`, `zip` and
            `tar`. Add one only if you trust the data, because your machine opens every URL in it.
        resolution (`int` or `list[int]`, *optional*):
            Side of the square training images in pixels, or their height and width: `1024` or `768 1344` on the command
            line, `1024` or `[768, 1344]` in YAML. If unset, the model's default.
        aspect_ratio_buckets (`bool`, *optional*, defaults to `False`):
            Whether to train each pair at a size that fits the aspect ratios of its images, instead of at `resolution`.
            The sizes (buckets) all have about the area of `resolution`, and a batch has one size. Not possible with
            streams.
        bucket_kwargs (`dict` or `str`, *optional*):
            Constants of `aspect_ratio_buckets` by name, in YAML or as JSON. `step` (default 64): all heights and widths
            are multiples of it, in pixels. `max_aspect_ratio` (default 2): largest ratio of the longer to the shorter
            side.
        min_side (`int`, *optional*):
            Smallest shorter side of an image, in pixels. Pairs with a smaller image are skipped, and the data report
            counts them. Set it to keep small images from being enlarged much. If unset, no pair is skipped for its
            size.
        random_crop (`bool`, *optional*, defaults to `False`):
            Whether to crop images at a random position instead of the center, the same one for both images of a pair.
        random_flip (`bool`, *optional*, defaults to `True`):
            Whether to flip pairs horizontally at random, with probability 0.5. Both images of a pair flip together.
        proportion_empty_prompts (`float`, *optional*, defaults to `0.0`):
            Share of training pairs whose prompt is replaced by an empty one, in `[0, 1]`. The published value is 0.2.
        precompute_latents (`bool`, *optional*, defaults to `False`):
            Whether to encode all images and prompts before training, into files that later runs reuse. VAE and text
            encoders then take no device memory in training. Needs map-style data.
        precompute_dir (`str`, *optional*):
            Folder for the files of `precompute_latents` and `precompute_ref_errors`. All processes of a run must be
            able to read it, and several runs may share it. If unset, `trl-diffusion-sdpo` in your cache folder.
        precompute_epochs (`int`, *optional*, defaults to `1`):
            Number of epochs for which random choices are drawn when results are computed before training; later epochs
            repeat them. The time of that computation is proportional to it. The choices are the positions of
            `random_crop` for `precompute_latents`, and crop, flip, dropped prompt, noise and timestep of each pair for
            `precompute_ref_errors`.
    """

    dataset_format: str | None = None
    dataset_num_proc: Annotated[int | None, Range("[1, inf)", "Leave it unset to use all cores.")] = None
    dataloader_num_workers: int | None = None
    score_threshold: Annotated[float | None, RESUME] = None
    swap_labels: Annotated[bool, RESUME] = False
    losers: Annotated[Losers, RESUME] = "data"
    pair_weights: Annotated[str | None, RESUME] = None
    calibrated_scores: Annotated[bool, RESUME] = False
    verify_images: VerifyImages = "sample"
    image_schemes: list[str] | None = None
    resolution: Annotated[list[int] | None, RESUME] = None
    aspect_ratio_buckets: Annotated[bool, RESUME] = False
    bucket_kwargs: Annotated[dict[str, Any] | str | None, RESUME] = None
    min_side: Annotated[int | None, Range("[1, inf)", "Leave it unset to skip no pair."), RESUME] = None
    random_crop: Annotated[bool, RESUME] = False
    random_flip: Annotated[bool, RESUME] = True
    proportion_empty_prompts: Annotated[float, Range("[0, 1]", "The paper uses 0.2."), RESUME] = 0.0
    precompute_latents: bool = False
    precompute_dir: str | None = None
    precompute_epochs: Annotated[int, Range("[1, inf)"), RESUME] = 1


@documented
@dataclass
class RunArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] for the output folder.

    Parameters:
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to delete the checkpoints and weights of another run in `output_dir` when a new run starts, and
            later checkpoints when a run resumes. If `False`, the trainer raises an error instead.
    """

    overwrite_output_dir: bool = False
