"""Each layout is read back by a second writing of its benchmark's reader."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from trl_diffusion_sdpo import Candidate, evaluate_models
from trl_diffusion_sdpo.cli.evaluate import make_parser
from trl_diffusion_sdpo.tools.evaluation.images import ImageSettings, image_path
from trl_diffusion_sdpo.tools.evaluation.layouts import LAYOUTS, write_layout
from trl_diffusion_sdpo.tools.evaluation.prompts import read_prompts

SIDE = 8


@pytest.fixture
def lay_out(tmp_path):
    """`lay_out(layout, prompts, seeds)`: the folder of the model `m`, whose images are `colour(prompt, seed)`."""

    def write(layout, prompts, seeds):
        files = LAYOUTS[layout](prompts, seeds)
        for index in range(len(prompts.prompts)):
            for seed in seeds:
                path = image_path(tmp_path, "m", index, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (SIDE, SIDE), colour(index, seed)).save(path)
        for _ in range(2):  # the second call replaces the files of the first
            write_layout(tmp_path, layout, ["m"], files)
        return tmp_path / layout / "m"

    return write


def colour(index, seed):
    return (40 * index + 20, 60 * seed + 20, 128)


def prompts_of(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return read_prompts(tmp_path / name)


def colour_of(file, box=None, tolerance=0):
    with Image.open(file) as image:
        pixels = np.asarray(image.crop(box) if box else image, dtype=int).reshape(-1, 3)
    assert np.ptp(pixels, axis=0).max() <= tolerance
    return tuple(pixels[0])


GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "two clocks"},
    {"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}], "prompt": "a photo of a bench"},
]


def test_geneval_reads_metadata_and_samples_of_each_line(lay_out, tmp_path):
    prompts = prompts_of(tmp_path, "evaluation_metadata.jsonl", "\n".join(map(json.dumps, GENEVAL)))
    folder = lay_out("geneval", prompts, (0, 1))
    found = {}
    for name in os.listdir(folder):
        if (folder / name).is_dir() and name.isdigit():
            metadata = json.loads((folder / name / "metadata.jsonl").read_text())
            samples = sorted(os.listdir(folder / name / "samples"))
            assert all(re.match(r"\d+\.png", sample) for sample in samples)
            found[int(name)] = (metadata, [colour_of(folder / name / "samples" / sample) for sample in samples])
    # The third line repeats the first prompt. It shares the images, and has its own metadata.
    expected = {
        line: (GENEVAL[line], [colour(index, 0), colour(index, 1)]) for line, index in ((0, 0), (1, 1), (2, 0))
    }
    assert found == expected
    assert (folder / "00000/samples/0000.png").samefile(image_path(tmp_path, "m", 0, 0))


DPG = """item_id,text,keywords,proposition_id,dependency,question_natural_language
partiprompts0,"a bench, and
a tree",k,1,0,Is there a bench?
partiprompts0,"a bench, and
a tree",k,2,0,Is there a tree?
12,two clocks,k,1,0,Are there clocks?
"""


@pytest.mark.parametrize("seeds", [(0, 1, 2, 3), (0,)])
def test_dpg_crops_the_images_of_an_item_from_its_grid(seeds, lay_out, tmp_path):
    folder = lay_out("dpg", prompts_of(tmp_path, "dpg_bench.csv", DPG), seeds)
    found = {}
    for name in os.listdir(folder):
        corners = [(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)][: len(seeds)]
        boxes = [(left, top, left + SIDE, top + SIDE) for left, top in corners]
        found[name.split(".")[0]] = [colour_of(folder / name, box) for box in boxes]
    assert found == {
        "partiprompts0": [colour(0, seed) for seed in seeds],
        "12": [colour(1, seed) for seed in seeds],
    }


def test_t2i_compbench_reads_prompt_and_number_from_the_name(lay_out, tmp_path):
    listed = ["a green bench and a blue bowl", "A clock reads 11:44.", "a green bench and a blue bowl"]
    folder = lay_out("t2i-compbench", prompts_of(tmp_path, "color_val.txt", "\n".join(listed)), (0, 1))
    names = os.listdir(folder / "samples")
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [int(name.split(".png")[0].split("_")[1]) for name in names] == list(range(6))
    assert [name.split("_")[0] for name in names] == [prompt for prompt in listed for _ in range(2)]
    expected = [colour(index, seed) for index in (0, 1, 0) for seed in (0, 1)]
    assert [colour_of(folder / "samples" / name) for name in names] == expected


def test_images_are_copied_where_links_are_not_possible(lay_out, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    file = lay_out("t2i-compbench", prompts_of(tmp_path, "a.txt", "a tree"), (0,)) / "samples" / "a tree_000000.png"
    assert file.read_bytes() == image_path(tmp_path, "m", 0, 0).read_bytes()


def test_hpsv2_finds_each_prompt_of_a_style_by_its_number(lay_out, tmp_path):
    annotations = ["a bench", "two clocks", "a bench"]
    folder = lay_out("hpsv2", prompts_of(tmp_path, "anime.json", json.dumps(annotations)), (0, 1))
    assert os.listdir(folder) == ["anime"]
    found = []
    for number in range(len(annotations)):
        with Image.open(folder / "anime" / f"{number:05d}.jpg") as image:
            assert image.format == "JPEG"
            found.append(image.convert("RGB").getpixel((0, 0)))
    for seen, index in zip(found, (0, 1, 0), strict=True):
        assert np.abs(np.subtract(seen, colour(index, 0))).max() <= 3


def test_hpsv2_takes_styles_from_a_key(tmp_path):
    rows = [{"prompt": "a", "style": "photo"}, {"prompt": "b", "style": "anime"}, {"prompt": "c", "style": "photo"}]
    files = LAYOUTS["hpsv2"](prompts_of(tmp_path, "all.json", json.dumps(rows)), (0,))
    assert list(files) == ["photo/00000.jpg", "anime/00000.jpg", "photo/00001.jpg"]


@pytest.mark.parametrize(
    ("layout", "name", "text", "match"),
    [
        ("geneval", "a.txt", "a bench", "tag"),
        ("geneval", "a.jsonl", '{"prompt": "a", "tag": "counting"}', "include"),
        ("dpg", "a.jsonl", '{"prompt": "a"}', "item_id"),
        ("dpg", "a.jsonl", '{"prompt": "a", "item_id": "1.5"}', "item_id"),
        ("dpg", "a.jsonl", '{"prompt": "a", "item_id": 1}\n{"prompt": "b", "item_id": 1}', "item_id"),
        ("t2i-compbench", "a.txt", "snake_case", "snake_case"),
        ("t2i-compbench", "a.txt", "either/or", "either/or"),
        ("t2i-compbench", "a.txt", "ü" * 123, "244"),
        ("hpsv2", "prompts.json", '["a"]', "style"),
        ("hpsv2", "anime.json", '["a", ""]', "empty"),
    ],
)
def test_prompts_that_lack_what_a_layout_needs_are_refused(layout, name, text, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        LAYOUTS[layout](prompts_of(tmp_path, name, text), (0,))


def test_dpg_takes_up_to_four_seeds(tmp_path):
    with pytest.raises(ValueError, match="5 seeds"):
        LAYOUTS["dpg"](prompts_of(tmp_path, "a.csv", DPG), range(5))


def test_an_evaluation_writes_a_layout_without_any_scorer(sd_folder, tmp_path):
    assert {*LAYOUTS} == {*next(one.choices for one in make_parser()._actions if one.dest == "layout")}
    settings = ImageSettings(call_kwargs={"num_inference_steps": 1, "guidance_scale": 1.0})
    arguments = [Candidate("base", sd_folder), Candidate("same", sd_folder)], ["a bench", "a tree"], [], tmp_path
    for layout, match in (("geneval", "tag"), ("parti", "parti")):
        with pytest.raises(ValueError, match=match):
            evaluate_models(*arguments, settings, layout=layout)
    assert not list(tmp_path.rglob("*.png"))  # it is found out before images are generated
    evaluate_models(*arguments, settings, layout="t2i-compbench")
    for model in ("base", "same"):
        folder = tmp_path / "t2i-compbench" / model / "samples"
        assert sorted(os.listdir(folder)) == ["a bench_000000.png", "a tree_000001.png"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 4 and "Win rates" not in page
    assert "Win rate" not in (tmp_path / "report.md").read_text().split("A scorer is")[0]
