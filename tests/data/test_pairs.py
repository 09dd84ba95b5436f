"""From every format to items, map-style and streamed: winners, drops and messages."""

import logging

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pairs import JUNK, STYLES, bad_rows, canonical, in_style, items_of, picture, png, prepare, same

from trl_diffusion_sdpo.utils.processes import Peers


def levels(prepared):
    """(prompt, winner grey level, loser grey level) of every pair."""
    greys = []
    for item in items_of(prepared):
        grey = item["pixel_values"][:, 0, 0, 0].tolist()
        greys.append((item["prompt"], *grey))
    return greys


FORMAT_CASES = {
    "canonical": (canonical(2), [("p0", 100, 0), ("p1", 101, 1)]),
    "pickapic": (
        [
            {"caption": "a", "jpg_0": png(1), "jpg_1": png(2), "label_0": 1.0, "label_1": 0.0, "has_label": True},
            {"caption": "b", "jpg_0": png(3), "jpg_1": png(4), "label_0": 0.0, "label_1": 1.0, "has_label": True},
            {"caption": "c", "jpg_0": png(5), "jpg_1": png(6), "label_0": 0.5, "label_1": 0.5, "has_label": True},
            {"caption": "d", "jpg_0": png(7), "jpg_1": png(8), "label_0": None, "label_1": None, "has_label": False},
        ],
        [("a", 1, 2), ("b", 4, 3)],
    ),
    "pickapic_webdataset": (
        [
            {"original_prompt.txt": "a\n", "jpg_0.jpg": png(1), "jpg_1.jpg": png(2), "label_0.txt": "1\n"},
            {"original_prompt.txt": "b\n", "jpg_0.jpg": png(3), "jpg_1.jpg": png(4), "label_0.txt": "0\n"},
            {"original_prompt.txt": "c\n", "jpg_0.jpg": png(5), "jpg_1.jpg": png(6), "label_0.txt": "0.5\n"},
        ],
        [("a", 1, 2), ("b", 4, 3)],
    ),
    "hpdv2 preference": (
        [{"prompt": "a", "image_path": [png(1), png(2), png(3)], "human_preference": [0, 1, 0]}],
        [("a", 2, 1), ("a", 2, 3)],
    ),
    "hpdv2 rank": (
        [{"prompt": "a", "image_path": [png(1), png(2), png(3)], "rank": [2, 1, 3]}],
        [("a", 2, 1), ("a", 1, 3), ("a", 2, 3)],
    ),
    "hpdv3": ([{"prompt": "a", "path1": png(1), "path2": png(2), "confidence": 0.9}], [("a", 1, 2)]),
    "imagerewarddb": (
        [
            {"prompt_id": "x", "prompt": "a", "image": png(1), "rank": 3},
            {"prompt_id": "x", "prompt": "a", "image": png(2), "rank": 1},
            {"prompt_id": "x", "prompt": "a", "image": png(3), "rank": 3},
            {"prompt_id": "y", "prompt": "b", "image": png(4), "rank": 1},
            {"prompt_id": "y", "prompt": "b", "image": png(5), "rank": 2},
        ],
        [("a", 2, 1), ("a", 2, 3), ("b", 4, 5)],
    ),
    "rapidata votes": (
        [{"prompt": "a", "image1": png(1), "image2": png(2), "votes_image1": 1, "votes_image2": 9}],
        [("a", 2, 1)],
    ),
    "rapidata weighted": (
        [
            {
                "prompt": "a",
                "image1": png(1),
                "image2": png(2),
                "weighted_results_image1_preference": 0.7,
                "weighted_results_image2_preference": 0.3,
            }
        ],
        [("a", 1, 2)],
    ),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("case", FORMAT_CASES)
def test_every_format_gives_the_right_winners(case, style):
    rows, expected = FORMAT_CASES[case]
    assert levels(prepare(in_style(rows, style))) == expected


@pytest.mark.parametrize(("case", "style"), [("hpdv2 rank", "stream"), ("imagerewarddb", "arrow")])
def test_swapped_labels_make_winners_of_the_losers_in_every_format(case, style):
    rows, expected = FORMAT_CASES[case]
    prepared = prepare(in_style(rows, style), swap_labels=True)
    assert levels(prepared) == [(prompt, loser, winner) for prompt, winner, loser in expected]
    assert "labels are swapped" in str(prepared.report)


@pytest.mark.parametrize("style", ["arrow", "stream"])
def test_image_columns_are_read_whether_embedded_or_paths(tmp_path, style):
    (tmp_path / "winner.png").write_bytes(png(9))
    row = {"prompt": "a", "path1": str(tmp_path / "winner.png"), "path2": picture(3)}
    image, text = datasets.Image(), datasets.Value("string")
    features = datasets.Features({"prompt": text, "path1": image, "path2": image})
    assert levels(prepare(in_style([row], style, features))) == [("a", 9, 3)]

    listed = [{"prompt": "a", "image_path": [png(1), png(2)], "rank": [2, 1]}]
    features = datasets.Features(
        {"prompt": text, "image_path": datasets.List(image), "rank": datasets.List(datasets.Value("int64"))}
    )
    assert levels(prepare(in_style(listed, style, features))) == [("a", 2, 1)]


def test_what_is_no_table_is_refused_with_what_to_do():
    table = datasets.Dataset.from_list(canonical(2))
    with pytest.raises(ValueError, match="with_transform"):
        prepare(table.with_transform(lambda batch: batch))
    with pytest.raises(ValueError, match="from_generator"):
        prepare(torch.utils.data.TensorDataset(torch.zeros(2)))
    with pytest.raises(ValueError, match="one split.*train"):
        prepare({"train": table})
    with pytest.raises(ValueError, match="list of dicts"):
        prepare([canonical(1)[0], 3])


def test_a_list_of_dicts_may_hold_every_kind_of_image(tmp_path):
    (tmp_path / "a.png").write_bytes(png(9))
    kinds = [str(tmp_path / "a.png"), tmp_path / "a.png", png(9), picture(9), {"bytes": png(9), "path": None}]
    rows = [{"prompt": str(i), "path1": kind, "path2": picture(3)} for i, kind in enumerate(kinds)]
    assert levels(prepare(rows)) == [(str(i), 9, 3) for i in range(5)]


@pytest.mark.parametrize("style", STYLES)
def test_bad_rows_are_dropped_counted_and_named(style):
    prepared = prepare(in_style(bad_rows(), style), verify_images="all")
    assert levels(prepared) == [("good", 1, 2), ("fine", 3, 4)]
    report = prepared.report
    assert (report.rows, report.pairs, report.undecodable, report.bad_prompts) == (7, 2, 4, 1)
    assert [row for row, _ in report.examples["undecodable"]] == [2, 3, 4, 5]
    assert "too small" in str(report) and "image format" in str(report) and "row 5" in str(report)


def test_a_bad_image_of_a_ranking_drops_its_pairs_only():
    for images in ([png(1), JUNK, png(3)], [png(1), png(2)]):
        rows = [{"prompt": "a", "image_path": images, "rank": [1, 2, 3]}]
        prepared = prepare(rows)
        assert prepared.report.pairs == 1 and prepared.report.undecodable == 2
        assert prepare(datasets.Dataset.from_list(rows)).report.undecodable == 2


@pytest.mark.parametrize("style", ["arrow", "list"])
def test_without_verification_a_bad_pair_is_replaced_by_the_next_good_one(style, caplog):
    prepared = prepare(in_style(bad_rows(), style), verify_images="none")
    assert len(prepared) == 6
    with caplog.at_level(logging.WARNING):
        items = items_of(prepared)
    assert [item["prompt"] for item in items] == ["good", "fine", "fine", "fine", "fine", "fine"]
    assert [item["row"] for item in items] == [0, 5, 5, 5, 5, 5]
    assert all(same(item, prepared[5]) for item in items[1:])
    assert (prepared.report.pairs, prepared.report.undecodable) == (2, 4)
    assert len([record for record in caplog.records if "is used instead" in record.message]) == 4


def test_verification_runs_in_several_processes_and_is_cached(tmp_path):
    datasets.Dataset.from_list(bad_rows()).save_to_disk(tmp_path / "set")
    dataset = datasets.load_from_disk(tmp_path / "set")
    first = prepare(dataset, verify_images="all", num_proc=2)
    caches = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("cache-*")}
    assert caches
    second = prepare(datasets.load_from_disk(tmp_path / "set"), verify_images="all", num_proc=2)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("cache-*")} == caches
    assert first.report == second.report
    assert first.report.undecodable == 4


