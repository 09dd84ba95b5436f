"""Images that are liked or disliked by themselves: which is which, how they are matched, and what is refused."""

import io
import logging
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pairs import JUNK, canonical, items_of, png, prepare
from torch.utils.data import DataLoader

from trl_diffusion_sdpo import load_pairs
from trl_diffusion_sdpo.data import PairMixture, single_images
from trl_diffusion_sdpo.data.buckets import AspectRatioBuckets
from trl_diffusion_sdpo.data.formats import resolve_format
from trl_diffusion_sdpo.data.pairs import Pairs
from trl_diffusion_sdpo.data.stream_position import StreamPosition
from trl_diffusion_sdpo.utils.processes import Peers


def judged(values, column="label", bad=(), **columns):
    """Row i has the prompt `p i`, an image of the grey level i + 1 and a verdict."""
    return datasets.Dataset.from_list(
        [
            {"prompt": f"p {i}", "image": JUNK if i in bad else png(i + 1), column: value, **columns}
            for i, value in enumerate(values)
        ]
    )


def png_of(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def matched(prepared):
    """(row of the liked image, row of the disliked one) of each item, read off their pixels, and checked by prompts."""
    found = []
    for item in items_of(prepared) if isinstance(prepared, Pairs) else prepared:
        liked, disliked = (level - 1 for level in item["pixel_values"][:, 0, 0, 0].tolist())
        assert (item["prompt"], item["loser_prompt"]) == (f"p {liked}", f"p {disliked}")
        found.append((liked, disliked))
    return found


def check(prepared, liked, disliked):
    """Each image is matched, with one of the other kind, and those of a kind equally often or once more."""
    pairs = matched(prepared)
    assert len(pairs) == max(len(liked), len(disliked))
    for side, rows in zip(zip(*pairs, strict=True), (liked, disliked), strict=True):
        counts = Counter(side)
        assert set(counts) == set(rows) and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("values", [[1, 0, 1, 0, 0], [1, -1, 1, -1, -1], ["up", "Down", "UP ", "down", "no"]])
def test_labels_are_numbers_or_words(values):
    check(prepare(judged(values)), [0, 2], [1, 3, 4])
    check(prepare(judged(values).to_list()), [0, 2], [1, 3, 4])
    swapped = prepare(judged(values), swap_labels=True)
    check(swapped, [1, 3, 4], [0, 2])
    assert "2 liked and 3 disliked" in str(swapped.report)


def test_labels_are_names_of_classes_such_as_folders():
    rows = judged([1, 0, 0]).cast_column("label", datasets.ClassLabel(names=["up", "down"]))
    check(prepare(rows), [1, 2], [0])


def test_other_classes_stay_numbers():
    """A label of pairs is one, and a prompt may not be one."""
    rows = datasets.Dataset.from_list([{"caption": "a fox", "jpg_0": png(1), "jpg_1": png(2), "label_0": 1}])
    won = prepare(rows.cast_column("label_0", datasets.ClassLabel(names=["lost", "won"])))
    assert won[0]["pixel_values"][0].unique().tolist() == [1]
    named = judged([1, 0]).remove_columns("prompt").add_column("prompt", [0, 1])
    with pytest.raises(ValueError, match="(?s)No pair is left.*2 bad prompts"):
        prepare(named.cast_column("prompt", datasets.ClassLabel(names=["cat", "dog"])))


@pytest.mark.parametrize(
    ("scores", "liked"),
    [
        ([0.3, 0.1, 0.2, 0.4, 0.5], [0, 3, 4]),  # the median itself is liked
        ([1, 0, 0, 0, 0], [0]),  # unless nothing is below it
        ([4, 4, 5, 3, 4], [0, 1, 2, 4]),
    ],
)
def test_scores_are_compared_with_their_median(scores, liked):
    check(prepare(judged(scores, "score")), liked, [row for row in range(5) if row not in liked])


@pytest.mark.parametrize(("threshold", "liked"), [(4, [0, 3]), (3.5, [0, 3]), (2, [0, 1, 3, 4])])
def test_scores_are_compared_with_a_given_threshold(threshold, liked):
    """Also those of a mixture, and those that are text."""
    for scores in ([4, 2, 1, 5, 3], ["4", "2", "1", "5", "3"]):
        rows = judged(scores, "score")
        check(prepare(rows, score_threshold=threshold), liked, [row for row in range(5) if row not in liked])
    both = prepare(PairMixture([rows, judged([4, 4, 1], "score")]), score_threshold=threshold)
    for liked_row, _, disliked_row, _ in both.positions.tolist():
        found = [[4, 2, 1, 5, 3, 4, 4, 1][row] for row in (liked_row, disliked_row)]
        assert found[0] >= threshold > found[1]


def test_a_bad_score_does_not_move_the_median():
    check(prepare(judged([1.0, float("nan"), 2.0, float("inf"), 3.0], "score")), [2, 4], [0])


@pytest.mark.parametrize(
    ("given", "liked"),
    [(None, [0, 3]), (2.0, [0, 2, 3, 5])],  # 5 and 6 reach 4, the training images' median; that of these is 2.5
)
def test_held_out_images_are_judged_by_the_threshold_of_the_training_images(make_trainer, given, liked):
    train = judged([1, 3, 4, 5, 6], "score")
    held_out = judged([5, 1, 2, 6, 1, 3], "score")
    trainer = make_trainer(
        train=train, eval_dataset={"one": held_out, "labels": judged([1, 0])}, loss_type="tgo", score_threshold=given
    )
    check(trainer.eval_dataset["one"], liked, [row for row in range(6) if row not in liked])
    check(trainer.eval_dataset["labels"], [0], [1])
    later = trainer.get_eval_dataloader(held_out).dataset
    check(later, liked, [row for row in range(6) if row not in liked])


def test_data_sets_with_medians_of_their_own_leave_held_out_images_theirs(make_trainer):
    trainer = make_trainer(
        train=PairMixture([judged([1, 2], "score"), judged([10, 20], "score")]),
        eval_dataset=judged([4, 5, 6], "score"),
        loss_type="tgo",
    )
    check(trainer.eval_dataset, [1, 2], [0])


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (judged([1, 0]), "single_images with a `label`"),
        (judged([1, 0]).add_column("score", [1, 2]), "with a `label`"),
        ([{"prompt": "p", "chosen": png(1), "rejected": png(2)}], "canonical"),
    ],
)
def test_a_threshold_without_scores_says_that_it_has_no_effect(caplog, rows, named):
    prepare(rows, score_threshold=0.5)
    assert "`score_threshold=0.5` has no effect on the train data" in caplog.text and named in caplog.text
    caplog.clear()
    prepare(rows, score_threshold=0.5, training=False)
    prepare(judged([1, 2], "score"), score_threshold=2)
    assert "no effect" not in caplog.text


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), -float("inf")])
def test_a_threshold_must_be_finite(make_args, threshold):
    with pytest.raises(ValueError, match="`score_threshold` must be a finite number, got .*Set a score"):
        make_args(score_threshold=threshold)


