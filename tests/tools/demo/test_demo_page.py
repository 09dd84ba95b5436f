"""What the documentation shows of the demo comes from the committed run."""

import re

import pytest
from PIL import Image

from benchmarks.demo_page import GRID, PAGE, PICTURES, RESULTS, ROOT, fingerprint, page
from trl_diffusion_sdpo.tools.demo.results import DemoResult


@pytest.fixture(scope="module")
def committed():
    return DemoResult.read(RESULTS)


def test_the_page_is_what_the_program_writes_from_the_committed_run(committed):
    assert PAGE.read_text(encoding="utf-8") == page(committed)


@pytest.mark.parametrize("name", [*PICTURES, GRID])
def test_each_picture_is_of_the_committed_run(name):
    with Image.open(ROOT / "docs" / "images" / name) as picture:
        assert picture.info["Source"] == fingerprint()


@pytest.mark.parametrize("file", ["README.md", "docs/index.md"])
def test_the_scores_beside_the_first_picture_are_those_of_the_run(committed, file):
    text = " ".join((ROOT / file).read_text(encoding="utf-8").split())
    words = re.search(r'demo_images.png".*? alt="(.*?)"|!\[([^]]*)\]\(images/demo_images.png', text)
    shown = re.findall(r"0\.\d{3}", words[1] or words[2])
    assert shown == [f"{model.best.mean:.3f}" for model in committed.models.values()]


def test_the_committed_run_is_read_and_written_without_loss(committed, tmp_path):
    committed.write(tmp_path / "results.json")
    assert (tmp_path / "results.json").read_bytes() == RESULTS.read_bytes()
