"""Prompts, ratings and duplicates of a folder of own images."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw, ImageFilter
from PIL.PngImagePlugin import PngInfo

from trl_diffusion_sdpo.tools.pairing.manifest import read_manifest
from trl_diffusion_sdpo.tools.pairing.own_images import list_images
from trl_diffusion_sdpo.tools.pairing.picks import PairsFile, PickLog, rated_pairs
from trl_diffusion_sdpo.tools.pairing.session import PickSession

A1111 = "a red fox, <lora:fur:0.8> (snow:1.2)\nsecond line\nNegative prompt: blurry\nSteps: 20, Seed: 1"
READ = "a red fox, (snow:1.2) second line"
COMFY = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 1, "positive": ["9", 0], "negative": ["7", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    "9": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["6", 0]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["5", 0], "clip": ["4", 1]}},
    "5": {"class_type": "PrimitiveString", "inputs": {"value": "a red fox"}},
}
GUIDED = {
    "1": {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["2", 0], "noise": ["8", 0]}},
    "2": {"class_type": "BasicGuider", "inputs": {"conditioning": ["3", 0]}},
    "3": {"class_type": "CLIPTextEncodeFlux", "inputs": {"clip_l": "", "t5xxl": "a red fox", "guidance": 3}},
}
SWARM = json.dumps({"sui_image_params": {"prompt": "a red fox", "negativeprompt": "blurry"}})


def picture(grey=0, side=16):
    return Image.fromarray(np.full((side, side, 3), grey, np.uint8))


def png(path, grey=0, **texts):
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text) if isinstance(text, str) else info.add_text(key, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(grey).save(path, pnginfo=info)


def jpeg(path, comment, tag=ExifTags.Base.UserComment):
    exif = Image.Exif()
    if tag == ExifTags.Base.UserComment:
        exif.get_ifd(ExifTags.IFD.Exif)[tag] = comment
    else:
        exif[tag] = comment
    picture().save(path, exif=exif)


def prompts_of(folder, **options):
    list_images(folder, **options)
    return {image.name: image.prompt for image in read_manifest(folder)[0]}


@pytest.mark.parametrize(
    ("texts", "prompt"),
    [
        ({"parameters": A1111}, READ),
        ({"parameters": SWARM}, "a red fox"),
        ({"prompt": json.dumps(COMFY), "workflow": "{}"}, "a red fox"),
        ({"prompt": json.dumps(GUIDED)}, "a red fox"),
        ({"prompt": "a red fox"}, "a red fox"),
    ],
)
def test_prompts_of_png(tmp_path, texts, prompt):
    png(tmp_path / "a.png", **texts)
    assert prompts_of(tmp_path) == {"a.png": prompt}


@pytest.mark.parametrize(
    ("comment", "prompt"),
    [
        (b"UNICODE\0" + A1111.encode("utf-16-be"), READ),
        (b"UNICODE\0" + A1111.encode("utf-16-le"), READ),
        (b"ASCII\0\0\0" + A1111.encode(), READ),
        (SWARM.encode(), "a red fox"),
    ],
)
@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_prompts_of_exif_comments(tmp_path, comment, prompt, ending):
    jpeg(tmp_path / f"a.{ending}", comment)
    assert prompts_of(tmp_path) == {f"a.{ending}": prompt}


def test_the_prompt_of_a_webp_of_comfyui(tmp_path):
    jpeg(tmp_path / "a.webp", "prompt:" + json.dumps(COMFY), ExifTags.Base.Model)
    assert prompts_of(tmp_path) == {"a.webp": "a red fox"}


def test_a_text_file_comes_first_and_names_only_if_asked(tmp_path):
    png(tmp_path / "a.png", parameters=A1111)
    (tmp_path / "a.txt").write_text("my own\nwords", encoding="utf-8-sig")
    png(tmp_path / "sub" / "a_red_fox_00012_.png")
    png(tmp_path / ".hidden.png", parameters=A1111)
    assert prompts_of(tmp_path) == {"a.png": "my own words"}
    assert prompts_of(tmp_path, from_names=True) == {"a.png": "my own words", "sub/a_red_fox_00012_.png": "a red fox"}


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({"parameters": "x" * 30_000}, "more than 20000 characters"),
        ({"prompt": "{" + '"a":' * 5}, "without a prompt"),
        ({"prompt": '{"a":' * 20_000}, "without a prompt"),
        ({"parameters": '{"sui_image_params": [1]}'}, "without a prompt"),
        ({"prompt": json.dumps({"1": {"inputs": {"positive": ["1", 0], "text": 4}}})}, "without a prompt"),
        ({"prompt": json.dumps({"1": {"inputs": {"positive": [["x"], 0]}}, "2": 7})}, "without a prompt"),
        ({"parameters": ""}, "without a prompt"),
    ],
)
def test_metadata_that_lie_are_counted(tmp_path, texts, reason):
    png(tmp_path / "bad.png", **texts)
    png(tmp_path / "good.png", parameters="a fox")
    lines = list_images(tmp_path)
    assert [image.name for image in read_manifest(tmp_path)[0]] == ["good.png"]
    assert any("1 images" in line and reason in line for line in lines)


def test_damaged_files_are_counted(tmp_path):
    png(tmp_path / "good.png", parameters="a fox")
    content = (tmp_path / "good.png").read_bytes()
    head, body = content[:33], content[33:]
    (tmp_path / "cut.png").write_bytes(content[:-30])
    (tmp_path / "text.png").write_bytes(b"no image")
    (tmp_path / "empty.jpg").touch()
    bomb = b"parameters\0\0" + zlib.compress(b"x" * 80_000_000)
    (tmp_path / "bomb.png").write_bytes(head + chunk(b"zTXt", bomb) + body)
    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "huge.png").write_bytes(content[:8] + chunk(b"IHDR", size) + body)
    (tmp_path / "link.png").symlink_to("/dev/zero")
    jpeg(tmp_path / "comment.jpg", b"UNICODE\0\xd8")
    lines = list_images(tmp_path)
    assert [image.name for image in read_manifest(tmp_path)[0]] == ["good.png"]
    counted = sum(int(line.split("left out: ")[1].split()[0]) for line in lines if "left out" in line)
    assert counted == 7


def test_a_folder_without_prompts_is_an_error(tmp_path):
    png(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1 images without a prompt(.|\n)*--from_names"):
        list_images(tmp_path)
    assert not (tmp_path / "manifest.jsonl").exists()


def test_images_that_look_equal_are_listed_once_and_colours_and_details_count(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8).repeat(64, 0).repeat(64, 1)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    image.resize((400, 400), Image.Resampling.LANCZOS).save(tmp_path / "small.png")
    image.save(tmp_path / "saved.jpg", quality=85)
    Image.fromarray(pixels[..., ::-1]).save(tmp_path / "other_colours.png")
    mended = pixels.copy()
    mended[:64, :64] ^= 64  # one part in 64
    Image.fromarray(mended).save(tmp_path / "mended.png")
    for path in [*tmp_path.glob("*.png"), *tmp_path.glob("*.jpg")]:
        path.with_suffix(".txt").write_text("one prompt")
    assert set(prompts_of(tmp_path)) == {"a.png", "other_colours.png", "mended.png"}


def drawing(side=256, seed=0):
    """An image with edges, which blurring changes and resizing does not hide."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), (200, 210, 220))
    for x, y, width, *colour in rng.integers((0, 0, 9, 0, 0, 0), (side, side, 80, 256, 256, 256), (40, 6)).tolist():
        ImageDraw.Draw(image).ellipse([x, y, x + width, y + width], fill=tuple(colour))
    return image


