"""Reads rows of preference data sets, and lists the pairs in them. Images are returned undecoded."""

from __future__ import annotations

import functools
import hashlib
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from ..utils._compat import dataset_fingerprint
from ..utils.errors import UserError
from ..utils.processes import Peers, forks_by_default, usable_cores
from ..utils.score_scale import ScoreReading
from .data_report import evenly_spaced
from .fingerprints import facts_if_there, local_names, short, start_of
from .formats import SEED_COLUMNS, PreferenceFormat, Reject, groups, pairs_in_group, resolve_format
from .images import ImageReader, Size, UndecodableImageError, UnreadableImageError, as_list
from .kept_index import kept_index
from .mixtures import PairMixture, check_formats, repeat_by_weight
from .number_columns import bad_seeds, numbers_of_rows
from .pair_table import PairTable
from .single_images import class_names, match_images, median_score
from .tables import as_table

EXAMINED = datasets.Features(
    {
        "heights": datasets.List(datasets.Value("int32")),
        "widths": datasets.List(datasets.Value("int32")),
        "problems": datasets.List(datasets.Value("string")),
    }
)
HASHED_PAIRS = 2**20  # pairs at a time
FINGERPRINTED_PAIRS = 16  # pairs whose prompts and images are hashed to recognize a data set
ROWS_AT_ONCE = 1000
HASHED_ROWS = 100_000  # at once
FEW_ROWS = 1000  # one process decodes fewer rows' images faster than several
FEW_HEADERS = 20_000  # the same for headers of images


class StoredImage(NamedTuple):
    """An undecoded image of a row."""

    format: PreferenceFormat
    row: Mapping[str, Any]  # values of the row's columns
    number: int  # number of the image within the row

    def decode(self, reader: ImageReader) -> Image.Image:
        """Decode the image, with the errors of [`ImageReader.decode`]."""
        images = images_of_row(self.row, self.format)
        if self.number >= len(images):
            raise UndecodableImageError(f"image {self.number} is missing: the row has {len(images)} images")
        try:
            return reader.decode(images[self.number])
        except (UndecodableImageError, UnreadableImageError) as error:
            raise type(error)(f"image {self.number} {error}") from None

    def start(self) -> bytes:
        """Return [`start_of`] the undecoded image."""
        return b"".join(map(start_of, images_of_row(self.row, self.format)[self.number : self.number + 1]))

    def is_same(self, other: StoredImage) -> bool:
        """Return whether both images are stored as the same bytes or path. They are not decoded."""
        mine, theirs = self._stored(), other._stored()
        return mine is not None and mine == theirs

    def _stored(self) -> Any:
        value = dict(enumerate(images_of_row(self.row, self.format))).get(self.number)
        return (value.get("bytes") or value.get("path")) if isinstance(value, Mapping) else value

    @property
    def prompt(self) -> str:
        """The prompt of the image."""
        return self.format.prompt(self.row, self.number)

    @property
    def mask(self) -> Any:
        """The undecoded mask of the image."""
        columns = self.format.mask_columns
        return self.row.get(columns[self.number if len(columns) > 1 else 0])

    def sources(self, reader: ImageReader) -> list[Image.Image]:
        """Decode the images that the prompt edits.

        Raises:
            UndecodableImageError: If the row has no source image, or one is missing or cannot be decoded.
        """
        stored = as_list(self.row[self.format.source_columns[0]])
        if not stored:
            raise UndecodableImageError("has no source")
        try:
            return [reader.decode(value) for value in stored]
        except UndecodableImageError as error:
            raise UndecodableImageError(f"has a source that {error}") from None

    def noise_seed(self, *, is_winner: bool) -> int:
        """Return the seed of the noise from which the image was generated. `SEED_COLUMNS` are those of the preferred
        and the other image, whatever their order in the row, so `is_winner` says which it is."""
        return int(self.row[SEED_COLUMNS[is_winner == self.format.is_swapped]])


