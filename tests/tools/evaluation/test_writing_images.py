"""Images are written beside the loop that draws them: in order, with the same pixels, and no error is lost."""

import numpy as np
import pytest
from PIL import Image

from trl_diffusion_sdpo.tools.evaluation import images
from trl_diffusion_sdpo.tools.evaluation.images import writing_images


def drawn(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def test_all_images_are_there_when_the_context_ends(tmp_path):
    with writing_images() as write:
        for batch in range(3):
            write([(tmp_path / f"{batch}-{i}.png", drawn(2 * batch + i), "a prompt", i) for i in range(2)])
    for number, file in enumerate(sorted(tmp_path.iterdir())):
        with Image.open(file) as image:
            assert np.array_equal(image, drawn(number)) and image.info["prompt"] == "a prompt"
    assert number == 5


@pytest.mark.parametrize("batches", [1, 2])
def test_an_error_of_the_thread_is_raised_in_the_loop(tmp_path, monkeypatch, batches):
    """By the next batch, or when the context ends. What was to come is not written."""

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(images, "write_atomically", full)
    with pytest.raises(OSError, match="0.png"), writing_images() as write:
        for batch in range(batches):
            write([(tmp_path / f"{batch}.png", drawn(0), "", 0)])


def test_an_error_of_the_loop_comes_after_the_images_before_it(tmp_path):
    with pytest.raises(KeyError), writing_images() as write:
        write([(tmp_path / "0.png", drawn(0), "", 0)])
        raise KeyError
    assert (tmp_path / "0.png").is_file()