def test_sharpness_may_be_a_taste_and_copies_are_named_and_can_be_kept(tmp_path):
    image = drawing()
    image.save(tmp_path / "a_sharp.png")
    image.filter(ImageFilter.GaussianBlur(1)).save(tmp_path / "b_soft.png")
    image.save(tmp_path / "c_saved.jpg", quality=90)
    for name in ("a_sharp", "b_soft", "c_saved"):
        (tmp_path / f"{name}.txt").write_text("a drawing")
    lines = list_images(tmp_path)
    assert [one.name for one in read_manifest(tmp_path)[0]] == ["a_sharp.png", "b_soft.png"]
    assert any("c_saved.jpg" in line and "a_sharp.png" in line for line in lines)
    list_images(tmp_path, keep_duplicates=True)
    assert len(read_manifest(tmp_path)[0]) == 3


def test_formats_that_are_not_read_and_captions_of_other_names_are_named(tmp_path):
    png(tmp_path / "good.png", parameters="a fox")
    for name in ("photo.HEIC", "b.avif", "c.jxl", "good.caption", "good.png.txt"):
        (tmp_path / name).write_text("x")
    said = "\n".join(list_images(tmp_path))
    assert all(name in said for name in ("3 images", "photo.HEIC", "b.avif", "c.jxl", "good.caption", "good.png.txt"))