class TableSource:
    """Rows of one `datasets.Dataset`. Images are read from Arrow without decoding."""

    def __init__(
        self, dataset: datasets.Dataset, row_format: PreferenceFormat, name: str, number_columns: Sequence[str] = ()
    ) -> None:
        self.format = row_format
        self.name = name
        self.dataset = dataset
        # Files that `datasets` maps into memory, where it would not notice changed bytes. Results of `map`, which have
        # these names, may be written anew by each run.
        files = [entry["filename"] for entry in dataset.cache_files]
        self._files = [file for file in files if not os.path.basename(file).startswith("cache-")]
        texts = dict.fromkeys([*row_format.text_columns(dataset.column_names), *number_columns])
        images = [*row_format.image_columns, *row_format.mask_columns, *row_format.source_columns]
        seeds = [column for column in number_columns if column in SEED_COLUMNS]
        self.unread = [column for column in dataset.column_names if column not in (*texts, *images)]
        self.labels = dataset.with_format(None).select_columns(list(texts))
        if row_format.has_image_scores and row_format.score_threshold is None:
            self.format = replace(row_format, score_threshold=median_score(self.values("score")))
        self._images = dataset.with_format("arrow").select_columns(images)
        others = [*row_format.prompt_columns, *row_format.mask_columns, *seeds]
        columns = [*row_format.image_columns, *row_format.source_columns, *others]
        self._others = dataset.with_format("arrow").select_columns(others)
        self._rows = dataset.with_format("arrow").select_columns(columns)

    def __len__(self) -> int:
        return len(self._images)

    def row(self, number: int, *, with_images: bool = True) -> dict[str, Any]:
        """Return the undecoded values of a row, without images and source images unless `with_images`."""
        return (self._rows if with_images else self._others)[number].to_pylist()[0]

    def values(self, column: str, rows: range | None = None) -> Iterator[Any]:
        """Yield a column's value in each row, or in consecutive `rows`. Only columns of the format and of
        `number_columns` are available."""
        labels = self.labels.select_columns([column])
        for batch in (labels if rows is None else labels.select(rows)).iter(batch_size=ROWS_AT_ONCE):
            yield from batch[column]

    def prompts_of_rows(self, rows: np.ndarray, image: int = 0) -> list[str]:
        """Return the prompts of `rows`, which must be in ascending order. `image` (0 or 1) selects the image if each
        has its own prompt."""
        columns = self.format.prompt_columns
        column = columns[image if self.format.prompt_of_each_image else 0]
        if not len(rows):
            return []
        first, last = int(rows[0]), int(rows[-1]) + 1
        wanted = np.zeros(last - first, dtype=bool)
        wanted[rows - first] = True
        values = self.values(column, range(first, last))
        chosen = (value for value, is_wanted in zip(values, wanted, strict=True) if is_wanted)
        return [self.format.prompt({column: value}, image) for value in chosen]

    def index_pairs(self, reject: Reject) -> PairTable:
        """Return the pairs of all rows. Call `reject` for dropped rows and pairs."""
        if self.format.single_images:
            return PairTable(match_images(self.format, self._labelled_rows(), self.name, reject), {})
        positions = array("q")
        scores = array("d")
        for group in groups(self.format, self._labelled_rows()):
            for pair in pairs_in_group(self.format, group, reject):
                positions.extend(pair[:4])
                scores.extend(pair.scores or ())
        dtype = np.int32 if len(self) <= np.iinfo(np.int32).max else np.int64
        index = np.array(positions, dtype=dtype).reshape(-1, 4)
        return PairTable(index, {"scores": np.array(scores).reshape(-1, 2)} if len(scores) else {})

    def _labelled_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each row's number and values without images. Rows of the same group are consecutive."""
        labels = self.labels
        order = np.arange(len(self))
        if self.format.group_column is not None:
            first: dict[Any, int] = {}  # groups in the order of their first rows
            positions = [first.setdefault(group, len(first)) for group in self.values(self.format.group_column)]
            order = np.argsort(positions, kind="stable")
            labels = labels.select(order)
        numbers = iter(order.tolist())
        named = class_names(self.format, labels.features) if self.format.single_images else {}
        for batch in labels.iter(batch_size=ROWS_AT_ONCE):
            for column, names in named.items():
                batch[column] = [names.get(number) for number in batch[column]]
            for values in zip(*batch.values(), strict=True):
                yield next(numbers), dict(zip(batch, values, strict=True))

    def examine_images(
        self, rows: np.ndarray, reader: ImageReader, decode: bool, num_proc: int | None, *, of_sources: bool = False
    ) -> Iterator[list[tuple[int, int, str]]]:
        """Yield a list for each row: height, width and problem of each of its images, or with `of_sources` of its
        source images. `datasets` caches the result."""
        images = self._images if len(rows) == len(self) else self._images.select(rows)
        row_format = self.format
        if of_sources:
            row_format = replace(self.format, image_columns=self.format.source_columns, images_in_list=True)
        in_files = any(local_names(images[0].column(name)) for name in row_format.image_columns)
        examined = images.map(
            _examine_table,
            batched=True,
            batch_size=16 if decode else ROWS_AT_ONCE,
            fn_kwargs={"row_format": row_format, "reader": reader, "decode": decode, "files": self._file_facts()},
            remove_columns=images.column_names,
            features=EXAMINED,
            num_proc=num_proc,
            desc="Checking images" if decode else "Reading image sizes",
            load_from_cache_file=False if in_files else None,  # `datasets` would not notice that a file has changed
        )
        for batch in examined.with_format(None).iter(batch_size=ROWS_AT_ONCE):
            for facts in zip(*(batch[name] for name in EXAMINED), strict=True):
                yield list(zip(*facts, strict=True))

    @functools.cached_property
    def content_key(self) -> dict[str, str]:
        """Hashes of prompts and images for cache keys. They also change with a local image file or a file of the data
        set."""
        digest = hashlib.sha256(f"{dataset_fingerprint(self._images)} {self._file_facts()}".encode())
        for batch in self._images.iter(batch_size=ROWS_AT_ONCE):
            for column in batch.columns:
                for name in local_names(column):
                    digest.update(f"{name} {facts_if_there(name)}\n".encode("utf-8", "surrogatepass"))
        return {"prompts": dataset_fingerprint(self.labels), "images": short(digest)}

    @functools.cached_property
    def label_key(self) -> list[Any]:
        """Key of the rows' index and prompts, as values for JSON. It hashes the values themselves: their fingerprint
        may stay the same where `map` computes others."""
        digest = hashlib.blake2b()
        for rows in self.labels.with_format("arrow").iter(batch_size=HASHED_ROWS):
            for batch in rows.combine_chunks().to_batches():
                digest.update(batch.serialize())
        row_format = replace(self.format, label_readers={})  # whose functions the name of the format determines
        return [self.name, short(digest), str(self.labels.features), repr(row_format)]

    def _file_facts(self) -> list[Any]:
        """Return sizes and times of the data set's own files, which may be in any folder."""
        return [facts_if_there(file) for file in self._files]


