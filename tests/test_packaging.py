"""The package that is shipped: requirements, entry point, data files and the example configurations."""

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from trl_diffusion_sdpo.cli import train, train_parser
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.utils import import_utils

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))

# https://huggingface.co/papers/2511.03317, and SmPO-Diffusion and DDIM-InPO: loss, learning rate, beta, mu, warm-up and
# training steps, pairs a step.
PUBLISHED = {
    "sd15_sigmoid": ("sigmoid", 2.05e-5, 5000, 0.9, 500, 2000, 2048),
    "sd15_dmpo": ("dmpo", 2.05e-5, 2000, 0.9, 500, 2000, 2048),
    "sd15_dspo": ("dspo", 2.05e-5, 0.001, 0.2, 500, 2000, 2048),
    "sdxl_sigmoid": ("sigmoid", 2.05e-6, 5000, 0.6, 500, 2000, 2048),
    "sdxl_dmpo": ("dmpo", 2.05e-6, 6000, 0.6, 500, 2000, 2048),
    "sdxl_dspo": ("dspo_sdxl", 2.05e-6, 5000, 0.6, 500, 2000, 2048),
    "sd15_smpo": ("smpo", 1.024e-5, 2000, None, 100, 200, 1024),
    "sdxl_smpo": ("smpo", 1.024e-5, 5000, None, 100, 200, 1024),
    "sd15_inpo": ("sigmoid", 1.024e-5, 2000, None, 200, 400, 1024),
    "sdxl_inpo": ("sigmoid", 1.024e-5, 5000, None, 200, 400, 1024),
}


def test_importing_the_package_imports_no_torch():
    code = "import sys, trl_diffusion_sdpo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_command_is_installed_and_is_the_one_that_the_tests_call():
    module, _, function = PROJECT["project"]["scripts"]["trl-diffusion-sdpo"].partition(":")
    assert getattr(import_module(module), function) is main


def test_every_imported_library_is_required():
    required = {Requirement(line).name.replace("-", "_") for line in PROJECT["project"]["dependencies"]}
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "trl_diffusion_sdpo").rglob("*.py")]
    imported = {name for text in sources for name in re.findall(r"(?m)^\s*(?:from|import) ([a-zA-Z]\w*)", text)}
    others = imported - set(sys.stdlib_module_names) - {"trl_diffusion_sdpo"} - set(import_utils.EXTRAS.values())
    distributions = {"PIL": "pillow", "yaml": "pyyaml", "fsspec": "datasets"}  # datasets reads files by fsspec
    # A docstring may have a line that begins with `from` and a word.
    assert {distributions.get(name, name) for name in others if find_spec(name) is not None} <= required


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_parsed_and_has_the_published_values(path, tmp_path):
    script_args, args, _ = train.parse(["--config", str(path), "--use_cpu", "--output_dir", str(tmp_path)])
    assert script_args.dataset_name is None  # the data set is left to the command line
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * 8
    mu = args.safeguard_mu if args.safeguard == "output" else None
    values = (args.loss_type, args.learning_rate, args.beta, mu, args.warmup_steps, args.max_steps, pairs)
    assert values == PUBLISHED.get(path.stem, values)


def test_the_wheel_holds_the_examples_where_the_command_line_looks_for_them():
    installed, in_clone = train_parser.EXAMPLES
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {str(in_clone.relative_to(ROOT)): str(installed.relative_to(ROOT))}


def test_an_example_is_found_by_name_and_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_parser.read_given(["--config", "sdxl_lora"])[0]["output_dir"] == "sdxl-sdpo-lora"
    with pytest.raises(ValueError, match="Did you mean `sdxl_lora`"):
        train_parser.read_given(["--config=sdxl_lroa"])
    (tmp_path / "sdxl_lora").write_text("output_dir: mine\n", encoding="utf-8")
    assert train_parser.read_given(["--config", "sdxl_lora"])[0] == {"output_dir": "mine"}
