"""Rename each of the `TRAINER_NAMES` in a copy of transformers, import the trainer with it, and print what happens:
the import must fail and name what is missing. About 10 seconds a name."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import transformers

from trl_diffusion_sdpo.utils._compat import TRAINER_NAMES

INSTALLED = Path(transformers.__file__).parent
IMPORT = "import transformers; from trl_diffusion_sdpo import DiffusionSDPOTrainer; print(transformers.__file__)"


def import_with(source: str) -> tuple[int, str]:
    """Import the trainer in a new process, with `source` as transformers' `trainer.py`. Return the exit status, and the
    last line of what the process printed."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "transformers")
        copy.mkdir()
        for entry in INSTALLED.iterdir():
            if entry.name not in ("trainer.py", "__pycache__"):
                (copy / entry.name).symlink_to(entry)
        (copy / "trainer.py").write_text(source, encoding="utf-8")
        paths = [folder, str(Path(__file__).parents[2])]
        command = [sys.executable, "-c", IMPORT]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return run.returncode, (run.stdout + run.stderr).strip().rpartition("\n")[2]


def main() -> int:
    source = (INSTALLED / "trainer.py").read_text(encoding="utf-8")
    status, said = import_with(source)
    sys.stdout.write(f"as it is: {'imported' if status == 0 else said}\n")
    failed = int(status != 0)
    for name in TRAINER_NAMES:
        status, said = import_with(re.sub(rf"\b{name}\b", f"{name}_2", source))
        is_named = status != 0 and said.startswith("trl_diffusion_sdpo.utils._compat.UnsupportedVersionError")
        failed += not (is_named and f"no {name}." in said)
        sys.stdout.write(f"{name}: {said}\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
