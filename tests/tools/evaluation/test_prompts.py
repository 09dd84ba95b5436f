import json

import pytest
from datasets import Dataset, Features, List
from datasets import Image as Feature

from trl_diffusion_sdpo.tools.evaluation.prompts import read_prompts

EXPECTED = ("a red circle", 'two "blue" squares', "ein grüner Baum")


def contents():
    rows = [{"id": index, "caption": prompt} for index, prompt in enumerate(EXPECTED)]
    return {
        "txt": "\n".join([EXPECTED[0], "", *EXPECTED[1:], EXPECTED[0], "  "]),
        "json": json.dumps(list(EXPECTED)),
        "jsonl": "\n".join(map(json.dumps, rows)),
        "csv": 'id,caption\n0,a red circle\n1,"two ""blue"" squares"\n2,ein grüner Baum\n',
    }


@pytest.mark.parametrize("ending", ["txt", "json", "jsonl", "csv"])
def test_prompts_are_read_from_a_file(ending, tmp_path):
    path = tmp_path / f"prompts.{ending}"
    path.write_text(contents()[ending], encoding="utf-8")
    listed = read_prompts(path)
    assert listed.prompts == EXPECTED
    assert (listed.empty, listed.duplicates) == ((2, 1) if ending == "txt" else (0, 0))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", "grün".encode("latin-1"), "UTF-8"),
        ("a.txt", b"\n\n", "none"),
        ("a.json", b"{", "a.json"),
        ("a.json", b'{"prompt": "x"}', "list"),
        ("a.jsonl", b'{"words": "x"}', "words"),
        ("a.csv", b"words\nx\n", "prompt_column"),
    ],
)
def test_a_bad_file_is_an_error(name, content, match, tmp_path):
    with pytest.raises(ValueError, match=name):
        read_prompts(tmp_path / name)  # the file does not exist yet
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "a\u2028b\nc\n"),
        ("a.jsonl", '{"prompt": "a\u2028b"}\n\n{"prompt": "c"}'),
        ("a.csv", '\ufeffprompt\n"a\u2028b"\nc\n'),
    ],
)
def test_only_a_newline_ends_a_prompt(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    listed = read_prompts(tmp_path / name)
    assert (listed.prompts, listed.empty) == (("a\u2028b", "c"), 0)


def test_a_limit_keeps_the_first_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("a\n\nb\na\nc")
    assert read_prompts(tmp_path / "a.txt").first(2).prompts == ("a", "b")
    with pytest.raises(ValueError, match="limit of 0"):
        read_prompts(tmp_path / "a.txt").first(0)


def test_images_of_a_data_set_are_not_read(tmp_path):
    """The images cannot be decoded, so reading one would fail."""
    columns = {"prompt": ["x", "y"], "jpg_0": [b"0", b"1"]}
    broken = {"path": None, "bytes": b"no image"}
    data = Dataset.from_dict({**columns, "image": [broken] * 2, "images": [[broken]] * 2})
    features = {**data.features, "image": Feature(), "images": List(Feature())}
    data.cast(Features(features)).to_parquet(tmp_path / "test.parquet")
    assert read_prompts(tmp_path).prompts == ("x", "y")


@pytest.mark.parametrize(
    ("name", "text", "column", "match"),
    [
        ("a.csv", "prompt,style\na cat, sitting,photo\n", None, "row 1"),
        ("a.txt", "a cat\n", "caption", "caption"),
        ("a.json", "[" * 100_000, None, "a.json"),
    ],
)
def test_a_file_that_would_be_read_wrongly_is_refused(name, text, column, match, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=match):
        read_prompts(tmp_path / name, column=column)


def test_prompts_are_a_column_of_a_data_set(tmp_path):
    (tmp_path / "test.csv").write_text("words,prompt\na,x\nb,y\na,z\n")
    listed = read_prompts(tmp_path, column="words")
    assert (listed.prompts, listed.duplicates) == (("a", "b"), 1)
