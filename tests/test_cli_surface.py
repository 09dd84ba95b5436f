"""The argument surface: what a user can type, and what happens if nothing is typed. A change here is a change for
users, and shows in the diff of `cli_surface.json` and of the options of `train` that the package ships. After a change
that is meant, write both anew with

    python tests/test_cli_surface.py
"""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from transformers import TrainingArguments

from trl_diffusion_sdpo import DiffusionSDPOConfig
from trl_diffusion_sdpo.cli import given, launch, options, train, train_help
from trl_diffusion_sdpo.cli.main import COMMANDS, main

SNAPSHOT = Path(__file__).with_name("cli_surface.json")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def described() -> options.OptionTable:
    """The options of the parser that TRL makes of the dataclasses that are installed."""
    return train.describe_options()


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
    monkeypatch.delenv(launch.LAUNCHED_VARIABLE, raising=False)


def surface() -> dict:
    """Of every command but `train` and `encode`, whose options are a file of the package: defaults by option."""
    modules = {name: import_module(f"trl_diffusion_sdpo.cli.{name.replace('-', '_')}") for name in COMMANDS}
    parsers = {name: module.make_parser() for name, module in modules.items() if name not in ("train", "encode")}
    return {
        "commands": list(COMMANDS),
        **{
            name: {action.dest: action.default for action in parser._actions if action.dest != "help"}
            for name, parser in parsers.items()
        },
    }


def test_the_arguments_are_those_of_the_snapshot():
    assert json.loads(json.dumps(surface())) == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_the_shipped_options_of_train_are_those_of_its_parser(described):
    """Under other versions than the described ones, only what this package declares itself is compared."""
    stored = json.loads(options.TABLE_FILE.read_text(encoding="utf-8"))
    here, shipped = {name: dataclasses.asdict(row) for name, row in described.options.items()}, stored["options"]
    assert described.package_options == stored["package_options"]
    assert {name: here[name] for name in described.package_options} == {
        name: shipped[name] for name in described.package_options
    }
    if options.installed_versions() == stored["versions"]:
        assert here == shipped
        assert described.launch_options == stored["launch_options"]


def test_fields_of_every_class_that_the_configuration_inherits_are_options(described):
    holders = [holder for holder in inspect.getmro(DiffusionSDPOConfig) if dataclasses.is_dataclass(holder)]
    assert len(holders) >= 3, "itself, its groups and TrainingArguments"
    for holder in holders:
        declared = {field.name for field in dataclasses.fields(holder) if field.init}
        assert declared <= set(described.options)
        if holder.__module__.startswith("trl_diffusion_sdpo"):
            theirs = {field.name for field in dataclasses.fields(TrainingArguments)}  # whose defaults it may change
            assert {name for name in inspect.get_annotations(holder) if name in declared} - theirs <= set(
                described.package_options
            )


def test_every_own_argument_has_a_help_text_and_a_flag(described):
    for name in described.package_options:
        assert described.options[name].help
        assert f"--{name}" in described.options[name].flags


def test_arguments_of_transformers_that_the_documentation_names_are_options(described):
    page = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    rows = page.partition("| Feature of TrainingArguments")[2].partition("\n\n")[0].splitlines()[2:]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert "gradient_accumulation_steps" in named or len(named) > 10
    renamed = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # by transformers 5.23
    assert set(named) - renamed <= set(described.options)