@pytest.mark.parametrize("dataset", [[], datasets.Dataset.from_dict({"prompt": [], "path1": [], "path2": []})])
def test_an_empty_set_is_an_error(dataset):
    with pytest.raises(ValueError, match="empty.*0 rows"):
        prepare(dataset)


@pytest.mark.parametrize("style", STYLES)
def test_a_set_of_ties_alone_is_an_error_that_prints_the_report(style):
    rows = [{"caption": "a", "jpg_0": png(1), "jpg_1": png(2), "label_0": 0.5, "label_1": 0.5}] * 3
    with pytest.raises(ValueError, match="3 rows, 0 pairs, 3 ties"):
        items_of(prepare(in_style(rows, style)))


@pytest.mark.parametrize("kind", [datasets.DatasetDict, dict])
def test_a_dict_of_splits_is_refused_and_its_splits_named(kind):
    with pytest.raises(ValueError, match="'train', 'validation'"):
        prepare(kind({"train": datasets.Dataset.from_list(canonical(1)), "validation": None}))


@pytest.mark.parametrize("style", STYLES)
def test_wrong_columns_are_an_error_in_every_style(style):
    with pytest.raises(ValueError, match="'picture'"):
        prepare(in_style([{"text": "a", "picture": png(1)}], style))


@pytest.mark.parametrize("style", STYLES)
def test_items_have_scores(style):
    rows = canonical(2, chosen_score=0.75, rejected_score=-1.5) + canonical(1, chosen_score=None, rejected_score=1.0)
    prepared = prepare(in_style(rows, style))
    assert [item["scores"] for item in items_of(prepared)] == [(0.75, -1.5)] * 2
    assert prepared.report.bad_labels == 1
    assert "scores" not in items_of(prepare(in_style(canonical(1), style)))[0]


