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
            Name of the data set's format, such as `"pickapic"`. If unset, the format is detected from the column names.
        dataset_num_proc (`int`, *optional*):
            Number of processes that read images before training, to verify them (`verify_images="all"`) and to find
            their sizes. If unset, one process per CPU core is used.
        dataloader_num_workers (`int`, *optional*):
            Number of DataLoader workers that decode images, for each training process. Map-style data give the same
            batches with any number of workers. If unset, the trainer chooses the number: no worker for fewer than 512
            pairs, at most one for a stream, and at most four otherwise.
        swap_labels (`bool`, *optional*, defaults to `False`):
            Whether to swap winner and loser of every pair, in training and evaluation data. Training on swapped pairs
            gives a model that prefers the worse images. A model that prefers the worse images can be the `reference` of
            [`~trl_diffusion_sdpo.preference_guidance`].
        losers (`str`, *optional*, defaults to `"data"`):
            Source of the losers. `"data"` uses the losers in the data set. `"permute"` replaces each loser by the
            winner of a random pair with another prompt, drawn again in every epoch. Use `"permute"` for images with
            captions, because such data have no losers. `"permute"` needs map-style data.
        pair_weights (`str`, *optional*):
            Source of the weights by which the losses of training pairs are multiplied: the name of a numeric column, or
            a function of the winner's and loser's scores. The functions are `"gap"` (difference of the scores),
            `"gain"` (difference of `2^score`), `"inverse_gap"` (larger if the scores are closer), `"rarity"` (larger if
            few images have such scores) and `"agreement"` (smaller if several scorers disagree). Weights are divided by
            their mean over the training data. Evaluation uses no weights. `pair_weights` cannot be used with streams.
        calibrated_scores (`bool`, *optional*, defaults to `False`):
            Whether to replace each image's score by the image's expected share of wins against the other images of its
            prompt, before the loss and `pair_weights` read the score. Scores from `pairs score` become log-odds first.
            `calibrated_scores` cannot be used with streams.
        verify_images (`str`, *optional*, defaults to `"sample"`):
            Images of a map-style data set that are decoded before training, to find damaged images. `"sample"` decodes
            the images of 128 pairs, evenly spaced in the data. `"all"` decodes all images and drops pairs with damaged
            images. `"none"` decodes no image. If training later reads a damaged image, the next pair without damaged
            images replaces the pair with this image.
        image_schemes (`list[str]`, *optional*):
            URL schemes, such as `s3`, that image URLs in the data may have in addition to `file`, `hf`, `zip` and
            `tar`. Add a scheme only if you trust the data, because your machine opens every URL in the data.
        resolution (`int` or `list[int]`, *optional*):
            Side of the square training images in pixels, or their height and width. Write `1024` or `768 1344` on the
            command line, and `1024` or `[768, 1344]` in YAML. If unset, the model's default resolution is used.
        aspect_ratio_buckets (`bool`, *optional*, defaults to `False`):
            Whether to train each pair at an image size that fits the aspect ratios of its images, instead of at
            `resolution`. The size is chosen from a list of sizes (buckets) that all have about the area of
            `resolution`. All pairs of a batch have the same size. `aspect_ratio_buckets` cannot be used with streams.
        bucket_kwargs (`dict` or `str`, *optional*):
            Constants of the image sizes of `aspect_ratio_buckets`, by name, in YAML or as JSON. All heights and widths
            are multiples of `step` pixels (default 64). `max_aspect_ratio` (default 2) is the largest allowed ratio of
            the longer to the shorter side.
        min_side (`int`, *optional*):
            Smallest allowed length in pixels of an image's shorter side. Pairs with a smaller image are skipped, and
            the data report says how many. Set `min_side` so that small images are not enlarged much. If unset, no pair
            is skipped for its size.
        random_crop (`bool`, *optional*, defaults to `False`):
            Whether to crop images at a random position instead of at the center. Both images of a pair are cropped at
            the same position.
        random_flip (`bool`, *optional*, defaults to `True`):
            Whether to flip pairs horizontally at random, each pair with probability 0.5. Both images of a pair are
            flipped together.
        proportion_empty_prompts (`float`, *optional*, defaults to `0.0`):
            Share of training pairs whose prompt is replaced by an empty prompt, in `[0, 1]`. The published value is
            0.2.
        precompute_latents (`bool`, *optional*, defaults to `False`):
            Whether to encode all images and prompts before training, into files that later runs reuse. With
            `precompute_latents`, VAE and text encoders take no device memory in training. `precompute_latents` needs
            map-style data.
        precompute_dir (`str`, *optional*):
            Folder for the files that `precompute_latents` and `precompute_ref_errors` write. All processes of a run
            must be able to read this folder, and several runs may share the folder. If unset, the folder
            `trl-diffusion-sdpo` in the user's cache folder is used.
        precompute_epochs (`int`, *optional*, defaults to `1`):
            Number of epochs for which random choices are drawn if results are computed before training. Later epochs
            repeat these choices. With `precompute_latents`, the choices are the positions of `random_crop`. With
            `precompute_ref_errors`, the choices are crop, flip, dropped prompt, noise and timestep of each pair. The
            time of the computation before training is proportional to `precompute_epochs`.
    """

    dataset_format: str | None = None
    dataset_num_proc: Annotated[int | None, Range("[1, inf)", "Leave it unset to use all cores.")] = None
    dataloader_num_workers: int | None = None
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
            later checkpoints when a run resumes. If `False`, the trainer raises an error instead of deleting files.
    """

    overwrite_output_dir: bool = False
