"""Pairs of a tiny pipeline's own images, chosen by functions of the pixels."""

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from trl_diffusion_sdpo import Candidate, load_pairs
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.tools.evaluation.images import ImageSettings
from trl_diffusion_sdpo.tools.pairing.generate import Pairing, combine, generate_pairs
from trl_diffusion_sdpo.tools.pairing.session import PickSession
from trl_diffusion_sdpo.tools.rewards import FunctionScorer, load_scorer
from trl_diffusion_sdpo.tools.rewards.vlm_server import VLMServerJudge

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
        assert row["rejected"].endswith(f"-{np.argmin(reds)}.png")
        assert row["chosen"].endswith(f"-{np.argmax(reds)}.png") and row["agreement"] == 1
        assert row["chosen_score"] > 0 > row["rejected_score"]
    (scale,) = rows[0]["score_scales"]  # z-scores, which are on no scorer's scale
    scores = [row[side] for row in rows for side in ("chosen_score", "rejected_score")]
    assert scale["scorer"] == "z-scores of red" and scale["log_odds"] == 1.0
    assert (scale["low"], scale["high"]) == (min(scores), max(scores))  # each best and worst image is in a pair


def test_weights_of_scorers_must_be_numbers():
    with pytest.raises(ValueError, match="weights.*much"):
        Pairing(weights={"red": "much"})


def test_the_folder_is_read_by_training_by_datasets_and_by_the_pick_page(generated):
    pairs = load_pairs(str(generated))
    assert len(pairs) == 3 and {"prompt", "chosen", "rejected", "chosen_score"} <= set(pairs.column_names)
    assert len(load_dataset(str(generated), split="train")) == 3  # the files that the card names
    session = PickSession(generated)
    assert len(session.images) == 12 and not session.is_blind
    image = next(iter(session.images.values()))
    assert image.facts["noise_seed"] == SETTINGS.noise_seed(image.prompt, image.facts["seed"])
    session.close()
    assert len(rows_of(generated)) == 3  # a page without a pick replaces nothing


def test_an_image_is_drawn_again_from_its_seed(generated, sd_folder):
    from diffusers import StableDiffusionPipeline

    row = rows_of(generated)[1]
    place = int(row["chosen"][-5])
    # In batches as there were: a batch of another size may differ in its last bits.
    generators = [SETTINGS.generator(row["prompt"], seed) for seed in SETTINGS.seeds]
    generators[place] = torch.Generator().manual_seed(row["chosen_noise_seed"])
    images = StableDiffusionPipeline.from_pretrained(sd_folder)(
        [row["prompt"]] * 4, generator=generators, **SETTINGS.call_kwargs
    ).images
    assert images[place].tobytes() == Image.open(generated / row["chosen"]).tobytes()


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
    command = ["pairs", "generate", "--model", sd_folder, "--prompts", "prompts.txt", "--output_dir", "out"]
    command += ["--images", "3", "--device", "cpu", "--call_kwargs", json.dumps(SETTINGS.call_kwargs)]
    assert main(command) == 0 and "pairs pick out" in capsys.readouterr().out
    assert main([*command, "--scorers", "taste:score"]) == 0
    assert "2 pairs of 2 prompts (1 empty and 1 repeated" in capsys.readouterr().out
    assert "preference" in (tmp_path / "out" / "README.md").read_text()
    assert main(["pairs", "check", "out", "--resolution", "16"]) == 0
    assert "2 pairs" in capsys.readouterr().out


@pytest.mark.parametrize("command", [("pairs", "generate"), ("evaluate",)])
def test_processes_wait_up_to_a_day_for_the_slowest(command, monkeypatch, tmp_path):
    """By default, processes on GPUs end if one still generates after ten minutes."""

    class Started(Exception):
        pass

    def start(**given):
        raise Started(given["timeout"])

    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    monkeypatch.setattr("accelerate.PartialState", start)
    models = ["--model", "base"] if command[0] == "pairs" else ["--models", "base", "other"]
    with pytest.raises(Started) as error:
        main([*command, *models, "--prompts", "prompts.txt", "--output_dir", "out"])
    assert error.value.args == (timedelta(days=1),)


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
    with pytest.raises(ValueError, match="margin"):
        generate_pairs(Candidate("model", sd_folder), PROMPTS, [same], generated, SETTINGS)


class Judge(VLMServerJudge):
    """Prefers the brighter of two images; its server is never asked."""

    asked = 0

    def compare(self, first, second, prompts):
        Judge.asked += len(first)
        return torch.tensor([np.sign(dark_of(b) - dark_of(a)) for a, b in zip(first, second, strict=True)])


def test_a_judge_of_neighbours_limits_what_may_win_and_lose(generated, sd_folder):
    judge = Judge("http://127.0.0.1:9/v1", "org/model")
    for _ in range(2):  # the answers are kept
        pairs = generate_pairs(
            Candidate("model", sd_folder), PROMPTS, [RED, judge], generated, SETTINGS, Pairing(margin=0.001)
        )
        assert Judge.asked == 2 * 3
    rows = rows_of(generated)
    assert 0 < pairs == len(rows)
    for row in rows:
        for side, sign in (("chosen", 1), ("rejected", -1)):
            stem, seed = row[side][:-4].rsplit("-", 1)
            neighbour = generated / f"{stem}-{int(seed) ^ 1}.png"
            assert sign * (dark_of(Image.open(neighbour)) - dark_of(Image.open(generated / row[side]))) > 0


