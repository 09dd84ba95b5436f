"""The folders for benchmarks, read back by a second writing of each benchmark's reader."""

import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trl_diffusion_sdpo import UserError
from trl_diffusion_sdpo.cli.main import main

SCRIPT = Path(__file__).parents[2] / "examples" / "scripts" / "benchmark_folders.py"
SIDE = 16


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("benchmark_folders", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture
def arrange(script, sd_folder, tmp_path):
    """`arrange(benchmark, prompts, text)`: the folder for a benchmark, after an evaluation of its prompts, and the
    images by prompt and seed."""

    def arranged(benchmark, name, text):
        prompts = tmp_path / name
        prompts.write_text(text)
        folder = str(tmp_path / "evaluation")
        command = ["evaluate", "--models", f"tuned={sd_folder}", "--prompts", str(prompts), "--output_dir", folder]
        command += ["--call_kwargs", json.dumps({"num_inference_steps": 1, "height": SIDE, "width": SIDE})]
        assert main([*command, *"--seeds 0 1 2 3 --device cpu".split()]) == 0
        script.main([benchmark, str(prompts), folder, "tuned", str(tmp_path / "arranged")])
        rows = map(json.loads, (tmp_path / "evaluation" / "manifest.jsonl").read_text().splitlines())
        images = {(row["prompt"], row["seed"]): pixels(tmp_path / "evaluation" / row["image"]) for row in rows}
        return tmp_path / "arranged", images

    return arranged


def pixels(file, box=None):
    with Image.open(file) as image:
        return np.asarray(image.crop(box) if box else image, dtype=int)


def test_geneval_reads_metadata_and_samples_of_each_line(arrange):
    lines = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "two clocks"},
        {"tag": "colors", "include": [{"class": "bench", "color": "red"}], "prompt": "a photo of a bench"},
    ]
    folder, images = arrange("geneval", "evaluation_metadata.jsonl", "\n".join(map(json.dumps, lines)))
    found = [name for name in sorted(os.listdir(folder)) if (folder / name).is_dir() and name.isdigit()]
    assert [int(name) for name in found] == [0, 1, 2]
    for line, name in zip(lines, found, strict=True):
        assert json.loads((folder / name / "metadata.jsonl").read_text()) == line
        samples = sorted(os.listdir(folder / name / "samples"))
        assert len(samples) == 4 and all(re.match(r"\d+\.png", sample) for sample in samples)
        for seed, sample in enumerate(samples):  # the third line repeats the first prompt, and shows its images
            assert (pixels(folder / name / "samples" / sample) == images[line["prompt"], seed]).all()


