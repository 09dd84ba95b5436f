"""Training with `--accelerate_config`: where each argument goes, how accelerate and transformers read the
configurations, errors before anything starts, and one launch of two processes."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, patch_environment
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from transformers.integrations import unset_hf_deepspeed_config
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from trl_diffusion_sdpo.cli import launch, train
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.models.denoiser_wrapper import DenoiserWrapper

ROOT = Path(__file__).parents[2]
NAMES = ["fsdp2", "multi_gpu", "single_gpu", "zero1", "zero2", "zero3"]
SETTINGS = {name: yaml.safe_load(launch.config_path(name).read_text(encoding="utf-8")) for name in NAMES}
TWO_CPUS = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",  # accelerate's word for processes of torch's launcher
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "use_cpu": True,
}
TRAIN = [sys.executable, "-m", "trl_diffusion_sdpo.cli.main", "train"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
ONE_CPU = {**TWO_CPUS, "distributed_type": "NO", "num_processes": 1}


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
    for name in (launch.LAUNCHED_VARIABLE, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def two_cpus(tmp_path) -> str:
    """An accelerate configuration for two processes on the CPU."""
    return write_yaml(tmp_path / "two_cpus.yaml", TWO_CPUS)


def write_yaml(path: Path, settings: dict) -> str:
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def parser():
    return train.make_parser()


@pytest.fixture
def launched(monkeypatch):
    """`launched(arguments)`: the words that `accelerate launch` would get; nothing is started."""

    def run(*arguments: str) -> list[str]:
        caught: list[list[str]] = []
        monkeypatch.setattr(launch, "start", lambda words, command, given: caught.append(words) or 0)
        assert main(["train", "--model_name_or_path", "m", "--dataset_name", "d", *arguments]) == 0
        return caught[0]

    return run


def test_the_file_of_config_may_name_the_configuration_and_the_command_line_wins(launched, tmp_path):
    settings = {"accelerate_config": "zero2", "num_processes": 4, "enable_cpu_affinity": True, "beta": 5.0}
    settings["env"] = {"NAME": "value"}  # of the command, as TRL has it, though accelerate has an option of that name
    file = write_yaml(tmp_path / "run.yaml", settings)
    words = launched("--config", file, "--num_processes", "2", "--accelerate_config=multi_gpu")
    parsed = launch_command_parser().parse_args([*words, "-m", "module"])
    assert parsed.config_file == str(launch.config_path("multi_gpu"))
    assert (parsed.num_processes, parsed.enable_cpu_affinity) == (2, True)


def test_a_launched_process_launches_nothing_and_ignores_the_launchers_options(tmp_path, monkeypatch):
    file = write_yaml(tmp_path / "run.yaml", {"accelerate_config": "zero2", "num_processes": 4, "beta": 7.0})
    monkeypatch.setenv(launch.LAUNCHED_VARIABLE, "1")
    caught = []
    arguments = ["--config", file, "--use_cpu", "--output_dir", str(tmp_path / "run"), "--num_machines", "1"]
    train.run(arguments, "train", act=lambda *parsed: caught.append(parsed) or 0)
    assert caught[0][1].beta == 7.0


def test_by_default_there_is_one_process_per_accelerator_of_each_machine(launched, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    assert launched("--accelerate_config", "multi_gpu")[2:] == ["--num_processes", "8"]
    several = launched("--accelerate_config", "multi_gpu", "--num_machines", "4")
    assert several[2:] == ["--num_processes", "32", "--num_machines", "4"]
    assert launched("--accelerate_config", "single_gpu")[2:] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--accelerate_config", "zero9"], "fsdp2, multi_gpu, single_gpu, zero1, zero2, zero3, or the path"),
        (["--accelerate_config", "TWO", "--num_processes", "2", "stray"], "stray"),
        (["--accelerate_config", "TWO", "--config", "UNKNOWN"], "Did you mean `--beta`?"),
        (["--accelerate_config", "TWO", "--num_proceses", "2"], "Did you mean `--num_processes`?"),
        (["--accelerate_config", "UNREADABLE"], "must be valid YAML"),
        (["--num_processes", "2"], "need `--accelerate_config`"),
    ],
)
def test_a_mistake_is_an_error_of_one_line_before_anything_starts(arguments, said, two_cpus, tmp_path, capsys):
    unreadable = tmp_path / "unreadable.yaml"
    unreadable.write_text("distributed_type: [1, 2\n")
    unknown = write_yaml(tmp_path / "unknown.yaml", {"betta": 5})
    places = {"TWO": two_cpus, "UNKNOWN": unknown, "UNREADABLE": str(unreadable)}
    assert main(["train", "--use_cpu", *[places.get(word, word) for word in arguments]]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and error.count("error: ") == 1


def test_a_process_of_another_launcher_does_not_launch_again(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", "--accelerate_config", "multi_gpu"]) == 2
    assert "torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_accepts_a_configuration_as_transformers_completes_it(stage, make_args, sd_pipeline):
    """Through the environment that `accelerate launch` sets, into the dictionary that DeepSpeed's engine gets."""
    given = SETTINGS[f"zero{stage}"]["deepspeed_config"]
    names = {
        "zero_stage": "DEEPSPEED_ZERO_STAGE",
        "zero3_init_flag": "DEEPSPEED_ZERO3_INIT",
        "zero3_save_16bit_model": "DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
        "offload_optimizer_device": "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "offload_param_device": "DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    }
    assert set(given) == {*names, "deepspeed_multinode_launcher"} - (
        {"zero3_save_16bit_model"} if stage < 3 else set()
    )
    environment = {f"ACCELERATE_{names[key]}": str(value).lower() for key, value in given.items() if key in names}
    args = make_args(gradient_accumulation_steps=8, max_grad_norm=0.5, bf16=True)
    with patch_environment(**environment):
        plugin = DeepSpeedPlugin()
        plugin.set_mixed_precision("bf16")
    config = HfTrainerDeepSpeedConfig(plugin.deepspeed_config)
    config.trainer_config_process(args)
    config.trainer_config_finalize(args, DenoiserWrapper(sd_pipeline.unet), num_training_steps=2)
    unset_hf_deepspeed_config()
    assert "auto" not in str(config.config)
    assert config.config["gradient_accumulation_steps"] == 8
    assert config.config["gradient_clipping"] == 0.5
    assert config.config["train_micro_batch_size_per_gpu"] == 4
    assert config.config["bf16"] == {"enabled": True}
    assert config.config["zero_optimization"]["stage"] == stage
    assert config.config["zero_optimization"]["offload_optimizer"]["device"] == "none"
    assert plugin.zero3_init_flag is False


