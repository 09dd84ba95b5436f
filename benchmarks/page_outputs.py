"""Run the commands of docs/first_lora.md, and write what they print into the page.

The page's blocks of code run in order in a temporary folder. A block of text below such a block keeps its lines, with
the numbers of this run: a line is found again by its words before the first number that a training changes.

    python benchmarks/page_outputs.py        # a minute or two of CPU time
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/first_lora.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+\S*|(?<=Verdict: )\w+|(?<=of )\d+ modules")


def words(line: str) -> str:
    """Return what a line says before the numbers that a training changes, such as `step 20  evaluation  loss`."""
    return NUMBER.split(line, maxsplit=1)[0]


def refreshed(shown: str, printed: str) -> str:
    """Return the lines of a block of text as they were printed now.

    Raises:
        `ValueError`: If a line of the block was not printed.
    """
    lines = printed.splitlines()
    found = []
    for line in shown.splitlines():
        matches = [one for one in lines if words(one) == words(line)]
        if not matches and line != "...":
            raise ValueError(f"The page shows {line!r}, but no line of the output begins with {words(line)!r}.")
        found.append(matches[-1] if matches else line)
    return "\n".join(found) + "\n"


def run(language: str, code: str, folder: str) -> str:
    """Run a block of code in a folder, and return what it printed."""
    if language == "python":
        code = f"{sys.executable} - <<'END_OF_CODE'\n{code}END_OF_CODE\n"
    code = code.replace("trl-diffusion-sdpo ", f"{sys.executable} -m trl_diffusion_sdpo ")
    done = subprocess.run(["bash", "-ec", code], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{code}\nended with {done.returncode}:\n{done.stdout}\n{done.stderr[-3000:]}")
    return done.stdout if language == "python" else done.stdout + done.stderr


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    page = text
    printed = ""
    is_whole = False  # a script's output is shown whole
    with tempfile.TemporaryDirectory() as folder:
        for match in BLOCK.finditer(text):
            language, block = match.groups()
            if language == "yaml":
                Path(folder, "shapes.yaml").write_text(block, encoding="utf-8")
            elif language in ("bash", "python"):
                printed = run(language, block, folder)
                is_whole = language == "python"
            elif printed.strip():
                shown = printed if is_whole else refreshed(block, printed)
                page = page.replace(match[0], f"```text\n{shown}```")
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