def test_the_report_says_how_images_were_matched_and_which_are_both(caplog):
    with caplog.at_level(logging.INFO):
        prepare(judged([1, 0]))
    assert {record.levelname for record in caplog.records if "matched at random" in record.message} == {"INFO"}
    rows = judged(["up", "up", "up", "down", None, "gut"])
    prepared = prepare(rows.select([0, 1, 2, 3, 4, 5]))
    assert prepared.report.bad_labels == 2 and "'gut'" in str(prepared.report)
    assert "3 liked and 1 disliked images are matched at random; each disliked one comes 3 times" in str(
        prepared.report
    )
    assert "are liked and disliked" not in str(prepared.report)
    both = datasets.concatenate_datasets([rows.select([0, 1]), rows.select([0, 3]).remove_columns("label")])
    both = both.remove_columns("label").add_column("label", ["up", "up", "down", "down"])
    caplog.clear()
    assert "1 images are liked and disliked, with the same prompt" in str(prepare(both).report)
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_the_matching_is_the_same_at_each_start_and_in_each_run():
    rows = judged([i % 3 > 0 for i in range(40)])
    first, other = (prepare(rows, seed=seed) for seed in (1, 2))
    assert matched(first) == matched(other) and first.fingerprint() == other.fingerprint()
    assert (
        first.fingerprint()["prompts"] != prepare(rows.map(lambda row: {"prompt": row["prompt"] + "!"})).fingerprint()
    )


