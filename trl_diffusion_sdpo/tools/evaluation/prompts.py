"""Read the prompts of an evaluation from a file or a dataset."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...utils.errors import UserError

PROMPT_COLUMNS = ("prompt", "caption", "text", "Prompt", "caption_text")


@dataclass(frozen=True)
class PromptList:
    """Distinct prompts in their original order.

    Args:
        prompts (`tuple[str, ...]`): The prompts.
        empty (`int`): Number of empty prompts skipped.
        duplicates (`int`): Number of repeated prompts skipped.
    """

    prompts: tuple[str, ...]
    empty: int = 0
    duplicates: int = 0

    def first(self, count: int) -> PromptList:
        """Return a list of only the first `count` prompts.

        Raises:
            `ValueError`: If `count` is below 1.
        """
        if count < 1:
            raise UserError(
                f"An evaluation needs at least one prompt, got a limit of {count} prompts. Raise the limit."
            )
        return replace(self, prompts=self.prompts[:count])


def read_prompts(source: str | Path, *, column: str | None = None, split: str = "test") -> PromptList:
    """Return the prompts in a `.txt`, `.json`, `.jsonl` or `.csv` file, or in a dataset on the Hub.

    Empty and repeated prompts are skipped and counted.

    Args:
        source (`str` or `Path`): Path of a file, or Hub id of a dataset.
        column (`str`, *optional*): Column or key of the prompts, by default the first of `prompt`, `caption`, `text`
            and similar names that exists.
        split (`str`, *optional*, defaults to `"test"`): Split of the dataset.

    Raises:
        `ValueError`: If the file is missing, not UTF-8 or malformed, or has no column of prompts or no prompts.
    """
    path = Path(source)
    if path.suffix in _READERS:
        if not path.is_file():
            raise UserError(
                f"The prompts must be in a file or a dataset, and there is no file {path}. Check the path."
            )
        try:
            entries = _READERS[path.suffix](path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"A prompt file must be UTF-8, and {path} is not: {error}. Convert it.") from error
        except (ValueError, RecursionError, csv.Error) as error:
            raise UserError(f"{path} could not be read as a {path.suffix[1:]} file of prompts: {error}") from error
    else:
        import datasets

        loaded = datasets.load_dataset(str(source), split=split)
        # Other columns may have images, which reading would decode.
        texts = (datasets.Value("string"), datasets.Value("large_string"))
        entries = loaded.select_columns([name for name, kind in loaded.features.items() if kind in texts])
    return distinct_prompts([_prompt(entry, column, source) for entry in entries], source)


def distinct_prompts(prompts: Sequence[str], source: Any = "the list") -> PromptList:
    """Return the prompts without empty and repeated ones, and how many of each were left out.

    Raises:
        `ValueError`: If all prompts are empty.
    """
    stripped = [prompt.strip() for prompt in prompts]
    filled = [prompt for prompt in stripped if prompt]
    distinct = tuple(dict.fromkeys(filled))
    if not distinct:
        raise UserError(f"An evaluation needs at least one prompt, and {source} has none. Add prompts.")
    return PromptList(distinct, len(stripped) - len(filled), len(filled) - len(distinct))


def _prompt(entry: Any, column: str | None, source: Any) -> str:
    if isinstance(entry, str) and column is None:
        return entry
    if not isinstance(entry, dict):
        hint = "" if column is None else f" Only mappings have a column `{column}`: leave `--prompt_column` out."
        raise UserError(f"Each entry of {source} must be a prompt or a mapping with a prompt, got {entry!r}.{hint}")
    columns = PROMPT_COLUMNS if column is None else (column,)
    name = next((name for name in columns if isinstance(entry.get(name), str)), None)
    if name is None:
        raise UserError(
            f"The prompts of {source} must be in a column {' or '.join(f'`{name}`' for name in columns)}, got the "
            f"columns {sorted(entry)}. Name the right column with `--prompt_column` (in Python: `column`)."
        )
    return entry[name]


def _read_json(text: str) -> list[Any]:
    content = json.loads(text)
    if not isinstance(content, list):
        raise UserError(f"the file must contain a list of prompts, got a {type(content).__name__}")
    return content


def _read_csv(text: str) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(text)))
    for number, row in enumerate(rows, 1):
        if None in row:
            raise UserError(f"row {number} has more cells than there are columns. Put prompts with commas in quotes")
    return rows


_READERS: dict[str, Callable[[str], list[Any]]] = {
    # `str.splitlines` would also split at some characters inside a prompt, such as U+2028.
    ".txt": lambda text: text.removesuffix("\n").split("\n"),
    ".json": _read_json,
    ".jsonl": lambda text: [json.loads(line) for line in text.split("\n") if line.strip()],
    ".csv": _read_csv,
}
