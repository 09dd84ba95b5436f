"""How an error looks: a sentence for one of ours, a traceback for a library's."""

import json
import os
import pickle
import pkgutil
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import trl_diffusion_sdpo
from trl_diffusion_sdpo import UserError
from trl_diffusion_sdpo.cli.errors import sentence as shown
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.data import PairOptions, PairTransform, prepare_dataset
from trl_diffusion_sdpo.models.pipelines import load_pipeline
from trl_diffusion_sdpo.saving.publishing import PublishingError
from trl_diffusion_sdpo.utils.disk import DiskFullError
from trl_diffusion_sdpo.utils.errors import NotFiniteError
from trl_diffusion_sdpo.utils.import_utils import MissingExtraError

UNET = "unet/diffusion_pytorch_model.safetensors"
TINY = {
    "use_cpu": True,
    "max_steps": 1,
    "resolution": 16,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
FOREIGN = ("Invalid beta parameter at index 0: 1.5", {"adam_beta1": 1.5})  # torch's optimizer, once training begins


@pytest.fixture(scope="module")
def pairs(make_pairs, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pairs")
    make_pairs(4).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def broken(sd_folder, tmp_path) -> Path:
    """A copy of the tiny pipeline, to be damaged."""
    return Path(shutil.copytree(sd_folder, tmp_path / "model"))


def words(model, data, folder, **settings) -> list[str]:
    given = {"model_name_or_path": model, "dataset_name": data, "output_dir": folder, **TINY, **settings}
    return ["train", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]


def sentence(capsys, *arguments, **settings) -> str:
    """What `train` says of a user's error, in one line."""
    capsys.readouterr()
    assert main(words(*arguments, **settings)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "train: error: " in line]
    return line.partition("error: ")[2]


def subclasses(kind: type) -> set[type]:
    return {kind, *(below for child in kind.__subclasses__() for below in subclasses(child))}


def test_every_error_that_the_package_defines_for_users_can_be_caught_as_a_user_error():
    """Of all exceptions of the package. `_LeftOutError` leaves out an image of a folder, and is always caught."""
    for module in pkgutil.walk_packages(trl_diffusion_sdpo.__path__, f"{trl_diffusion_sdpo.__name__}."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    ours = {kind for kind in subclasses(Exception) if kind.__module__.startswith(trl_diffusion_sdpo.__name__)}
    assert {kind.__name__ for kind in ours if not issubclass(kind, UserError)} == {"_LeftOutError"}
    assert UserError in ours and len(ours) > 8


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (DiskFullError, OSError),
        (MissingExtraError, ImportError),
        (NotFiniteError, FloatingPointError),
        (PublishingError, OSError),
        (UserError, ValueError),
    ],
)
def test_an_error_for_users_is_caught_by_the_base_class_that_a_library_would_raise(kind, base):
    with pytest.raises(base, match="what to do") as caught:
        raise kind("what to do")
    assert isinstance(caught.value, UserError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == "what to do", "as workers send it"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_that_a_worker_finds_is_one_line(tmp_path, streaming):
    row = {"prompt": "x", "chosen": str(tmp_path / "junk.png"), "rejected": str(tmp_path / "junk.png")}
    Path(row["chosen"]).write_bytes(b"no image")
    rows = Dataset.from_list([row])
    reading = {"transform": PairTransform(16), "verify_images": "none"}
    pairs = prepare_dataset(rows.to_iterable_dataset() if streaming else rows, PairOptions(**reading))
    with pytest.raises(ValueError) as alone:
        next(iter(pairs))
    with pytest.raises(ValueError, match="Caught .* in DataLoader worker") as caught:
        next(iter(DataLoader(pairs, batch_size=None, num_workers=1)))
    assert isinstance(caught.value, UserError)
    assert shown(caught.value) == str(alone.value) == shown(alone.value)


def test_an_error_of_a_library_while_training_has_its_traceback(sd_folder, pairs, tmp_path):
    with pytest.raises(ValueError, match=FOREIGN[0]):
        main(words(sd_folder, pairs, tmp_path / "run", **FOREIGN[1]))


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("launched", [False, True], ids=["one process", "two processes"])
@pytest.mark.parametrize("foreign", [False, True], ids=["own", "foreign"])
def test_processes_show_tracebacks_of_libraries_only(sd_folder, pairs, tmp_path, launched, foreign):
    settings = FOREIGN[1] if foreign else {"timestep_range": "5 5"}
    arguments = [part for word in words(sd_folder, pairs, tmp_path / "run", **settings) for part in word.split()]
    if launched:
        config = {"distributed_type": "MULTI_GPU", "num_machines": 1, "use_cpu": True, "mixed_precision": "no"}
        (tmp_path / "cpus.yaml").write_text(json.dumps({"compute_environment": "LOCAL_MACHINE", **config}))
        arguments += ["--accelerate_config", str(tmp_path / "cpus.yaml"), "--num_processes", "2"]
        arguments += ["--main_process_port", "0"]
    command = [sys.executable, "-m", "trl_diffusion_sdpo", *arguments]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == (1 if foreign else 2), done.stderr[-3000:]
    assert ("Traceback" in done.stderr) is foreign
    said = f"ValueError: {FOREIGN[0]}" if foreign else "error: `timestep_range` must be two whole numbers"
    assert said in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", "", "empty.jsonl is empty"),
        ("header.csv", "prompt,chosen,rejected\n", "header.csv could not be read: "),
        ("nothing.json", None, "nothing.json could not be read: "),
    ],
)
def test_data_without_pairs_are_named(sd_folder, tmp_path, capsys, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert said in sentence(capsys, sd_folder, tmp_path / name, tmp_path / "run")


def test_missing_files_of_a_model_are_named(broken, sd_folder):
    weights = load_file(broken / UNET)
    shards = {"conv_in.weight": "diffusion_pytorch_model-00002-of-00002.safetensors"}
    (broken / f"{UNET}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (broken / UNET).unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its weight files, such as .*00002-of-00002"):
        load_pipeline(broken)
    (broken / f"{UNET}.index.json").unlink()
    torch.save(weights, broken / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="has pickled weights such as .*bin"):
        load_pipeline(broken)
    shutil.copy(Path(sd_folder) / UNET, broken / UNET)
    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer"):
        load_pipeline(broken)
