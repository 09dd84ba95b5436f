"""Arguments that say what the training data are, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, field

INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")
ON_BAD_ROW = ("drop", "raise")


@dataclass
class DataArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that controls the data.

    Parameters:
        dataset_format (`str`, *optional*):
            Name of the preference format, such as `"pickapic"`; detected by columns if unset.
        dataset_num_proc (`int`, *optional*):
            Processes for the check of the images.
        on_bad_row (`str`, *optional*, defaults to `"drop"`):
            `"drop"` leaves out ties, undecodable images and prompts that are no text, counted and reported; `"raise"`
            stops at the first.
        verify_images (`bool`, *optional*, defaults to `True`):
            Whether to decode every image of a map-style data set once before training (cached by `datasets`). If
            not, bad images are found when they are drawn, and the next good row stands in.
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
        default=None, metadata={"help": "Number of processes to use for checking the dataset."}
    )
    on_bad_row: str = field(
        default="drop",
        metadata={
            "help": "`drop` leaves out ties and bad rows, counted; `raise` stops at the first.",
            "choices": list(ON_BAD_ROW),
        },
    )
    verify_images: bool = field(
        default=True, metadata={"help": "Whether to decode every image of a map-style data set before training."}
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
