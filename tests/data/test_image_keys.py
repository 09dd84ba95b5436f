"""The key of an image changes when the image does."""

import os

from PIL import Image

from trl_diffusion_sdpo.data.image_keys import image_key


def test_a_file_replaced_by_one_of_the_same_size_and_time_has_another_key(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"first")
    os.utime(path, ns=(1, 1))
    before = image_key(str(path))
    path.write_bytes(b"other")
    os.utime(path, ns=(1, 1))
    assert image_key(str(path)) != before
    assert image_key({"bytes": None, "path": str(path)}) == image_key(path)


def test_bytes_and_pixels_are_told_apart_by_their_content():
    assert image_key(b"one") == image_key({"bytes": b"one", "path": "x.png"}) != image_key(b"two")
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    assert image_key(red) == image_key(red.copy()) != image_key(blue)
