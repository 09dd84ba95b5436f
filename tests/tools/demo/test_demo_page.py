"""What the documentation shows of the demo comes from the committed run."""

import re

import pytest
from PIL import Image

from benchmarks.demo_page import PAGE, PICTURES, RESULTS, ROOT, fingerprint, page
from trl_diffusion_sdpo.tools.demo.report import percent
from trl_diffusion_sdpo.tools.demo.results import DemoResult


@pytest.fixture(scope="module")
def committed():
    return DemoResult.read(RESULTS)


def test_the_page_is_what_the_program_writes_from_the_committed_run(committed):
    assert PAGE.read_text(encoding="utf-8") == page(committed)


@pytest.mark.parametrize("name", PICTURES)
def test_each_picture_is_of_the_committed_run(name):
    with Image.open(ROOT / "docs" / "images" / name) as picture:
        assert picture.info["Source"] == fingerprint()


def test_the_numbers_in_the_readme_are_those_of_the_run(committed):
    text = re.search(r'preferred_images.png".*? alt="(.*?)"', (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    for model in committed.models.values():
        assert f"{model.label} {model.best.mean:.3f}" in text
        if model.curves is not None:
            assert f"{model.label} {percent(model.curves.winner_change[-1])} %" in text


def test_the_committed_run_is_read_and_written_without_loss(committed, tmp_path):
    committed.write(tmp_path / "results.json")
    assert (tmp_path / "results.json").read_bytes() == RESULTS.read_bytes()