class PairSource:
    """Rows of one data set, or of several in sequence.

    Args:
        tables (`Sequence[TableSource]`): The data sets.
        weights (`Sequence[float]`, *optional*): See [`PairMixture`].
        number_columns (`Sequence[str]`): Columns that need a valid number in every pair's row: a seed of noise
            (`SEED_COLUMNS`), or any finite number, or a list of them.
    """

    def __init__(
        self,
        tables: Sequence[TableSource],
        weights: Sequence[float] | None = None,
        number_columns: Sequence[str] = (),
    ) -> None:
        self.tables = list(tables)
        self._weights = weights
        self._number_columns = number_columns
        self._starts = [0, *np.cumsum([len(table) for table in tables]).tolist()]
        self.formats = formats = [table.format for table in tables]
        self.format_name = "+".join(row_format.name for row_format in formats)
        self.prompt_of_each_image = any(each.prompt_of_each_image for each in formats)
        self.single_images = any(each.single_images for each in formats)
        self.has_masks = any(row_format.mask_columns for row_format in formats)
        self.has_sources = any(row_format.source_columns for row_format in formats)
        self.unread = tuple(dict.fromkeys(column for table in tables for column in table.unread))
        check_formats({table.name: table.format for table in tables})

    def __len__(self) -> int:
        return self._starts[-1]

    def images(self, positions: Iterable[tuple[int, int]], *, with_images: bool = True) -> list[StoredImage]:
        """Return the undecoded images at `positions`, each a row number and an image number. Without `with_images`,
        all columns except images and source images are read, so none can be decoded."""
        rows: dict[int, dict[str, Any]] = {}
        images = []
        for row, image in positions:
            number = bisect_right(self._starts, row) - 1
            table = self.tables[number]
            if row not in rows:
                rows[row] = table.row(row - self._starts[number], with_images=with_images)
            images.append(StoredImage(table.format, rows[row], image))
        return images

    @property
    def score_threshold(self) -> float | None:
        """Score from which on images are liked, or `None` if none have scores, or if data sets differ in it."""
        thresholds = {row_format.score_threshold for row_format in self.formats if row_format.has_image_scores}
        return thresholds.pop() if len(thresholds) == 1 else None

    def are_single_images(self, rows: np.ndarray) -> np.ndarray:
        """Return whether each of `rows` is an image by itself, in a mixture, as a mask."""
        of_tables = np.array([row_format.single_images for row_format in self.formats])
        return np.asarray(of_tables[np.searchsorted(self._starts, rows, side="right") - 1])

    def scores_from_threshold(self, positions: np.ndarray) -> np.ndarray:
        """Return how far the scores of single images are above the threshold of their data set, `(P, 2)`, for pairs at
        `positions` `(P, 4)`."""
        above = []
        for table in self.tables:
            least = table.format.score_threshold or 0.0  # unset if no score is readable
            above.append(numbers_of_rows(table.values("score"), "score")[0][:, 0] - least)
        return np.concatenate(above)[positions[:, [0, 2]]]

    def prompts_of_rows(self, rows: np.ndarray, image: int = 0) -> list[str]:
        """Return the prompts of `rows` without reading images. `image` (0 or 1) selects the image if each has its own
        prompt."""
        different, number_of_row = np.unique(rows, return_inverse=True)
        prompts = [prompt for table, share in self._split(different) for prompt in table.prompts_of_rows(share, image)]
        return [prompts[number] for number in number_of_row.reshape(-1).tolist()]

    def values(self, column: str) -> Iterator[Any]:
        """Yield the value of a column in each row."""
        for table in self.tables:
            yield from table.values(column)

    def examine_images(
        self, positions: np.ndarray, reader: ImageReader, *, decode: bool, num_proc: int | None, peers: Peers
    ) -> tuple[np.ndarray, dict[tuple[int, int], str]]:
        """Decode all images of pairs, or only read their headers if `decode` is false. The first process and its
        workers do it, but call it in all processes together.

        Args:
            positions (`np.ndarray` of shape `(P, 4)`): Row and image of each pair's winner and loser.
            num_proc (`int`, *optional*): Workers. By default, one per CPU core if there are many images, else none.

        Returns:
            `tuple`: Height and width of winners and losers, `(P, 2, 2)`, with zeros for bad and missing images, and a
                dict from `(row number, image number)` of each bad image to the reason.
        """
        rows = np.unique(positions[:, [0, 2]])
        images = 1 + int(positions[:, [1, 3]].max())  # largest number of images in a row

        def examine() -> tuple[np.ndarray, dict[tuple[int, int], str]]:
            examined = self._examined(rows, reader, decode, num_proc)
            sizes = np.zeros((len(rows), images, 2), dtype=np.int32)
            reasons = {}
            for row, row_sizes, facts in zip(rows.tolist(), sizes, examined, strict=True):
                for image, (height, width, problem) in enumerate(facts[:images]):
                    row_sizes[image] = height, width
                    if problem:
                        reasons[row, image] = problem
            return sizes, reasons

        sizes, reasons = peers.first(examine)
        return sizes[np.searchsorted(rows, positions[:, [0, 2]]), positions[:, [1, 3]]], reasons

    def source_sizes(
        self, rows: np.ndarray, reader: ImageReader, *, num_proc: int | None, peers: Peers
    ) -> list[tuple[Size, ...]]:
        """Return `(height, width)` of each source image of `rows`, which must be in ascending order, or `()` where
        sources cannot be read. The first process and its workers read the headers, but call it in all processes
        together."""

        def read() -> list[tuple[Size, ...]]:
            return [
                () if any(problem for *_, problem in facts) else tuple((height, width) for height, width, _ in facts)
                for facts in self._examined(rows, reader, False, num_proc, of_sources=True)
            ]

        return peers.first(read)

    def _examined(
        self, rows: np.ndarray, reader: ImageReader, decode: bool, num_proc: int | None, *, of_sources: bool = False
    ) -> Iterator[list[tuple[int, int, str]]]:
        """Yield the results of [`TableSource.examine_images`] for sorted row numbers of all data sets."""
        is_long = len(rows) >= (FEW_ROWS if decode else FEW_HEADERS)
        if num_proc is None and is_long and forks_by_default():
            num_proc = usable_cores()
        for table, numbers in self._split(rows):
            if len(numbers):
                yield from table.examine_images(numbers, reader, decode, num_proc, of_sources=of_sources)

    def _split(self, rows: np.ndarray) -> Iterator[tuple[TableSource, np.ndarray]]:
        """Split sorted row numbers by data set. Yield each data set and the numbers of its rows within it."""
        shares = np.split(rows, np.searchsorted(rows, self._starts[1:-1]))
        for table, share, start in zip(self.tables, shares, self._starts[:-1], strict=True):
            yield table, share - start

    def index_pairs(self, reject: Reject) -> PairTable:
        """Return the pairs of all data sets, repeated so that each has its share of the epoch. Call `reject` for
        dropped rows and pairs. Those of large data sets are kept for later starts."""

        def key() -> list[Any]:
            return [[table.label_key for table in self.tables], self._weights, self._number_columns]

        return kept_index(key, len(self), self._index_pairs, reject)

    def _index_pairs(self, reject: Reject) -> PairTable:
        pairs = self._pairs_of_all(reject)
        for column in self._number_columns:
            values = self.values(column)
            reasons = bad_seeds(values, column) if column in SEED_COLUMNS else numbers_of_rows(values, column)[1]
            is_bad = np.isin(pairs.positions[:, 0], list(reasons))
            for row in np.unique(pairs.positions[is_bad, 0]).tolist():
                reject("bad_labels", row, reasons[row], 1)
            pairs = pairs.take(~is_bad)
        return pairs

    def _pairs_of_all(self, reject: Reject) -> PairTable:
        if len(self.tables) == 1:
            return self.tables[0].index_pairs(reject)
        listed = []
        for table, start in zip(self.tables, self._starts[:-1], strict=True):

            def reject_in_mixture(
                kind: str, row: int, reason: str, amount: int, table: TableSource = table, start: int = start
            ) -> None:
                reject(kind, row + start, f"{reason} ({table.name}, row {row})", amount)

            pairs = table.index_pairs(reject_in_mixture)
            if not len(pairs):
                raise UserError(
                    f"Every data set of a mixture must have a pair. The {table.name} data have {len(table)} rows "
                    "and no pair. Check the labels of these data, or remove the data from the mixture."
                )
            shift = np.array([start, 0, start, 0], pairs.positions.dtype)
            listed.append(replace(pairs, positions=pairs.positions + shift))
        if self._weights is not None:
            listed = repeat_by_weight(listed, self._weights)
        columns = {name: np.concatenate([pairs.columns[name] for pairs in listed]) for name in listed[0].columns}
        return PairTable(np.concatenate([pairs.positions for pairs in listed]), columns)

    def fingerprint(self, pairs: PairTable, *, thorough: bool = False) -> dict[str, Any]:
        """Return hashes that identify pairs of these rows.

        Args:
            thorough (`bool`): Whether to hash every prompt and image, for caches; these hashes depend on this machine's
                image files. Otherwise, a few pairs are hashed, so that a resumed run can compare data on any machine.

        Returns:
            `dict[str, Any]`: `format`, `pairs` (number of pairs), `index` (hash of image positions and scores),
                `prompts` (hash of prompts) and `images` (hash of images).
        """
        digest = hashlib.sha256()
        for start in range(0, len(pairs), HASHED_PAIRS):  # int64 copies of all would be twice the table
            part = pairs.positions[start : start + HASHED_PAIRS]
            digest.update(np.ascontiguousarray(part, dtype="<i8").data)
        if "scores" in pairs.columns:
            digest.update(np.ascontiguousarray(pairs.columns["scores"], dtype="<f8").data)
        facts: dict[str, Any] = {"format": self.format_name, "pairs": len(pairs), "index": short(digest)}
        if thorough:
            keys = [table.content_key for table in self.tables]
            return {**facts, **{name: [key[name] for key in keys] for name in ("prompts", "images")}}
        prompts = hashlib.sha256()
        images = hashlib.sha256()
        sample = pairs.positions[evenly_spaced(len(pairs), FINGERPRINTED_PAIRS)].tolist()
        for winner, number, loser, loser_number in sample:
            both = self.images(sorted([(winner, number), (loser, loser_number)]))  # whatever the label
            for image in both if self.prompt_of_each_image or self.single_images else self.images([(winner, 0)]):
                prompts.update(repr(image.prompt).encode() + b"\0")
            for image in both:
                images.update(image.start() + b"\0")
        return {**facts, "prompts": short(prompts), "images": short(images)}


