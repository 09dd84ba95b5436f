"""The argument surface: what a user can type, and what happens if nothing is typed. A change here is a change for
users, and shows in the diff of `cli_surface.json`. After a change that is meant, write it anew with

    python tests/test_cli_surface.py
"""

import dataclasses
import json
from pathlib import Path

import pytest

from trl_diffusion_sdpo import DiffusionSDPOConfig
from trl_diffusion_sdpo.cli import demo, train
from trl_diffusion_sdpo.cli.main import COMMANDS, main

SNAPSHOT = Path(__file__).with_name("cli_surface.json")


def surface() -> dict:
    ours = [base for base in reversed(DiffusionSDPOConfig.__mro__) if base.__module__.startswith("trl_diffusion_sdpo")]
    own = {name: kind for base in ours for name, kind in base.__annotations__.items()}
    fields = {field.name: field for field in dataclasses.fields(DiffusionSDPOConfig) if field.name in own}
    return {
        "commands": list(COMMANDS),
        "config": {name: {"type": own[name], "default": fields[name].default} for name in own if name in fields},
        "demo": {action.dest: action.default for action in demo.make_parser()._actions if action.dest != "help"},
    }


def test_the_arguments_are_those_of_the_snapshot():
    assert json.loads(json.dumps(surface())) == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_every_own_argument_has_a_help_text_and_a_flag():
    flags = {flag for action in train.make_parser()._actions for flag in action.option_strings}
    for name in surface()["config"]:
        assert DiffusionSDPOConfig.__dataclass_fields__[name].metadata["help"]
        assert f"--{name}" in flags


def test_without_arguments_there_is_help(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_an_unknown_command_is_an_error_that_names_the_known_ones(capsys):
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "'trian'" in error and "train" in error and "Traceback" not in error


def test_env_prints_versions(capsys):
    import torch

    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in printed and "diffusers: " in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"usage: trl-diffusion-sdpo {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset_name", "pairs"], "--model_name_or_path"),
        (["--model_name_or_path", "folder"], "--dataset_name"),
        (["--model_name_or_path", "folder", "--safeguard_mu", "2"], "`safeguard_mu` must be in [0, 1], got 2.0"),
        (["--betta", "5"], "--betta"),
        (["--config"], "`--config` takes one YAML file"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--resume_from_checkpoint"], "--resume_from_checkpoint"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_exit_code_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code_of(["train", "--use_cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_yaml_file_that_is_none_is_told(tmp_path, capsys):
    broken = tmp_path / "broken.yaml"
    broken.write_text("beta: [1, 2\n")
    assert main(["train", "--config", str(broken)]) == 2
    assert "must be YAML" in capsys.readouterr().err


def test_the_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("TRL_DIFFUSION_SDPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="`--config` takes one YAML file"):
        main(["train", "--config"])


def test_the_command_line_overrides_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"beta: 1000\nsafeguard_mu: 0.5\nuse_cpu: true\noutput_dir: {tmp_path / 'out'}\n")
    _, args, _ = train.parse([f"--config={file}", "--beta", "2000"])
    assert (args.beta, args.safeguard_mu) == (2000.0, 0.5)


@pytest.mark.parametrize(
    ("given", "meant"), [(None, None), ("true", True), ("True", True), (True, True), ("false", None), (False, None)]
)
def test_resuming_is_asked_for_in_words(given, meant):
    assert train.resume_point(given) is meant


def test_resuming_from_a_folder_needs_the_folder(tmp_path):
    assert train.resume_point(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        train.resume_point(str(tmp_path / "checkpoint-7"))


def exit_code_of(argv: list[str]) -> int:
    """argparse exits by itself where an argument cannot be read."""
    try:
        return main(argv)
    except SystemExit as exit_:
        return exit_.code


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(surface(), indent=2) + "\n", encoding="utf-8")
