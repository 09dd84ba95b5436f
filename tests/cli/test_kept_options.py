"""Help and mistyped options are answered from an earlier call, without slow imports, in the parser's words."""

import subprocess
import sys

import pytest

from trl_diffusion_sdpo.cli import kept_options, train_parser
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.utils.errors import UserError

PROG = "trl-diffusion-sdpo train"


@pytest.fixture
def kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    kept_options.keep(train_parser.make_parser, PROG)


def test_the_help_does_not_say_that_an_option_is_ignored():
    assert "this will be ignored" not in " ".join(train_parser.make_parser(PROG).format_help().split())


def refused(arguments: list[str], *, early: bool) -> str:
    with pytest.raises(UserError) as error:
        if early:
            kept_options.answer_early(arguments, PROG)
        else:
            train_parser.TrainOptions.read(arguments, PROG).refuse_others()
    return str(error.value)


def test_the_help_is_the_parsers_and_needs_no_torch(kept, capsys):
    code = (
        "import sys; from trl_diffusion_sdpo.cli.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == train_parser.make_parser(PROG).format_help()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lerning_rate", "1e-4"],
        ["--max-step=3", "--bf16"],
        ["--num_processes", "2"],
        ["--use_peft", "--lora", "8"],
    ],
    ids=" ".join,
)
def test_a_mistyped_option_is_refused_in_the_same_words(kept, arguments):
    assert refused(arguments, early=True) == refused(arguments, early=False)


def test_a_mistyped_setting_of_a_file_is_refused_in_the_same_words(kept, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lerning_rate: 1e-4\n")
    assert refused(["--config", str(file)], early=True) == refused(["--config", str(file)], early=False)


@pytest.mark.parametrize(
    "words",
    [
        ["--learning-rate", "1e-4", "--no_random_flip"],
        ["--accelerate_config", "ddp", "--num_processes", "2"],
        ["--config", "FILE"],
        ["stray"],  # for the parser to refuse
    ],
    ids=" ".join,
)
def test_options_that_exist_are_left_to_the_parser(kept, words, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("gradient_checkpointing: true\nbeta: 3\n")  # a former name
    words = [str(file) if word == "FILE" else word for word in words]
    assert not kept_options.answer_early(words, PROG)


def test_options_of_other_files_or_versions_are_not_used(kept, monkeypatch):
    sources = kept_options._sources()
    monkeypatch.setattr(kept_options, "_sources", lambda: {**sources, "transformers": "0"})
    assert not kept_options.answer_early(["--lerning_rate", "1"], PROG)
    assert not kept_options.answer_early(["--help"], PROG)


@pytest.mark.parametrize("content", ["", "[]", "{", "{}"])
def test_a_damaged_file_is_ignored_and_replaced(kept, content):
    kept_options._file().write_text(content)
    assert not kept_options.answer_early(["--help"], PROG)
    kept_options.keep(train_parser.make_parser, PROG)
    assert kept_options.answer_early(["--help"], PROG)


def test_a_folder_that_cannot_be_written_costs_only_time(monkeypatch, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert "--learning_rate" in capsys.readouterr().out


def test_few_layouts_are_kept(kept, monkeypatch):
    for columns in range(60, 75):
        monkeypatch.setenv("COLUMNS", str(columns))
        kept_options.keep(train_parser.make_parser, PROG)
    assert len(kept_options._read()["help"]) == kept_options.PAGES
    assert kept_options.answer_early(["--help"], PROG)