def test_an_image_keeps_its_mask():
    """That of an odd row is white everywhere, that of an even one in a corner only."""
    corner = np.zeros((16, 16), np.uint8)
    corner[:8, :8] = 255
    rows = judged([1, 0, 0, 1]).add_column("mask", [png_of(corner), png(255)] * 2)
    for item in map(prepare(rows).__getitem__, range(2)):
        levels = [level - 1 for level in item["pixel_values"][:, 0, 0, 0].tolist()]
        assert [int(mask.min()) for mask in item["masks"]] == [row % 2 for row in levels]


def test_single_images_and_pairs_train_together(make_pairs):
    prepared = prepare(
        PairMixture([judged([1, 0, 0]), make_pairs(3).remove_columns(["chosen_score", "rejected_score"])])
    )
    prompts = {(item["prompt"], item["loser_prompt"]) for item in prepared}
    assert prompts >= {(f"prompt {i}",) * 2 for i in range(3)} and len(prepared) == 5
    assert "1 liked and 2 disliked" in str(prepared.report) and "2 times an epoch" in str(prepared.report)
    assert "are liked and disliked" not in str(prepared.report)


def test_a_bad_image_is_counted_once_and_takes_no_good_one_with_it():
    prepared = prepare(judged([1, 1, 0, 0, 0, 0, 0], bad=[1, 4]), verify_images="all")
    assert prepared.report.undecodable == 2 and "row 1: image" in str(prepared.report)
    check(prepared, [0], [2, 3, 5, 6])
    rows = judged([1, 0, 1, 0]).to_list()
    rows[2]["image"] = png(3, (12, 9))
    prepared = prepare(rows, min_side=10)
    assert prepared.report.too_small == 1 and "9 pixels along the shorter side" in str(prepared.report)
    check(prepared, [0], [1, 3])


def test_two_images_of_one_bucket_are_matched():
    """Except where a bucket has images of one kind only."""
    sizes = [(32, 16), (16, 32)] * 6 + [(16, 16)]
    rows = [{"prompt": "p", "image": png(i + 1, size), "label": i % 4 < 2} for i, size in enumerate(sizes)]
    buckets = AspectRatioBuckets((32, 32), step=8)
    prepared = prepare(rows, resolution=32, buckets=buckets)
    assert len(prepared) == 7
    alone = 0
    for pair, (liked, _, disliked, _) in enumerate(prepared.positions.tolist()):
        alone += 12 in (liked, disliked)
        assert 12 in (liked, disliked) or sizes[liked] == sizes[disliked]
        height, width = prepared.target_size(pair)
        assert 12 in (liked, disliked) or (height > width) == (sizes[liked][1] > sizes[liked][0])
    assert alone == 1
    assert {row for pair in prepared.positions.tolist() for row in pair[::2]} == set(range(13))