def make_source(
    dataset: Any,
    dataset_format: str | None,
    name: str,
    *,
    use_scores: bool = True,
    score_reading: ScoreReading | None = None,
    is_swapped: bool = False,
    number_columns: Sequence[str] = (),
    reads_verdicts: bool = True,
    score_threshold: float | None = None,
) -> PairSource:
    """Return the rows of a data set, a list of dicts or a mixture as a `PairSource`.

    Raises:
        ValueError: If the data have an unsupported type or no rows, or a column of `number_columns` is missing.
    """
    listed = [(name, dataset, dataset_format)]
    if isinstance(dataset, PairMixture):
        listed = list(dataset.entries(dataset_format, name))
    tables = []
    for label, rows, set_format in listed:
        table = as_table(rows, set_format, label)
        if lacking := [column for column in number_columns if column not in table.column_names]:
            setting = "noise_source='generated'" if set(lacking) <= set(SEED_COLUMNS) else "pair_weights"
            raise UserError(
                f"`{setting}` reads the columns {lacking}. The {label} data have only {table.column_names}. Add the "
                "columns, or choose another value of the setting."
            )
        row_format = resolve_format(
            set_format,
            table.column_names,
            table.features,
            use_scores=use_scores,
            score_reading=score_reading,
            is_swapped=is_swapped,
            reads_verdicts=reads_verdicts,
            score_threshold=score_threshold,
        )
        tables.append(TableSource(table, row_format, label, number_columns))
    weights = dataset.weights if isinstance(dataset, PairMixture) else None
    return PairSource(tables, weights, number_columns)


