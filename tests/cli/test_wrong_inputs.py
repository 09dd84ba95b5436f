"""Wrong inputs of every command end in one sentence and exit code 2: every sixteenth here, all in the matrix."""

import pytest
from cli.wrong_inputs import COMMANDS, Place, inputs

CASES = [
    pytest.param(text, id=text, marks=() if index % 16 == 0 else pytest.mark.matrix)
    for index, text in enumerate(inputs())
]


@pytest.fixture(scope="module")
def place(sd_folder, make_pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    make_pairs(4).save_to_disk(folder / "pairs")
    return Place(folder, sd_folder, str(folder / "pairs"))


@pytest.mark.parametrize("text", CASES)
def test_a_wrong_input_is_one_sentence(place, text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert place.fault(text) is None


@pytest.mark.matrix
@pytest.mark.parametrize("text", [pytest.param(text, id=text) for text in COMMANDS])
def test_a_command_without_a_wrong_input_works(place, text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "exit code 0" in str(place.fault(text))