def test_captions_with_other_verdicts_still_take_losers_from_other_prompts():
    prepared = prepare(judged(["cat", "dog", "cat", "dog"]), losers="permute")
    assert prepared.report.format == "captioned" and len(prepared) == 4
    assert "every image is a winner, whatever its `label`" in str(prepared.report)
    liked = prepare(judged([1, 0, 1, 0]), losers="permute", dataset_format="single_images")
    assert {item["prompt"] for item in liked} == {"p 0", "p 2"}


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (judged([1, 1]), {}, "two kinds.*All 2 images of the train data are liked.*generate --from_images"),
        (judged([0, 0]), {}, "All 2 images of the train data are disliked"),
        (judged([3, 3], "score"), {}, "All 2 images.*are liked, because their scores of 3 to 3 are not below"),
        (judged([3, 4], "score"), {"score_threshold": 3}, "of 3 to 4 are not below the threshold 3. Set another"),
        (judged([3, 4], "score"), {"score_threshold": 5}, "are disliked, because .* 3 to 4 are below the threshold 5"),
        (judged(["chat", "chien"]), {}, "No pair is left.*'chat'"),
        (judged([float("nan"), float("nan")], "score"), {}, "No pair is left.*must be finite"),
        (judged([1, 0]), {"needs_scores": "`smpo`"}, "`smpo` needs pairs whose images both have a score"),
        (judged([1, 2], "score").to_iterable_dataset(), {}, "need `score_threshold` in a stream.*Set it"),
        (judged([1, 0], source_image=png()).to_iterable_dataset(), {}, "Streams cannot have a `source` column"),
        (
            judged([1, 1]).to_iterable_dataset(),
            {"repeat": True},
            "images of the train stream.* are all liked. Shuffle",
        ),
        (judged([1, 0], score=0.5), {"score_distances": True}, "`tgo_distance_weight` needs.*or have a `label`"),
        (canonical(), {"score_distances": True}, "`tgo_distance_weight` needs.*format canonical"),
        (
            judged([1, 0], "score"),
            {"score_distances": True, "losers": "permute", "dataset_format": "single_images"},
            "`tgo_distance_weight` needs.*`losers='data'`",
        ),
        (
            judged([1, 0], "score").to_iterable_dataset(),
            {"score_distances": True},
            "`tgo_distance_weight` must read all",
        ),
    ],
)
def test_what_cannot_be_matched_is_refused(rows, settings, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        items_of(prepare(rows, **settings))


# ---- Streams


def streamed(verdicts, shards=1, **settings):
    """A stream of images with the letters L (liked) and D (disliked)."""
    rows = judged([letter == "L" for letter in verdicts]).to_iterable_dataset(num_shards=shards)
    return prepare(rows, **settings)


@pytest.fixture
def two_wait(monkeypatch):
    monkeypatch.setattr(single_images, "WAITING", 2)


@pytest.mark.parametrize(
    ("verdicts", "pairs"),
    [
        ("LDDL", [(0, 1), (3, 2)]),
        ("LLDD", [(0, 2), (1, 3)]),
        # 4 is the third one to wait, so 1 takes the used 2, as 3 does when 5 comes; 5 waits until the end, when 2 was
        # used less recently than 6.
        ("LLDLLLD", [(0, 2), (1, 2), (3, 2), (4, 6), (5, 2)]),
        ("LDDDDDDDDDD", [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (0, 7), (0, 8), (0, 9), (0, 10)]),
        ("DLDLLLLL", [(1, 0), (3, 2), (4, 0), (5, 2), (6, 0), (7, 2)]),
    ],
)
def test_images_of_a_stream_are_matched_as_they_come(two_wait, verdicts, pairs):
    data = streamed(verdicts)
    assert matched(data) == pairs and data.report.unmatched == 0 and data.report.dropped == 0
    exchanged = verdicts.translate({ord("L"): "D", ord("D"): "L"})
    assert matched(streamed(exchanged, swap_labels=True)) == pairs


def test_images_before_the_first_of_the_other_kind_are_counted(two_wait, caplog):
    data = streamed("LLLLD")
    assert matched(data) == [(2, 4), (3, 4)]
    assert (data.report.pairs, data.report.unmatched, data.report.dropped) == (2, 2, 2)
    assert "row 1 (unmatched): it and all images so far are liked" in caplog.text


def test_no_image_of_an_unbalanced_stream_is_left_out_and_few_are_in_memory():
    class Row(dict):
        alive = most = 0

        def __init__(self, *entries):
            super().__init__(*entries)
            Row.alive += 1
            Row.most = max(Row.most, Row.alive)

        def __del__(self):
            Row.alive -= 1

    rows = ((i, Row({"prompt": "p", "label": i % 20 == 5})) for i in range(500))
    seen = Counter()
    for pair in single_images.match_in_order(
        resolve_format(None, ["prompt", "image", "label"]), rows, "train", lambda *_: pytest.fail("rejected")
    ):
        seen.update(number for number, _ in pair)
        del pair
    assert set(seen) == set(range(500))
    assert {seen[i] for i in range(500) if i % 20 != 5} == {1}  # each one of the larger kind once
    assert Row.most <= 3 * single_images.WAITING + 3


def test_a_stream_of_one_kind_says_so_after_so_many_rows(monkeypatch):
    monkeypatch.setattr(single_images, "ONE_KIND", 30)
    read = []

    def stream(verdicts):
        def rows():
            for i, verdict in enumerate(verdicts):
                read.append(i)
                yield {"prompt": f"p {i}", "image": png(i % 200 + 1), "label": verdict}

        return prepare(datasets.IterableDataset.from_generator(rows), repeat=True)

    with pytest.raises(ValueError, match="first 30 images of the train stream.* are all disliked. Shuffle"):
        next(iter(stream([0] * 1000)))
    assert len(read) < 40
    assert next(iter(stream([0] * 29 + [1])))["prompt"] == "p 29"


def test_workers_whose_shares_have_one_kind_each_say_so():
    """Both would drop all of their images, and the run would end before its first step."""

    def rows(verdicts):
        for verdict in verdicts:
            for i in range(20):
                yield {"prompt": f"p {i}", "image": png(i + 1), "label": verdict}

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"verdicts": [1, 0]})
    loader = DataLoader(prepare(stream, repeat=True), batch_size=None, num_workers=2)
    with pytest.raises(ValueError, match="share of a process or worker, are all liked. Shuffle"):
        next(iter(loader))
    assert next(iter(prepare(stream, repeat=True)))["seed"]  # one reader has both


