"""The ratios of step times that `step_time.py` measures."""

from dataclasses import dataclass

from proportions import THIN, XL_HALF


@dataclass(frozen=True)
class Comparison:
    """One ratio: the step time of a contestant divided by that of another.

    Attributes:
        part (`str`): Value of `--parts` that selects this comparison.
        published (`str`): Pipeline size to imitate, a key of `PROPORTIONS`.
        tuning (`str`): `"full"` or `"lora"`.
        target (`float`, *optional*): Value that the ratio should not exceed.
        whole (`bool`): Whether to include the loading of data in the time of a step.
    """

    part: str
    published: str
    tuning: str
    name: str
    against: str
    target: float | None = None
    whole: bool = False


COMPARISONS = (
    Comparison("bare", "sd15", "full", "ours", "bare loop", 1.03),
    Comparison("bare", "sd15", "lora", "ours", "bare loop", 1.03),
    Comparison("overhead", THIN, "full", "ours", "bare loop"),
    Comparison("overhead", THIN, "lora", "ours", "bare loop"),
    Comparison("overhead", THIN, "full", "plain Trainer", "bare loop"),
    Comparison("overhead", THIN, "lora", "plain Trainer", "bare loop"),
    Comparison("authors", "sd15", "full", "ours", "authors' step"),
    Comparison("diffusers", "sd15", "lora", "ours", "diffusers' script"),
    Comparison("cached", "sdxl", "full", "ours, cached", "ours", 1 / 1.3, whole=True),
    Comparison("cached", "sdxl", "lora", "ours, cached", "ours", 1 / 1.3, whole=True),
    Comparison("cached", "sdxl", "lora", "ours, cached, errors", "ours, errors", 1 / 1.3, whole=True),
    Comparison("cached", XL_HALF, "full", "ours, cached", "ours", whole=True),
    Comparison("cached", XL_HALF, "lora", "ours, cached", "ours", whole=True),
    Comparison("errors", "sd15", "full", "ours, cached, errors", "ours, cached", 0.80),
    Comparison("errors", "sd15", "lora", "ours, cached, errors", "ours, cached", 0.72),
    Comparison("both", "sd15", "full", "ours, cached, errors", "authors' step", 0.60),
    Comparison("both", "sd15", "lora", "ours, cached, errors", "diffusers' script"),
)