def test_accents_are_equal_in_either_unicode_form(tmp_path):
    png(tmp_path / f"cafe{chr(0x301)}.png")
    (tmp_path / "caf\u00e9.txt").write_text("coffee")
    png(tmp_path / f"the{chr(0x301)}_2.png", 90)
    assert set(prompts_of(tmp_path, from_names=True).values()) == {"coffee", "th\u00e9"}


# ---- Called again ----------------------------------------------------------------------------------------------------


@pytest.fixture
def picked(tmp_path):
    """Three images of one prompt, a picked to be better than b, and b than c."""
    for number, name in enumerate("abc"):
        drawing(64, number).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a drawing")
    list_images(tmp_path)
    log = PickLog(tmp_path, {image.name: image for image in read_manifest(tmp_path)[0]})
    log.add("a.png", "b.png", "first")
    log.add("c.png", "b.png", "second")
    log.close()
    return tmp_path


def pairs_of(folder):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return {(row["chosen"], row["rejected"]) for row in rows}


def test_picks_survive_renamed_files_and_larger_copies(picked):
    (picked / "a.png").rename(picked / "renamed.png")
    (picked / "a.txt").rename(picked / "renamed.txt")
    drawing(64, 1).resize((128, 128), Image.Resampling.BICUBIC).save(picked / "b_large.png")
    (picked / "b_large.txt").write_text("a drawing")
    list_images(picked)
    assert pairs_of(picked) == {("renamed.png", "b_large.png"), ("b_large.png", "c.png")}
    list_images(picked, keep_duplicates=True)
    assert pairs_of(picked) == {("renamed.png", "b.png"), ("b.png", "c.png")}
    session = PickSession(picked)
    assert session.state("tab")["judged"] == 2 and session.undo("tab", 2)["judged"] == 1
    session.close()
    assert PickLog(picked, read_only=True).last.number == 1


def test_a_copy_may_take_the_place_of_its_smaller_original(picked):
    drawing(64, 1).resize((128, 128), Image.Resampling.BICUBIC).save(picked / "b_large.png")
    (picked / "b.txt").rename(picked / "b_large.txt")
    (picked / "b.txt").write_text("a drawing")
    list_images(picked)
    (picked / "b.png").unlink()
    list_images(picked)
    assert pairs_of(picked) == {("a.png", "b_large.png"), ("b_large.png", "c.png")}


def test_prompts_from_names_stay_in_a_call_without_them_and_follow_a_renamed_file(tmp_path):
    png(tmp_path / "a_red_fox.png")
    assert prompts_of(tmp_path, from_names=True) == {"a_red_fox.png": "a red fox"}
    (tmp_path / "a_red_fox.png").rename(tmp_path / "1.png")
    assert prompts_of(tmp_path) == {"1.png": "a red fox"}


def test_picks_that_no_longer_hold_are_counted(picked):
    drawing(64, 7).save(picked / "a.png")  # another picture under the same name
    (picked / "c.txt").write_text("a corrected caption")
    said = "\n".join(list_images(picked))
    assert pairs_of(picked) == set()
    assert "1 picks of an image whose file" in said and "1 picks of two images whose prompts differ" in said
    (picked / "b.txt").write_text("a corrected caption")
    assert "1 picks of an image whose file" in "\n".join(list_images(picked))
    assert pairs_of(picked) == {("b.png", "c.png")}
    (picked / "c.png").unlink()
    assert "1 picks of an image that the manifest" in "\n".join(list_images(picked))


