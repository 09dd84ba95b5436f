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