def test_a_judge_alone_is_refused_before_images_are_generated(tmp_path):
    judge = load_scorer("vlm_judge", url="http://127.0.0.1:1/v1", model="judge")
    with pytest.raises(ValueError, match="vlm_judge"):
        generate_pairs(Candidate("model", "no such model"), PROMPTS, [judge], tmp_path, SETTINGS)


def test_negatives_are_of_the_same_noise_without_guidance(sd_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    command = ["pairs", "generate", "--recipe", "negatives", "--model", sd_folder, "--prompts", "prompts.txt"]
    command += ["--images", "2", "--device", "cpu", "--output_dir", "out"]
    options = ["--call_kwargs", '{"num_inference_steps": 2, "guidance_scale": 5}']
    assert main([*command, "--call_kwargs", '{"guidance_scale": 1.0}']) == 2  # both sides alike
    assert main([*command, *options]) == 0 and "4 pairs of 2 prompts" in capsys.readouterr().out
    rows = rows_of(tmp_path / "out")
    assert all(row["chosen_noise_seed"] == row["rejected_noise_seed"] for row in rows)
    chosen, rejected = (Image.open(tmp_path / "out" / rows[0][side]).tobytes() for side in ("chosen", "rejected"))
    assert chosen != rejected
    assert "swap_labels" in (tmp_path / "out" / "README.md").read_text()
    assert len(load_pairs("out")) == 4 and PickSession(tmp_path / "out").is_blind


NOISE = {"noise_source": "generated", "random_flip": False, "resolution": 16}


def test_training_draws_the_noise_of_each_image_again(generated, sd_folder, make_trainer):
    generate_pairs(Candidate("model", sd_folder), PROMPTS, [RED], generated, SETTINGS)
    trainer = make_trainer(
        sd_folder, train=load_pairs(str(generated)), eval_dataset=load_pairs(str(generated)), **NOISE
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    noisy = trainer.pair_forward.noisy_batch(batch)
    latents, _ = trainer.pair_forward.encode(batch)
    rows = rows_of(generated)
    seeds = [
        rows[row][side] for side in ("chosen_noise_seed", "rejected_noise_seed") for row in batch["rows"].tolist()
    ]
    assert batch["noise_seeds"] == seeds
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    expected = trainer.family.noise_process.add_noise(latents, noise, noisy.timesteps)
    torch.testing.assert_close(noisy.noisy, expected)
    evaluated = next(iter(trainer.get_eval_dataloader()))
    assert "noise_seeds" not in evaluated
    trainer.train()


@pytest.mark.parametrize(
    ("settings", "change", "named"),
    [
        ({"random_flip": True}, {}, "random_flip"),
        ({"noise_offset": 0.1}, {}, "noise_offset"),
        ({}, {"chosen_noise_seed": None}, "chosen_noise_seed"),
        ({}, {"chosen_noise_seed": -1}, "seed of a generator"),
        ({"resolution": 32}, {}, "resolution"),
    ],
)
def test_noise_that_cannot_fit_is_refused(settings, change, named, generated, sd_folder, make_trainer):
    table = load_pairs(str(generated)).map(lambda row: {"chosen_noise_seed": 7, "rejected_noise_seed": 8} | change)
    if change.get("chosen_noise_seed", 0) is None:
        table = table.remove_columns("chosen_noise_seed")
    with pytest.raises(ValueError, match=named):
        make_trainer(sd_folder, train=table, **{**NOISE, **settings}).train()


def test_pairs_are_published_with_their_card(generated, hub_server, capsys, tmp_path):
    assert main(["pairs", "push", str(generated), "tester/taste", "--private"]) == 0
    assert "3 rows" in capsys.readouterr().out
    repo = hub_server.repos["tester/taste"]
    card = repo.files["README.md"].decode()
    assert repo.private and "chosen by scorers" in card and "data/train-" in card and "- preference" in card
    (file,) = [name for name in repo.files if name.endswith(".parquet")]
    url = f"{hub_server.endpoint}/datasets/tester/taste/resolve/main/{file}"
    published = load_dataset("parquet", data_files=url, cache_dir=str(tmp_path))["train"]  # no cache of an earlier run
    assert published.column_names == load_pairs(str(generated)).column_names
    assert np.array_equal(published[0]["chosen"], Image.open(generated / rows_of(generated)[0]["chosen"]))
    hub_server.forbidden.add("tester/other")
    assert main(["pairs", "push", str(generated), "tester/other"]) != 0
    assert main(["pairs", "push", str(generated / "images"), "tester/taste"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_two_processes_that_are_killed_make_the_pairs_of_one(sd_folder, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "red_taste.py").write_text(
        "def score(images, prompts):\n    return [i.getpixel((0, 0))[0] for i in images]\n"
    )
    options = ["pairs", "generate", "--model", sd_folder, "--prompts", "prompts.txt", "--scorers", "red_taste:score"]
    options += ["--batch_size", "1", "--device", "cpu", "--call_kwargs", json.dumps(SETTINGS.call_kwargs)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "trl_diffusion_sdpo", *options, "--output_dir", "two"]
    path = f"{Path(__file__).parents[3]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    quiet = {
        "cwd": tmp_path,
        "env": {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
    }
    process = subprocess.Popen(launch, **quiet, start_new_session=True, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(list(tmp_path.glob("two/images/model/*.png"))) < 3 and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.005)
    process.terminate()  # its workers too
    process.wait()
    subprocess.run(launch, **quiet, check=True, capture_output=True, timeout=240)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*options, "--output_dir", "one"]) == 0
    for name in ("pairs.jsonl", "manifest.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for image in (tmp_path / "one").glob("images/model/*.png"):
        assert image.read_bytes() == (tmp_path / "two" / image.relative_to(tmp_path / "one")).read_bytes()