@pytest.mark.parametrize(
    ("rows", "threshold"),
    [
        (judged([3, 1, 5, 2, 1], "score"), 3),
        (judged(["3", "1", "5", "2", "1"], "score"), 2.5),
        (judged([1, 0, 1, 0, 0]).cast_column("label", datasets.ClassLabel(names=["down", "up"])), None),
        (judged([0, 1, 0, 1, 1]).cast_column("label", datasets.ClassLabel(names=["up", "down"])), None),
    ],
)
def test_a_stream_is_judged_as_a_table_is(rows, threshold):
    assert matched(prepare(rows.to_iterable_dataset(), score_threshold=threshold)) == [(0, 1), (2, 3), (0, 4)]


def test_bad_rows_of_a_stream_are_counted_and_a_bad_image_costs_its_pair():
    rows = judged(["up", "down", "gut", "down", "up", "down", "up", "down"]).to_list()
    rows[1]["image"] = JUNK
    rows[3]["prompt"] = None
    for row in rows:
        row["mask"] = png(255)
    rows[5]["mask"] = b"no mask"
    data = prepare(datasets.IterableDataset.from_generator(lambda: iter(rows)))
    assert matched(data) == [(6, 7)]  # 0 is matched with the bad image, and 4 with the bad mask
    report = data.report
    assert (report.rows, report.pairs, report.bad_labels, report.bad_prompts, report.undecodable) == (8, 1, 1, 1, 2)


def test_two_processes_share_a_stream_and_its_shards():
    verdicts = "LDDLDDLLDDDL"
    alone = matched(streamed(verdicts, training=False))
    both = [streamed(verdicts, training=False).for_process(Peers(index, 2)) for index in range(2)]
    assert [pair for pairs in zip(*map(matched, both), strict=True) for pair in pairs][: len(alone)] == alone
    own = [streamed(verdicts, shards=2, repeat=True).for_process(Peers(index, 2)) for index in range(2)]
    halves = [[(0, 1), (3, 2), (0, 4), (3, 5)], [(6, 8), (7, 9), (11, 10)]]
    assert [matched(islice(share, len(half))) for share, half in zip(own, halves, strict=True)] == halves


