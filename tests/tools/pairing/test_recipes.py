"""Losers that are made from good images, by a tiny pipeline or without a model."""

import io
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from trl_diffusion_sdpo import Candidate, load_pairs
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.data import PairOptions, PairTransform, prepare_dataset
from trl_diffusion_sdpo.tools.evaluation.images import ImageSettings
from trl_diffusion_sdpo.tools.pairing.generate import Pairing
from trl_diffusion_sdpo.tools.pairing.recipes import degraded, pairs_from_images, region
from trl_diffusion_sdpo.tools.rewards import FunctionScorer
from trl_diffusion_sdpo.tools.rewards.vlm_server import VLMServerJudge

RECIPES = ["spin", "partial", "local", "degraded"]
CALL = {"num_inference_steps": 4, "guidance_scale": 1.0}
SETTINGS = ImageSettings(call_kwargs=CALL)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"damaged")
    rows = [{"image": f"{number}.png", "prompt": f"drawing {number}"} for number in range(4)]
    (folder / "manifest.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def list_images(folder, images):
    """Save images as `0.png`, `1.png` and so on, and list them."""
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    rows = [{"image": f"{number}.png", "prompt": f"drawing {number}"} for number in range(len(images))]
    (folder / "manifest.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_image_gets_a_loser(recipe, images, sd_folder, tmp_path, caplog):
    model = None if recipe == "degraded" else Candidate("model", sd_folder)
    settings = ImageSettings() if recipe == "degraded" else SETTINGS
    assert pairs_from_images(recipe, model, images, tmp_path, settings) == 3
    rows = rows_of(tmp_path)
    chosen, rejected = (np.asarray(Image.open(tmp_path / rows[1][kind])) for kind in ("chosen", "rejected"))
    assert chosen.shape == rejected.shape == (32, 32, 3) and (chosen != rejected).any()
    if recipe == "local":
        inside = np.asarray(Image.open(tmp_path / rows[1]["mask"]).convert("L")) == 255
        assert (chosen[~inside] == rejected[~inside]).all() and 0.05 < inside.mean() < 0.5
        pairs = prepare_dataset(load_pairs(str(tmp_path)), PairOptions(PairTransform((32, 32))))
        assert 0 < pairs[0]["masks"].float().mean() < 0.6
    card = (tmp_path / "README.md").read_text()
    assert "left out: 1" in card and ("safeguard_mu" in card) == (recipe != "spin")
    assert ("safeguard" in caplog.text) == (recipe != "spin")
    # A second call makes what is missing, to the same bytes.
    before = {path: path.read_bytes() for path in tmp_path.glob("images/*/*.png")}
    (tmp_path / rows[2]["rejected"]).unlink()
    assert pairs_from_images(recipe, model, images, tmp_path, settings) == 3
    assert before == {path: path.read_bytes() for path in tmp_path.glob("images/*/*.png")}
    # Other losers are not mixed with these.
    if recipe != "degraded":
        with pytest.raises(ValueError, match="strength"):
            pairs_from_images(recipe, model, images, tmp_path, settings, 0.5)
    record = tmp_path / "images" / "rejected" / "settings.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps({**facts, "version": facts["version"] - 1}))
    with pytest.raises(ValueError, match="version"):
        pairs_from_images(recipe, model, images, tmp_path, settings)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--recipe", "partial", "--from_images", "nowhere"], "nowhere"),
        (["--recipe", "partial"], "--from_images"),
        (["--recipe", "scored"], "--prompts"),
        (["--recipe", "negatives", "--prompts", "p.txt", "--scorers", "pickscore"], "--scorers"),
        (["--recipe", "local", "--from_images", "images", "--margin", "0.5"], "margin"),
        (["--recipe", "degraded", "--from_images", "images"], "--model"),
        (["--recipe", "local", "--from_images", "images", "--images", "8"], "--images"),
        (["--recipe", "spin", "--from_images", "images", "--strength", "0.5"], "--strength"),
        (["--recipe", "negatives", "--prompts", "p.txt", "--margin", "0.5"], "--margin"),
        (["--recipe", "local", "--from_images", "images", "--strength", "0"], "strength"),
        (["--recipe", "spin", "--from_images", "out"], "out"),
    ],
)
def test_a_wrong_option_is_one_line(options, named, images, sd_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(images)
    assert main(["pairs", "generate", "--model", sd_folder, "--output_dir", "out", "--device", "cpu", *options]) == 2
    said = capsys.readouterr().err
    assert named in said and "Traceback" not in said


def test_the_command_makes_losers(images, sd_folder, tmp_path, capsys):
    command = ["pairs", "generate", "--recipe", "spin", "--model", sd_folder, "--from_images", str(images)]
    command += ["--call_kwargs", json.dumps(CALL), "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0 and "3 pairs" in capsys.readouterr().out


def test_winners_are_read_as_training_reads_images(sd_folder, tmp_path, caplog):
    """16 bits become 8 bits, transparency becomes white, and formats that run programs are not opened."""
    good, out = tmp_path / "good", tmp_path / "out"
    good.mkdir()
    Image.fromarray(np.full((32, 32), 128 * 257, np.uint16)).save(good / "deep.png")
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(good / "clear.png")
    Image.new("RGB", (32, 32)).save(good / "program.eps")
    (good / "program.eps").rename(good / "program.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(good / "late.png")
    content = bytearray((good / "late.png").read_bytes())
    content[-2000] ^= 255  # the checksum of the pixels is wrong
    (good / "late.png").write_bytes(content)
    names = ("deep", "clear", "program", "late")
    rows = [json.dumps({"image": f"{name}.png", "prompt": name}) for name in names]
    (good / "manifest.jsonl").write_text("\n".join(rows))
    assert pairs_from_images("spin", Candidate("model", sd_folder), good, out, SETTINGS) == 2
    written = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    grey = {row["prompt"]: np.unique(np.asarray(Image.open(out / row["chosen"]))).tolist() for row in written}
    assert grey == {"deep": [128], "clear": [255]}
    assert "program.png" in caplog.text and "late.png" in caplog.text


@pytest.mark.parametrize(
    ("call_kwargs", "named"),
    [({**CALL, "width": "64"}, "width"), ({**CALL, "num_inference_steps": 1}, "strength")],
)
def test_sizes_and_steps_that_no_image_can_have_are_refused(call_kwargs, named, images, sd_folder, tmp_path):
    with pytest.raises(ValueError, match=named):
        settings = ImageSettings(call_kwargs=call_kwargs)
        pairs_from_images("partial", Candidate("model", sd_folder), images, tmp_path / "out", settings)


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (16, 16)])
def test_a_region_is_one_smooth_piece_that_differs_from_pair_to_pair(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    masks = [region(image, np.random.default_rng([index, 0])) for index in range(30)]
    for index, mask in enumerate(masks):
        inside = np.asarray(mask) == 255
        assert mask.size == size and set(np.unique(mask)) == {0, 255} and 0.04 < inside.mean() < 0.64
        assert mask.tobytes() == region(image, np.random.default_rng([index, 0])).tobytes()
        rest = mask.copy()
        ImageDraw.floodfill(rest, tuple(int(place[0]) for place in reversed(inside.nonzero())), 0)
        assert rest.getextrema() == (0, 0)  # nothing but the first piece
        if size != (16, 16):
            left, top, right, bottom = mask.getbbox()
            assert inside.sum() < 0.95 * (right - left) * (bottom - top)  # no rectangle
            # Removing what is narrower than 5 pixels changes little.
            opened = mask.filter(ImageFilter.MinFilter(5)).filter(ImageFilter.MaxFilter(5))
            assert (np.asarray(opened) == 255).sum() > 0.9 * inside.sum()
    assert len({mask.tobytes() for mask in masks}) > 20


def test_regions_follow_the_contrast():
    """Nine of ten regions reach a noisy corner of a flat image, which a random one would reach in few cases."""
    pixels = np.full((96, 96, 3), 90, dtype=np.uint8)
    pixels[64:, 64:] = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    masks = [np.asarray(region(Image.fromarray(pixels), np.random.default_rng([index, 0]))) for index in range(60)]
    assert np.mean([mask[64:, 64:].any() for mask in masks]) >= 0.9
    flat = [
        np.asarray(region(Image.new("RGB", (96, 96), "red"), np.random.default_rng([index, 0]))) for index in range(60)
    ]
    reached = np.mean(flat, axis=0) / 255
    assert np.mean([mask[64:, 64:].any() for mask in flat]) < 0.7
    assert abs(np.argwhere(reached > 0).mean(0) - 47.5).max() < 4  # drawn evenly, regions have no side


def test_local_leaves_out_and_names_images_without_colour(sd_folder, tmp_path, caplog):
    """The largest channel is 5 and 6 above the smallest: 2.0 % of 255 is 5.1."""
    grey, tinted, red = (Image.new("RGB", (32, 32), colour) for colour in ((99, 99, 104), (99, 99, 105), "red"))
    source = list_images(tmp_path / "good", [grey, tinted, red])
    with caplog.at_level(logging.INFO):
        assert pairs_from_images("local", Candidate("model", sd_folder), source, tmp_path / "out", SETTINGS) == 2
    assert [row["prompt"] for row in rows_of(tmp_path / "out")] == ["drawing 1", "drawing 2"]
    assert "0.png is left out" in caplog.text and "Left out of 3 images: 1 without colour" in caplog.text
    assert "left out: 1 without colour" in (tmp_path / "out" / "README.md").read_text()


class Known(FunctionScorer):
    """Gives the images of the folder known scores, and all others 0."""

    def __init__(self, folder, values):
        self.values = {Image.open(folder / f"{number}.png").tobytes(): value for number, value in enumerate(values)}
        self.asked = 0
        super().__init__("known", self.score)

    def score(self, images, prompts):
        self.asked += len(images)
        return [self.values.get(image.tobytes(), 0.0) for image in images]


class Judge(VLMServerJudge):
    """Prefers the first image of the first pair, and is undecided about the others; its server is never asked."""

    def compare(self, first, second, prompts):
        return torch.tensor([float(prompt == "drawing 0") for prompt in prompts])


def noise_images(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]


def test_scorers_leave_out_pairs_whose_gap_is_small(tmp_path):
    """Scores 3, 1 and -1 of the winners and 0 of all losers have a mean of 0.5 and a standard deviation of 1.258, so
    the gaps are 2.38, 0.79 and -0.79 standard deviations."""
    source = list_images(tmp_path / "good", noise_images(3))
    out = tmp_path / "out"
    scorer = Known(source, [3.0, 1.0, -1.0])

    def make(scorers=(scorer,), **pairing):
        return pairs_from_images(
            "degraded", None, source, out, ImageSettings(), scorers=scorers, pairing=Pairing(**pairing)
        )

    assert make() == 2 and scorer.asked == 6
    rows = rows_of(out)
    spread = (11 / 6 - 0.25) ** 0.5
    for row, winner in zip(rows, (3, 1), strict=True):
        np.testing.assert_allclose(row["chosen_score"], (winner - 0.5) / spread)
        np.testing.assert_allclose(row["rejected_score"], -0.5 / spread)
        assert row["score_scales"][0]["log_odds"] == 1
    assert "left out: 1 that the scorers do not prefer" in (out / "README.md").read_text()
    assert make(margin=0.8) == 1 and make(margin=0.78) == 2 and make(combination="majority") == 2
    other = FunctionScorer("opposite", lambda images, prompts: [-score for score in scorer.score(images, prompts)])
    assert make(combination="pareto") == 2
    with pytest.raises(ValueError, match="all 3 pairs"):
        make((scorer, other), combination="pareto")
    judge = Judge("http://127.0.0.1:9/v1", "org/model")
    assert make((scorer, judge)) == 1
    with pytest.raises(ValueError, match="scorer of single images"):
        make((judge,))
    # Saved scores are used again, but not after an image was made.
    before = scorer.asked
    assert make() == 2 and scorer.asked == before
    (out / "images" / "rejected" / "00001-0.png").unlink()
    assert make() == 2 and scorer.asked == before + 6
    assert make(()) == 3 and "chosen_score" not in rows_of(out)[0]


def test_pairs_that_a_person_picked_are_not_replaced(images, tmp_path):
    (tmp_path / "picks.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="picked"):
        pairs_from_images("degraded", None, images, tmp_path, ImageSettings())


def test_a_degraded_image_is_blurred_compressed_noisy_or_faded():
    """Each kind is recognised by a property of its own, and its amount is within the stated range."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(np.kron(rng.integers(80, 176, (16, 16, 3)), np.ones((16, 16, 1))).astype(np.uint8))
    before = np.asarray(image, dtype=np.float64)
    jpegs = [jpeg_of(image, quality) for quality in range(5, 26)]
    seen = []
    for index in range(40):
        loser = degraded(image, np.random.default_rng([index, 0]))
        assert loser.size == image.size and loser.mode == "RGB"
        assert loser.tobytes() == degraded(image, np.random.default_rng([index, 0])).tobytes() != image.tobytes()
        after = np.asarray(loser, dtype=np.float64)
        grey = round(np.asarray(image.convert("L")).mean())
        slope = ((after - grey) * (before - grey)).sum() / ((before - grey) ** 2).sum()
        if abs(after - before - (slope - 1) * (before - grey)).max() < 1.1:
            seen.append("fade")
            assert 0.2 <= round(slope, 2) <= 0.6
        elif any((after == compressed).all() for compressed in jpegs):
            seen.append("jpeg")
        elif (after - before).std() > 20:
            seen.append("noise")
            assert 0.09 * 255 < (after - before).std() < 0.31 * 255
        else:
            seen.append("blur")
            step = np.abs(np.diff(after[:, :, 1], axis=1)).max() / np.abs(np.diff(before[:, :, 1], axis=1)).max()
            # A Gaussian of radius s pixels makes of a step a slope of 1 / (s sqrt(2 pi)), which rounding may double.
            assert 0.4 / 7.68 / 2 < step < 2 * 0.4 / 2.56 and abs(after.mean() - before.mean()) < 1
    assert set(seen) == {"blur", "jpeg", "noise", "fade"}


def jpeg_of(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), dtype=np.float64)


def test_degraded_pairs_need_no_model_and_train_after_supervised_tuning(sd_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    list_images(tmp_path / "good", noise_images(4))
    generate = ["pairs", "generate", "--recipe", "degraded", "--from_images", "good", "--output_dir", "own"]
    size = ["--call_kwargs", '{"width": 16, "height": 16}']
    assert main([*generate, *size, "--device", "cpu"]) == 0
    assert "4 pairs" in capsys.readouterr().out
    assert main([*generate, "--call_kwargs", '{"num_inference_steps": 4}', "--device", "cpu"]) == 2
    assert "num_inference_steps" in capsys.readouterr().err
    assert main(["pairs", "generate", "--recipe", "local", "--from_images", "good", "--output_dir", "other"]) == 2
    assert "--model" in capsys.readouterr().err
    train = ["train", "--dataset_name", "own", "--resolution", "16", "--use_cpu", "--report_to", "none"]
    train += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--save_strategy", "no"]
    first = ["--model_name_or_path", sd_folder, "--use_peft", "--loss_type", "sft", "--max_steps", "1"]
    assert main([*train, *first, "--output_dir", "first"]) == 0
    assert main([*train, "--model_name_or_path", "first", "--max_steps", "2", "--output_dir", "my-taste"]) == 0
    assert (tmp_path / "my-taste" / "adapter_model.safetensors").is_file()
