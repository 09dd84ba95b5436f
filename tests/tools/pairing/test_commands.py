"""The sub-commands of `pairs`."""

import json
import math

import pytest
import torch
from PIL import Image

from trl_diffusion_sdpo import load_pairs
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.tools.pairing.check import check_pairs
from trl_diffusion_sdpo.tools.rewards import FunctionScorer


@pytest.fixture
def pairs(tmp_path):
    for number in range(6):
        Image.new("RGB", (32, 24 + 8 * (number == 0)), (40 * number,) * 3).save(tmp_path / f"{number}.png")
    (tmp_path / "5.png").write_bytes(b"damaged")
    rows = [(1, 0), (2, 1), (1, 2), (1, 0), (3, 3), (4, 5), (9, 0)]
    lines = [
        json.dumps({"prompt": f"<b>{rejected}", "chosen": f"{chosen}.png", "rejected": f"{rejected}.png"})
        for chosen, rejected in rows
    ]
    lines[2] = lines[2].replace("<b>2", "<b>1")  # contradicts the second pair
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.jsonl"


def test_check_counts_what_training_drops_and_what_is_doubtful(pairs, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(pairs.parent))
    (pairs.parent / "look.py").write_text(
        "def score(images, prompts):\n    return [i.getpixel((0, 0))[0] for i in images]\n"
    )
    sheet = pairs.parent / "sheet.html"
    assert (
        main(["pairs", "check", str(pairs), "--resolution", "16", "--scorer", "look:score", "--sheet", str(sheet)])
        == 0
    )
    said = capsys.readouterr().out
    assert "7 rows, 5 pairs" in said and "2 undecodable" in said and "9.png" in said
    assert "of 5 examined pairs, 1 have two identical images, 1 repeat" in said and "1 contradict" in said
    assert "32x24 (8 times), 32x32 (2 times)" in said and "70%" in said  # three agree, one is a tie
    page = sheet.read_text()
    assert page.count("<figure>") == 5 and "<b>0" not in page and "&lt;b&gt;0" in page and "http" not in page


def test_check_leaves_out_and_counts_pairs_whose_images_get_no_score(pairs):
    class Hesitant(FunctionScorer):
        def __call__(self, images, prompts):
            return torch.tensor([math.nan if image.getpixel((0, 0))[0] == 0 else 1.0 for image in images])

    report = "\n".join(check_pairs(load_pairs(pairs), scorer=Hesitant("hesitant", len)))
    assert "50% of 3 examined pairs" in report  # ties; of five, two have the black image
    assert "no score to an image of 2 examined pairs" in report


def test_check_shows_and_scores_single_images_with_their_own_prompts(tmp_path):
    rows = [{"prompt": f"fox {k}", "image": f"{k}.png", "label": k < 2} for k in range(4)]
    for k in range(4):
        Image.new("RGB", (16, 16), (k, k, k)).save(tmp_path / f"{k}.png")
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "picks.jsonl").write_text('{"pick": 1, "first": "0.png", "second": "0.png", "verdict": "liked"}\n')
    asked = set()

    class Listening(FunctionScorer):
        def __call__(self, images, prompts):
            asked.update((image.getpixel((0, 0))[0], prompt) for image, prompt in zip(images, prompts, strict=True))
            return torch.ones(len(images))

    sheet = tmp_path / "sheet.html"
    dataset = load_pairs(tmp_path / "images.jsonl")
    report = check_pairs(dataset, scorer=Listening("listening", len), sheet=sheet, folder=tmp_path)
    assert asked == {(k, f"fox {k}") for k in range(4)}
    assert all(f"fox {k}" in sheet.read_text() for k in range(4)) and "`liked` or `disliked`" in report[-1]


def test_check_names_the_size_and_the_option_of_enlarged_images(pairs, capsys):
    assert main(["pairs", "check", str(pairs), "--resolution", "48"]) == 0
    said = capsys.readouterr().out
    assert "48x48" in said and "resolution" in said


def test_an_error_of_the_scorer_is_not_told_as_one_of_the_data_set(pairs, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(pairs.parent))
    (pairs.parent / "broken.py").write_text("def score(images, prompts):\n    raise OSError('no weights')\n")
    assert main(["pairs", "check", str(pairs), "--scorer", "broken:score"]) == 2
    said = capsys.readouterr().err
    assert "scorer" in said and "no weights" in said and "data set" not in said


def test_check_of_nothing_is_one_line(tmp_path, capsys):
    assert main(["pairs", "check", str(tmp_path / "nowhere.jsonl")]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    (tmp_path / "pairs.jsonl").touch()
    assert main(["pairs", "check", str(tmp_path / "pairs.jsonl")]) == 2
    assert "pairs.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["pik"], ["pick"], ["pick", "nowhere"], ["from-images", "nowhere"]])
def test_a_mistake_is_one_line(arguments, capsys):
    assert main(["pairs", *arguments]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_pick_reads_a_folder_of_images_that_was_not_listed(tmp_path, capsys, monkeypatch):
    for number in range(3):
        Image.new("RGB", (16, 16), (80 * number,) * 3).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a fox")

    def stop(server):
        raise KeyboardInterrupt

    monkeypatch.setattr("socketserver.BaseServer.serve_forever", stop)
    assert main(["pairs", "pick", str(tmp_path), "--port", "0"]) == 0
    said = capsys.readouterr()
    assert "3 images of 1 prompts" in said.out and "http://127.0.0.1:" in said.out and "0 picks" in said.out
    assert not said.err
    assert main(["pairs", "pick", str(tmp_path), "--port", "0", "--host", "0.0.0.0"]) == 0
    assert "network" in capsys.readouterr().err


def test_equal_scores_of_a_pair_agree_by_half_with_its_label(pairs, capsys):
    for number, (better, worse) in enumerate([(2, 1), (1, 1), (0, 1), (1, 1)]):
        row = {"prompt": "a", "chosen": "1.png", "rejected": "0.png", "chosen_score": better, "rejected_score": worse}
        with pairs.open("a" if number else "w") as file:
            file.write(json.dumps(row) + "\n")
    assert main(["pairs", "check", str(pairs), "--resolution", "16"]) == 0
    assert "50%" in capsys.readouterr().out