def images_of_row(row: Mapping[str, Any], row_format: PreferenceFormat) -> list[Any]:
    """Return the undecoded images of a row, in the order of `ImageScores.values`."""
    if not row_format.images_in_list:
        return [row.get(column) for column in row_format.image_columns]
    images = row.get(row_format.image_columns[0])
    if isinstance(images, Iterable) and not isinstance(images, str | bytes | memoryview | Mapping):
        return list(images)
    return [] if images is None else [images]


def _examine_table(
    table: pa.Table, row_format: PreferenceFormat, reader: ImageReader, decode: bool, files: list[Any]
) -> dict[str, list[list[Any]]]:
    """Return heights, widths and problems of a batch's images, as the columns of `EXAMINED`. `datasets` hashes
    `files`, so it computes again when these facts about files change."""
    columns = row_format.image_columns
    examined: dict[str, list[list[Any]]] = {name: [] for name in EXAMINED}
    for values in zip(*(map(_value, table.column(name)) for name in columns), strict=True):
        facts = []
        for image in images_of_row(dict(zip(columns, values, strict=True)), row_format):
            try:
                height, width = reader.decode(image).size[::-1] if decode else reader.size(image)
                facts.append((height, width, ""))
            except UndecodableImageError as error:
                facts.append((0, 0, str(error)))
        for number, name in enumerate(EXAMINED):
            examined[name].append([fact[number] for fact in facts])
    return examined


def _value(scalar: pa.Scalar) -> Any:
    """Convert an Arrow value to Python. Bytes become a view: `as_py` would copy a whole memory-mapped file."""
    if not scalar.is_valid:
        return None
    if pa.types.is_struct(scalar.type):
        return {name: _value(field) for name, field in scalar.items()}
    if pa.types.is_list(scalar.type) or pa.types.is_large_list(scalar.type):
        return [_value(entry) for entry in scalar.values]
    if pa.types.is_binary(scalar.type) or pa.types.is_large_binary(scalar.type):
        return memoryview(scalar.as_buffer())
    return scalar.as_py()
