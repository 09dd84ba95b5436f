"""Fixtures that several rooms' tests share: tiny pipelines of diffusers' and transformers' real classes with random
weights, saved to a folder once a session and loaded back as a user would."""

import atexit
import logging
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before libraries read it: no test may depend on what the Hub holds
# DeepSpeed builds an extension once per test run, for all processes of the run. Use a new folder for each run: a killed
# build leaves a lock behind, and the next build in the same folder would wait for it forever, without a message.
if "TORCH_EXTENSIONS_DIR" not in os.environ:
    os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="torch_extensions-")
    atexit.register(shutil.rmtree, os.environ["TORCH_EXTENSIONS_DIR"], ignore_errors=True)

import datasets
import numpy as np
import pytest
from local_hub import hub_server  # noqa: F401  (a fixture)
from PIL import Image
from tiny_pipelines import case, quiet, stable_diffusion

from trl_diffusion_sdpo.models.pipelines import load_pipeline


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Run the tests of a file in one process, and all of tests/distributed, whose cases train in one launch."""
    from xdist.scheduler import LoadScopeScheduling

    class LoadFileOrFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/distributed" if file.startswith("tests/distributed/") else file

    return LoadFileOrFolder(config, log)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """`family_folder(name)`: folder of the tiny pipeline of one of `tiny_pipelines.CASES`, saved once a session."""
    folders = {}

    def saved(name: str) -> str:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("pipelines") / name
            case(name).build().save_pretrained(folders[name])
        return str(folders[name])

    return saved


@pytest.fixture(scope="session")
def sd_folder(family_folder) -> str:
    """Folder of a Stable Diffusion pipeline that predicts epsilon: images 16x16, latents 4x8x8."""
    return family_folder("stable_diffusion")


@pytest.fixture(scope="session")
def sdxl_folder(family_folder) -> str:
    """Folder of a Stable Diffusion XL pipeline: two text encoders, pooled text, time ids; images 16x16."""
    return family_folder("stable_diffusion_xl")


@pytest.fixture
def sd_pipeline(sd_folder):
    return quiet(load_pipeline(sd_folder))


@pytest.fixture
def sdxl_pipeline(sdxl_folder):
    return quiet(load_pipeline(sdxl_folder))


@pytest.fixture(scope="session")
def make_sd_pipeline():
    """`make_sd_pipeline(prediction_type="epsilon", seed=0, **unet_overrides)`: a Stable Diffusion pipeline."""
    return stable_diffusion.build


@pytest.fixture(scope="session")
def make_pairs():
    """`make_pairs(count=16, seed=0, size=(20, 24))`: canonical preference pairs of random images, with scores."""
    return build_pairs


@pytest.fixture
def plotted():
    """Lets `make_args` and `make_trainer` draw curves."""


@pytest.fixture
def several_draws():
    """Evaluations of a few pairs take several draws of noise for each, like users' evaluations."""


@pytest.fixture(autouse=True)
def level_of_the_log():
    """Commands that run in this process set the level of the package's log; other tests read the log too."""
    logger = logging.getLogger("trl_diffusion_sdpo")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def one_draw(monkeypatch, request):
    """Evaluations of a few pairs take one draw of noise for each, unless the test uses `several_draws`."""
    if "several_draws" not in request.fixturenames:
        from trl_diffusion_sdpo.step import pair_evaluation

        monkeypatch.setattr(pair_evaluation, "MOST_DRAWS", 1)


@pytest.fixture
def make_args(tmp_path, monkeypatch, request):
    """`make_args(**overrides)`: quiet arguments for a few steps on the CPU, writing below the test's own folder. Curves
    are not drawn, which takes half a second at every save and end, unless the test uses `plotted`."""
    from trl_diffusion_sdpo import DiffusionSDPOConfig
    from trl_diffusion_sdpo.reporting import run_callbacks

    if "plotted" not in request.fixturenames:
        monkeypatch.setattr(run_callbacks, "plot_curves", lambda history, file: None)

    def build(**overrides):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        if overrides.get("precompute_latents") or overrides.get("precompute_ref_errors"):
            settings["precompute_dir"] = str(tmp_path / "computed")
        return DiffusionSDPOConfig(**{**settings, **overrides})

    return build


@pytest.fixture
def make_trainer(sd_folder, make_args, make_pairs):
    """`make_trainer(model=, ref_model=, train=, eval_dataset=, peft_config=, ..., **args)`: a trainer on tiny parts."""
    from trl_diffusion_sdpo import DiffusionSDPOTrainer

    direct = ("processing_class", "peft_config", "callbacks", "compute_metrics", "optimizers", "data_collator")

    def build(model=None, ref_model=None, train=None, eval_dataset=None, **overrides):
        given = {name: overrides.pop(name) for name in direct if name in overrides}
        return DiffusionSDPOTrainer(
            sd_folder if model is None else model,
            ref_model,
            make_args(**overrides),
            make_pairs() if train is None else train,
            eval_dataset,
            **given,
        )

    return build


def build_pairs(count: int = 16, seed: int = 0, size: tuple[int, int] = (20, 24)) -> datasets.Dataset:
    generator = np.random.default_rng(seed)

    def image() -> Image.Image:
        return Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))

    def row(index: int) -> dict:
        scores = {"chosen_score": float(index % 3), "rejected_score": 1.0}
        return {"prompt": f"prompt {index}", "chosen": image(), "rejected": image(), **scores}

    return datasets.Dataset.from_list([row(index) for index in range(count)])