def test_a_stream_goes_on_after_any_pair_as_if_undisturbed(two_wait):
    def stream():
        return streamed("LLDLLDLLLLD", repeat=True, prompt_dropout=0.5)

    def outline(item):
        return item and (item["prompt"], item["loser_prompt"], item["row"], item["seed"])

    undisturbed = list(islice(stream(), 20))
    assert undisturbed[-1]["read"][1] == 2  # the third pass
    for count in range(20):
        position = StreamPosition.beginning(1, 0)
        for item in undisturbed[:count]:
            position.add(item["read"])
        resumed = stream()
        resumed.start_at(position)
        expected = [None] * count + [outline(item) for item in undisturbed[count:]]
        assert list(map(outline, islice(resumed, 20))) == expected


def test_a_mixture_of_streams_has_pairs_and_single_images(make_pairs):
    pairs = make_pairs(3).remove_columns(["chosen_score", "rejected_score"]).to_iterable_dataset()
    data = prepare(PairMixture([judged([1, 0, 0]).to_iterable_dataset(), pairs]))
    assert {(item["prompt"], item["loser_prompt"]) for item in data} == {
        ("p 0", "p 1"),
        ("p 0", "p 2"),
        *((f"prompt {i}", f"prompt {i}") for i in range(3)),
    }


@pytest.mark.parametrize("loss_type", ["tgo", "kto"])
def test_a_stream_of_single_images_trains_and_resumes(make_trainer, tmp_path, loss_type):
    rows = judged([0.1 * (i % 5) for i in range(17)], "score").to_iterable_dataset().shuffle(seed=1, buffer_size=4)

    def train(steps, folder, resume=None):
        trainer = make_trainer(
            train=rows,
            eval_dataset=rows,
            loss_type=loss_type,
            score_threshold=0.25,
            max_steps=steps,
            save_strategy="steps",
            save_steps=1,
            output_dir=str(tmp_path / folder),
        )
        trainer.train(resume_from_checkpoint=resume)
        accuracy = trainer.evaluate()["eval_rewards/accuracies"]
        return torch.cat([weight.detach().flatten() for weight in trainer.denoiser.parameters()]), accuracy

    undisturbed, accuracy = train(4, "one")
    assert 0 <= accuracy <= 1
    train(2, "two")
    resumed, again = train(4, "two", "latest")
    assert torch.equal(resumed, undisturbed) and again == accuracy


def test_folders_of_liked_and_disliked_images(tmp_path, caplog):
    for name in ("liked/a", "liked/b", "liked/c", "disliked/a", "disliked/d"):
        file = tmp_path / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(png(ord(name[-1])))
        if name != "liked/c":
            file.with_suffix(".txt").write_text(f"caption of {name}")
    prepared = prepare(load_pairs(tmp_path))
    assert "1 without a caption: liked/c.png" in caplog.text
    prompts = {(item["prompt"], item["loser_prompt"]) for item in prepared}
    assert {prompt for prompt, _ in prompts} == {"caption of liked/a", "caption of liked/b"}
    assert {prompt for _, prompt in prompts} == {"caption of disliked/a", "caption of disliked/d"}
    (tmp_path / "chosen").mkdir()
    with pytest.raises(ValueError, match="It has only chosen, liked, disliked"):
        load_pairs(tmp_path)


@pytest.mark.parametrize(
    ("settings", "levels"),
    [
        ({"loss_type": "sigmoid", "safeguard": "output"}, ["WARNING"]),
        ({"loss_type": ["tgo", "sigmoid"], "beta": 1.0, "safeguard": "none"}, ["WARNING"]),
        ({"loss_type": "sigmoid", "safeguard": "parameter"}, ["INFO"]),
        ({"loss_type": "kto"}, []),
        ({"loss_type": "apo_zero"}, []),
        ({"loss_type": "sft"}, []),
        ({"losers": "permute", "dataset_format": "single_images"}, []),
    ],
)
def test_a_loss_that_compares_matched_images_is_told(make_trainer, caplog, settings, levels):
    with caplog.at_level(logging.INFO):
        make_trainer(train=judged([1, 0, 1, 0]), eval_dataset=judged([1, 0, 1, 0]), **settings)
    told = [record for record in caplog.records if "compares the two images" in record.message]
    assert [record.levelname for record in told] == levels
    assert all("Set `loss_type='tgo'`" in record.message for record in told)