def test_dpg_crops_the_images_of_an_item_from_its_grid(arrange):
    text = 'item_id,text,question\nparti0,"a bench, and\na tree",1\nparti0,"a bench, and\na tree",2\n12,clocks,1\n'
    folder, images = arrange("dpg", "dpg_bench.csv", text)
    assert {name.split(".")[0] for name in os.listdir(folder)} == {"parti0", "12"}
    for item, prompt in (("parti0", "a bench, and\na tree"), ("12", "clocks")):
        for seed, (left, top) in enumerate([(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]):
            tile = pixels(folder / f"{item}.png", (left, top, left + SIDE, top + SIDE))
            assert (tile == images[prompt, seed]).all()


def test_t2i_compbench_reads_prompt_and_number_from_the_name(arrange):
    listed = ["a green bench and a blue bowl", "A clock reads 11:44.", "a green bench and a blue bowl"]
    folder, images = arrange("t2i-compbench", "color_val.txt", "\n".join(listed))
    names = sorted(os.listdir(folder / "samples"), key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [int(name.split(".png")[0].split("_")[1]) for name in names] == list(range(12))
    assert [name.split("_")[0] for name in names] == [prompt for prompt in listed for _ in range(4)]
    for number, name in enumerate(names):
        assert (pixels(folder / "samples" / name) == images[listed[number // 4], number % 4]).all()


def test_hpsv2_finds_each_prompt_of_a_style_by_its_number(arrange):
    annotations = ["a bench", "two clocks", "a bench"]
    folder, images = arrange("hpsv2", "anime.json", json.dumps(annotations))
    assert os.listdir(folder) == ["anime"]
    for number, prompt in enumerate(annotations):
        file = folder / "anime" / f"{number:05d}.jpg"
        with Image.open(file) as image:
            assert image.format == "JPEG"
        assert np.abs(pixels(file) - images[prompt, 0]).mean() < 20


@pytest.fixture
def evaluated(script, tmp_path):
    """`evaluated(benchmark, name, text, prompt, seeds, height)`: the folder for a benchmark, of an evaluation of one
    prompt with grey images, as bright as their seed."""

    def arranged(benchmark, name, text, prompt="a", seeds=1, height=SIDE):
        prompts = tmp_path / name
        prompts.write_text(text)
        rows = [{"model": "m", "prompt": prompt, "seed": seed, "image": f"{seed}.png"} for seed in range(seeds)]
        for seed in range(seeds):
            Image.new("RGB", (SIDE, height), (seed + 1,) * 3).save(tmp_path / f"{seed}.png")
        (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
        script.main([benchmark, str(prompts), str(tmp_path), "m", str(tmp_path / "arranged")])
        return tmp_path / "arranged"

    return arranged


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_a_grid_of_dpg_with_fewer_images_has_them_in_their_places(seeds, evaluated):
    with Image.open(evaluated("dpg", "dpg_bench.csv", "item_id,text\n1,a\n", seeds=seeds) / "1.png") as image:
        corners = [(0, 0), (SIDE, 0), (0, SIDE)]
        assert [image.getpixel(corner)[0] for corner in corners[:seeds]] == list(range(1, seeds + 1))
        assert image.size == ((SIDE, SIDE) if seeds == 1 else (2 * SIDE, 2 * SIDE))


ITEM = "item_id,text\n1,a\n"


@pytest.mark.parametrize(
    ("benchmark", "name", "text", "settings", "named"),
    [
        ("geneval", "a.jsonl", '{"prompt": "a", "tag": "counting"}', {}, "include"),
        ("geneval", "a.jsonl", '{"prompt": "b", "tag": "counting", "include": []}', {}, "'b'"),
        ("dpg", "a.csv", "item_id,text\n1.5,a\n", {}, "'1.5'"),
        ("dpg", "a.csv", "item_id,text\n1/5,a\n", {}, "'1/5'"),
        ("dpg", "a.csv", ITEM, {"seeds": 5}, "got 5"),
        ("dpg", "a.csv", ITEM, {"height": 2 * SIDE}, "16x32"),
        ("t2i-compbench", "a.txt", "snake_case", {"prompt": "snake_case"}, "'snake_case'"),
        ("t2i-compbench", "a.txt", "either/or", {"prompt": "either/or"}, "'either/or'"),
        ("t2i-compbench", "a.txt", 245 * "a", {"prompt": 245 * "a"}, 245 * "a"),
        ("hpsv2", "prompts.json", '["a"]', {}, "concept-art"),
        ("hpsv2", "anime.json", '["a", ""]', {}, "''"),
    ],
)
def test_what_would_get_a_wrong_score_is_refused(benchmark, name, text, settings, named, evaluated, capsys, tmp_path):
    with pytest.raises(SystemExit):
        evaluated(benchmark, name, text, **settings)
    assert named in capsys.readouterr().err
    assert not (tmp_path / "arranged").exists()


def test_an_item_of_dpg_with_two_prompts_is_refused(script, tmp_path):
    (tmp_path / "dpg.csv").write_text("item_id,text\n1,a\n1,b\n")
    images = script.Images()
    for prompt in ("a", "b"):
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / f"{prompt}.png")
        images[prompt] = [tmp_path / f"{prompt}.png"]
    with pytest.raises(UserError, match="'1'"):
        script.dpg(tmp_path / "dpg.csv", images)
