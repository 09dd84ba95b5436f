"""The commands, their help, and what is said of a mistake."""

import dataclasses
import inspect
import re
import warnings

import pytest
from trl import ModelConfig

from trl_diffusion_sdpo import DiffusionSDPOConfig
from trl_diffusion_sdpo.cli import launch, train, train_parser
from trl_diffusion_sdpo.cli.main import COMMANDS, main
from trl_diffusion_sdpo.utils.hints import OTHER_TOOLS
from trl_diffusion_sdpo.utils.import_utils import hide_idle_notes


@pytest.fixture(scope="module")
def parser():
    return train.make_parser()


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
    monkeypatch.delenv(launch.LAUNCHED_VARIABLE, raising=False)


def test_every_own_setting_has_a_help_text(parser):
    helps = {action.dest: action.help for action in parser._actions}
    for holder in inspect.getmro(DiffusionSDPOConfig):
        if dataclasses.is_dataclass(holder) and holder.__module__.startswith("trl_diffusion_sdpo"):
            assert all(helps[name] for name in inspect.get_annotations(holder))


def test_the_help_has_this_packages_options_before_those_of_transformers(parser):
    text = parser.format_help()
    at = [text.index(f"\n{title}:") for title in (train_parser.MODEL, train_parser.OWN, train_parser.INHERITED)]
    assert at == sorted(at)
    assert at[1] < text.index("\n  --safeguard_mu") < at[2] < text.index("\n  --per_device_train_batch_size")
    listed = re.findall(r"(?m)^  --(\w+)", text)
    assert len(listed) == len(set(listed)) and not train_parser.HIDDEN & set(listed)


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
def test_an_option_of_language_models_is_refused_with_the_reason(name, value, tmp_path):
    assert name in train_parser.HIDDEN
    with pytest.raises(ValueError, match=f"`{name}="):
        DiffusionSDPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_options_of_other_trainers_lead_to_ours(parser):
    names = set(parser.names())
    assert set(OTHER_TOOLS.values()) <= names and not set(OTHER_TOOLS) & names


def test_every_option_of_trls_model_arguments_that_needs_an_adapter_is_known():
    """The others apply to all weights too, or have no effect, with a warning."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    others = {name for name in names if not name.startswith(train_parser.ADAPTER_PREFIXES)}
    assert others <= {"model_name_or_path", "model_revision", "dtype", "attn_implementation", "use_peft"} | {
        "trust_remote_code"  # of older versions
    }


def test_without_arguments_there_is_help(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_an_unknown_command_is_an_error_that_names_the_known_ones(capsys):
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "'trian'" in error and "`train`" in error and "Traceback" not in error


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
        (["--betta", "5"], "Did you mean `--beta`?"),
        (["--lr", "5"], "`--learning_rate`"),
        (["--rank=4"], "`--lora_r`"),
        (["--train_text_encoder"], "Text encoders are not trained."),
        (["--lora_type", "lokr"], "LoRA (`use_peft`)"),
        (["--safeguard_m", "0.5"], "`--safeguard_m` is no option"),
        (["--no-random-flop"], "`--no_random_flip`"),
        (["--safeguard", "paramter"], "got 'paramter'. Did you mean `parameter`?"),
        (["--loss_type", "exo_pair"], "`dmpo`, and its `label_smoothing` is `dmpo_alpha`"),
        (["--beta", "five"], "--beta: must be a number, got 'five'"),
        (["--max_steps", "1.5"], "must be a whole number, got '1.5'"),
        (["--random_flip", "maybe"], "must be true or false, got 'maybe'"),
        (["--beta", "5", "stray"], "stray"),
        (["--config"], "--config: expected one argument"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--resume_from_checkpoint"], "--resume_from_checkpoint"),
        (["--lora_r", "16"], "`lora_r`"),  # TRL's own default: given all the same
        (["--lora_alpha=8", "--lora_target_modules", "to_q", "to_v"], "`lora_alpha`, `lora_target_modules`"),
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


def test_the_wait_for_the_libraries_is_announced_and_only_once_for_all_processes(capsys, monkeypatch):
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["train"]) == 2
        assert capsys.readouterr().err.count("loading the libraries") == lines


def test_what_libraries_warn_of_on_purpose_is_not_shown():
    """A second stage adds an adapter to a LoRA, and a CPU pins no memory."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hide_idle_notes()
        warnings.warn(
            "Already found a `peft_config` attribute in the model. This will lead to having multiple adapters"
        )
        warnings.warn("'pin_memory' argument is set as true but no accelerator is found, then device pinned memory")
        warnings.warn("another")
    assert [str(one.message) for one in shown] == ["another"]


@pytest.mark.parametrize(
    ("given", "meant"), [(None, None), ("true", True), ("True", True), (True, True), ("false", None), (False, None)]
)
def test_resuming_is_asked_for_in_words(given, meant):
    assert train.resume_point(given) is meant


def test_resuming_from_a_folder_needs_the_folder(tmp_path):
    assert train.resume_point(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        train.resume_point(str(tmp_path / "checkpoint-7"))
