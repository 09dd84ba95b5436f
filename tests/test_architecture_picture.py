"""The picture and the page of the architecture are current."""

import re
from pathlib import Path
from xml.etree import ElementTree

import architecture_picture
import pytest
from architecture_picture import COMMAND, PICTURE, ROOM_WIDTH, imports_between_rooms, picture, place
from architecture_rules import FLOORS, PACKAGE

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"


@pytest.fixture
def small_house(tmp_path):
    """A package with a room on every floor but one, of which two import."""
    files = {
        "_compat.py": "",
        "losses/__init__.py": "",
        "models/ema.py": "from ..losses import mean\nfrom .._compat import name",
        "step/a.py": "def f():\n    from trl_diffusion_sdpo.models.ema import EMAWeights",
    }
    for name, text in files.items():
        file = tmp_path / PACKAGE / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return tmp_path / PACKAGE


def test_the_picture_shows_the_imports_of_today():
    current = picture(ROOT / PACKAGE)
    assert PICTURE.read_text(encoding="utf-8") == current, f"the imports have changed: run `{COMMAND}`"


def test_a_room_s_imports_are_those_of_its_files_at_any_depth_without_the_ground(small_house):
    rooms, ground = imports_between_rooms(small_house)
    assert rooms == {"losses": set(), "models": {"losses"}, "step": {"models"}}
    assert ground == ["_compat"]


def test_another_import_is_another_picture(small_house):
    before = picture(small_house)
    assert picture(small_house) == before
    (small_house / "losses" / "metrics.py").write_text('"""More of a room."""\nimport torch\n', encoding="utf-8")
    assert picture(small_house) == before
    (small_house / "step" / "b.py").write_text("from ..losses import metrics\n", encoding="utf-8")
    assert picture(small_house).count("<path class=") == before.count("<path class=") + 1


def test_rooms_are_on_their_floors_and_do_not_overlap():
    boxes = place(imports_between_rooms(ROOT / PACKAGE)[0])
    for room, box in boxes.items():
        for other, beside in boxes.items():
            assert (box.top < beside.top) == (FLOORS[room] > FLOORS[other])
            if box.top == beside.top and room != other:
                assert abs(box.left - beside.left) > ROOM_WIDTH


def test_the_picture_is_well_formed_and_every_room_has_words():
    root = ElementTree.fromstring(picture(ROOT / PACKAGE))
    drawn = [element.text for element in root.iter() if element.get("class") == "name"]
    assert sorted(drawn) == sorted(imports_between_rooms(ROOT / PACKAGE)[0])
    assert set(drawn) <= set(architecture_picture.LABELS)


def test_the_page_has_the_picture_and_every_room_with_its_floor():
    page = PAGE.read_text(encoding="utf-8")
    assert "](images/architecture.svg)" in page
    listed = {room: floor for floor, room in re.findall(r"^\| (roof|\d|ground) \| `(\w+)", page, re.MULTILINE)}
    rooms, _ = imports_between_rooms(ROOT / PACKAGE)
    roof = max(FLOORS.values())
    expected = {room: "roof" if FLOORS[room] == roof else str(FLOORS[room]) for room in rooms}
    assert {room: floor for room, floor in listed.items() if floor != "ground"} == expected


def test_the_files_that_the_page_names_exist():
    page = re.sub(r"^```.*?^```$", "", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", page))
    assert {name for name in named if not (ROOT / PACKAGE / name).exists() and not (ROOT / name).exists()} == set()
