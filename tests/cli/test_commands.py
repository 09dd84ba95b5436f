"""The commands, their help, and what they say to a mistake."""

import pytest

from trl_diffusion_sdpo.cli import launch, train
from trl_diffusion_sdpo.cli.main import COMMANDS, main
from trl_diffusion_sdpo.utils.hints import OTHER_TOOLS


@pytest.fixture(scope="module")
def parser():
    return train.make_parser()


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
    monkeypatch.delenv(launch.LAUNCHED_VARIABLE, raising=False)


def test_options_of_other_trainers_lead_to_ours(parser):
    names = set(parser.names())
    former = {"activation_checkpointing": "gradient_checkpointing"}  # before transformers 5.23
    assert all(name in names or former.get(name) in names for name in OTHER_TOOLS.values())
    still_there = {"gradient_checkpointing", "warmup_ratio"}  # in older versions of transformers
    assert not set(OTHER_TOOLS) & (names - still_there)


def test_without_arguments_there_is_help(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_an_unknown_command_is_an_error_that_names_the_known_ones(capsys):
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "'trian'" in error and "`train`" in error and "Traceback" not in error


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
        (["--model_name_or_path", "m", "--dataset_name", "d", "--safeguard_mu", "2"], "must be in [0, 1], got 2.0"),
        (["--betta", "5"], "Did you mean `--beta`?"),
        (["--lr", "5"], "`--learning_rate`"),
        (["--lora_type", "lokr"], "lora_type"),
        (["--safeguard_m", "0.5"], "`--safeguard_m`"),
        (["--safeguard", "paramter"], "invalid choice: 'paramter' (choose from"),
        (["--max_steps", "1.5"], "invalid int value: '1.5'"),
        (["--beta", "5", "stray"], "stray"),
        (["--lora_r", "16"], "`lora_r`"),  # TRL's own default: given all the same
        (["--load_in_8bit", "true", "--use_peft", "false"], "`load_in_8bit`"),
        (["--num_processes", "2"], "`--accelerate_config`"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = [] if "model_name_or_path" in said or "dataset_name" in said else ["--dataset_name", "d"]
    named += ["--model_name_or_path", "m"] if named else []
    assert main(["train", "--use_cpu", *named, *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert said in line


def test_the_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("TRL_DIFFUSION_SDPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="nowhere.yaml"):
        main(["train", "--config", "nowhere.yaml"])
