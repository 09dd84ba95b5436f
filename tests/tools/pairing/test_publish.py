"""Cards of pairs, and what an upload contains."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image, ImageCms
from tools.pairing.folders import write_folder

from trl_diffusion_sdpo import Candidate
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.tools.pairing.publish import write_dataset
from trl_diffusion_sdpo.tools.pairing.session import PickSession

PLACE = "52 deg 31 min"
PACKET = f"<x:xmpmeta><rdf:Description photo='{PLACE}'/></x:xmpmeta>"


@pytest.fixture
def model(tmp_path):
    (tmp_path / "home" / "my-sd15").mkdir(parents=True)
    return Candidate("model", str(tmp_path / "home" / "my-sd15"))


def write(folder, count, model, **facts):
    folder.mkdir(exist_ok=True)
    rows = [{"prompt": str(row), "chosen": "w.png", "rejected": "l.png"} for row in range(count)]
    write_dataset(folder, rows, "Pairs of a test.", model, facts)
    return (folder / "README.md").read_text()


def test_a_card_is_of_the_pairs_beside_it_and_names_no_folder_of_the_user(model, tmp_path):
    before = write(tmp_path / "pairs", 3, model, Scorers="pickscore")
    after = write(tmp_path / "pairs", 5, model, Scorers="hpsv2.1")
    assert "Pairs: 3" in before and "pickscore" in before
    assert "Pairs: 5" in after and "hpsv2.1" in after and "pickscore" not in after
    assert "my-sd15" in after and str(tmp_path) not in after


def test_a_card_that_a_person_edited_is_kept_and_named(model, tmp_path, caplog):
    card = tmp_path / "pairs" / "README.md"
    edited = write(tmp_path / "pairs", 3, model) + "\nMy own words."
    card.write_text(edited)
    caplog.set_level("INFO", "trl_diffusion_sdpo")
    assert write(tmp_path / "pairs", 5, model) == edited and str(card) in caplog.text


def published(hub_server, folder):
    assert main(["pairs", "push", str(folder), "tester/card"]) == 0
    repo = hub_server.repos["tester/card"]
    (file,) = [name for name in repo.files if name.endswith(".parquet")]
    return repo.files["README.md"].decode(), pq.read_table(io.BytesIO(repo.files[file])).to_pylist()


def test_a_card_of_picks_replaces_that_of_scorers_and_counts_the_uploaded_pairs(model, tmp_path, hub_server):
    folder = write_folder(tmp_path / "own", [{"prompt": "a fox", "image": f"{k}.png"} for k in range(3)])
    write(folder, 9, model, Scorers="pickscore")
    session = PickSession(folder)
    pair = session.state("tab")["pair"]
    session.pick("tab", pair["first"], pair["second"], "first")
    session.close()
    card, rows = published(hub_server, folder)
    assert "Pairs: 1\n" in card and "pickscore" not in card and len(rows) == 1


def test_thumbs_are_uploaded_with_their_images(tmp_path, hub_server):
    folder = write_folder(tmp_path / "own", [{"prompt": f"fox {k}", "image": f"{k}.png"} for k in range(3)])
    session = PickSession(folder, thumbs=True)
    for verdict in ("liked", "disliked", "unsure"):
        pair = session.state("tab")["pair"]
        session.pick("tab", pair["first"], pair["second"], verdict)
    session.close()
    card, rows = published(hub_server, folder)
    assert "Images: 2\n" in card and "Picks: liked: 1\n" in card and "Pairs" not in card and "tgo" in card
    assert all(Image.open(io.BytesIO(row["image"]["bytes"])).size for row in rows) and len(rows) == 2
    assert str(tmp_path) not in str(rows)


def save(image, kind):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Orientation] = PLACE, 6
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(buffer, kind, exif=exif, icc_profile=profile, **({} if kind == "PNG" else {"xmp": PACKET.encode()}))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_upload_has_no_place_and_no_camera_and_the_same_pixels(kind, tmp_path, hub_server):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    name = f"photo.{kind.lower()}"
    content = save(Image.fromarray(pixels), kind)
    if kind == "JPEG":  # with a fill byte before the EXIF, and a camera's video behind the image
        content = content.replace(b"\xff\xe1", b"\xff\xff\xe1", 1) + PLACE.encode()
    (tmp_path / name).write_bytes(content)
    Image.new("RGB", (48, 32)).save(tmp_path / "plain.png")
    (tmp_path / "manifest.jsonl").touch()
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": name, "rejected": "plain.png"}))
    original = (tmp_path / name).read_bytes()
    _, rows = published(hub_server, tmp_path)
    content = rows[0]["chosen"]["bytes"]
    assert PLACE.encode() in original and PLACE.encode() not in content and b"xmpmeta" not in content
    before, after = Image.open(tmp_path / name), Image.open(io.BytesIO(content))
    exif = after.getexif()
    assert exif[ExifTags.Base.Orientation] == 6 and ExifTags.Base.Make not in exif
    assert after.info["icc_profile"] == before.info["icc_profile"]
    assert np.array_equal(before, after)
    plain = rows[0]["rejected"]["bytes"]
    assert plain == (tmp_path / "plain.png").read_bytes()


@pytest.mark.parametrize("folder", ["nowhere", "empty", "damaged"])
def test_a_push_of_nothing_or_of_a_damaged_image_is_one_line(folder, tmp_path, capsys):
    write_folder(tmp_path / "damaged", [{"prompt": "a", "image": "w.png"}])
    (tmp_path / "damaged" / "w.png").write_bytes(b"damaged")
    (tmp_path / "damaged" / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "w.png", "rejected": "w.png"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "pairs.jsonl").touch()
    (tmp_path / "empty" / "manifest.jsonl").touch()
    assert main(["pairs", "push", str(tmp_path / folder), "tester/card"]) == 2
    said = capsys.readouterr().err
    assert folder in said and "Traceback" not in said
