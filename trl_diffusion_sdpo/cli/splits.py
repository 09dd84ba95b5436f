"""Split expressions of the Datasets library, such as `train[:90%]` or `train+test`: the rows that they mean, and
whether two of them have some in common."""

import datasets

ALL_SPLITS = "all"  # the Datasets library's name for the concatenation of all splits


def rename_split(split: str, name: str) -> str:
    """Replaces the name of a split and keeps its slices: `test[:90%]` becomes `train[:90%]`."""
    return "+".join(name + part[len(_split_name(part)) :] for part in _split_parts(split))


def rows_of(split: str, lengths: dict[str, int]) -> list[tuple[str, range]]:
    """The rows of a split expression such as `train[:90%]` or `train[:100]+test`: a split's name and a range of its
    rows, for each summand. `lengths` are the splits' numbers of rows.

    Raises:
        ValueError: If there is no such split, or the expression is invalid.
    """
    if split == ALL_SPLITS:
        return [(name, range(length)) for name, length in lengths.items()]
    absolute = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return [(part.splitname, range(part.from_, part.to)) for part in absolute]


def share_rows(first: str, second: str, lengths: dict[str, int]) -> bool:
    """Whether two splits of one data set have a row in common, given the lengths of its splits."""
    return any(
        name == other and max(rows.start, others.start) < min(rows.stop, others.stop)
        for name, rows in rows_of(first, lengths)
        for other, others in rows_of(second, lengths)
    )


def surely_share_rows(first: str, second: str) -> bool:
    """Whether two splits of one data set have a row in common whatever the splits' lengths, which are unknown before
    the data are loaded: they have an equal part, or a part of one is all of a split that the other slices."""
    if ALL_SPLITS in (first, second):
        return True
    return any(
        _split_name(part) == _split_name(other) and (part == other or _split_name(part) in (part, other))
        for part in _split_parts(first)
        for other in _split_parts(second)
    )


def _split_parts(split: str) -> list[str]:
    return [part.strip() for part in split.split("+")]


def _split_name(part: str) -> str:
    """`train` of `train[:90%]`."""
    return part.partition("[")[0]