@pytest.mark.parametrize("swap_labels", [False, True])
def test_scores_less_the_median_of_their_data_set_belong_to_each_half(swap_labels):
    """A row without a score is dropped, and counts in no median."""
    scores = [0.5, 0.125, 0.25, None, 0.75, 0.0625]
    prepared = prepare(judged(scores, "score"), score_distances=True, swap_labels=swap_labels)
    assert len(prepared) == 3 and prepared.report.bad_labels == 1
    for item in prepared:
        levels = [level - 1 for level in item["pixel_values"][:, 0, 0, 0].tolist()]
        assert item["scores"] == tuple(scores[row] - 0.25 for row in levels)
    stars = judged([5.0, 1.0, 3.0], "score").map(lambda row: {"prompt": "stars " + row["prompt"]})
    mixed = prepare(PairMixture([judged(scores, "score"), stars]), score_distances=True)
    found = {item["prompt"]: item["scores"][0] for item in mixed}
    assert found == {"p 0": 0.25, "p 2": 0.0, "p 4": 0.5, "stars p 0": 2.0, "stars p 2": 0.0}
    assert "scores" not in prepare(judged(scores, "score"))[0]


@pytest.mark.parametrize("safeguard", ["output", "parameter"])
def test_tgo_with_weights_trains_cached_as_live(make_trainer, safeguard):
    """The median is 0, so the weights are 2, 3 and 1 in the 3 liked images, and 5 and 9 in the 2 disliked ones."""
    rows = judged([0.5, 1.0, 0.0, -2.0, -4.0], "score")
    weights = []
    for settings in ({}, {"precompute_latents": True}):
        trainer = make_trainer(
            train=rows,
            eval_dataset=rows,
            loss_type="tgo",
            loss_kwargs={"tgo_distance_weight": 2.0},
            safeguard=safeguard,
            **settings,
        )
        losers = trainer.train_dataset.positions[:, 2].tolist()
        mean = (2 + 3 + 1 + sum({3: 5, 4: 9}[row] for row in losers)) / 6
        assert trainer.evaluate()["eval_loss"] == pytest.approx(mean * np.log(2), rel=1e-6)
        trainer.train()
        weights.append(torch.cat([weight.detach().flatten() for weight in trainer.denoiser.parameters()]))
    assert torch.equal(*weights)
    with pytest.raises(ValueError, match="`tgo_distance_weight` needs"):
        make_trainer(train=judged([1, 0]), loss_type="tgo", loss_kwargs={"tgo_distance_weight": 2.0})


@pytest.mark.parametrize("loss_type", ["tgo", "kto"])
@pytest.mark.parametrize("safeguard", ["output", "parameter"])
def test_single_images_train_cached_as_live(make_trainer, loss_type, safeguard):
    """With several flips, prompts of both halves, and errors of the reference computed first."""
    rows = judged([i % 3 > 0 for i in range(12)])
    weights = []
    for settings in ({}, {"precompute_latents": True}, {"precompute_ref_errors": True, "precompute_epochs": 1}):
        trainer = make_trainer(
            train=rows, eval_dataset=rows, loss_type=loss_type, safeguard=safeguard, seed=3, max_steps=2, **settings
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx({"tgo": np.log(2), "kto": 0.5}[loss_type], rel=1e-6)
        trainer.train()
        weights.append(torch.cat([weight.detach().flatten() for weight in trainer.denoiser.parameters()]))
        accuracy = trainer.evaluate()["eval_rewards/accuracies"]
        assert 0 <= accuracy <= 1
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