def test_the_fsdp_plugin_is_of_version_2_and_does_not_shard_text_encoders():
    given = SETTINGS["fsdp2"]["fsdp_config"]
    with patch_environment(**{key: str(value) for key, value in given.items()}):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False  # else transformers fills weights on the first process only
    assert plugin.activation_checkpointing is False
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.transformer_cls_names_to_wrap is None, "left to the model"
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"


def run_cli(arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    command = [*TRAIN, *arguments]
    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, cwd=folder, timeout=300, check=False
    )


def tiny_run(sd_folder: str, pairs: Path, output: Path) -> dict:
    return {
        **{"model_name_or_path": sd_folder, "dataset_name": str(pairs), "output_dir": str(output)},
        **{"use_cpu": True, "resolution": 16, "max_steps": 2, "per_device_train_batch_size": 2},
        **{"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True},
    }


def test_two_processes_train_and_write_one_artifact(sd_folder, make_pairs, two_cpus, tmp_path):
    """The file of `--config` names the configuration, so the test would notice a process that launches again."""
    make_pairs(8).save_to_disk(tmp_path / "pairs")
    settings = {**tiny_run(sd_folder, tmp_path / "pairs", tmp_path / "run"), "accelerate_config": two_cpus}
    file = write_yaml(tmp_path / "run.yaml", {**settings, "main_process_port": 0})
    done = run_cli(["--config", file, "--learning_rate", "1e-3"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The tuned weights are in") == 1, "said once: the processes know of one another"
    tuned = load_file(tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors")
    before = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet").state_dict()
    assert set(tuned) == set(before)
    assert any((tuned[name] != before[name]).any() for name in tuned)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("settings", [TWO_CPUS, ONE_CPU], ids=["two processes", "one process"])
def test_ctrl_c_ends_all_processes_with_a_checkpoint(settings, sd_folder, make_pairs, tmp_path):
    """Sent to the process group after the first logged step, as by a terminal."""
    make_pairs(8).save_to_disk(tmp_path / "pairs")
    config = write_yaml(tmp_path / "cpus.yaml", {**settings, "main_process_port": 0})
    endless = {**tiny_run(sd_folder, tmp_path / "pairs", tmp_path / "run"), "max_steps": 100000}
    command = [*TRAIN, "--accelerate_config", config, "--config", write_yaml(tmp_path / "run.yaml", endless)]
    with subprocess.Popen(
        command,
        **{"env": ENVIRONMENT, "cwd": tmp_path, "text": True, "start_new_session": True},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        watchdog = threading.Timer(180, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        lines = []
        for line in process.stdout:
            if "rewards/margins" in line and not any("rewards/margins" in earlier for earlier in lines):
                os.killpg(process.pid, signal.SIGINT)
            lines.append(line)
        watchdog.cancel()
    text = "".join(lines)
    assert process.returncode == 130, text[-2000:]
    assert text.count("--resume_from_checkpoint true") == 1 and "Traceback" not in text
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "trainer_state.json").is_file()