@pytest.mark.parametrize("style", STYLES)
def test_long_prompts_are_cut_counted_and_kept(style, caplog):
    rows = canonical(3)
    rows[1]["prompt"] = "word " * 10**5
    prepared = prepare(in_style(rows, style))
    items = items_of(prepared)
    assert [len(item["prompt"]) for item in items] == [2, 1024 * 16, 2]
    assert prepared.report.cut_prompts == 1 and prepared.report.dropped == 0
    assert "1 cut prompts" in str(prepared.report) and "row 1" in caplog.text


@pytest.mark.parametrize("style", STYLES)
def test_columns_that_are_not_read_are_named(style, caplog):
    caplog.set_level(logging.INFO)
    rows = canonical(2, caption="another prompt", chosen_score=1.0, rejected_score=0.0)
    report = prepare(in_style(rows, style), use_scores=False).report
    assert report.unread == ("caption", "chosen_score", "rejected_score")
    assert "caption, chosen_score, rejected_score" in (str(report) if style == "stream" else caplog.text)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (picture(7, (4, 40)), "4x40 is too small"),
        (picture(7, (1, 1)), "1x1 is too small"),
        (picture(7, (8, 900)), "8x900 is too long"),
        (Image.new("F", (16, 16)), "floating-point"),
        (Image.fromarray(np.full((16, 16), 70_000, dtype=np.int32)), "16 bits"),
        (np.zeros((16, 16, 3), dtype=np.uint8), "unknown kind ndarray"),
        (3, "unknown kind int"),
    ],
)
def test_an_image_in_memory_that_cannot_be_used_is_counted_with_its_reason(image, reason):
    rows = canonical(2)
    rows[1]["rejected"] = image
    report = prepare(rows, verify_images="all").report
    assert report.undecodable == 1 and reason in str(report)


