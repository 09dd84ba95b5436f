"""Losers that a tiny pipeline makes from good images."""

import json

import numpy as np
import pytest
from PIL import Image

from trl_diffusion_sdpo import Candidate, load_pairs
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.data import PairOptions, PairTransform, prepare_dataset
from trl_diffusion_sdpo.tools.evaluation.images import ImageSettings
from trl_diffusion_sdpo.tools.pairing.recipes import pairs_from_images

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