def test_columns_that_the_user_added_are_kept_and_become_columns_of_the_pairs(picked):
    rows = [json.loads(line) for line in (picked / "manifest.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"artist": "artist of " + row["image"], "rating": 3}
    (picked / "manifest.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (picked / "a.png").rename(picked / "d.png")  # the column follows the picture
    drawing(64, 9).save(picked / "a.png")
    (picked / "d.txt").write_text("a drawing")
    said = "\n".join(list_images(picked))
    assert "3 ratings" in said and "b.png, c.png, d.png" in said
    assert {image.name: image.facts.get("artist") for image in read_manifest(picked)[0]} == {
        "a.png": None, "b.png": "artist of b.png", "c.png": "artist of c.png", "d.png": "artist of a.png"
    }  # fmt: skip
    row = json.loads((picked / "pairs.jsonl").read_text().splitlines()[0])
    assert row.items() >= {"chosen_artist": "artist of a.png", "rejected_artist": "artist of b.png"}.items()
    assert len(row) == 5


def test_likes_by_folder_become_pairs(tmp_path):
    for number, name in enumerate(("a", "liked/b", "disliked/c", "liked/d")):
        png(tmp_path / f"{name}.png", 60 * number, parameters="a fox")
    png(tmp_path / "e.png", parameters="other")
    list_images(tmp_path)
    images = {image.name: image for image in read_manifest(tmp_path)[0]}
    assert {name: image.facts.get("rating") for name, image in images.items()} == {
        "a.png": 0, "liked/b.png": 1, "disliked/c.png": -1, "liked/d.png": 1, "e.png": None
    }  # fmt: skip
    assert len(rated_pairs(images)) == 5
    log = PickLog(tmp_path)
    log.add("a.png", "disliked/c.png", "second")  # a pick counts more than a folder
    assert PairsFile(tmp_path, images).write(log) == (5, {})
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert {(row["chosen"], row["rejected"]) for row in rows} == {
        ("disliked/c.png", "a.png"), ("liked/b.png", "a.png"), ("liked/d.png", "a.png"),
        ("liked/b.png", "disliked/c.png"), ("liked/d.png", "disliked/c.png"),
    }  # fmt: skip
    log.close()


def test_a_copy_in_the_folder_of_likes_is_a_like(tmp_path):
    png(tmp_path / "a.png", parameters="a fox")
    png(tmp_path / "liked" / "a.png", parameters="a fox")
    png(tmp_path / "b.png", 90, parameters="a fox")
    list_images(tmp_path)
    assert sorted(image.facts["rating"] for image in read_manifest(tmp_path)[0]) == [0, 1]


@pytest.mark.parametrize(
    ("packet", "rating"),
    [
        ('<rdf:Description xmp:Rating="4"/>', 4),
        ("<xmp:Rating>5</xmp:Rating>", 5),
        ('<rdf:Description xmp:Rating="-1"/>', -1),
        ('<rdf:Description xmp:Rating="0"/>', None),
        ('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><xmp:Rating>&b;</xmp:Rating>', None),
    ],
)
def test_star_ratings(tmp_path, packet, rating):
    png(tmp_path / "a.png", parameters="a fox", **{"XML:com.adobe.xmp": packet})
    picture().save(tmp_path / "b.jpg", xmp=packet.encode())
    (tmp_path / "b.txt").write_text("another")
    list_images(tmp_path)
    assert [image.facts.get("rating") for image in read_manifest(tmp_path)[0]] == [rating, rating]


def test_the_folder_of_an_evaluation_is_left_alone(tmp_path):
    png(tmp_path / "a.png", parameters="a fox")
    (tmp_path / "manifest.jsonl").write_text('{"model": "base", "prompt": "a fox", "seed": 0, "image": "a.png"}\n')
    with pytest.raises(ValueError, match="evaluate"):
        list_images(tmp_path)