def test_the_help_lists_every_option_once_in_groups_with_this_packages_first(described, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    listed = re.findall(r"(?m)^  --(\w+)", printed)
    titles = re.findall(r"(?m)^([A-Z].*):$", printed)
    assert len(listed) == len(set(listed))
    former = {"gradient_checkpointing", "gradient_checkpointing_kwargs"} if _has_new_names(described) else set()
    assert set(listed) == set(described.options) - train_help.HIDDEN - former
    assert titles[0] == "Model and data" and "Optimizer, from transformers" in titles
    last_of_ours = max(listed.index(name) for name in described.package_options)
    assert last_of_ours < listed.index("per_device_train_batch_size")
    text = " ".join(printed.split())
    assert "`--no_random_flip` turns it off" in text and "(default: sigmoid)" in text and "%%" not in text


def _has_new_names(described):
    return "activation_checkpointing" in described.options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bf16_full_eval", True),
        ("fp16_full_eval", True),
        ("include_for_metrics", ["loss"]),
        ("include_num_input_tokens_seen", "all"),
        ("label_smoothing_factor", 0.1),
        ("neftune_noise_alpha", 5.0),
        ("use_liger_kernel", True),
    ],
)
def test_an_option_that_is_not_listed_is_refused_with_the_reason(name, value, tmp_path):
    assert name in train_help.HIDDEN
    with pytest.raises(ValueError, match=f"`{name}=.*` cannot act on a diffusion model: "):
        DiffusionSDPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_options_that_are_not_listed_exist(described):
    assert train_help.HIDDEN - set(described.options) <= {"local_rank", "liger_kernel_config", "use_cache"}
    assert not train_help.HIDDEN & set(described.package_options)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["train", "--help"], 0),
        (["train", "--betta", "5"], 2),
        (["train", "--config", "typo.yaml"], 2),
        (["train", "--safeguard", "paramter", "--model_name_or_path", "m", "--dataset_name", "d"], 2),
        (["train", "--use_cpu"], 2),
        (["sweep-scale", "--help"], 0),
        (["sweep-scale", "--scale", "1"], 2),
        (["demo", "--pairs", "onpolicy"], 2),
    ],
)
def test_help_and_mistakes_are_told_before_torch_is_imported(words, code, tmp_path):
    if options.read_table() is None and words[0] == "train":
        pytest.skip("the options are described for other versions, so the parser is made")
    (tmp_path / "typo.yaml").write_text("safegard: none\n")
    program = (
        "import sys\nfrom trl_diffusion_sdpo.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as exit_:\n    code = exit_.code or 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'trl', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-500:]


def test_under_other_versions_an_unknown_name_is_told_from_their_sources(described, tmp_path, monkeypatch):
    names = options.names_in_sources()
    if options.read_table() is not None:
        assert set(described.options) <= names
    assert names is None or "betta" not in names
    monkeypatch.setattr(options, "installed_versions", dict)
    assert options.read_table() is None
    file = tmp_path / "run.yaml"
    file.write_text("safegard: none\n")
    for words, said in ((["--betta", "5"], "Did you mean `--beta`?"), (["--config", str(file)], "mean `safeguard`")):
        if names is not None:
            with pytest.raises(ValueError, match=re.escape(said)):
                given.refuse_unknown_names(words)
    given.refuse_unknown_names(["--beta", "5", "--no_random_flip", "--learning-rate=-1"])


def test_without_arguments_there_is_help(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_an_unknown_command_is_an_error_that_names_the_known_ones(capsys):
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "'trian'" in error and "Did you mean `train`?" in error and "Traceback" not in error


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
        (["--model_name_or_path", "m", "--dataset_name", "d", "--safeguard_mu", "2"], "must be in [0, 1], got 2.0"),
        (["--betta", "5"], "`--betta` is no option of this command. Did you mean `--beta`?"),
        (
            ["--train_text_encoder"],
            "`--train_text_encoder` is no option of this command. Text encoders are not trained.",
        ),
        (["--text-encoder-lr=1e-5"], "Text encoders are not trained."),
        (
            ["--lora_type", "lokr"],
            "`--lora_type` is no option of this command. Of adapters there is LoRA (`use_peft`)",
        ),
        (["--network_module", "lycoris.kohya"], "Of adapters there is LoRA"),
        (["--safeguard_m", "0.5"], "`--safeguard_m` is no option"),
        (["--no-random-flop"], "Did you mean `--no_random_flip`"),
        (
            ["--safeguard", "paramter"],
            "must be one of none, output, parameter, got 'paramter'. Did you mean `parameter`?",
        ),
        (["--safeguard", "off"], "must be one of none, output, parameter, got 'off'."),
        (["--beta", "five"], "--beta: must be a number, got 'five'"),
        (["--max_steps", "1.5"], "must be a whole number, got '1.5'"),
        (["--random_flip", "maybe"], "must be true or false, got 'maybe'"),
        (["--beta", "5", "stray"], "These words belong to no option: stray"),
        (["--config"], "`--config` takes one YAML file"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--resume_from_checkpoint"], "--resume_from_checkpoint"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_exit_code_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--use_cpu", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_yaml_file_that_is_none_is_told(tmp_path, capsys):
    broken = tmp_path / "broken.yaml"
    broken.write_text("beta: [1, 2\n")
    assert main(["train", "--config", str(broken)]) == 2
    assert "must be YAML" in capsys.readouterr().err
    broken.write_text("lycoris_config: config.json\n")
    assert main(["train", "--config", str(broken)]) == 2
    assert "`lycoris_config` is none. Of adapters there is LoRA" in capsys.readouterr().err


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


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(surface(), indent=2) + "\n", encoding="utf-8")
    options.write_table(train.describe_options())
