"""Each published format is read from rows shaped like the real ones, without any image."""

import pytest

from trl_diffusion_sdpo.data.formats import (
    FORMATS,
    LabelError,
    compare,
    detect_format,
    groups,
    pairs_in_group,
    resolve_format,
)

PICKAPIC = (
    "are_different best_image_uid caption created_at has_label image_0_uid image_0_url image_1_uid image_1_url "
    "jpg_0 jpg_1 label_0 label_1 model_0 model_1 ranking_id user_id"
).split()
REAL_COLUMNS = {
    "branch_prompts": ["chosen_prompt", "rejected_prompt", "chosen", "rejected", "chosen_score", "rejected_score"],
    "canonical": ["prompt", "chosen", "rejected", "chosen_score", "rejected_score"],
    "pickapic": PICKAPIC,
    "pickapic_webdataset": ["jpg_0.jpg", "jpg_1.jpg", "label_0.txt", "original_prompt.txt", "__key__", "__url__"],
    "hpdv2": ["prompt", "image_path", "human_preference", "user_hash"],
    "hpdv3": ["prompt", "path1", "path2", "confidence", "choice_dist", "model1", "model2"],
    "imagerewarddb": ["image_id", "prompt_id", "prompt", "classification", "image", "rank", "overall_rating"],
    "rapidata": ["prompt", "image1", "image2", "votes_image1", "votes_image2", "model1", "model2", "detailed_results"],
    "editreward": ["instruction", "source_image", "left_image", "right_image", "vote_type"],
    "captioned": ["image", "text", "width", "height"],
}


def read(name, rows):
    """Pairs as (winner row, image, loser row, image), and every rejection as (kind, row, amount)."""
    rejected = []

    def reject(kind, row, reason, amount):
        rejected.append((kind, row, amount))

    row_format = FORMATS[name]
    pairs = [
        tuple(pair[:4])
        for group in groups(row_format, enumerate(rows))
        for pair in pairs_in_group(row_format, group, reject)
    ]
    return pairs, rejected


@pytest.mark.parametrize(("name", "columns"), REAL_COLUMNS.items())
def test_real_columns_are_recognised(name, columns):
    assert detect_format(columns).name == name


def test_unknown_columns_are_named_together_with_every_accepted_set():
    with pytest.raises(ValueError, match="caption_text") as error:
        detect_format(["caption_text", "img"])
    for name in FORMATS:
        assert f"{name}:" in str(error.value)


def test_a_prompt_of_each_image_is_read_where_both_columns_are_there():
    both = ["chosen_prompt", "rejected_prompt", "chosen", "rejected"]
    row_format = detect_format(both)
    row = {"chosen_prompt": "a cat", "rejected_prompt": "a dog", "prompt": "an animal"}
    assert row_format.name == "branch_prompts"
    assert [row_format.prompt(row, 0), row_format.prompt(row, 1)] == ["a cat", "a dog"]
    assert detect_format([*both, "caption"]).name == "branch_prompts"
    assert resolve_format("canonical", [*both, "prompt"]).prompt(row, 1) == "an animal"


def test_a_named_format_must_exist_and_fit():
    with pytest.raises(ValueError, match="must be one of"):
        resolve_format("pickapick", PICKAPIC)
    with pytest.raises(ValueError, match="lacks .*path1"):
        resolve_format("hpdv3", PICKAPIC)
    assert resolve_format("pickapic", PICKAPIC).name == "pickapic"


def test_equal_scores_are_a_tie_and_the_larger_wins():
    assert compare([0.0, 1.0]) == ([(1, 0)], 0)
    assert compare([0.5, 0.5]) == ([], 1)
    assert compare([3.0, 1.0, 3.0]) == ([(0, 1), (2, 1)], 1)


def test_canonical_scores_are_read():
    row_format = FORMATS["canonical"]
    assert row_format.reward_scores({"prompt": "a", "chosen_score": 2, "rejected_score": "0.5"}) == (2.0, 0.5)
    assert resolve_format(None, ["prompt", "chosen", "rejected", "chosen_score"]).score_columns is None
    with pytest.raises(LabelError, match="rejected_score"):
        row_format.reward_scores({"prompt": "a", "chosen_score": 2.0, "rejected_score": None})


def test_pickapic_rows_without_a_label_are_no_pairs():
    rows = [
        {"caption": "a", "label_0": None, "label_1": None, "has_label": True},
        {"caption": "b", "label_0": 1.0, "label_1": 0.0, "has_label": False},
        {"caption": "c", "label_0": float("nan"), "label_1": 0.0},
    ]
    assert read("pickapic", rows) == ([], [("bad_labels", 0, 1), ("bad_labels", 1, 1), ("bad_labels", 2, 1)])


def test_pickapic_with_the_first_label_only():
    rows = [{"caption": "a", "label_0": value} for value in (0.0, 0.5, 1.0)]
    assert read("pickapic", rows) == ([(0, 1, 0, 0), (2, 0, 2, 1)], [("ties", 1, 1)])


