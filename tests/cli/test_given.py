"""The command line and YAML files as values of options: booleans, text, numbers, lists, errors and warnings."""

import pytest

from trl_diffusion_sdpo.cli import given, launch, options, train
from trl_diffusion_sdpo.cli.main import main


@pytest.fixture(scope="module")
def table() -> options.OptionTable:
    return options.read_table() or train.describe_options()


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
    for name in (launch.LAUNCHED_VARIABLE, "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def read_yaml(table, tmp_path):
    """`read_yaml(text)`: the settings of a file with that text."""

    def read(text: str) -> dict:
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return given.read_given(["--config", str(file)], table).settings

    return read


def read_words(table, *words: str) -> dict:
    return given.read_given(list(words), table).typed


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("safeguard: none", "none"),
        ("safeguard: off", "none"),
        ("safeguard: no", "none"),
        ("timestep_weighting: off", "none"),
        ("eval_strategy: no", "no"),
        ("save_strategy: off", "no"),
        ("report_to: no", "none"),
        ("random_flip: off", False),
        ("random_flip: on", True),
        ("random_flip: no", False),
        ("random_flip: 'on'", True),
        ("random_flip: 'No'", False),
        ("random_flip: 0", False),
        ("bf16: yes", True),
        ("resume_from_checkpoint: true", "true"),
        ("resume_from_checkpoint: no", "false"),
        ("learning_rate: 1e-5", 1e-5),  # text to YAML 1.1
        ("beta: 2000", 2000),
        ("beta: null", None),
        ("beta: none", None),
        ("dataset_config: 2024", "2024"),
        ("timesteps: [999, 749.5]", [999, 749.5]),
        ("timesteps: 999", [999]),
        ("sample_prompts: a dog", ["a dog"]),
        ("loss_type: sigmoid", ["sigmoid"]),
        ("loss_type: [sigmoid, sft]", ["sigmoid", "sft"]),
        ("loss_weights: [1, 0.5]", [1, 0.5]),
        ("report_to: [tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("model_init_kwargs: {variant: fp16}", {"variant": "fp16"}),
        ('model_init_kwargs: \'{"variant": "fp16"}\'', '{"variant": "fp16"}'),
    ],
)
def test_a_setting_of_a_file_is_converted_to_the_type_of_its_option(read_yaml, text, value):
    (read,) = read_yaml(text).values()
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("safeguard: on", "`safeguard` must be one of none, output, parameter, got true"),
        ("loss_type: off", "`loss_type` must be one of sigmoid, "),
        ("loss_type: sigmoit", "got 'sigmoit'. Did you mean `sigmoid`?"),
        ("loss_type: [sigmoid, sftt]", "`loss_type` must be one of sigmoid, "),
        ("run_name: on", "`run_name` must be text, got true: YAML reads on, off, yes and no as booleans."),
        ("max_steps: off", "`max_steps` must be a whole number, got false"),
        ("max_steps: 2.5", "`max_steps` must be a whole number, got 2.5"),
        ("max_steps: many", "`max_steps` must be a whole number, got 'many'"),
        ("max_steps:", "`max_steps` must be a whole number, got nothing"),
        ("learning_rate: fast", "`learning_rate` must be a number, got 'fast'"),
        ("random_flip: maybe", "`random_flip` must be true or false, got 'maybe'"),
        ("random_flip: 2", "`random_flip` must be true or false, got '2'"),
        ("beta: [1, 2]", "`beta` must be a number, got [1, 2]"),
        ("model_revision: 1.10", "`model_revision` must be text, got 1.1. Write it in quotes."),
        ("timesteps: [999, off]", "`timesteps` must be"),
        ("betta: 5", "`betta` is none. Did you mean `beta`?"),
        ("learning-rate: 5", "Did you mean `learning_rate`?"),
        ("beta: 1\nbeta: 2", "beta is given twice"),
        ("model_init_kwargs: {variant: a, variant: b}", "variant is given twice"),
        ("num_processes: 2", "need `--accelerate_config`; got `--num_processes`"),
        ("env: off", "`env` of the file must map names to values"),
    ],
)
def test_a_setting_that_its_option_does_not_take_is_refused_with_the_rule(read_yaml, text, message):
    with pytest.raises(ValueError) as caught:
        read_yaml(text)
    assert message in str(caught.value)


def test_the_environment_of_a_file_is_set_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRL_DIFFUSION_SDPO_TEST", raising=False)
    file = tmp_path / "run.yaml"
    file.write_text("env: {TRL_DIFFUSION_SDPO_TEST: 7}\n")
    assert main(["train", "--config", str(file)]) == 2  # no model is named
    assert given.os.environ.pop("TRL_DIFFUSION_SDPO_TEST") == "7"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--lora_r", "16"], "`lora_r`"),  # TRL's own default: given all the same
        (["--lora_alpha=8", "--lora_target_modules", "to_q", "to_v"], "`lora_alpha`, `lora_target_modules`"),
        (["--load_in_4bit"], "`load_in_4bit`"),
        (["--load_in_8bit", "true", "--use_peft", "false"], "`load_in_8bit`"),
        (["--bnb_4bit_quant_type", "fp4"], "`bnb_4bit_quant_type`"),
        (["--use_dora", "--use_rslora"], "`use_dora`, `use_rslora`"),
        (["--use_bnb_nested_quant"], "`use_bnb_nested_quant`"),
    ],
)
def test_options_of_an_adapter_are_refused_where_all_weights_are_trained(table, words, named):
    with pytest.raises(ValueError, match=f"Without `use_peft` all weights are trained.* and {named} would do nothing"):
        read_words(table, *words)
    assert read_words(table, *(word for word in words if "peft" not in word and word != "false"), "--use_peft")


