"""Tune, save and load a LoRA under every newer Python of this machine: `make test-all PART=pythons`. A Python with only
PyTorch's CUDA build takes about 6 GB of disk."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROUND = Path(__file__).with_name("lora_round.py")
FIRST = (3, 12)  # the other tests run under 3.11


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="torch", help="Requirement for PyTorch, such as torch==2.13.0.")
    parser.add_argument("--environments", type=Path, default=ROOT, help="Folder for the virtual environments.")
    options = parser.parse_args()
    pythons = find_pythons()
    if not pythons:
        sys.stderr.write(f"This machine has no Python of {'.'.join(map(str, FIRST))} or above.\n")
        return 1
    failed = [version for version, python in pythons.items() if not runs(version, python, options)]
    sys.stdout.write(f"{len(pythons) - len(failed)} passed, {len(failed)} failed\n")
    return bool(failed)


def find_pythons() -> dict[tuple[int, ...], Path]:
    """The newest interpreter of each minor version, on the path or of pyenv; (3, 12) -> its path."""
    named = [shutil.which(f"python3.{minor}") for minor in range(FIRST[1], FIRST[1] + 8)]
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [Path(path) for path in named if path] + list((home / "versions").glob("*/bin/python"))
    newest: dict[tuple[int, ...], tuple[tuple[int, ...], Path]] = {}
    for candidate in candidates:
        asked = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False)
        found = re.fullmatch(r"Python (\d+)\.(\d+)\.(\d+)", asked.stdout.strip())  # no release candidates
        if asked.returncode or not found:
            continue
        version = tuple(map(int, found.groups()))
        if version >= FIRST and version > newest.get(version[:2], ((), candidate))[0]:
            newest[version[:2]] = version, candidate
    return {minor: path for minor, (_, path) in sorted(newest.items())}


def runs(version: tuple[int, ...], python: Path, options: argparse.Namespace) -> bool:
    """Whether the package installs and `lora_round.py` succeeds under this interpreter."""
    folder = options.environments / f".venv-python{'.'.join(map(str, version))}"
    inside = folder / "bin" / "python"
    install = [inside, "-m", "pip", "--disable-pip-version-check", "install", "-q", "-c", ROOT / "constraints.txt"]
    commands = [
        [python, "-m", "venv", folder],
        [*install, options.torch],
        [*install, "-e", ROOT],
        [inside, ROUND],
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return all(subprocess.run(command, env=environment, check=False).returncode == 0 for command in commands)


if __name__ == "__main__":
    sys.exit(main())