@pytest.mark.parametrize("convert", [str, lambda text: text.encode()])
def test_webdataset_labels_are_text_and_still_swap(convert):
    rows = [
        {"original_prompt.txt": convert("a cat\n"), "label_0.txt": convert(label)} for label in ("0\n", "0.5\n", "1")
    ]
    assert read("pickapic_webdataset", rows) == ([(0, 1, 0, 0), (2, 0, 2, 1)], [("ties", 1, 1)])
    assert FORMATS["pickapic_webdataset"].prompt(rows[0]) == "a cat"


@pytest.mark.parametrize("label", [[], [1, "best"]])
def test_hpdv2_labels_that_are_no_list_of_numbers_are_bad(label):
    assert read("hpdv2", [{"prompt": "a", "rank": label}]) == ([], [("bad_labels", 0, 1)])


def test_imagerewarddb_compares_rows_of_one_prompt_id():
    rows = [
        {"prompt": "a", "prompt_id": "p1", "rank": 2},
        {"prompt": "a", "prompt_id": "p1", "rank": 1},
        {"prompt": "b", "prompt_id": "p2", "rank": 1},
        {"prompt": "b", "prompt_id": "p2", "rank": 1},
        {"prompt": "b", "prompt_id": "p2", "rank": 5},
        {"prompt": "c", "prompt_id": "p3", "rank": 1},
        {"prompt": "d", "prompt_id": None, "rank": 1},
    ]
    pairs, rejected = read("imagerewarddb", rows)
    assert pairs == [(1, 0, 0, 0), (2, 0, 4, 0), (3, 0, 4, 0)]
    assert rejected == [("ties", 2, 1), ("bad_labels", 5, 1), ("bad_labels", 6, 1)]


def test_votes_for_left_or_right_are_read_with_their_source():
    votes = ["leftvote", "rightvote", "tie", "bothbad_vote", "other", None]
    pairs, rejected = read("editreward", [{"instruction": "make it red", "vote_type": vote} for vote in votes])
    assert pairs == [(0, 0, 0, 1), (1, 1, 1, 0)]
    assert [(kind, row) for kind, row, _ in rejected] == [
        ("ties", 2),
        ("ties", 3),
        ("bad_labels", 4),
        ("bad_labels", 5),
    ]
    assert resolve_format(None, REAL_COLUMNS["editreward"]).source_columns == ("source_image",)


@pytest.mark.parametrize(
    ("word", "is_valid"), [("True", True), (1.0, True), (b"yes\n", True), ("No", False), (0, False)]
)
def test_a_validity_column_is_read_as_true_or_false(word, is_valid):
    row = {"has_label": word, "label_0": 1, "label_1": 0}
    if is_valid:
        assert FORMATS["pickapic"].image_scores(row).values == (1.0, 0.0)
    else:
        with pytest.raises(LabelError, match="false"):
            FORMATS["pickapic"].image_scores(row)


@pytest.mark.parametrize("word", ["nope", "unlabelled", float("nan"), 2])
def test_another_word_in_a_validity_column_is_no_label(word):
    with pytest.raises(LabelError, match=f"has_label.*{word}"):
        FORMATS["pickapic"].image_scores({"has_label": word, "label_0": 1, "label_1": 0})


@pytest.mark.parametrize("alone", ["chosen_prompt", "rejected_prompt"])
def test_the_prompt_of_one_image_alone_is_refused_unless_the_format_is_named(alone):
    columns = ["prompt", "chosen", "rejected", alone]
    with pytest.raises(ValueError, match=f"only `{alone}`"):
        resolve_format(None, columns)
    assert resolve_format("canonical", columns).prompt_columns == ("prompt",)


def test_a_prompt_is_cut_only_behind_what_any_text_encoder_reads():
    """1024 tokens of 16 characters."""
    read = FORMATS["canonical"].prompt
    assert read({"prompt": "x" * 1024 * 16}) == "x" * 1024 * 16
    assert read({"prompt": "x" * 10**6}) == "x" * 1024 * 16


@pytest.mark.parametrize("label", [5, -1, 1.01])
def test_a_single_label_that_is_no_probability_is_bad(label):
    with pytest.raises(LabelError, match=f"{label}"):
        FORMATS["pickapic"].image_scores({"label_0": label})


def test_images_of_one_group_with_other_prompts_are_not_compared():
    row_format, rejected = FORMATS["imagerewarddb"], []
    rows = [
        {"prompt": prompt, "prompt_id": 1, "rank": rank} for rank, prompt in enumerate(["a cat", "a dog", "a cat"])
    ]
    pairs = list(pairs_in_group(row_format, list(enumerate(rows)), lambda *args: rejected.append(args)))
    assert [pair[:4] for pair in pairs] == [(0, 0, 2, 0)]
    assert [(kind, row) for kind, row, _, _ in rejected] == [("bad_prompts", 1)] and "a dog" in rejected[0][2]
