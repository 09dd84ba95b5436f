"""The package that is shipped: requirements, entry point, data files and the configurations of the paper."""

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from trl_diffusion_sdpo.cli import train, train_parser
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.utils import import_utils

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))

# https://huggingface.co/papers/2511.03317: loss, learning rate, optimizer, beta, alpha, mu.
PUBLISHED = {
    "sd15_sigmoid": ("sigmoid", 2.05e-5, "adamw_torch", 5000, None, 0.9),
    "sd15_dmpo": ("dmpo", 2.05e-5, "adamw_torch", 2000, 0.01, 0.9),
    "sd15_dspo": ("dspo", 2.05e-5, "adamw_torch", 0.001, None, 0.2),
    "sdxl_sigmoid": ("sigmoid", 2.05e-6, "adafactor", 5000, None, 0.6),
    "sdxl_dmpo": ("dmpo", 2.05e-6, "adafactor", 6000, 0.01, 0.6),
    "sdxl_dspo": ("dspo_sdxl", 2.05e-6, "adafactor", 5000, None, 0.6),
}
# SmPO-Diffusion and DDIM-InPO: loss, beta, kind and steps of the inversion, steps, warm-up.
INVERTED = {
    "sd15_smpo": ("smpo", 2000, "renoise", 5, 200, 100),
    "sdxl_smpo": ("smpo", 5000, "renoise", 10, 200, 100),
    "sd15_inpo": ("sigmoid", 2000, "ddim", 10, 400, 200),
    "sdxl_inpo": ("sigmoid", 5000, "ddim", 10, 400, 200),
}
BASES = {
    "sd35": ("stabilityai/stable-diffusion-3.5-medium", 1024),
    "flux": ("black-forest-labs/FLUX.1-dev", 512),
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 1024),
}


@pytest.fixture(scope="module")
def project() -> dict[str, list[str]]:
    """Requirements of pyproject.toml and of its extras, by name."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"dependencies": tables["dependencies"], **tables["optional-dependencies"]}


def parse_config(path: Path, tmp_path: Path):
    return train.parse(["--config", str(path), "--use_cpu", "--output_dir", str(tmp_path)])


def test_importing_the_package_imports_no_torch():
    code = "import sys, trl_diffusion_sdpo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_command_is_installed_and_is_the_one_that_the_tests_call():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, function = scripts["trl-diffusion-sdpo"].partition(":")
    assert getattr(import_module(module), function) is main


def test_every_imported_library_is_required(project):
    required = {Requirement(line).name.replace("-", "_") for line in project["dependencies"]}
    optional = set(import_utils.EXTRAS.values())
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "trl_diffusion_sdpo").rglob("*.py")]
    imported = {name for text in sources for name in re.findall(r"(?m)^\s*(?:from|import) ([a-zA-Z]\w*)", text)}
    modules = imported - set(sys.stdlib_module_names) - {"trl_diffusion_sdpo"} - optional
    distributions = {"PIL": "pillow", "yaml": "pyyaml", "fsspec": "datasets"}  # fsspec: datasets reads files by it
    assert {distributions.get(name, name) for name in modules if is_importable(name)} <= required


def is_importable(name: str) -> bool:
    """Words of a docstring that begins a line with `from` are no modules."""
    try:
        import_module(name)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_configuration_has_the_published_values(name, tmp_path):
    loss, learning_rate, optim, beta, alpha, mu = PUBLISHED[name]
    model, resolution = BASES[name.split("_")[0]]
    _, args, model_args = parse_config(ROOT / "examples" / "configs" / f"{name}.yaml", tmp_path)
    assert (args.loss_type, args.learning_rate, args.beta) == (loss, learning_rate, beta)
    assert (args.loss_kwargs.get("dmpo_alpha"), args.safeguard_mu) == (alpha, mu)
    assert (args.safeguard, args.safeguard_granularity, args.optim) == ("output", "batch", optim)
    assert (args.max_steps, args.warmup_steps, args.lr_scheduler_type) == (2000, 500, "constant_with_warmup")
    assert (args.bf16, args.proportion_empty_prompts, args.resolution) == (True, 0.2, [resolution] * 2)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 2048
    assert (model_args.model_name_or_path, model_args.use_peft, model_args.dtype) == (model, False, "float32")


@pytest.mark.parametrize("name", INVERTED)
def test_a_configuration_with_inversion_has_the_published_values(name, tmp_path):
    model, resolution = BASES[name.split("_")[0]]
    _, args, model_args = parse_config(ROOT / "examples" / "configs" / f"{name}.yaml", tmp_path)
    loss, beta, kind, steps, *length = INVERTED[name]
    assert [args.loss_type, args.beta, args.max_steps, args.warmup_steps] == [loss, beta, *length]
    inversion = {"kind": kind, "steps": steps, "end": "exact"} | ({"eta": 0.1} if "inpo" in name else {})
    assert (args.noise_source, args.inversion_kwargs) == ("inversion", inversion)
    smpo = {"smpo_coefficient": 10, "smpo_score_scale": pytest.approx(0.166581)}
    assert args.loss_kwargs == (smpo if args.loss_type == "smpo" else {})
    assert (args.safeguard, args.bf16, args.learning_rate) == ("none", True, 1.024e-5)
    assert args.resolution == [resolution] * 2
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 1024
    assert (model_args.model_name_or_path, model_args.use_peft, model_args.dtype) == (model, False, "float32")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_parsed(path, tmp_path):
    script_args, _, model_args = parse_config(path, tmp_path)
    assert script_args.dataset_name is None  # the data set is left to the command line
    assert model_args.model_name_or_path in {model for model, _ in BASES.values()}


def test_the_wheel_holds_the_examples_where_the_command_line_looks_for_them(tmp_path, monkeypatch):
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    installed, in_clone = train_parser.EXAMPLES
    assert tables["wheel"]["force-include"] == {str(in_clone.relative_to(ROOT)): str(installed.relative_to(ROOT))}
    assert set(train_parser.example_configs()) == {path.stem for path in CONFIGS}
    monkeypatch.setattr(train_parser, "EXAMPLES", (CONFIGS[0].parent, tmp_path / "no clone"))
    assert len(train_parser.example_configs()) == len(CONFIGS)


def test_an_example_is_found_by_name_and_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_parser.read_given(["--config", "sdxl_lora"])[0]["output_dir"] == "sdxl-sdpo-lora"
    with pytest.raises(ValueError, match=r"examples? configurations? .*sdxl_lora.* Did you mean `sdxl_lora`"):
        train_parser.read_given(["--config=sdxl_lroa"])[0]
    (tmp_path / "sdxl_lora").write_text("output_dir: mine\n", encoding="utf-8")
    assert train_parser.read_given(["--config", "sdxl_lora"])[0] == {"output_dir": "mine"}
