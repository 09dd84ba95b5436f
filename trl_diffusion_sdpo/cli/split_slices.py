"""Splits and slices of them, such as `train[:90%]` and `train[:100]+test`, as the Datasets library reads them."""

import datasets

_ALL = "all"  # what the library calls the sum of all splits


def rename(split: str, name: str) -> str:
    """The same slices of a split of another name: `train[:90%]` of `test[:90%]`."""
    return "+".join(name + part[len(_name_of(part)) :] for part in _parts(split))


def rows_of(split: str, lengths: dict[str, int]) -> list[tuple[str, range]]:
    """The rows that a split means: a split's name and a range of its rows, for each part of a sum.

    Args:
        split (`str`): Such as `train[:90%]`.
        lengths (`dict[str, int]`): Rows of each split that there is.

    Raises:
        ValueError: If there is no such split, or the words mean none.
    """
    if split == _ALL:
        return [(name, range(length)) for name, length in lengths.items()]
    absolute = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return [(part.splitname, range(part.from_, part.to)) for part in absolute]


def share_rows(first: str, second: str, lengths: dict[str, int]) -> bool:
    """Whether a row belongs to both splits of one data set, whose splits have the given lengths."""
    return any(
        name == other and max(rows.start, others.start) < min(rows.stop, others.stop)
        for name, rows in rows_of(first, lengths)
        for other, others in rows_of(second, lengths)
    )


def surely_share_rows(first: str, second: str) -> bool:
    """Whether two splits of one data set have a row in common whatever their lengths, which are not known before the
    data are loaded: parts that are the same, or one that is all of the other's split."""
    if _ALL in (first, second):
        return True
    return any(
        _name_of(part) == _name_of(other) and (part == other or _name_of(part) in (part, other))
        for part in _parts(first)
        for other in _parts(second)
    )


def _parts(split: str) -> list[str]:
    return [part.strip() for part in split.split("+")]


def _name_of(part: str) -> str:
    """`train` of `train[:90%]`."""
    return part.partition("[")[0]
