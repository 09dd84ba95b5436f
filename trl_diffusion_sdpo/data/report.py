"""What became of a preference set: how many rows, pairs and drops, and examples of what was wrong."""

from dataclasses import dataclass, field

COUNTS = ("rows", "pairs", "ties", "undecodable", "bad_prompts", "bad_labels")
EXAMPLES_KEPT = 5
HOW_TO_DROP = 'Fix the row, or pass on_bad_row="drop" to leave such rows out.'


@dataclass
class DataReport:
    """What became of a preference set.

    Attributes:
        name, format (`str`): Which set, read as what.
        rows (`int`): Rows of the source.
        pairs (`int`): Pairs to train on.
        ties (`int`): Pairs of images that were judged equal.
        undecodable (`int`): Pairs of which an image cannot be decoded.
        bad_prompts, bad_labels (`int`): Rows whose prompt is no string; whose label or score is missing or unreadable.
        examples (`dict[str, list[tuple[int, str]]]`): For each kind of drop, the first few row numbers and reasons.
    """

    name: str
    format: str
    rows: int = 0
    pairs: int = 0
    ties: int = 0
    undecodable: int = 0
    bad_prompts: int = 0
    bad_labels: int = 0
    examples: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        """Everything that was left out, of whatever kind."""
        return self.ties + self.undecodable + self.bad_prompts + self.bad_labels

    def add(self, kind: str, row: int, reason: str, amount: int = 1) -> bool:
        """Counts a drop, as `amount` of them; true if it was kept as an example."""
        setattr(self, kind, getattr(self, kind) + amount)
        kept = self.examples.setdefault(kind, [])
        if len(kept) == EXAMPLES_KEPT:
            return False
        kept.append((row, reason))
        return True

    def __str__(self) -> str:
        counts = ", ".join(f"{getattr(self, count)} {count.replace('_', ' ')}" for count in COUNTS)
        lines = [f"{self.name} data ({self.format}): {counts}"]
        for kind, examples in self.examples.items():
            lines += [f"  {kind.replace('_', ' ')}: row {row}: {reason}" for row, reason in examples]
        return "\n".join(lines)


def reject(report: DataReport, strict: bool, kind: str, row: int, reason: str, amount: int) -> bool:
    """Counts a drop; true if it was kept as an example.

    Raises:
        ValueError: On a bad row, if `strict`. A tie is none: its labels say that it has no winner.
    """
    if strict and kind != "ties":
        raise ValueError(f"{report.name} data, row {row}: {reason}. {HOW_TO_DROP}")
    return report.add(kind, row, reason, amount)
