"""Losers that a tiny pipeline makes from good images."""

import json

import numpy as np
import pytest
from PIL import Image

from trl_diffusion_sdpo import Candidate, load_pairs
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.data import PairOptions, PairTransform, prepare_dataset
from trl_diffusion_sdpo.evaluation.images import ImageSettings
from trl_diffusion_sdpo.pairing.recipes import pairs_from_images

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


@pytest.mark.parametrize("recipe", ["spin", "partial", "local"])
def test_each_image_gets_a_loser(recipe, images, sd_folder, tmp_path):
    model = Candidate("model", sd_folder)
    assert pairs_from_images(recipe, model, images, tmp_path, SETTINGS) == 3
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    chosen, rejected = (np.asarray(Image.open(tmp_path / rows[1][kind])) for kind in ("chosen", "rejected"))
    assert chosen.shape == rejected.shape == (32, 32, 3) and (chosen != rejected).any()
    if recipe == "local":
        inside = np.asarray(Image.open(tmp_path / rows[1]["mask"]).convert("L")) == 255
        assert (chosen[~inside] == rejected[~inside]).all() and 0.05 < inside.mean() < 0.5
        pairs = prepare_dataset(load_pairs(str(tmp_path)), PairOptions(PairTransform((32, 32))))
        assert 0 < pairs[0]["masks"].float().mean() < 0.6
    card = (tmp_path / "README.md").read_text()
    assert "left out: 1" in card and ("safeguard_mu" in card) == (recipe != "spin")
    # A second call makes what is missing, to the same bytes.
    before = {path: path.read_bytes() for path in tmp_path.glob("images/*/*.png")}
    (tmp_path / rows[2]["rejected"]).unlink()
    assert pairs_from_images(recipe, model, images, tmp_path, SETTINGS) == 3
    assert before == {path: path.read_bytes() for path in tmp_path.glob("images/*/*.png")}
    with pytest.raises(ValueError, match="strength"):
        pairs_from_images(recipe, model, images, tmp_path, SETTINGS, 0.5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--recipe", "partial", "--from_images", "nowhere"], "nowhere"),
        (["--recipe", "partial"], "--from_images"),
        (["--recipe", "scored"], "--prompts"),
        (["--recipe", "spin", "--from_images", "images", "--scorers", "pickscore"], "--scorers"),
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