def test_a_missing_prompt_in_a_list_is_a_bad_prompt_whatever_stands_for_it():
    """Rows from pandas have NaN where a text is missing."""
    rows = canonical(3)
    rows[0]["prompt"], rows[1]["prompt"] = float("nan"), None
    report = prepare(rows).report
    assert (report.pairs, report.bad_prompts) == (1, 2)
    rows[2]["prompt"], rows[1]["prompt"] = 7, "text"
    with pytest.raises(ValueError, match=r"'prompt': \['int', 'str'\]"):
        prepare(rows)


def labelled(label_0, **columns):
    return {"caption": "a", "jpg_0": png(1), "jpg_1": png(2), "label_0": label_0, "label_1": 1 - label_0, **columns}


@pytest.mark.parametrize("swap_labels", [False, True])
def test_seeds_of_the_noise_are_those_of_the_preferred_and_the_other_image(swap_labels):
    """In Pick-a-Pic, either image may be the preferred one. Swapped labels swap the seeds, too."""
    seeds = {"chosen_noise_seed": 11, "rejected_noise_seed": 22}
    rows = [labelled(1, **seeds), labelled(0, **seeds)]
    items = items_of(prepare(rows, noise_seeds=True, swap_labels=swap_labels))
    assert [item["noise_seeds"] for item in items] == [(22, 11) if swap_labels else (11, 22)] * 2


def test_seeds_of_the_noise_are_refused_where_a_row_has_several_pairs():
    row = {"prompt": "a", "image_path": [png(i) for i in range(3)], "human_preference": [1, 0, 0]}
    with pytest.raises(ValueError, match="hpdv2"):
        prepare([row | {"chosen_noise_seed": 1, "rejected_noise_seed": 2}], noise_seeds=True)


def test_sources_of_several_pairs_of_a_row_are_encoded_once_unless_their_crops_differ():
    """Three images, so three pairs. The source has the shape of all of them, or of the first two."""
    for last, distinct in ((16, 24), 1), ((24, 16), 2):
        images = [picture(i, size) for i, size in enumerate([(16, 24), (16, 24), last])]
        row = {
            "prompt": "edit",
            "image_path": images,
            "human_preference": [3, 2, 1],
            "source_image": picture(9, (16, 24)),
        }
        prepared = prepare([row])
        assert len(prepared) == 3 and len(set(prepared.edits())) == distinct


def test_a_sample_is_spread_over_a_table_and_the_beginning_of_a_stream():
    rows = canonical(6)
    table = prepare(datasets.Dataset.from_list(rows))
    stream = prepare(datasets.Dataset.from_list(rows).to_iterable_dataset())
    assert [item["prompt"] for item in table.sample(3)] == ["p0", "p2", "p4"]
    assert [item["prompt"] for item in stream.sample(3)] == ["p0", "p1", "p2"]
    assert len(table.sample(9)) == len(stream.sample(9)) == 6


def test_processes_learn_which_pairs_the_others_could_not_decode():
    prepared = prepare(datasets.Dataset.from_list(canonical(4)))
    prepared.gather_undecodable(Peers(0, 3, gather=lambda own: [own, [2], [1, 2]]))
    assert prepared.undecodable.tolist() == [0, 1, 1, 0] and prepared.report.undecodable == 2
