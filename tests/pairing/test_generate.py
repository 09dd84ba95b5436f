"""Pairs of a tiny pipeline's own images, chosen by functions of the pixels."""

import json

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from trl_diffusion_sdpo import Candidate, load_pairs
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.evaluation.images import ImageSettings
from trl_diffusion_sdpo.pairing.generate import Pairing, combine, generate_pairs
from trl_diffusion_sdpo.pairing.session import PickSession
from trl_diffusion_sdpo.rewards import FunctionScorer, load_scorer

PROMPTS = ["a red circle", "two squares", "the sea"]
SETTINGS = ImageSettings(seeds=(0, 1, 2, 3), call_kwargs={"num_inference_steps": 2, "guidance_scale": 1.0})


def red_of(image):
    return float(np.asarray(image, dtype=np.float64)[..., 0].mean())


def dark_of(image):
    return -float(np.asarray(image, dtype=np.float64).mean())


RED = FunctionScorer("red", lambda images, prompts: [red_of(image) for image in images])
DARK = FunctionScorer("dark", lambda images, prompts: [dark_of(image) for image in images])


def rows_of(folder):
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def generated(sd_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    assert generate_pairs(Candidate("model", sd_folder), PROMPTS, [RED], folder, SETTINGS) == 3
    return folder


def test_the_best_image_of_each_prompt_is_paired_with_its_worst(generated):
    rows = rows_of(generated)
    assert [row["prompt"] for row in rows] == PROMPTS
    for index, row in enumerate(rows):
        reds = [red_of(Image.open(generated / "images" / "model" / f"{index:05d}-{seed}.png")) for seed in range(4)]
        assert row["chosen_seed"] == np.argmax(reds) and row["rejected_seed"] == np.argmin(reds)
        assert row["chosen"].endswith(f"-{np.argmax(reds)}.png") and row["agreement"] == 1
        assert row["chosen_score"] > 0 > row["rejected_score"]


def test_the_folder_is_read_by_training_by_datasets_and_by_the_pick_page(generated):
    pairs = load_pairs(str(generated))
    assert len(pairs) == 3 and {"prompt", "chosen", "rejected", "chosen_score"} <= set(pairs.column_names)
    assert len(load_dataset(str(generated), split="train")) == 3  # the files that the card names
    session = PickSession(generated)
    assert len(session.images) == 12 and not session.is_blind
    session.close()
    assert len(rows_of(generated)) == 3  # a page without a pick replaces nothing


def test_an_image_is_drawn_again_from_its_seed(generated, sd_folder):
    from diffusers import StableDiffusionPipeline

    row = rows_of(generated)[1]
    generator = SETTINGS.generator(row["prompt"], row["chosen_seed"])
    # In batches as there were: a batch of another size may differ in its last bits.
    seeds = [SETTINGS.generator(row["prompt"], seed) for seed in SETTINGS.seeds]
    seeds[row["chosen_seed"]] = generator
    images = StableDiffusionPipeline.from_pretrained(sd_folder)(
        [row["prompt"]] * 4, generator=seeds, **SETTINGS.call_kwargs
    ).images
    assert images[row["chosen_seed"]].tobytes() == Image.open(generated / row["chosen"]).tobytes()


def test_a_failed_scorer_loses_no_image(sd_folder, tmp_path):
    model = Candidate("model", sd_folder)

    def fail(images, prompts):
        raise RuntimeError("the server is gone")

    with pytest.raises(RuntimeError, match="gone"):
        generate_pairs(model, PROMPTS, [FunctionScorer("red", fail)], tmp_path, SETTINGS)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("images/model/*.png")}
    assert len(times) == 12 and not (tmp_path / "pairs.jsonl").exists()
    assert generate_pairs(model, PROMPTS, [RED, DARK], tmp_path, SETTINGS, Pairing(margin=0.01)) > 3
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("images/model/*.png")}
    every = rows_of(tmp_path)
    generate_pairs(model, PROMPTS, [RED, DARK], tmp_path, SETTINGS, Pairing("pareto", margin=0.01))
    agreed = [row for row in every if row["agreement"] == 1]
    assert rows_of(tmp_path) == agreed and len(agreed) < len(every)


def test_rewards_by_hand():
    scores = np.array([[[0.0, 1.0, 2.0]], [[30.0, 10.0, 20.0]]])
    z = np.sqrt(1.5)  # of the outer two of three equally spaced values
    weighted = combine(scores, np.array([1.0, 0.5]), "weighted")
    expected = np.array([-z + z / 2, -z / 2, z])
    np.testing.assert_allclose(weighted, [expected / np.sqrt(np.mean(expected**2))])
    # Image 2 beats image 1 by both scorers; the other comparisons are one against one.
    np.testing.assert_allclose(combine(scores, np.array([1.0, 1.0]), "majority"), [[0, -0.5, 0.5]])
    missing = combine(np.array([[[0.0, np.nan, 2.0]]]), np.array([1.0]), "weighted")
    np.testing.assert_allclose(missing, [[-1, np.nan, 1]])
    np.testing.assert_array_equal(combine(np.ones((1, 2, 3)), np.array([1.0]), "weighted"), np.zeros((2, 3)))


def test_the_command_makes_pairs_with_a_function_of_ones_own(sd_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taste.py").write_text(
        "def score(images, prompts):\n    return [i.getpixel((0, 0))[0] for i in images]\n"
    )
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\na cat\n")
    command = [
        "pairs",
        "generate",
        "--model",
        sd_folder,
        "--prompts",
        "prompts.txt",
        "--images",
        "3",
        "--device",
        "cpu",
    ]
    command += ["--call_kwargs", json.dumps(SETTINGS.call_kwargs), "--output_dir", "out"]
    assert main(command) == 0 and "pairs pick out" in capsys.readouterr().out
    assert main([*command, "--scorers", "taste:score"]) == 0
    assert "2 pairs of 2 prompts (1 empty and 1 repeated" in capsys.readouterr().out
    assert "preference" in (tmp_path / "out" / "README.md").read_text()
    assert main(["pairs", "check", "out", "--resolution", "16"]) == 0
    assert "2 pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--images", "1"], "2 seeds"),
        (["--weights", '{"pickscore": 1}'], "pickscore"),
        (["--margin", "0"], "margin"),
        (["--prompts", "empty.txt"], "empty.txt"),
        (["--call_kwargs", '{"steps": 3}'], "steps"),
    ],
)
def test_a_wrong_option_is_one_line(options, named, sd_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    command = ["pairs", "generate", "--model", sd_folder, "--prompts", "prompts.txt", "--output_dir", "out"]
    assert main([*command, "--device", "cpu", *options]) == 2
    said = capsys.readouterr().err
    assert named in said and "Traceback" not in said


def test_picks_of_a_person_are_not_replaced(sd_folder, tmp_path):
    (tmp_path / "picks.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="picked"):
        generate_pairs(Candidate("model", sd_folder), PROMPTS, [RED], tmp_path, SETTINGS)


def test_scorers_that_tell_nothing_apart_are_an_error(generated, sd_folder):
    same = FunctionScorer("same", lambda images, prompts: [1.0] * len(images))
    with pytest.raises(ValueError, match="apart"):
        generate_pairs(Candidate("model", sd_folder), PROMPTS, [same], generated, SETTINGS)


def test_a_judge_of_two_images_is_refused_before_images_are_generated(tmp_path):
    judge = load_scorer("vlm_judge", url="http://127.0.0.1:1/v1", model="judge")
    with pytest.raises(ValueError, match="vlm_judge"):
        generate_pairs(Candidate("model", "no such model"), PROMPTS, [judge], tmp_path, SETTINGS)
