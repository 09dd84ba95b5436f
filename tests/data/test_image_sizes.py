"""An image's size from its header is that of the decoded image, and what pairs get from it."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pairs import prepare

from trl_diffusion_sdpo.data import AspectRatioBuckets, PreferenceCollator
from trl_diffusion_sdpo.data.buckets import PairKey
from trl_diffusion_sdpo.data.images import ImageReader

BUCKETS = AspectRatioBuckets((16, 16), step=4)  # 12 x 20, 16 x 16, 20 x 12


def encoded(height, width, kind="PNG", **options):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def same_as_decoded(value):
    image = ImageReader().decode(value)
    assert ImageReader().size(value) == (image.height, image.width)
    return image.height, image.width


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_size_of_a_turned_image_is_that_of_the_upright_one(kind, orientation):
    upright = (12, 24) if orientation < 5 else (24, 12)
    assert same_as_decoded(encoded(12, 24, kind, exif=turned(orientation))) == upright


def test_no_pixel_is_decoded(monkeypatch):
    data = [encoded(12, 24, kind) for kind in ("PNG", "JPEG", "WEBP")]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert {ImageReader().size(value) for value in data} == {(12, 24)}


def row(winner, loser, **columns):
    return {"prompt": f"{winner} {loser}", "chosen": encoded(*winner), "rejected": encoded(*loser), **columns}


ROWS = [row((16, 16), (32, 32)), row((20, 60), (40, 80)), row((80, 40), (40, 20)), row((30, 10), (12, 12))]
SIDES = ("chosen", "rejected")
TARGETS = [(16, 16), (12, 20), (20, 12), (20, 12)]  # of 3:1 and 1:1 the mean is 1.73, and 20 x 12 is 1.67


def saved(file, data):
    file.write_bytes(data)
    return str(file)


@pytest.mark.parametrize("kind", ["rows", "bytes", "images", "files", "lists"])
def test_pairs_get_the_sizes_of_their_buckets_from_every_source(kind, tmp_path):
    rows = ROWS
    if kind == "lists":
        keys = ("rejected", "chosen")
        rows = [{"prompt": "", "image_path": [pair[key] for key in keys], "human_preference": [0, 1]} for pair in ROWS]
    elif kind == "files":
        rows = [{key: saved(tmp_path / f"{i}{key}.png", pair[key]) for key in SIDES} for i, pair in enumerate(ROWS)]
        rows = [{**pair, "prompt": ""} for pair in rows]
    data = rows if kind == "rows" else datasets.Dataset.from_list(rows)
    if kind == "images":
        data = data.cast_column("chosen", datasets.Image()).cast_column("rejected", datasets.Image())
    prepared = prepare(data, buckets=BUCKETS)
    assert [prepared.target_size(pair) for pair in range(4)] == TARGETS
    assert [tuple(prepared[pair]["pixel_values"].shape[2:]) for pair in range(4)] == TARGETS
    assert prepared.for_evaluation().target_size(2) == (20, 12)


def test_small_images_are_left_out_and_counted(caplog):
    for buckets in (None, BUCKETS):
        prepared = prepare(ROWS, min_side=16, buckets=buckets)
        assert (prepared.report.pairs, prepared.report.too_small, prepared.report.dropped) == (3, 1, 1)
        assert prepared.report.examples["too_small"] == [(3, "10 pixels along the shorter side, and `min_side=16`")]
        assert "1 too small" in caplog.text
        caplog.clear()
    assert prepared[0]["repeated"] is False and prepared[PairKey(0, is_repeated=True)]["repeated"] is True
    assert prepared.target_size(2) == (20, 12)
    unfiltered = prepare(ROWS, min_side=8)
    assert "1 pairs have an image that is enlarged" in str(unfiltered.report)
    assert (
        unfiltered.report.too_small == 0 and unfiltered.target_size(0) == (16, 16) and "repeated" not in unfiltered[0]
    )


def test_an_image_without_a_readable_size_drops_its_pair():
    rows = [*ROWS, {**ROWS[0], "rejected": b"junk"}, {**ROWS[1], "chosen": None}]
    for data in (rows, datasets.Dataset.from_list(rows)):
        prepared = prepare(data, buckets=BUCKETS, verify_images="none")
        assert (prepared.report.pairs, prepared.report.undecodable) == (4, 2)
        assert [number for number, _ in prepared.report.examples["undecodable"]] == [4, 5]
        assert "image format" in prepared.report.examples["undecodable"][0][1]
    many = prepare([ROWS[0], *[rows[4]] * 9], buckets=BUCKETS, verify_images="none").report
    assert (many.pairs, many.undecodable, len(many.examples["undecodable"])) == (1, 9, 5)
    with pytest.raises(ValueError, match="No pair is left"):
        prepare([rows[4]], buckets=BUCKETS, verify_images="none")


def test_a_pair_that_fails_when_read_is_replaced_by_one_of_its_bucket():
    """Its header is whole and its pixels are not."""
    broken = {**ROWS[1], "chosen": ROWS[1]["chosen"][:90]}
    prepared = prepare([broken, ROWS[0], ROWS[1], ROWS[2]], buckets=BUCKETS, verify_images="none")
    assert prepared.target_size(0) == (12, 20)
    assert prepared[0]["row"] == 2 and prepared[0]["pixel_values"].shape[2:] == (12, 20)
    alone = prepare([ROWS[0], broken, ROWS[2]], buckets=BUCKETS, verify_images="none")
    with pytest.raises(ValueError, match="12 x 20"):
        alone[1]


def test_the_sizes_of_a_saved_set_are_read_once(tmp_path, monkeypatch):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "pairs")
    first = prepare(datasets.load_from_disk(tmp_path / "pairs"), buckets=BUCKETS).fingerprint()
    monkeypatch.setattr(ImageReader, "size", lambda *_: pytest.fail("read again"))
    assert prepare(datasets.load_from_disk(tmp_path / "pairs"), buckets=BUCKETS).fingerprint() == first


def test_the_sizes_of_files_that_have_changed_are_read_anew(tmp_path):
    """The rows of the saved set are equal both times; a file that they name is not."""
    names = {side: saved(tmp_path / f"{side}.png", ROWS[0][side]) for side in SIDES}
    datasets.Dataset.from_list([{"prompt": "", **names}]).save_to_disk(tmp_path / "pairs")
    targets = []
    for row in ROWS[:2]:
        for side in SIDES:
            saved(tmp_path / f"{side}.png", row[side])
        targets.append(prepare(datasets.load_from_disk(tmp_path / "pairs"), buckets=BUCKETS).target_size(0))
    assert targets == TARGETS[:2]


def test_the_collator_counts_what_does_not_fill_up():
    prepared = prepare([ROWS[0]] * 3, buckets=BUCKETS)
    batch = PreferenceCollator()([prepared[0], prepared[1], prepared[PairKey(2, is_repeated=True)]])
    assert batch["counted"] == 2 and batch["pixel_values"].shape == (6, 3, 16, 16)
    assert "counted" not in PreferenceCollator()([prepare(ROWS)[0]])
    torch.testing.assert_close(prepared[PairKey(2, is_repeated=True)]["pixel_values"], prepared[2]["pixel_values"])