def test_options_of_an_adapter_in_a_file_are_refused_too(read_yaml):
    with pytest.raises(ValueError, match="`lora_r` would do nothing"):
        read_yaml("lora_r: 8\nload_in_4bit: false")
    assert read_yaml("lora_r: 8\nuse_peft: yes") == {"lora_r": 8, "use_peft": True}
    assert read_yaml("load_in_4bit: no") == {"load_in_4bit": False}


def test_every_option_of_trls_model_arguments_that_needs_an_adapter_is_known():
    """The others apply to all weights too, or have no effect, with a warning."""
    from dataclasses import fields

    from trl import ModelConfig

    others = {field.name for field in fields(ModelConfig) if not field.name.startswith(given._ADAPTER_PREFIXES)}
    assert others <= {"model_name_or_path", "model_revision", "dtype", "attn_implementation", "use_peft"} | {
        "trust_remote_code"  # of older versions
    }


def test_the_last_of_an_option_given_twice_counts_with_a_warning(table, caplog):
    assert read_words(table, "--beta", "5", "--max_steps", "3", "--beta=6")["beta"] == 6.0
    (record,) = caplog.records
    assert record.message == "`--beta` is given 2 times; the last one, 6.0, counts."


def test_both_flags_of_a_boolean_are_one_option_given_twice(table, caplog):
    assert read_words(table, "--random_flip", "--no_random_flip")["random_flip"] is False
    assert "`--random_flip` is given 2 times; the last one, False" in caplog.text


def test_a_process_that_the_launcher_started_repeats_no_warning(table, caplog, monkeypatch):
    monkeypatch.setenv(launch.LAUNCHED_VARIABLE, "")
    read_words(table, "--beta", "5", "--beta", "6")
    monkeypatch.delenv(launch.LAUNCHED_VARIABLE)
    monkeypatch.setenv("RANK", "1")
    read_words(table, "--beta", "5", "--beta", "6")
    assert not caplog.records


@pytest.mark.parametrize("words", [["--test_size", "0.1"], ["--eval_steps", "5"], ["--eval_dataset_name", "other"]])
def test_options_of_an_evaluation_without_one_are_a_warning(table, caplog, words):
    read_words(table, *words, "--eval_strategy", "steps")
    assert not caplog.records
    read_words(table, *words)
    assert f"`{words[0][2:]}={words[1]}" in caplog.text and "without `eval_strategy`" in caplog.text


def test_a_file_of_arguments_beside_the_program_is_not_read(tmp_path, monkeypatch):
    """transformers' parser appends the words of `PROGRAM.args`, if there is such a file."""
    program = tmp_path / "program"
    program.with_suffix(".args").write_text("--beta 7")
    monkeypatch.setattr("sys.argv", [str(program)])
    _, args, _ = train.parse(["--use_cpu", "--output_dir", str(tmp_path), "--beta", "5"])
    assert args.beta == 5.0
    _, args, _ = train.parse(["--use_cpu", "--output_dir", str(tmp_path)])
    assert args.beta is None


def test_settings_of_the_file_and_the_command_line_are_in_the_arguments(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"safeguard: off\nrandom_flip: no\neval_strategy: no\nuse_cpu: on\nbeta: 2e3\noutput_dir: {tmp_path}\n"
        "use_peft: true\nlora_target_modules: [to_q, to_k]\ntest_size: 0.25\n"
    )
    pairs, args, model = train.parse(["--config", str(file), "--max_steps", "7"])
    assert (args.safeguard, args.random_flip, args.eval_strategy, args.use_cpu) == ("none", False, "no", True)
    assert (args.beta, args.max_steps, pairs.test_size) == (2000.0, 7, 0.25)
    assert (model.use_peft, model.lora_target_modules, model.lora_dropout) == (True, ["to_q", "to_k"], 0.0)


def test_a_sum_of_losses_is_given_by_a_file_or_on_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"loss_type: [sigmoid, sft]\nloss_weights: [1, 0.1]\nuse_cpu: on\noutput_dir: {tmp_path}\n")
    plain = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"]
    for words, loss_type, weights in (
        (["--config", str(file)], ["sigmoid", "sft"], [1.0, 0.1]),
        (["--config", str(file), "--loss_type", "dmpo", "hinge"], ["dmpo", "hinge"], [1.0, 0.1]),
        ([*plain, "--loss_type", "sigmoid", "sft", "--loss_weights", "2", "0.5"], ["sigmoid", "sft"], [2.0, 0.5]),
        ([*plain, "--loss_type", "ipo"], "ipo", None),
        (plain, "sigmoid", None),
    ):
        _, args, _ = train.parse(words)
        assert (args.loss_type, args.loss_weights) == (loss_type, weights)
    with pytest.raises(ValueError, match="must be one of sigmoid, .*, got 'sftt'. Did you mean `sft`"):
        train.parse([*plain, "--loss_type", "sigmoid", "sftt"])


def test_a_file_with_a_new_name_is_read_where_transformers_has_the_former_one(table, tmp_path):
    """transformers before 5.23 has `gradient_checkpointing` only; the example configurations have the new name."""
    file = tmp_path / "run.yaml"
    file.write_text("activation_checkpointing: true\n", encoding="utf-8")
    new, former = "activation_checkpointing", "gradient_checkpointing"
    one = table.options.get(new) or table.options[former]
    for name in (new, former):
        others = {key: option for key, option in table.options.items() if key not in (new, former)}
        known = table._replace(options={**others, name: one})
        assert given.read_given(["--config", str(file)], known).settings == {name: True}
