"""The command line and YAML files as values of options."""

import os

import pytest

from trl_diffusion_sdpo.cli import launch, options, train, train_parser
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.models.adapters import lora_config


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
    for name in (launch.LAUNCHED_VARIABLE, "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def read_yaml(tmp_path):
    """`read_yaml(text)`: the values of all options with a file of that text."""

    def read(text: str) -> dict:
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        options = train_parser.TrainOptions.read(["--config", str(file)], None)
        options.refuse_others()
        return options.values

    return read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("eval_strategy: no", "no"),
        ("safeguard: Off", "none"),
        ("report_to: no", "none"),  # the default
        ("report_to: []", "none"),
        ("fsdp: []", None),
        ("fsdp: no", None),
        ("random_flip: 0", False),
        ("resume_from_checkpoint: true", "true"),
        ("learning_rate: 1e-5", 1e-5),  # text to YAML 1.1
        ("beta: null", None),
        ("dataset_config: 2024", "2024"),
        ("model_revision: 1.10", "1.10"),
        ("random_flip: no", False),
        ("timesteps: [999, 749.5]", [999, 749.5]),
        ("timesteps: 999", [999]),
        ("sample_prompts: ['a dog', 'b = c']", ["a dog", "b = c"]),
        ("model_init_kwargs: {variant: fp16}", '{"variant": "fp16"}'),
        ("random_crop: true", True),
    ],
)
def test_a_setting_of_a_file_is_converted_to_the_type_of_its_option(read_yaml, text, value):
    assert read_yaml(text)[text.partition(":")[0]] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("safeguard: on", "invalid choice: 'on' (choose from"),
        ("max_steps: 2.5", "invalid int value: '2.5'"),
        ("random_flip: 2", "got 2 but expected"),
        ("beta: [1, 2]", "got '2'"),
        ("betta: 5", "`--beta`"),
        ("num_processes: 2", "need `--accelerate_config`, got `--num_processes=2`"),
        ("seed: 1\nsteps: [1\nbeta: 2\n", "line 3"),
        ("- beta", "must map names to values"),
        ("a: &many [1, 2]\nb: [*many, *many]", "`*many`"),
        (f"beta: {'9' * 6000}", "run.yaml"),
        (f"loss_kwargs: {'[' * 5000}", "run.yaml"),
        ("\0", "run.yaml"),
    ],
)
def test_a_setting_that_its_option_does_not_take_is_refused_with_the_rule(read_yaml, text, message):
    with pytest.raises(ValueError) as caught:
        read_yaml(text)
    assert message in str(caught.value)


def test_words_that_argparse_takes_for_options_or_half_of_one_are_read(tmp_path):
    words = ["--use_cpu", "--output_dir", str(tmp_path), "--bf16", "--safeguard", "off"]
    _, args, _ = train.parse(words)
    assert (args.bf16, args.safeguard) == (True, "none")
    with pytest.raises(ValueError, match="-0.0001"):
        train.parse([*words, "--weight_decay", "-1e-4"])


def test_the_environment_of_a_file_is_set_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delenv("TRL_DIFFUSION_SDPO_TEST", raising=False)
    file = tmp_path / "run.yaml"
    file.write_text("env: {TRL_DIFFUSION_SDPO_TEST: 7}\n")
    assert main(["train", "--config", str(file)]) == 2  # no model is named
    assert os.environ.pop("TRL_DIFFUSION_SDPO_TEST") == "7"


def test_a_file_of_arguments_beside_the_program_is_not_read(tmp_path, monkeypatch):
    """transformers' parser appends the words of `PROGRAM.args`, if there is such a file."""
    program = tmp_path / "program"
    program.with_suffix(".args").write_text("--beta 7")
    monkeypatch.setattr("sys.argv", [str(program)])
    _, args, _ = train.parse(["--use_cpu", "--output_dir", str(tmp_path)])
    assert args.beta is None


def test_settings_of_the_file_and_the_command_line_are_in_the_arguments(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"safeguard: none\nrandom_flip: no\neval_strategy: no\nuse_cpu: yes\nbeta: 2e3\noutput_dir: {tmp_path}\n"
        "use_peft: true\nlora_target_modules: [to_q, to_k]\ntest_size: 0.25\nmodel_init_kwargs: {variant: fp16}\n"
        "max_steps: 3\nloss_type: [sigmoid, sft]\nloss_weights: [1, 0.1]\n"
    )
    pairs, args, model = train.parse(["--config", str(file), "--max_steps", "7", "--loss_type", "dmpo", "hinge"])
    assert (args.safeguard, args.random_flip, args.eval_strategy, args.use_cpu) == ("none", False, "no", True)
    assert (args.beta, args.max_steps, pairs.test_size) == (2000.0, 7, 0.25)
    assert args.model_init_kwargs == {"variant": "fp16"}
    assert (args.loss_type, args.loss_weights) == (["dmpo", "hinge"], [1.0, 0.1])
    assert (model.use_peft, model.lora_target_modules, model.lora_dropout) == (True, ["to_q", "to_k"], 0.0)


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_a_file_with_a_new_name_is_read_where_transformers_has_the_former_one(name):
    """transformers before 5.23 has `gradient_checkpointing` only; the example configurations have the new name."""
    parser = options.OneLineParser()
    parser.add_argument(f"--{name}", type=bool)
    assert parser.words_of({"activation_checkpointing": "true"}) == ([f"--{name}=true"], [])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("beta: 1\nbeta: 2", "beta"),
        ("loss_kwargs:\n  alpha: 1\n  alpha: 2", "alpha"),
        ("datasets:\n  - {path: a}\n  - {path: b, path: c}", "path"),
    ],
)
def test_a_name_that_a_file_sets_twice_is_refused(read_yaml, text, name):
    """YAML takes the last value without a word."""
    with pytest.raises(ValueError, match=f"`{name}`"):
        read_yaml(text)


@pytest.mark.parametrize("option", ["--config", "--accelerate_config"])
def test_a_file_that_is_named_twice_is_refused(option, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("beta: 1")
    with pytest.raises(ValueError, match=f"`{option}`"):
        train_parser.read_given([option, str(file), f"{option}={file}"])


@pytest.mark.parametrize("names", [["to_q"], ["to_out.0"], ["to_q", "to_k"]])
def test_one_name_of_a_loras_layers_is_a_name_like_several(names):
    from trl import ModelConfig

    config = lora_config(ModelConfig(use_peft=True, lora_target_modules=list(names)))
    assert config.target_modules == set(names)
    assert lora_config(ModelConfig(use_peft=True, lora_target_modules=["all-linear"])).target_modules == "all-linear"
